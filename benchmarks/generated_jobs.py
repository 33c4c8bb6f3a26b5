"""Plans against every layout that Megatron-LM or FSDP could be given, on jobs made by rule.

    python benchmarks/generated_jobs.py [--jobs N] [--skip N] [--time-limit S] [-o FILE]

Jobs are models x clusters x lengths x tokens per device, those kept whose parameters, gradients and state in
mixed precision take from 2 to 60 % of the cluster's memory; `--jobs` takes as many, evenly spaced. Layouts are all of

    tp 1 2 4 8, sequences cut too where above 1      pp powers of two, vpp 1 2 4 and one layer per stage
    cp 1 2 4 8 from 16384 positions on               ep powers of two, of experts       zero 1, and 3 without a pipeline
    microbatches of 1 2 4 sequences                  recompute everything kept or all made again

that divide the model and the devices and fit where plans must (less 10 % of each device's memory). Both sides:
attention fused, kernels of XLA, gradients of several microbatches added up in fp32; nothing overlapped but
sends between stages, which plans take to run beside computation, and everything.
`behind`: how much longer the plan takes than the fastest layout, and its bound above that layout's price (`unsound`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")

from meshwright import pricing  # noqa: E402
from meshwright.api import plan_captured  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.planner.jobs.pinned import Parallelism  # noqa: E402
from meshwright.planner.request import HEADROOM, Request  # noqa: E402
from meshwright.recipe import make  # noqa: E402

WEIGHTS = {
    "gpt3-1.3b": 1.3,
    "llama3-8b": 8.0,
    "llama3-70b": 70.6,
    "gpt3-175b": 175.0,
    "mixtral-8x7b": 46.7,
}
CLUSTERS = ("h100x8", "4xh100x8@ib400", "16xa100x8@hdr200", "64xh100x8@roce400")
LENGTHS = (2048, 8192, 32768, 131072)
TOKENS = (8192, 32768)  # per device and step
STATE = 16.0  # bytes per parameter: bf16 and fp32 weights, gradients, two moments
LEAST = 4.0  # of them, what no rank has a share of with ZeRO-1: weights and gradients in bf16
POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Job:
    """A model on a cluster, with `batch` sequences of `seq` tokens a step."""

    model: str
    cluster: str
    seq: int
    batch: int


def jobs() -> Iterator[Job]:
    """All that the rule makes."""
    for (model, billions), name, seq, tokens in product(WEIGHTS.items(), CLUSTERS, LENGTHS, TOKENS):
        cluster = Cluster.parse(name)
        share = STATE * billions * 1e9 / (cluster.size * cluster.device.memory)
        batch = cluster.size * tokens // seq
        if 0.02 <= share <= 0.6 and batch >= 8:
            yield Job(model, name, seq, batch)


def layouts(job: Job) -> Iterator[tuple[Parallelism, int]]:
    """Each with sequences per microbatch."""
    cluster, shape = Cluster.parse(job.cluster), pricing.shape_of(job.model, job.seq)
    contexts = (1, 2, 4, 8) if job.seq >= 16384 else (1,)
    experts = [n for n in POWERS if n <= shape.experts.count] if shape.experts else [1]
    for tp, pp, cp, ep, zero in product((1, 2, 4, 8), POWERS, contexts, experts, (1, 3)):
        dp = cluster.size // (tp * pp * cp)
        if not dp or dp * tp * pp * cp != cluster.size or dp % ep or (zero == 3 and pp > 1):
            continue
        chunks = {1, 2, 4, max(1, shape.layers // pp)} if pp > 1 else {1}
        for vpp, microbatch in product(sorted(chunks), (1, 2, 4)):
            fits = (
                zero == 3
                or shape.experts
                or LEAST * WEIGHTS[job.model] * 1e9 / (tp * pp) < cluster.memory_per_device
            )
            if fits and shape.layers % (pp * vpp) == 0 and job.batch % (dp * microbatch) == 0:
                yield (
                    Parallelism(tp, pp, vpp, dp, cp, ep, zero, sequence_parallel=tp > 1),
                    microbatch,
                )


def best(job: Job, overlap: str) -> dict[str, Any] | None:
    """The fastest of the layouts that fit."""
    cluster, shape = Cluster.parse(job.cluster), pricing.shape_of(job.model, job.seq)
    room, found, tried = cluster.memory_per_device * (1 - HEADROOM), [], 0
    for layout, microbatch in layouts(job):
        for recompute in ("everything", "blocks"):
            setting = pricing.Setting(
                recompute,
                overlap=pricing.overlaps(overlap),
                reduce_in_fp32=job.batch > microbatch * layout.dp,
                redone_inside=False,
            )
            try:
                price = pricing.price_job(
                    shape,
                    layout,
                    cluster,
                    global_batch=job.batch,
                    microbatch=microbatch,
                    setting=setting,
                )
            except MeshwrightError:
                continue
            tried += 1
            if price.peak <= room:
                found.append((price.step, price.peak, layout, microbatch, recompute))
                break  # what keeps all is faster than what makes it again
    if not found:
        return None
    step, peak, layout, microbatch, recompute = min(found, key=lambda each: each[0])
    shown = {
        k: v for k, v in asdict(layout).items() if v not in (1, False, None) and k != "cp_kind"
    }
    return {
        "step_seconds": step, "gib": peak / 2**30, "layout": {**shown, "microbatch": microbatch},
        "recompute": recompute, "tried": tried,
    }  # fmt: skip


def planned(job: Job, request: Request) -> dict[str, Any]:
    """The plan in short."""
    captured = make({"model": job.model, "batch": job.batch, "seq": job.seq}).capture(True)
    begun = time.process_time()
    try:
        plan = plan_captured(captured, Cluster.parse(job.cluster), request, job.model)
    except MeshwrightError as error:
        return {"refused": str(error).splitlines()[0]}
    stages = len(plan.pipeline.stages) if plan.pipeline else 1
    return {
        "step_seconds": plan.estimate.step_seconds, "lower_bound": plan.proof.lower_bound,
        "cpu_seconds": time.process_time() - begun, "gib": plan.estimate.peak_bytes / 2**30,
        "plan": f"{plan.mesh}, {stages} stages, {plan.microbatches} microbatches, recompute {plan.recompute}",
    }  # fmt: skip


def compared(job: Job, limit: float) -> Iterator[dict[str, Any]]:
    """One row per execution model."""
    for overlap, words in (("none", "stages"), ("all", "all")):
        request = Request(pp="auto", attention="fused", overlap=overlap, time_limit=limit)  # type: ignore[arg-type]
        plan, expert = planned(job, request), best(job, words)
        row = {**asdict(job), "overlap": overlap, "plan": plan, "expert": expert}
        if expert and "refused" not in plan:
            row["behind"] = plan["step_seconds"] / expert["step_seconds"] - 1
            row["unsound"] = max(0.0, plan["lower_bound"] / expert["step_seconds"] - 1)
        yield row


def told(row: dict[str, Any]) -> str:
    plan, expert = row["plan"], row["expert"]
    mine = plan.get("refused") or f"{plan['step_seconds']:.4g} ({plan['lower_bound']:.4g})"
    theirs = (
        f"{expert['step_seconds']:.4g} {expert['layout']} {expert['recompute']}"
        if expert
        else "nothing fits"
    )
    behind = f"{row['behind']:+.1%}" if "behind" in row else "-"
    unsound = f" BOUND {row['unsound']:+.1%} ABOVE" if row.get("unsound") else ""
    where = f"{row['model']}, {row['cluster']}, {row['batch']} x {row['seq']}"
    return f"| {where} | {row['overlap']} | {mine} | {theirs} | {behind}{unsound} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=32)
    parser.add_argument("--skip", type=int, default=0, help="of these, as many are left out")
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    every, rows = list(jobs()), []
    chosen = [every[i * len(every) // options.jobs] for i in range(min(options.jobs, len(every)))]
    print(
        "| job | overlap | plan (bound) | fastest layout | plan behind it |\n|---|---|---|---|---|"
    )
    for job in sorted(chosen, key=lambda job: len(list(layouts(job))))[options.skip :]:
        for row in compared(job, options.time_limit):
            rows.append(row)
            print(told(row), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")
        pricing._parts.cache_clear()
        pricing._program.cache_clear()
    late = [row["behind"] for row in rows if "behind" in row]
    print(f"{len(late)} compared, behind by more than 1 %: {sum(each > 0.01 for each in late)}")


if __name__ == "__main__":
    main()
