"""From a plan and a captured step to what each rank runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from ...ir.analysis.blocks import fold
from ...ir.composites.attention_op import composed
from ...ir.errors import MismatchError
from ...ir.fingerprint import fingerprint
from ...ir.graph import Graph
from ...ir.local.program import LocalProgram
from ...ir.passes.contract import run_passes
from ...ir.passes.localize import localize
from ...ir.passes.order import TORCH_PASSES
from ...ir.plan import Plan
from ...ir.plan_checks import check_decisions
from ...ir.program import prepare
from .lower_pipeline import StagedProgram, lower_pipeline

_T = TypeVar("_T")


def lower(plan: Plan, graph: Graph) -> LocalProgram | StagedProgram:
    """What ranks run of a plan: one program on all, or those of its stages.

    Raises:
        MismatchError: the plan was made for another graph.
        PlanError: cuts, microbatches or orders of a pipeline that cannot be.
        LoweringError: the plan misses a decision, or has stages that torch cannot run yet.
    """
    if plan.pipeline is None:
        return local_program(plan, graph)
    return lower_pipeline(plan, _as_planned(plan, graph))


def local_program(plan: Plan, graph: Graph) -> LocalProgram:
    """What each device of the mesh of a plan without stages runs.

    Raises:
        MismatchError: the plan was made for another graph.
        LoweringError: the plan misses a decision.
    """
    assert plan.pipeline is None
    program = prepare(fold(_as_planned(plan, graph)).whole, plan.recompute)
    check_decisions(plan, program.graph, program.value_tags)
    return run_passes(localize(program, plan), TORCH_PASSES)


def _as_planned(plan: Plan, graph: Graph) -> Graph:
    """The step with attention, losses and the batch as the plan has them."""
    found = fingerprint(graph)
    if found != plan.graph:
        raise MismatchError(
            f"the plan was made for graph {plan.graph[:12]}, this step is graph {found[:12]}.",
            where=f"plan `{plan.name}`, mesh {plan.mesh}",
            fix="plan this step again, with the shapes and options it will run with",
        )
    graph = composed(graph, plan.attention, plan.cluster, plan.loss, plan.backend)
    return graph if plan.batch is None else replace(graph, batch=plan.batch.known)


def arrays_in(
    program: LocalProgram | StagedProgram, graph: Graph, arrays: Mapping[int, _T]
) -> dict[int, _T]:
    """Constants that are arrays, by their numbers in a program made of the graph; stages keep those of the graph."""
    if isinstance(program, StagedProgram):
        return dict(arrays)
    pairs = zip(graph.constants, program.constants, strict=False)
    return {here.value: arrays[there.value] for there, here in pairs if there.value in arrays}
