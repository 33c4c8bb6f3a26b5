"""What an op sends while it runs: reductions that it settles, rows that its devices exchange for equal work.

argmax over a cut dim      all_reduce of its result
causal attention, its rows cut and dealt out evenly      permute of half of q, and of half of o back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..ir.mesh import Mesh
from ..ir.rule import Rule, Strategy, settled_axes


@dataclass(frozen=True, slots=True)
class Sent:
    """A collective over `axes` of this share of what a device has of one side: an operand, or a result after those."""

    kind: Literal["all_reduce", "permute"]
    axes: tuple[str, ...]
    side: int
    share: float = 1.0


def sent_inside(rule: Rule, strategy: Strategy, mesh: Mesh) -> list[Sent]:
    """All that one run of an op sends by itself."""
    results = range(len(rule.operands), len(rule.operands) + len(rule.results))
    found = [
        Sent("all_reduce", axes, side)
        for axes in settled_axes(rule, strategy, mesh).values()
        for side in results
    ]
    for number, joint in enumerate(rule.joints, len(rule.factors)):
        axes = _axes(strategy.axes, number, mesh)
        sides = enumerate((*rule.operands, *rule.results))
        found += [
            Sent("permute", axes, k, 0.5)
            for k, dims in sides
            if axes and any(joint.factors[0] in dim for dim in dims)
        ]
    return found


def _axes(codes: Sequence[int], code: int, mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name, each in zip(mesh.names, codes, strict=True) if each == code)
