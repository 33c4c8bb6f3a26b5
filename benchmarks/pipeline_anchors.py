"""Published pipeline partitions and ours, on the same inputs, under each anchor's objective and in one simulator.

    python benchmarks/pipeline_anchors.py FOLDER [--aceso FOLDER] [--only NAME ...] [-o FILE]

FOLDER holds `pipedream_*.json`, `piper*.json`, `dapple_*.json` and `dnn_partitioning*.json`; the folder
of `--aceso` its profiled operators. `objective` is ours over theirs by the anchor's own objective (at
most 1: never worse), `simulated` the same in the neutral evaluator, and `fastest` for the plan of ours
that is fastest there. `same` tells whether the anchor's plan gives its published figure here. A file that is
there keeps the rows of anchors that are not run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anchors.cases import aceso_rows, dapple_rows, max_load_rows, pipedream_rows, piper_rows
from anchors.row import Row

ANCHORS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "pipedream": pipedream_rows,
    "piper": piper_rows,
    "dapple": dapple_rows,
    "dnn-partitioning": max_load_rows,
    "aceso": aceso_rows,
}


COLUMNS = {
    "same": 6, "published": 11, "ours": 11, "objective": 10, "simulated": 10, "fastest": 9, "both": 9,
    "seconds": 9, "further": 9, "theirs": 9,
}  # fmt: skip


def line(row: Row) -> str:
    same = {True: "same", False: "OTHER", None: "-"}[row.faithful]
    figures = [
        _figure(row.published, ".6g"),
        _figure(row.ours, ".6g"),
        _ratio(row.ours, row.published),
    ]
    ours = (row.simulated_ours, row.simulated_fastest, row.simulated_both)
    runs = [_ratio(simulated, row.simulated_theirs) for simulated in ours]
    seconds = [f"{row.seconds:.2f}", f"{row.further:.2f}", _figure(row.theirs, ".2f")]
    cells = zip([same, *figures, *runs, *seconds], COLUMNS.values(), strict=True)
    return (
        f"{row.anchor:16} {row.case:38}"
        + "".join(f"{cell:>{wide}}" for cell, wide in cells)
        + f"  {row.note}"
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "-" if ours is None or theirs is None else f"{ours / theirs:.4f}"


def summary(rows: list[Row]) -> dict[str, Any]:
    """Counts of one anchor's rows."""
    runs = [row for row in rows if row.simulated_theirs is not None]
    return {
        "cases": len(rows),
        "compared": sum(row.published is not None and row.ours is not None for row in rows),
        "never_worse": sum(row.never_worse for row in rows),
        "plans_reproduced": sum(row.faithful is True for row in rows),
        "plans_published": sum(row.faithful is not None for row in rows),
        "simulated_never_worse": sum(
            _within(row.simulated_ours, row.simulated_theirs) for row in runs
        ),
        "fastest_never_worse": sum(
            _within(row.simulated_fastest, row.simulated_theirs) for row in runs
        ),
        "both_never_worse": sum(_within(row.simulated_both, row.simulated_theirs) for row in runs),
        "simulated": len(runs),
        "faster_to_find": sum(row.theirs is not None and row.seconds < row.theirs for row in rows),
    }


def _within(ours: float | None, theirs: float | None) -> bool:
    return ours is not None and theirs is not None and ours <= theirs * (1 + 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--aceso", type=Path)
    parser.add_argument("--only", nargs="*", default=list(ANCHORS), choices=list(ANCHORS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    for folder in (options.folder, options.aceso):
        if folder and not folder.is_dir():
            parser.error(f"{folder} is no folder")
    print(
        f"{'anchor':16} {'case':38}" + "".join(f"{name:>{wide}}" for name, wide in COLUMNS.items())
    )
    kept = options.output and options.output.exists()
    report: dict[str, Any] = json.loads(options.output.read_text()) if kept else {}
    for name in options.only:
        folder = options.aceso if name == "aceso" else options.folder
        rows = []
        for row in ANCHORS[name](folder) if folder else ():
            rows.append(row)
            print(line(row), flush=True)
        if rows:
            report[name] = {**summary(rows), "rows": [asdict(row) for row in rows]}
            print(f"{name}: {summary(rows)}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
