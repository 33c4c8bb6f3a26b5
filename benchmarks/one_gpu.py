"""Predicted against measured on one GPU: seconds of a step, memory, and the cost of running by plan.

    python benchmarks/one_gpu.py [--profile FILE] [--cases gpt2-8 ...] [--minutes 20] [-o FILE]
    python benchmarks/one_gpu.py --predict-only FILE [--profile FILE] [-o FILE]

Every case runs in a process of its own: plan the step for this GPU, compile it, train some steps on
real values, read the allocator's peak; then the user's step under plain `jax.jit`, taking turns with
the planned one. Predictions are those of the preset and, if one is given, of a profile that
`meshwright calibrate` measured here. No case starts once the minutes are over. `--predict-only` measures
nothing: it prices the rows of a result anew, on any machine.

`fit-*` cases lie around the border of a small pool and are planned as if there were no border: does
XLA run out of memory where the plan says so?
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from kernel_times import measured_parts, parts_by_tag, predicted_parts

from meshwright.api import Options, plan_captured
from meshwright.backends.xla.capture import Captured
from meshwright.backends.xla.lower import lower
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.plan import Plan
from meshwright.ir.program import prepare
from meshwright.models import Example, build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.request import Request

WARM = 3  # steps before the clock counts
GROUPS, STEPS, LONGEST = 3, 10, 2.0  # measured: groups of steps; steps, or the seconds, of one
POOL = 0.92  # of the GPU's memory is XLA's, where a case does not say

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One step: a model of the zoo, what is pinned of its plan, and what is measured of it.

    request  of the planner; without a memory it may use the pool less its headroom
    pool     share of the GPU's memory that XLA may use
    beyond   whether to plan as if there were memory for anything
    plain    whether plain `jax.jit` runs too
    kernels  whether a trace says what each part takes
    """

    model: str
    options: dict[str, Any]
    request: dict[str, Any] = field(
        default_factory=lambda: {"recompute": "none", "microbatches": 1}
    )
    pool: float = POOL
    beyond: bool = False
    plain: bool = False
    kernels: bool = False


FULL = {"recompute": "full", "microbatches": 1}
LLAMA = {"layers": 2, "seq": 2048}
CASES: dict[str, Case] = {
    "gpt2-8": Case("gpt2", {"batch": 8}, plain=True),
    "gpt2-32": Case("gpt2", {"batch": 32}, plain=True, kernels=True),
    "gpt2-32-full": Case("gpt2", {"batch": 32}, FULL, kernels=True),
    "gpt2-medium-8": Case("gpt2-medium", {"batch": 8}),
    "gpt2-medium-16": Case("gpt2-medium", {"batch": 16}, plain=True),
    "gpt3-1.3b-8-full": Case("gpt3-1.3b", {"batch": 8}, FULL),
    "llama-1.5b-2": Case("llama3-8b", {**LLAMA, "batch": 2}),
    "llama-1.5b-4": Case("llama3-8b", {**LLAMA, "batch": 4}, plain=True, kernels=True),
    "llama-1.5b-8-full": Case("llama3-8b", {**LLAMA, "batch": 8}, FULL),
    "vit-b16-128": Case("vit-b16", {"batch": 128}),
    "vit-b16-256": Case("vit-b16", {"batch": 256}, plain=True, kernels=True),
    "wrn-50-2-64": Case("wrn-50-2", {"batch": 64}),
    "wrn-50-2-256": Case("wrn-50-2", {"batch": 256}, plain=True, kernels=True),
    # The planner chooses; the limit is below what the step takes if nothing is recomputed.
    "squeeze-gpt2-32": Case("gpt2", {"batch": 32}, {"memory": "24GiB"}),
    "squeeze-gpt2-medium-16": Case("gpt2-medium", {"batch": 16}, {"memory": "20GiB"}),
    **{
        f"fit-gpt2-{batch}": Case("gpt2", {"batch": batch}, pool=0.25, beyond=True)
        for batch in (14, 15, 16)
    },
}


@dataclass
class Prepared:
    """A step, traced and planned."""

    example: Example
    captured: Captured
    plan: Plan

    @classmethod
    def of(
        cls, model: str, options: dict[str, Any], cluster: Cluster, request: dict[str, Any]
    ) -> Prepared:
        example = build(model, **options)
        captured = Options(donate_argnums=(0,)).capture(
            example.step, (example.state, example.batch), {}
        )
        return cls(example, captured, plan_captured(captured, cluster, Request(**request), model))

    def predictions(self, preset: Cluster, profile: str | None) -> Row:
        """Seconds by the preset's rates and by those of a profile, in all and by part; bytes."""
        plan, small = self.plan, prepare(fold(self.captured.graph).small, self.plan.recompute)
        clusters = {"preset": preset} | (
            {"profile": preset.with_profile(profile)} if profile else {}
        )
        parts = {
            name: predicted_parts(small, Roofline(cluster), plan.microbatches, plan.mesh)
            for name, cluster in clusters.items()
        }
        return {
            "predicted": {name: sum(found.values()) for name, found in parts.items()}, "predicted_parts": parts,
            "predicted_bytes": plan.estimate.peak_bytes, "memory": plan.estimate.memory,
        }  # fmt: skip


def measured(case: Case, profile: str | None) -> Row:
    """Run one case in this process."""
    clock, cluster = Clock(), Cluster.local()
    room = cluster.with_("device.memory", "1 TiB") if case.beyond else cluster
    made = Prepared.of(case.model, case.options, room, case.request)
    row: Row = {
        "device": jax.devices()[0].device_kind, "preset": cluster.device.name, "jax": jax.__version__,
        "params": made.example.params, "recompute": made.plan.recompute, "microbatches": made.plan.microbatches,
        **made.predictions(cluster, profile), "pool_bytes": cluster.memory_per_device,
        "limit_bytes": made.plan.estimate.limit_bytes, "plan_seconds": clock.lap(),
    }  # fmt: skip
    try:
        _run(case, made, row, clock)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["error"] = str(error).strip().splitlines()[0][:200]
    return row


def _run(case: Case, made: Prepared, row: Row, clock: Clock) -> None:
    """Compile and train, and write into the row what is found."""
    example, lowered = made.example, lower(made.plan, made.captured)
    planned = lowered.compiled
    row["compiled_bytes"], row["compile_seconds"] = compiled_bytes(planned), clock.lap()
    batch = jax.device_put(jax.tree.leaves(example.make_batch(np.random.default_rng(0))))
    turn = Turn(jax.tree.leaves(example.init(jax.random.key(0))), batch)
    for _ in range(WARM):
        turn.step(planned)
    row["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    programs = {"planned": planned}
    if case.plain:
        programs["plain"] = plain_program(example, turn)
        row["plain_bytes"] = compiled_bytes(programs["plain"])
        for _ in range(WARM):
            turn.step(programs["plain"])
    row["seconds"], row["waited_seconds"] = turn.groups(programs), turn.waited(planned)
    row["loss"] = turn.loss
    if case.kernels:
        whole = prepare(fold(made.captured.graph).whole, made.plan.recompute)
        singly = lowered.compile(
            {"xla_gpu_enable_command_buffer": ""}
        )  # no CUDA graphs: they hide kernels' names
        row["measured_parts"] = measured_parts(turn.step, singly, parts_by_tag(whole))
    row["run_seconds"] = clock.lap()


def plain_program(example: Example, turn: Turn) -> Any:
    """The user's step under `jax.jit`, on flat leaves as the planned one is."""
    tree, count = jax.tree.structure((example.state, example.batch)), len(turn.state)

    def flat(*leaves: Any) -> Any:
        return jax.tree.leaves(example.step(*jax.tree.unflatten(tree, leaves)))

    avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (*turn.state, *turn.batch)]
    return jax.jit(flat, donate_argnums=tuple(range(count))).lower(*avals).compile()


def priced_again(row: Row, profile: str | None) -> Row:
    """A recorded row with today's predictions; needs no GPU."""
    if "recompute" not in row:
        return row
    cluster = Cluster.parse(f"{row['preset']}x1")
    pinned = {"recompute": row["recompute"], "microbatches": row["microbatches"]}
    made = Prepared.of(
        row["model"], row["options"], cluster.with_("device.memory", "1 TiB"), pinned
    )
    return {**row, **made.predictions(cluster, profile)}


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class Turn:
    """A state that programs take turns to carry on: flat leaves in, those of (state, metrics) out."""

    def __init__(self, state: list[Any], batch: list[Any]) -> None:
        self.state, self.batch, self.loss = state, batch, 0.0

    def step(self, program: Any, wait: bool = True) -> None:
        out = program(*self.state, *self.batch)
        if wait:
            jax.block_until_ready(out)
        self.state, self.loss = list(out[: len(self.state)]), out[-1]
        if wait:
            self.loss = float(self.loss)

    def groups(self, programs: dict[str, Any]) -> dict[str, float]:
        """Seconds of a step of each program when the next one is sent before it ends: medians of groups, in turns."""
        times: dict[str, list[float]] = {name: [] for name in programs}
        steps = max(4, min(STEPS, int(LONGEST / self.waited(next(iter(programs.values())), 1))))
        for _ in range(GROUPS):
            for name, program in programs.items():
                self.step(program)
                start = time.perf_counter()
                for _ in range(steps - 1):
                    self.step(program, wait=False)
                self.step(program)
                times[name].append((time.perf_counter() - start) / steps)
        return {name: median(found) for name, found in times.items()}

    def waited(self, program: Any, steps: int = STEPS) -> float:
        """Median seconds of a step whose loss the host reads before it sends the next."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step(program)
            times.append(time.perf_counter() - start)
        return median(times)


def compiled_bytes(program: Any) -> dict[str, float]:
    stats = program.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    }  # fmt: skip


# ---------------------------------------------------------------- all cases


def alone(name: str, case: Case, profile: str | None, seconds: float) -> Row:
    """A case in a process of its own, which has the GPU to itself."""
    command = [
        sys.executable,
        __file__,
        "--case",
        name,
        *(["--profile", profile] if profile else []),
    ]
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(case.pool)}
    head: Row = {
        "case": name,
        "model": case.model,
        "options": case.options,
        "request": case.request,
    }
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {**head, "error": f"not done in {seconds:.0f} s"}
    if done.returncode:
        return {**head, "error": _reason(done.stderr)}
    return {**head, **json.loads(done.stdout.strip().splitlines()[-1])}


def _reason(log: str) -> str:
    lines = [line for line in log.strip().splitlines() if line.strip()]
    said = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error" in line]
    return (said or lines or ["no word"])[-1][:600]


def told(row: Row) -> str:
    if "error" in row:
        share = row["predicted_bytes"] / row["pool_bytes"] if "pool_bytes" in row else 0.0
        return f"{row['case']:24} {row['error']}" + (
            f" ({share:.1%} of the pool predicted)" if share else ""
        )
    found, compiled = row["seconds"]["planned"], sum(row["compiled_bytes"].values())
    errors = " ".join(
        f"{name} {seconds / found - 1:+.1%}" for name, seconds in row["predicted"].items()
    )
    plain = (
        f"; plain jit {found / row['seconds']['plain']:.3f}" if "plain" in row["seconds"] else ""
    )
    peak = f"{row['peak_bytes'] / row['predicted_bytes'] - 1:+.1%}"
    memory = f"{row['predicted_bytes'] / 2**30:.2f} GiB predicted, {peak}"
    return (
        f"{row['case']:24} {found * 1e3:8.1f} ms  {errors}  {memory} (compiled"
        f" {compiled / row['predicted_bytes'] - 1:+.1%})  {row['recompute']} x{row['microbatches']}{plain}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", help="what `meshwright calibrate` wrote here")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="no case starts, nor runs, after these"
    )
    parser.add_argument(
        "--predict-only", type=Path, metavar="FILE", help="price the rows of this result anew"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(CASES[options.case], options.profile)))
        return
    rows = []
    for row in _rows(options):
        rows.append(row)
        print(told(row), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    if options.predict_only:
        yield from (
            priced_again(row, options.profile)
            for row in json.loads(options.predict_only.read_text())
        )
        return
    end = time.monotonic() + 60 * options.minutes
    for name in options.cases:
        if (left := end - time.monotonic()) < 20:
            return
        yield alone(name, CASES[name], options.profile, left)


if __name__ == "__main__":
    main()
