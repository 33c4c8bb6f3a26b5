"""From a plan and a captured step to what each rank runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from ...ir.analysis.blocks import fold
from ...ir.composites.attention_op import composed
from ...ir.errors import LoweringError, MismatchError
from ...ir.fingerprint import fingerprint
from ...ir.graph import Graph
from ...ir.local.program import LocalProgram
from ...ir.passes.contract import run_passes
from ...ir.passes.localize import localize
from ...ir.passes.order import PASSES
from ...ir.plan import Plan
from ...ir.plan_checks import check_decisions
from ...ir.program import prepare

_T = TypeVar("_T")


def local_program(plan: Plan, graph: Graph) -> LocalProgram:
    """What each device of the plan's mesh runs.

    Raises:
        MismatchError: the plan was made for another graph.
        LoweringError: the plan misses a decision, or has stages.
    """
    found = fingerprint(graph)
    if found != plan.graph:
        raise MismatchError(
            f"the plan was made for graph {plan.graph[:12]}, this step is graph {found[:12]}.",
            where=f"plan `{plan.name}`, mesh {plan.mesh}",
            fix="plan this step again, with the shapes and options it will run with",
        )
    if plan.pipeline is not None:
        raise LoweringError(
            f"a pipeline of {len(plan.pipeline.stages)} stages cannot run on torch yet.",
            where=f"plan `{plan.name}`",
            fix="plan with --pp 1, or run it with --backend xla",
        )
    graph = composed(graph, plan.attention, plan.cluster, plan.loss)
    graph = graph if plan.batch is None else replace(graph, batch=plan.batch.known)
    program = prepare(fold(graph).whole, plan.recompute)
    check_decisions(plan, program.graph, program.value_tags)
    return run_passes(localize(program, plan), PASSES)


def arrays_in(program: LocalProgram, graph: Graph, arrays: Mapping[int, _T]) -> dict[int, _T]:
    """Constants that are arrays, by their numbers in a program made of the graph."""
    pairs = zip(graph.constants, program.constants, strict=False)
    return {here.value: arrays[there.value] for there, here in pairs if there.value in arrays}
