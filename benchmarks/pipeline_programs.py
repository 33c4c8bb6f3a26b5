"""A pipeline as programs of its stages against a single program for all: predicted next to measured.

    python benchmarks/pipeline_programs.py [--profile benchmarks/results/cpu8.json] [-o FILE]

On eight emulated CPU devices. Both kinds of program run the same step, one step of each in turn. `busy` is the
processor's time in place of the clock's, which other work on the machine disturbs; `host` is the processor's time of
the thread that dispatches, and `per instruction` what more microbatches add to it, over the instructions they add.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import meshwright as mw
from meshwright.api import plan_captured
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.pipeline import LoweredPipeline
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.request import Request
from meshwright.recipe import make
from meshwright.training import start

DEVICES = 8
CASES = (  # model, batch, stages, microbatches
    ("gpt-tiny", 32, 2, 4), ("gpt-tiny", 32, 2, 16), ("gpt-tiny", 32, 4, 4), ("gpt-tiny", 32, 4, 16),
    ("llama-tiny", 32, 2, 8), ("gpt-bytes", 16, 2, 8),
)  # fmt: skip
KINDS = ("stages", "single")


def compare(
    model: str, batch: int, pp: int, microbatches: int, cluster: Cluster, steps: int
) -> dict[str, Any]:
    made = make({"model": model, "batch": batch})
    captured = made.capture(True)
    request = {
        "pp": pp,
        "microbatches": microbatches,
        "recompute": "none",
        "mesh": (DEVICES // pp,),
    }
    plan_of = lambda **pins: plan_captured(captured, cluster, Request(**request, **pins), model)  # noqa: E731
    chosen = plan_of()
    found: dict[str, Any] = {
        "model": model, "batch": batch, "stages": pp, "microbatches": microbatches,
        "chosen": chosen.pipeline.program, "predicted": chosen.pipeline.programs,
    }  # fmt: skip
    runs = {kind: Running(lower(plan_of(program=kind), captured), made) for kind in KINDS}
    for number in range(steps + 2):
        for running in runs.values():
            running.step(keep=number >= 2)
    return found | {"programs": {kind: running.medians for kind, running in runs.items()}}


class Running:
    """A step on its way, with what each took: seconds of the clock, of all processors, of the dispatching thread."""

    def __init__(self, lowered: Any, made: Any):
        self.lowered, self.times = lowered, []
        self.after = dict(lowered.captured.graph.state)
        state, batches = start(made, None, 0)
        self.leaves = lowered.placed(jax.tree.leaves((state, *next(batches))))

    def step(self, keep: bool) -> None:
        clock, busy, host = time.perf_counter(), time.process_time(), time.thread_time()
        results = self.lowered.jitted(*self.leaves)
        host = time.thread_time() - host
        jax.block_until_ready(results)
        took = time.perf_counter() - clock, time.process_time() - busy, host
        self.leaves = [
            results[self.after[k]] if k in self.after else leaf
            for k, leaf in enumerate(self.leaves)
        ]
        self.times += [took] * keep

    @property
    def medians(self) -> dict[str, float]:
        clock, busy, host = (statistics.median(each) for each in zip(*self.times, strict=True))
        many = len(self.lowered.driver.turns) if isinstance(self.lowered, LoweredPipeline) else 1
        return {"seconds": clock, "busy": busy, "host": host, "instructions": many}


def line(found: dict[str, Any]) -> str:
    pair = lambda values: " ".join(f"{value * 1e3:8.1f}" for value in values)  # noqa: E731
    measured = [
        pair(found["programs"][kind][what] for kind in KINDS)
        for what in ("seconds", "busy", "host")
    ]
    predicted = pair(found["predicted"].get(kind, np.nan) for kind in KINDS)
    name = f"{found['model']:10} {found['stages']} stages, {found['microbatches']:2} microbatches"
    words = "  ".join(
        f"{what} {ms}" for what, ms in zip(("clock", "busy", "host"), measured, strict=True)
    )
    return f"{name}  predicted {predicted} ({found['chosen']})  {words}"


def per_instruction(rows: list[dict[str, Any]]) -> list[str]:
    """Of cases that differ in microbatches alone: what an instruction more takes the host."""
    lines = []
    for few in rows:
        for many in rows:
            same = [few[k] == many[k] for k in ("model", "batch", "stages")]
            if all(same) and few["microbatches"] < many["microbatches"]:
                a, b = few["programs"]["stages"], many["programs"]["stages"]
                each = (b["host"] - a["host"]) / (b["instructions"] - a["instructions"])
                lines.append(
                    f"{few['model']}, {few['stages']} stages: {each * 1e6:.0f} us per instruction"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--case", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    mw.emulate(DEVICES)
    cluster = Cluster.parse(f"{DEVICES}xcpu")
    cluster = cluster if options.profile is None else cluster.with_profile(options.profile)
    rows = []
    for number in options.case:
        rows.append(compare(*CASES[number], cluster, options.steps))
        print(line(rows[-1]), flush=True)
    print("\n".join(per_instruction(rows)))
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
