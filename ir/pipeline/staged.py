"""A plan with a pipeline on the graph of its step: the schedule, the cut, and what each stage decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any

from ..analysis.blocks import fold
from ..errors import LoweringError
from ..graph import Graph
from ..passes.microbatch import TimeAxis, time_groups
from ..plan import Pipeline, Plan, Stage
from ..plan_checks import check_decisions
from ..program import Program, prepare
from .schedule import Schedule, check
from .stages import Stages, cut_stages


@dataclass(frozen=True, eq=False)
class StagedStep:
    """A step cut into the stages of a plan, each of which lies on one rank.

    `parts[stage]` is the plan with the mesh and the decisions of a stage. `groups`: into how many runs of
    neighbours the batch is dealt to microbatches, which must have the same rows on every stage's mesh.
    """

    plan: Plan
    schedule: Schedule
    program: Program
    cut: Stages
    parts: tuple[Plan, ...]
    groups: int | None

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return self.schedule.homes

    def inputs_of(self, stage: int) -> Iterator[int]:
        """Inputs of the step that a stage reads or keeps, values of theirs."""
        homes = zip(self.program.graph.inputs, self.cut.homes, strict=True)
        return (v for v, where in homes if stage in where)


def staged_step(plan: Plan, graph: Graph) -> StagedStep:
    """Cut a step as its plan says.

    Args:
        graph: of the step, composed and with its layers apart as planned.

    Raises:
        PlanError: cuts, microbatches or orders that cannot be.
        LoweringError: a stage on several ranks, or a decision that is missing.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    schedule = pipeline.read(plan.microbatches)
    check(schedule)
    whole = fold(graph).whole
    program = prepare(whole, plan.recompute, in_stages=True)
    check_decisions(plan, program.graph, program.value_tags)
    cuts = [stage.cut for stage in pipeline.stages]
    cut = cut_stages(program, whole, cuts, plan.microbatches, schedule.splits)
    _check_ranks(schedule)
    parts, groups = stage_plans(plan), _groups(plan, pipeline, program)
    return StagedStep(plan, schedule, program, cut, parts, groups)


def stage_plans(plan: Plan) -> tuple[Plan, ...]:
    """Of each stage, the plan with the stage's mesh and decisions."""
    stages = plan.pipeline.stages if plan.pipeline else ()
    return tuple(plan.model_copy(update=_own_decisions(stage)) for stage in stages)


def _check_ranks(schedule: Schedule) -> None:
    for stage in range(schedule.stages):
        found = sum(stage in held for held in schedule.held)
        if found != 1:
            raise LoweringError(
                f"stage {stage} lies on {found} ranks.",
                where=f"schedule {schedule.name}",
                fix="a schedule in which each stage lies on one rank",
            )


def _own_decisions(stage: Stage) -> dict[str, Any]:
    """What a stage decides for itself, of the fields of a plan."""
    given = {"strategies": stage.strategies, "slots": stage.slots}
    return {"mesh": stage.mesh, **{name: value for name, value in given.items() if value}}


def _groups(plan: Plan, pipeline: Pipeline, program: Program) -> int | None:
    time = program.time
    if not isinstance(time, TimeAxis) or plan.microbatches == 1:
        return None
    return lcm(
        *(time_groups(time.parts, stage.mesh, plan.microbatches) for stage in pipeline.stages)
    )
