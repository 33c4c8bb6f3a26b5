"""Seconds of one collective over some axes of a mesh.

Each axis of a mesh lies in the closest fabric tier that joins its ranks. A
group over several tiers works as a hierarchy: every tier carries its share
while the others carry theirs, so the slowest tier sets the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2

from ..ir.cluster import Cluster
from ..ir.graph import TensorType
from ..ir.mesh import Mesh
from ..ir.sharding import Sharding, Step, reshard


@dataclass(frozen=True, slots=True)
class Link:
    """What one device sees of a tier: seconds per message, bytes/s each way."""

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a straight line in bytes: `fixed + slope * nbytes`."""

    fixed: float = 0.0
    slope: float = 0.0

    def __call__(self, nbytes: float) -> float:
        return self.fixed + self.slope * nbytes

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.slope + other.slope)


FREE = Line()

# Bytes that cross each link per byte of the larger of the local operand and
# result, for a group of n. Source: Thakur, Rabenseifner & Gropp, IJHPCA 19(1),
# 2005, sections 4.1-4.5 (ring and pairwise exchange).
TRAFFIC: dict[str, Callable[[int], float]] = {
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
}
ROUNDS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}


@dataclass(frozen=True)
class Collectives:
    """Prices collectives on one mesh of one cluster.

    `links[axis]` is the tier an axis lies in. Leaves out congestion between
    groups that share a link, and overlap with compute.
    """

    mesh: Mesh
    cluster: Cluster

    @cached_property
    def links(self) -> dict[str, Link]:
        return {axis.name: self._link(axis.name) for axis in self.mesh.axes}

    def _link(self, name: str) -> Link:
        tier = self.cluster.tier_for(self.mesh.stride(name) * self.mesh.sizes[name])
        return Link(tier.name, tier.latency, tier.bandwidth / tier.oversubscription)

    def wire_bytes(self, kind: TensorType) -> int:
        """Bytes of a whole tensor when it travels.

        XLA's CPU backend carries out collectives of 16-bit floats in 32 bits: every
        bf16 collective of the zoo's compiled programs is f32 (jax 0.10.2, `meshwright audit`).
        """
        widened = self.cluster.device.kind == "cpu" and kind.dtype in ("bf16", "f16")
        return kind.nbytes * (2 if widened else 1)

    def joins(self, kind: str, phase: str, source: Sharding) -> bool:
        """Whether many collectives of this kind become one, and so have no latency of their own.

        A single number (a loss, a norm) comes after the gradients and pays its own.

        XLA's CPU backend joins the all-reduces of gradients and metrics: 29 to 97 of
        them are 1 in each compiled program of the zoo (jax 0.10.2, `meshwright audit`).
        """
        gradients = kind == "all_reduce" and phase == "update" and bool(source.dims)
        return gradients and self.cluster.device.kind == "cpu"

    def line(self, kind: str, axes: tuple[str, ...]) -> Line:
        """Seconds of one collective, as a line in the bytes of the larger local side."""
        if (kind, axes) not in self._lines:
            self._lines[kind, axes] = self._line(kind, axes)
        return self._lines[kind, axes]

    @cached_property
    def _lines(self) -> dict[tuple[str, tuple[str, ...]], Line]:
        return {}

    def _line(self, kind: str, axes: tuple[str, ...]) -> Line:
        """The line behind `line`.

            fixed  rounds * sum over axes of latency * ceil(log2 n)
            slope  max over tiers of traffic(n) * (share of the bytes in that tier) / bandwidth

        The innermost axis moves all bytes; each axis outside moves what is left
        after the inner ones have been combined: 1 / (product of their sizes).
        Source: hierarchical rings as in Cho et al., "BlueConnect", MLSys 2019.
        """
        inner, slope, fixed = 1, 0.0, 0.0
        for name in sorted(axes, key=self.mesh.stride):
            n, link = self.mesh.sizes[name], self.links[name]
            if n == 1:
                continue
            slope = max(slope, TRAFFIC[kind](n) / inner / link.bandwidth)
            fixed += ROUNDS[kind] * link.latency * ceil(log2(n))
            inner *= n
        return Line(fixed, slope)

    def resharding(self, source: Sharding, target: Sharding, phase: str) -> Line | None:
        """Seconds of moving one tensor between two layouts, as a line in its *global* bytes.

        Dims that are whole in both change nothing, so layouts that differ in these alone share
        their line.
        """
        cut = [(a, b) for a, b in zip(source.dims, target.dims, strict=True) if a or b]
        key = (tuple(cut), source.partial, target.partial, phase == "update", bool(source.dims))
        if key not in self._known:
            self._known[key] = self._resharding(source, target, phase)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple, Line | None]:
        return {}

    def _resharding(self, source: Sharding, target: Sharding, phase: str) -> Line | None:
        steps = reshard(source, target)
        if steps is None:
            return None
        total, share = FREE, 1.0 / source.ways(self.mesh)
        for step in steps:
            larger, share = self.shares(step, share)
            if step.kind != "slice":
                line = self.line(step.kind, step.axes)
                fixed = 0.0 if self.joins(step.kind, phase, source) else line.fixed
                total += Line(fixed, line.slope * larger)
        return total

    def shares(self, step: Step, share: float) -> tuple[float, float]:
        """Local bytes per global byte: of the larger side of the step, and after it."""
        ways = self.mesh.ways(step.axes)
        match step.kind:
            case "all_gather":
                return share * ways, share * ways
            case "reduce_scatter" | "slice":
                return share, share / ways
            case _:
                return share, share
