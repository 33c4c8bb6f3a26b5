"""How the ranks of a group lie in the fabric: how many share a host, a rack, a switch.

A mesh axis of 32 neighbours on hosts of 8 is 8 ranks in each host and 4 hosts; the same
axis with a stride of 8 is one rank in each of 32 hosts. Which tiers a group crosses, and with how
many of its devices at once, sets the bandwidth that it gets:

    tier     joins              sends in parallel       bandwidth of the group
    nvlink   8 ranks            1                       450 GB/s
    ib400    4 hosts            8 (all of a host)       8 x 50 GB/s
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...ir.cluster.cluster import Cluster, Tier
from ...ir.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Level:
    """The part of a group that one tier joins.

    Of each domain of the tier `inside` ranks belong to the group, in `parts` parts that the
    tiers below join already; each part has `lanes` ranks, which all send into this tier. Over a
    torus the group has a ring along each of the `rings` dimensions that it spans.
    """

    tier: Tier
    inside: int
    parts: int
    rings: int = 1

    @property
    def lanes(self) -> int:
        return self.inside // self.parts

    @property
    def bandwidth(self) -> float:
        """Bytes/s that one part of the group sends and receives."""
        return self.lanes * self.rings * self.tier.achieved


def levels_of(axes: Iterable[str], mesh: Mesh, cluster: Cluster) -> tuple[Level, ...]:
    """The tiers that a group over these axes crosses, closest first; tiers that join nothing are left out."""
    shape = [(mesh.stride(name), mesh.sizes[name]) for name in axes]
    found: list[Level] = []
    before = 1
    for tier, span in _domains(cluster):
        inside = 1
        for stride, size in shape:
            inside *= _within(stride, size, span)
        if inside > before:
            found.append(Level(tier, inside, inside // before, _rings(tier, shape)))
            before = inside
    return tuple(found)


def _within(stride: int, size: int, span: int) -> int:
    """How many neighbours along an axis fall into one domain of `span` consecutive ranks.

    A domain that the axis does not fill evenly counts as one with the fewest.
    """
    if stride >= span:
        return 1
    most = span // stride
    while size % most:
        most -= 1
    return min(size, most)


def _rings(tier: Tier, shape: list[tuple[int, int]]) -> int:
    """How many dimensions of a torus the axes span; 1 for any other tier.

    Source: jax-ml/scaling-book @0819a7d8c5, tpus.md and sharding.md: an array sharded over
    several torus dimensions is gathered over all of them at once.
    """
    spanned, stride = 0, 1
    for size in reversed(tier.shape or ()):
        spanned += any(s < stride * size and s * n > stride for s, n in shape)
        stride *= size
    return max(1, spanned)


def _domains(cluster: Cluster) -> list[tuple[Tier, int]]:
    """Ranks that each tier joins; hosts that differ count as the smallest."""
    per_host = min(group.per_host for group in cluster.groups)
    found: list[tuple[Tier, int]] = []
    for tier in cluster.fabric:
        span = cluster.size if tier.hosts >= cluster.hosts else int(tier.hosts) * per_host
        found.append((tier, span))
    return found
