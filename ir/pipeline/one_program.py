"""What all stages of a pipeline cannot do as one program."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import LoweringError
from ..graph import Graph
from ..ops import COMPOSITES
from ..rules import rule_of


def check_one_program(graph: Graph, strategies: Mapping[str, tuple[int, ...]]) -> None:
    """Whether all stages can be one program: a stage without a microbatch skips what others do, and XLA's CPU backend
    mixes up permutes of which some devices skip a turn (jax 0.10.2: wrong numbers, no error).

    Raises:
        LoweringError: devices exchange rows of an attention.
    """
    for op in (visit.op for visit in graph.visits if visit.op.kind in COMPOSITES):
        rule = rule_of(op, graph.types)
        if any(rule.joint(code) is not None for code in strategies.get(op.tag, ())):
            raise LoweringError(
                "devices exchange rows of attention, which one program for all stages cannot.",
                where=op.where or op.tag, fix="program=stages, which runs any stages",
            )  # fmt: skip
