"""Clusters of unlike devices and of islands behind a slow link: the plan over all against each group alone.

    python benchmarks/unlike_devices.py [-o FILE] [--time-limit SECONDS]

Every case is planned over the whole cluster and over each of its groups by itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from meshwright.api import plan_captured
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import PlanError
from meshwright.planner.request import Request
from meshwright.recipe import make

CLUSTERS = Path(__file__).parent / "clusters"
CASES = (
    ("a100_v100", "gpt2-medium", 64),
    ("a100_v100", "gpt3-1.3b", 64),
    ("two_islands", "gpt3-1.3b", 64),
    ("two_islands", "gpt3-6.7b", 256),
)


@dataclass
class Row:
    """Predicted seconds per step; `alone` by group, None where nothing fits. `stages` on each first device."""

    cluster: str
    model: str
    batch: int
    alone: dict[str, float | None]
    seconds: float
    lower_bound: float
    devices: int
    stages: dict[int, str]
    searched: float


def row(cluster: str, model: str, batch: int, limit: float) -> Row:
    where, made = Cluster.load(CLUSTERS / f"{cluster}.yaml"), make({"model": model, "batch": batch})
    captured, request = made.capture(True), Request(pp="auto", time_limit=limit)
    alone: dict[str, float | None] = {}
    for index, group in enumerate(where.groups):
        name = f"{group.hosts}x{group.per_host} {group.device}"
        if name in alone:
            continue
        try:
            found = plan_captured(captured, where.only(index), request, made.name)
            alone[name] = found.estimate.step_seconds
        except PlanError:
            alone[name] = None
    plan = plan_captured(captured, where, request, made.name)
    homes = plan.pipeline.read(plan.microbatches).homes if plan.pipeline else ()
    stages = plan.pipeline.stages if plan.pipeline else ()
    first = plan.pipeline.first if plan.pipeline else ()
    return Row(
        cluster, model, batch, alone, plan.estimate.step_seconds, plan.proof.lower_bound, plan.device_count,
        {first[rank]: stage.blocks for rank, stage in zip(homes, stages, strict=True)}, plan.proof.seconds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--time-limit", type=float, default=60.0)
    options = parser.parse_args()
    rows = []
    for case in CASES:
        found = row(*case, options.time_limit)
        rows.append(asdict(found))
        alone = ", ".join(
            f"{name} {'does not fit' if s is None else f'{s:.3f} s'}"
            for name, s in found.alone.items()
        )
        print(
            f"{found.cluster:12} {found.model:12} batch {found.batch:4}: {found.seconds:.3f} s on {found.devices}"
            f" devices, at least {found.lower_bound:.3f}; alone {alone}", flush=True,
        )  # fmt: skip
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
