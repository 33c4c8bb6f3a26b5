"""Does the model rank strategies as this machine does? Predicted against measured seconds per step.

    python benchmarks/ranking.py [--profile cpu8.json] [--rounds 5] [--models gpt-bytes ...] [-o FILE]

At least 40 strategies per model on 8 emulated CPU devices: data x tensor parallelism, ZeRO 0, 1
and 3, sequence parallelism, recompute, microbatches, as Megatron-LM would lay them out. Programs take
turns, in a new order each round; medians are compared. Without a profile one is measured first.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from meshwright import api  # noqa: E402
from meshwright.backends.xla.capture import capture  # noqa: E402
from meshwright.backends.xla.lower import lower  # noqa: E402
from meshwright.calibration import calibrate  # noqa: E402
from meshwright.ir.blocks import fold  # noqa: E402
from meshwright.ir.cluster import Cluster  # noqa: E402
from meshwright.ir.fingerprint import fingerprint  # noqa: E402
from meshwright.models import build  # noqa: E402
from meshwright.planner.jobs.fixed import fixed_plan  # noqa: E402
from meshwright.planner.jobs.pinned import Parallelism  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "llama-tiny": {"batch": 64, "seq": 128, "dtype": "f32"},
    "gpt-tiny": {"batch": 128, "seq": 64, "dtype": "f32"},
    "gpt-bytes": {"batch": 16},
}


def strategies() -> list[tuple[Parallelism, str, int]]:
    found = []
    for (dp, tp), zero, sp in product(((8, 1), (4, 2), (2, 4), (1, 8)), (0, 1, 3), (False, True)):
        if (sp and tp == 1) or (zero and dp == 1):
            continue
        for recompute, count in (("none", 1), ("full", 1), ("none", 2)):
            if recompute == "full" and zero == 1:
                continue
            found.append((Parallelism(tp=tp, dp=dp, zero=zero, sequence_parallel=sp), recompute, count))
    return found


def compared(name: str, cluster: Cluster, rounds: int) -> dict[str, Any]:
    example = build(name, **MODELS[name])
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    folded, mark = fold(captured.graph), fingerprint(captured.graph)
    batch = example.make_batch(np.random.default_rng(0))
    rows, states, programs = [], [], []
    for parallelism, recompute, count in strategies():
        plan = fixed_plan(
            folded, cluster, parallelism, microbatches=count, recompute=recompute, name=name, fingerprint=mark,
        )  # type: ignore[arg-type]
        program = api.RunningStep(lower(plan, captured))
        state, _ = jax.block_until_ready(program(example.init(jax.random.key(0)), batch))
        rows.append({
            "dp": parallelism.dp, "tp": parallelism.tp, "zero": parallelism.zero, "sp": parallelism.sequence_parallel,
            "recompute": recompute, "microbatches": count, "predicted": plan.estimate.step_seconds,
        })  # fmt: skip
        states.append(state)
        programs.append(program)
    times: list[list[float]] = [[] for _ in programs]
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for i in rng.permutation(len(programs)):
            start = time.perf_counter()
            states[i], _ = jax.block_until_ready(programs[i](states[i], batch))
            times[i].append(time.perf_counter() - start)
    for row, found in zip(rows, times, strict=True):
        row["measured"] = median(found)
    predicted, measured = ([row[k] for row in rows] for k in ("predicted", "measured"))
    first = min(rows, key=lambda row: row["predicted"])
    return {
        "model": name, "strategies": len(rows), "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "first_over_best": first["measured"] / min(measured),
        "measured_over_predicted": median(m / p for m, p in zip(measured, predicted, strict=True)), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    cluster = Cluster.parse("8xcpu").with_profile(options.profile or calibrate())
    report = []
    for name in options.models:
        found = compared(name, cluster, options.rounds)
        report.append(found)
        print(
            f"{name}: {found['strategies']} strategies, rank correlation {found['rank_correlation']:.3f},"
            f" the first takes {found['first_over_best']:.3f} of the best,"
            f" measured / predicted {found['measured_over_predicted']:.2f}",
            flush=True,
        )
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
