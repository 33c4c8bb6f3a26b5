"""Memory that overlap takes: what is gathered comes one gather early, what is reduced stays until the next is made.

Hiding a gather behind the product before it needs both weights at once, hiding a reduction behind the next product
both gradients. Further ahead a runtime may go where it has memory left. Left out: from one to the next of many
layers that the small graph has once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ...ir.execution import OverlapKind
from ...ir.graph import Op
from ...ir.passes.copies import settles
from ...ir.program import Program
from ..intra.hideable import flow_of


def early(program: Program, overlap: Sequence[OverlapKind]) -> dict[int, int]:
    """By gathered weight, the one before whose gather it comes with."""
    if "parameters" not in overlap:
        return {}
    batch, tags = flow_of(program).batch, program.value_tags
    found: dict[int, int] = {}
    for ops in _passes(program):
        gathers = [
            o for o in ops if o.kind == "copy" and not settles(o) and tags[o.inputs[0]] not in batch
        ]
        found |= {b.outputs[0]: a.outputs[0] for a, b in pairwise(gathers)}
    return found


def late(program: Program, overlap: Sequence[OverlapKind]) -> dict[int, int]:
    """By gradient that may be reduced, the next one's copy, until which it stays."""
    if "gradients" not in overlap:
        return {}
    found: dict[int, int] = {}
    for ops in _passes(program):
        reduced = [op for op in ops if settles(op)]
        found |= {a.inputs[0]: b.outputs[0] for a, b in pairwise(reduced)}
    return found


def _passes(program: Program) -> Iterator[list[Op]]:
    """The ops of each pass in order, those of loops by themselves."""
    ops = list(zip(program.graph.ops, program.phases, strict=True))
    for phase in ("forward", "backward"):
        mine = [op for op, its in ops if its == phase]
        yield mine
        yield from _bodies(mine)


def _bodies(ops: Sequence[Op]) -> Iterator[list[Op]]:
    for op in ops:
        for region in op.regions:
            yield list(region.ops)
            yield from _bodies(region.ops)
