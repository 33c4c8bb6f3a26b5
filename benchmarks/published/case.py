"""One published row as a job to price."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.jobs.pinned import Parallelism

Row = dict[str, str]


@dataclass
class Case:
    """One row as a job; fields with several options were not stated and are searched over."""

    row: Row
    cluster: Cluster
    shape: pricing.Shape
    parallelisms: list[Parallelism]
    microbatches: list[int]
    settings: list[pricing.Setting]
    batch: int
    measured: float  # seconds per step
    memory: float | None = None  # GiB
    note: str = ""


def whole(row: Row, name: str, default: int | None = None) -> int | None:
    return int(float(row[name])) if row[name] else default


def hosts(device: str, row: Row, fabric: str) -> Cluster:
    n, per = int(row["n_gpus"]), 8
    return Cluster.parse(f"{device}x{n}" if n <= per else f"{n // per}x{device}x{per}@{fabric}")
