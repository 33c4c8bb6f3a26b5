"""Proven bounds against published runs: no plan is faster than a bound, so no run may be, by more than the band.

    python benchmarks/bounds.py ROWS.csv [--set NAME ...] [--time-limit S] [-o FILE]

Rows whose model the zoo has, in bf16, as `fidelity.py` reads them. Each job (model, length, batch, cluster) is planned
once: attention fused, all overlapped, with a pipeline or without as the run has one.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fidelity
from published.case import Case

from meshwright import pricing
from meshwright.api import plan_captured
from meshwright.ir.errors import MeshwrightError
from meshwright.models import deepseek, gpt, llama, mixtral
from meshwright.planner.cost.bands import band_of
from meshwright.planner.request import Request
from meshwright.recipe import make

ZOO = (*gpt.CONFIGS, *llama.CONFIGS, *mixtral.CONFIGS, *deepseek.CONFIGS)
PINS: dict[bool, dict[str, Any]] = {
    False: {"pp": 1, "overlap": "all"},
    True: {"pp": "auto", "overlap": "all"},
}  # by whether the run has stages


def model_of(case: Case) -> str | None:
    """The zoo's model of a case."""
    return next((m for m in ZOO if pricing.shape_of(m, case.shape.seq) == case.shape), None)


def cases(rows: list[dict[str, str]], sets: list[str]) -> Iterator[tuple[str, str, Case]]:
    """Set, model and case of every row that can be planned."""
    for name in sets:
        source, read, _ = fidelity.SETS[name]
        for row in rows:
            case = read(row) if row["src"] == source else None
            if case and case.settings[0].products == "bf16" and (model := model_of(case)):
                yield name, model, case


def bound_of(model: str, case: Case, stages: bool, limit: float) -> float | str:
    """Seconds that no plan of this job undercuts, or why there is none."""
    captured = make({"model": model, "batch": case.batch, "seq": case.shape.seq}).capture(True)
    request = Request(attention="fused", time_limit=limit, **PINS[stages])
    try:
        return plan_captured(captured, case.cluster, request, model).proof.lower_bound
    except MeshwrightError as error:
        return str(error).splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument(
        "--set", dest="sets", nargs="*", default=list(fidelity.SETS), choices=list(fidelity.SETS)
    )
    parser.add_argument("--time-limit", type=float, default=30.0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    known: dict[Any, float | str] = {}
    found = []
    for name, model, case in cases(list(csv.DictReader(options.rows.open())), options.sets):
        stages = case.parallelisms[0].pp > 1
        job = model, case.shape.seq, case.batch, case.cluster.fingerprint(), stages
        if job not in known:
            known[job] = bound_of(model, case, stages, options.time_limit)
        bound, band = known[job], band_of(case.cluster)
        row = {
            "set": name,
            "id": case.row["id"],
            "model": model,
            "measured": case.measured,
            "bound": bound,
        }
        if isinstance(bound, float):
            row |= {
                "above": bound / case.measured - 1,
                "allowed": max(0.0, band.high) if band else 0.0,
            }
        found.append(row)
        print(row, flush=True)
    wrong = [row for row in found if row.get("above", -1.0) > row.get("allowed", 0.0)]
    print(
        f"{len(found)} runs, {len(known)} jobs; bounds above a run by more than the band: {len(wrong)}"
    )
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
