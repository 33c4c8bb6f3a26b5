"""Pipelines of stages with equal and with unequal numbers of devices: predicted seconds per step, and of searching.

python benchmarks/unequal_stages.py [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.cost.model import Roofline
from meshwright.planner.pipeline.search import Pipelines
from meshwright.planner.pipeline.unequal import Unequal
from meshwright.planner.problem import Problem
from meshwright.planner.request import Request
from meshwright.planner.trace import Trace
from meshwright.recipe import make

CASES: tuple[tuple[str, int, str, int | Literal["auto"], int | None], ...] = (
    ("gpt2", 512, "2xh100x8@ib400", 8, 32),
    ("gpt2", 512, "16xh100x1@ib400", "auto", 64),
    ("gpt2", 512, "h100x8", 3, 32),
    ("vit-l16", 1024, "2xh100x8@ib400", 8, 32),
    ("dlrm", 65_536, "h100x8", 4, None),
    ("wrn-50-2", 256, "h100x8", 4, None),
)


@dataclass
class Row:
    """`equal` and `unequal` seconds per step, None where there is none; `sizes` of the stages of the second."""

    model: str
    batch: int
    cluster: str
    stages: int | str
    microbatches: int | None
    equal: float | None
    unequal: float | None
    sizes: tuple[int, ...]
    equal_search: float
    unequal_search: float


def row(
    model: str, batch: int, cluster: str, stages: int | Literal["auto"], microbatches: int | None
) -> Row:
    made, where = make({"model": model, "batch": batch}), Cluster.parse(cluster)
    request, graph = Request(pp=stages, microbatches=microbatches), fold(made.capture(True).graph)
    started = time.process_time()
    problem = Problem(graph, where, request, Roofline(where), model, "")
    pipelines = Pipelines(problem, Trace(request.time_limit))
    pipelines.explore()
    pipelines.reorder()
    between = time.process_time()
    unequal = Unequal(pipelines)
    unequal.explore(pipelines.best.seconds)
    ended = time.process_time()
    found = unequal.found
    return Row(
        model, batch, cluster, stages, microbatches,
        pipelines.best.seconds if pipelines.best.priced else None, found[2].seconds if found else None,
        tuple(rank.space.mesh.size for rank in found[0]) if found else (), between - started, ended - between,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    for case in CASES:
        found = row(*case)
        rows.append(asdict(found))
        equal = f"{found.equal * 1e3:.1f} ms" if found.equal else "none"
        unequal = (
            f"{found.unequal * 1e3:.1f} ms on {found.sizes}" if found.unequal else "none faster"
        )
        print(
            f"{found.model:9} batch {found.batch:5} {found.cluster:16} pp {found.stages}: equal {equal}, "
            f"unequal {unequal}; CPU {found.equal_search:.1f} + {found.unequal_search:.1f} s", flush=True,
        )  # fmt: skip
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
