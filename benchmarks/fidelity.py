"""Predicted against published training runs.

    python benchmarks/fidelity.py ../shared/data/measurements/published_training_runs.csv [--set NAME] [-o FILE]

Every row is priced through the graph of the zoo's model of that shape. No constant is fitted
to a row: they come from `ir/cluster/hardware.yaml`. What a row does not state is searched over, as its
set says, and the fastest choice that fits is taken.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")

from published.case import Case, Row  # noqa: E402
from published.llm_foundry import mpt  # noqa: E402
from published.maxtext import maxtext, tiering  # noqa: E402
from published.megatron import megascale, megatron, megatron_core, zero_bubble  # noqa: E402
from published.simumax import simumax  # noqa: E402
from published.torchtitan import torchtitan  # noqa: E402

from meshwright import pricing  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.planner.cost.bands import joined_by  # noqa: E402


@dataclass
class Result:
    id: str
    model: str
    device: str
    fabric: str  # the tier that joins all devices
    framework: str
    measured: float
    predicted: float
    error: float
    memory: float | None
    predicted_memory: float
    memory_error: float | None
    chosen: str
    seconds: dict[str, float]


SETS: dict[str, tuple[str, Callable[[Row], Case | None], float]] = {
    "korthikanti": ("Korthikanti 2205.05198 T5", megatron, 0.04),
    "sc21": ("Narayanan SC21", megatron, 0.06),
    "ptd-p": (
        "Narayanan SC21 T2",
        lambda row: megatron(row) if int(row["zero"]) == 0 else None,
        0.06,
    ),
    "zero3": (
        "Narayanan SC21 T2",
        lambda row: megatron(row) if int(row["zero"]) == 3 else None,
        1.0,
    ),
    "megatron-core": ("Megatron-Core r0.8 H100", megatron_core, 0.12),
    "simumax": ("SimuMax B200 real", simumax, 0.08),
    "torchtitan": ("torchtitan bench 2024-12", torchtitan, 0.15),
    "torchtitan-tp": ("torchtitan asyncTP 2025-06", torchtitan, 0.15),
    "maxtext": ("MaxText TPU", maxtext, 0.15),
    "maxtext-2024": ("MaxText README 2024-03", maxtext, 0.15),
    "maxtext-tiers": ("MaxText tiering", tiering, 0.15),
    "zero-bubble": ("Zero-Bubble T4", zero_bubble, 1.0),
    "megascale": ("MegaScale T3 ablation", megascale, 1.0),
    "megatron-readme": ("Megatron-LM README", megatron, 1.0),
    "mpt": ("llm-foundry MPT", mpt, 1.0),
    "allreduce": ("Korthikanti 2205.05198 text", megatron, 0.04),
}


FRAMEWORKS = {
    **dict.fromkeys(("korthikanti", "sc21", "ptd-p", "megascale", "megatron-readme", "allreduce"), "Megatron-LM"),
    "zero-bubble": "Megatron-LM", "megatron-core": "Megatron-Core", "simumax": "Megatron-Core",
    "zero3": "DeepSpeed of 2021",
    **dict.fromkeys(("torchtitan", "torchtitan-tp"), "torchtitan"), "mpt": "llm-foundry",
    **dict.fromkeys(("maxtext", "maxtext-2024", "maxtext-tiers"), "MaxText"),
}  # fmt: skip


def best(case: Case, framework: str) -> Result:
    """The fastest of the choices that fit the device; if none does, the one that needs least."""
    cluster = case.cluster
    found: list[tuple[bool, float, float, Any]] = []
    problems = []
    for parallelism, microbatch, setting in product(
        case.parallelisms, case.microbatches, case.settings
    ):
        try:
            priced = pricing.price_job(
                case.shape,
                parallelism,
                cluster,
                global_batch=case.batch,
                microbatch=microbatch,
                setting=setting,
            )
        except MeshwrightError as error:
            problems.append(error.what)
            continue
        fits = priced.peak <= cluster.device.memory - cluster.device.reserve
        rank = (not fits, priced.step if fits else priced.peak)
        found.append((*rank, priced.peak, (priced, parallelism, microbatch, setting)))
    if not found:
        raise SystemExit(f"row {case.row['id']}: {problems[:2]}")
    _, _, peak, (priced, parallelism, microbatch, setting) = min(found, key=lambda f: f[:2])
    gib = peak / 2**30
    return Result(
        case.row["id"], case.row["model"], cluster.device.name, joined_by(cluster), framework,
        case.measured, priced.step, priced.step / case.measured - 1,
        case.memory, gib, gib / case.memory - 1 if case.memory else None,
        f"tp{parallelism.tp} pp{parallelism.pp}x{parallelism.vpp} dp{parallelism.dp} z{parallelism.zero}"
        f" mb{microbatch} {setting.recompute}", {k: round(v, 4) for k, v in priced.seconds.items()},
    )  # fmt: skip


def line(name: str, r: Result) -> str:
    memory = f"{r.predicted_memory:7.2f} GiB"
    if r.memory is not None and r.memory_error is not None:
        memory += f" of {r.memory:7.2f} {r.memory_error:+6.1%}"
    step = f"{r.measured:8.3f} {r.predicted:8.3f} s {r.error:+6.1%}"
    return f"{name:14} {r.id:>5} {r.model:12} {step}  {memory}  {r.chosen}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--set", dest="sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = list(csv.DictReader(options.rows.open()))
    report: dict[str, Any] = {}
    for name in options.sets:
        source, read, bar = SETS[name]
        cases = [c for row in rows if row["src"] == source and (c := read(row))]
        results = []
        for case in cases:
            results.append(best(case, FRAMEWORKS[name]))
            print(line(name, results[-1]), flush=True)
        mape = statistics.mean(abs(r.error) for r in results)
        held = [abs(r.memory_error) for r in results if r.memory_error is not None]
        memory = statistics.mean(held) if held else None
        end = f", memory {memory:.1%}" if memory else ""
        print(f"{name}: {len(results)} rows, MAPE {mape:.1%} (bar {bar:.0%}){end}")
        report[name] = {
            "bar": bar,
            "mape": mape,
            "memory_mape": memory,
            "rows": [asdict(r) for r in results],
        }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
