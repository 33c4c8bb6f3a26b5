"""Plans against layouts that experts use, on jobs that people run: seconds per step, all by our own prices.

    python benchmarks/expert_jobs.py [JOB ...] [-o FILE]

alone        `plan --pp auto --overlap none`: attention fused, nothing beside computation but sends between stages.
default      `plan --pp auto`: gathers of weights and reductions of gradients beside computation too.
all          `plan --pp auto --overlap all`.
expert       `price` of the expert's degrees under the same three, with XLA's kernels as plans have them and gradients
             reduced in 16 bits: the fastest microbatch and recomputation that fit as plans must, in 90 % of memory.
frameworks   the same, everything beside computation, with what frameworks do: norms that are computed again run inside
             the products that read them, gradients are reduced in fp32. A plan may not do that.

Each plan with its bound, and the seconds of CPU that its search took after capture. The degrees of each expert stand
below; Llama 3 405B's TP8·PP16 is of arXiv 2407.21783, table 4.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")

from meshwright import pricing  # noqa: E402
from meshwright.api import plan_captured  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.planner.request import HEADROOM, Request  # noqa: E402
from meshwright.recipe import make  # noqa: E402


@dataclass(frozen=True)
class Job:
    """A model on a cluster, sequences per step, and the degrees of an expert's layout."""

    model: str
    cluster: str
    batch: int
    seq: int | None = None
    degrees: dict[str, Any] = field(default_factory=dict)


JOBS = {
    "8B/8": Job("llama3-8b", "h100x8", 16, 8192, {"zero": 3}),
    "8B/128": Job("llama3-8b", "16xh100x8@ib400", 256, 8192, {"zero": 3}),
    "70B/64": Job(
        "llama3-70b", "8xh100x8@ib400", 256, 8192,
        {"tp": 4, "pp": 4, "cp": 2, "vpp": 5, "sequence_parallel": True, "zero": 1},
    ),
    "405B": Job(
        "llama3-405b", "2048xh100x8@roce400", 2048, 8192,
        {"tp": 8, "pp": 16, "vpp": 8, "lean_ends": True, "sequence_parallel": True, "zero": 1},
    ),
    "128k/8": Job("llama3-8b", "h100x8", 8, 131072, {"cp": 8, "zero": 3}),
    "GPT-3": Job(
        "gpt3-175b", "128xa100x8@hdr200", 1536, None,
        {"tp": 4, "pp": 8, "vpp": 6, "sequence_parallel": True, "zero": 1},
    ),
    "Mixtral": Job("mixtral-8x7b", "4xh100x8@ib400", 256, None, {"pp": 4, "ep": 8, "zero": 1}),
}  # fmt: skip
PLANS: dict[str, dict[str, Any]] = {
    "alone": {"pp": "auto", "overlap": "none"},
    "default": {"pp": "auto"},
    "all": {"pp": "auto", "overlap": "all"},
}
XLA: dict[str, Any] = {"redone_inside": False, "reduce_in_fp32": False}
EXPERTS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "expert, alone": (("everything", "dots", "blocks"), "stages", XLA),
    "expert, default": (("everything", "dots", "blocks"), "parameters,gradients,stages", XLA),
    "expert, all": (("everything", "dots", "blocks"), "all", XLA),
    "frameworks, all": (("none", "selective", "full"), "all", {}),
}  # policies, what runs beside computation, how


def planned(job: Job, request: Request) -> dict[str, Any]:
    """The plan of a job in short."""
    sizes = {"batch": job.batch, **({"seq": job.seq} if job.seq else {})}
    captured = make({"model": job.model, **sizes}).capture(True)
    begun, busy = time.perf_counter(), time.process_time()
    try:
        plan = plan_captured(captured, Cluster.parse(job.cluster), request, job.model)
    except MeshwrightError as error:
        return {"refused": str(error).splitlines()[0]}
    return {
        "step_seconds": plan.estimate.step_seconds,
        "lower_bound": plan.proof.lower_bound,
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - busy,
        "plan": f"{plan.mesh}, {len(plan.pipeline.stages) if plan.pipeline else 1} stages, "
        f"{plan.microbatches} microbatches, recompute {plan.recompute}",
    }


def priced(
    job: Job, policies: tuple[str, ...], overlap: str, how: dict[str, Any]
) -> dict[str, Any]:
    """The fastest of the expert's layout that fits."""
    cluster = Cluster.parse(job.cluster)
    room, found = cluster.memory_per_device * (1 - HEADROOM), []
    for microbatch, recompute in product((1, 2, 4), policies):
        degrees = {"tp": 1, "pp": 1, "cp": 1, "zero": 0, **job.degrees}
        try:
            price = pricing.price_job(
                pricing.shape_of(job.model, job.seq), pricing.parallelism_on(cluster, dp=None, **degrees),
                cluster, global_batch=job.batch, microbatch=microbatch,
                setting=pricing.Setting(recompute, overlap=pricing.overlaps(overlap), **how),
            )  # fmt: skip
        except MeshwrightError:
            continue  # this microbatch does not divide the batch
        if price.peak <= room:
            found.append(
                {"step_seconds": price.step, "microbatch": microbatch, "recompute": recompute}
            )
    return min(found, key=lambda row: row["step_seconds"], default={"refused": "nothing fits"})


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("jobs", nargs="*", choices=[[], *JOBS], metavar="JOB", help=" ".join(JOBS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    print("| job | " + " | ".join((*PLANS, *EXPERTS)) + " |")
    print("|---" * (1 + len(PLANS) + len(EXPERTS)) + "|", flush=True)
    rows = {}
    for name in options.jobs or JOBS:
        job = JOBS[name]
        row = {kind: planned(job, Request(time_limit=120, **pins)) for kind, pins in PLANS.items()}
        row |= {kind: priced(job, *how) for kind, how in EXPERTS.items()}
        rows[name] = row
        print(f"| {name} | " + " | ".join(map(_cell, row.values())) + " |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


def _cell(found: dict[str, Any]) -> str:
    if "refused" in found:
        return found["refused"]
    bound = (
        f" (bound {found['lower_bound']:.4g}; {found['cpu_seconds']:.1f} s)"
        if found.get("lower_bound")
        else ""
    )
    return f"{found['step_seconds']:.4g}{bound}"


if __name__ == "__main__":
    main()
