"""What a plan's seconds assume where the step does not say: told in its notes."""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.graph import TURNS, Graph, Op
from ..ir.rules.user_kernel import KIND as USERS
from .cost.flop import is_counted, told_cost
from .intra.outline import SELDOM


def assumptions(graph: Graph) -> tuple[str, ...]:
    """One line per op whose cost nobody can count, or that says itself what it costs."""
    found = [f"{visit.op.kind} at {visit.op.where or visit.op.tag}: {what}"
             for visit in graph.visits for what in _assumed(visit.op)]  # fmt: skip
    return tuple(dict.fromkeys(found))


def _assumed(op: Op) -> Iterator[str]:
    if told := told_cost(op):
        says = "`mw.kernel`" if op.kind == USERS else "its cost_estimate"
        yield f"counted as {told[0]:.3g} FLOP and {told[1]:.3g} bytes, which {says} says"
    elif op.kind == "while":
        yield f"how many turns it takes is not known; counted as {TURNS}"
    elif op.kind == "cond":
        dearest, many = op.integer("dearest") + 1, len(op.regions)
        yield f"counted as its dearest branch, number {dearest} of {many}; others as {SELDOM:.0%} of theirs"
    elif not is_counted(op):
        yield "its FLOP are not known; counted as one pass over what it reads and writes"
