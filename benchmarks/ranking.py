"""Does the model rank strategies as this machine does? Predicted against measured seconds per step.

    python benchmarks/ranking.py [--profile cpu8.json] [--rounds 7] [--models gpt-bytes ...] [-o FILE]
    python benchmarks/ranking.py --predict-only FILE --profile cpu8.json [-o FILE]

At least 40 strategies per model on 8 emulated CPU devices: data x tensor parallelism, ZeRO 0, 1
and 3, sequence parallelism, recompute, microbatches, as Megatron-LM would lay them out. Programs take
turns, in a new order each round; medians are compared. Without a profile one is measured first.

`--predict-only` measures nothing: it prices the rows of a result anew. Each row also has the
processor's seconds per core (`busy`), which other work on the machine disturbs less than the clock, and
a result the machine's load before and after, so that a disturbed one is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from meshwright.emulation import emulate

emulate(8)

from meshwright import api  # noqa: E402
from meshwright.backends.xla.capture import Captured, capture  # noqa: E402
from meshwright.backends.xla.lower import lower  # noqa: E402
from meshwright.calibration import calibrate  # noqa: E402
from meshwright.ir.analysis.blocks import fold  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.fingerprint import fingerprint  # noqa: E402
from meshwright.ir.plan import Plan  # noqa: E402
from meshwright.models import Example, build  # noqa: E402
from meshwright.planner.jobs.fixed import fixed_plan  # noqa: E402
from meshwright.planner.jobs.pinned import Parallelism  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "llama-tiny": {"batch": 64, "seq": 128, "dtype": "f32"},
    "gpt-tiny": {"batch": 128, "seq": 64, "dtype": "f32"},
    "gpt-bytes": {"batch": 16},
}
WARM = 2  # runs before the first that counts: compilation, then the memory that later runs reuse

Row = dict[str, Any]


def strategies() -> list[Row]:
    found = []
    for (dp, tp), zero, sp in product(((8, 1), (4, 2), (2, 4), (1, 8)), (0, 1, 3), (False, True)):
        if (sp and tp == 1) or (zero and dp == 1):
            continue
        for recompute, count in (("none", 1), ("full", 1), ("none", 2)):
            if recompute == "full" and zero == 1:
                continue
            found.append(
                {
                    "dp": dp,
                    "tp": tp,
                    "zero": zero,
                    "sp": sp,
                    "recompute": recompute,
                    "microbatches": count,
                }
            )
    return found


@dataclass
class Planner:
    """Plans of one model on one cluster, from rows that state a strategy."""

    name: str
    cluster: Cluster
    example: Example
    captured: Captured

    @classmethod
    def of(cls, name: str, cluster: Cluster) -> Planner:
        example = build(name, **MODELS[name])
        return cls(
            name,
            cluster,
            example,
            capture(example.step, example.state, example.batch, donate_argnums=0),
        )

    def __post_init__(self) -> None:
        self.folded, self.mark = fold(self.captured.graph), fingerprint(self.captured.graph)

    def plan(self, row: Row) -> Plan:
        parallelism = Parallelism(
            tp=row["tp"], dp=row["dp"], zero=row["zero"], sequence_parallel=row["sp"]
        )
        return fixed_plan(
            self.folded, self.cluster, parallelism, microbatches=row["microbatches"], recompute=row["recompute"],
            name=self.name, fingerprint=self.mark,
        )  # fmt: skip


def measured(planner: Planner, rounds: int) -> list[Row]:
    """Rows with predicted and measured seconds; programs take turns in a new order each round."""
    batch = planner.example.make_batch(np.random.default_rng(0))
    rows, states, programs = strategies(), [], []
    for row in rows:
        plan = planner.plan(row)
        row["predicted"] = plan.estimate.step_seconds
        program, state = (
            api.RunningStep(lower(plan, planner.captured)),
            planner.example.init(jax.random.key(0)),
        )
        for _ in range(WARM):
            state, _ = jax.block_until_ready(program(state, batch))
        states.append(state)
        programs.append(program)
    times: list[list[tuple[float, float]]] = [[] for _ in programs]
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for i in rng.permutation(len(programs)):
            start, busy = time.perf_counter(), time.process_time()
            states[i], _ = jax.block_until_ready(programs[i](states[i], batch))
            times[i].append((time.perf_counter() - start, time.process_time() - busy))
    cores = len(os.sched_getaffinity(0))
    for row, found in zip(rows, times, strict=True):
        row["measured"] = median(wall for wall, _ in found)
        row["busy"] = median(busy for _, busy in found) / cores
    return rows


def summary(name: str, rows: list[Row]) -> dict[str, Any]:
    predicted, found = ([row[k] for row in rows] for k in ("predicted", "measured"))
    first = min(rows, key=lambda row: row["predicted"])
    return {
        "model": name, "strategies": len(rows), "rank_correlation": float(spearmanr(predicted, found).statistic),
        "first_over_best": first["measured"] / min(found),
        "measured_over_predicted": median(m / p for m, p in zip(found, predicted, strict=True)), "rows": rows,
    }  # fmt: skip


def compared(name: str, cluster: Cluster, rounds: int) -> dict[str, Any]:
    before = os.getloadavg()[0]
    found = summary(name, measured(Planner.of(name, cluster), rounds))
    return {**found, "rounds": rounds, "load": [before, os.getloadavg()[0]]}


def priced_again(recorded: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    planner = Planner.of(recorded["model"], cluster)
    rows = [
        {**row, "predicted": planner.plan(row).estimate.step_seconds} for row in recorded["rows"]
    ]
    return {**recorded, **summary(recorded["model"], rows)}


def told(found: dict[str, Any]) -> str:
    return (
        f"{found['model']}: {found['strategies']} strategies, rank correlation {found['rank_correlation']:.3f}"
        f"{_told_busy(found['rows'])}, the first takes {found['first_over_best']:.3f} of the best,"
        f" measured / predicted {found['measured_over_predicted']:.2f}"
    )


def _told_busy(rows: list[Row]) -> str:
    if any("busy" not in row for row in rows):
        return ""  # recorded before it was measured
    found = spearmanr([row["predicted"] for row in rows], [row["busy"] for row in rows])
    return f" (with the processor's seconds {found.statistic:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--predict-only", type=Path, metavar="FILE", help="price the rows of this result anew"
    )
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    cluster = Cluster.parse("8xcpu").with_profile(options.profile or calibrate())
    recorded = (
        {r["model"]: r for r in json.loads(options.predict_only.read_text())}
        if options.predict_only
        else None
    )
    report = []
    for name in (
        options.models if recorded is None else [m for m in options.models if m in recorded]
    ):
        found = (
            compared(name, cluster, options.rounds)
            if recorded is None
            else priced_again(recorded[name], cluster)
        )
        report.append(found)
        print(told(found), flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
