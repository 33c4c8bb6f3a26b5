"""From a plan with a pipeline to what each rank of each stage runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...ir.errors import LoweringError
from ...ir.graph import Graph, TensorType
from ...ir.local.pipeline import PassProgram, RankProgram
from ...ir.passes.contract import run_passes
from ...ir.passes.decisions import Decisions
from ...ir.passes.localize_pipeline import localize_pass, pass_names, pipeline_program
from ...ir.passes.order import TORCH_PASSES
from ...ir.pipeline.borders import ProgramBorder, StageLayouts, borders
from ...ir.pipeline.schedule import Schedule
from ...ir.pipeline.staged import staged_step
from ...ir.pipeline.stages import Stages
from ...ir.plan import Plan
from ...ir.sharding import Sharding
from .handover import RankMesh


@dataclass(frozen=True)
class StagePass:
    """A pass of a stage: what crosses its border, and what one device runs; `timed` if once per microbatch."""

    border: ProgramBorder
    program: PassProgram
    timed: bool


@dataclass(frozen=True)
class StagePart:
    """Where a stage runs, and what its programs find there; see `runtime.programs.StageDevices`.

    `totals`: by value, how microbatches are joined, and the type of what a device holds of them.
    """

    ranks: RankMesh
    inputs: Mapping[int, Sharding]
    same: Mapping[int, int]
    totals: Mapping[int, tuple[str, TensorType]]


@dataclass(frozen=True)
class StagedProgram:
    """A step as the programs of pipeline stages, and in which order each rank of the pipeline runs them.

    `outputs`: the ranks and the layout of each result.
    """

    schedule: Schedule
    ranks: tuple[RankProgram, ...]
    graph: Graph
    cut: Stages
    stages: tuple[StagePart, ...]
    passes: tuple[StagePass, ...]
    outputs: tuple[tuple[RankMesh, Sharding], ...]
    groups: int

    @property
    def rank_count(self) -> int:
        return max(stage.ranks.ranks.stop for stage in self.stages)


def lower_pipeline(plan: Plan, graph: Graph) -> StagedProgram:
    """The programs of a plan with a pipeline.

    Args:
        graph: with its batch, attention and losses as planned.

    Raises:
        PlanError: cuts, microbatches or orders that cannot be.
        LoweringError: stages that torch cannot run yet, or a decision that is missing.
    """
    _check(plan)
    step = staged_step(plan, graph)
    layouts = [
        StageLayouts(Decisions(part, step.program, groups=step.groups)) for part in step.parts
    ]
    for number, each in enumerate(layouts):
        each.know_inputs(step.inputs_of(number))
    found = borders(layouts, step.cut, frozenset())
    passes = tuple(
        _pass(layouts[border.fragment.stage], border, name)
        for border, name in zip(found, pass_names(found), strict=True)
    )
    program = pipeline_program(step, layouts, found, [each.program for each in passes])
    assert plan.pipeline is not None
    meshes = [
        RankMesh(part.mesh, plan.pipeline.first[rank])
        for part, rank in zip(step.parts, step.ranks, strict=True)
    ]
    stages = tuple(
        _part(number, layouts[number], mesh, passes) for number, mesh in enumerate(meshes)
    )
    outputs = tuple((meshes[s], layouts[s].ends(o)) for o, s in enumerate(step.cut.ends))
    groups = layouts[0].decisions.groups
    return StagedProgram(
        step.schedule, program.ranks, step.program.graph, step.cut, stages, passes, outputs, groups
    )


def _check(plan: Plan) -> None:
    assert plan.pipeline is not None
    if plan.pipeline.unstacked:
        raise LoweringError(
            "a pipeline of layers that come from a loop cannot run on torch yet.",
            where=f"plan `{plan.name}`",
            fix="a model without a scan over its layers, --pp 1, or --backend xla",
        )
    if plan.pipeline.program == "single":
        raise LoweringError(
            "a pipeline as a single program cannot run on torch yet.",
            where=f"plan `{plan.name}`",
            fix="plan with --program stages, or run it with --backend xla",
        )


def _pass(layouts: StageLayouts, border: ProgramBorder, name: str) -> StagePass:
    found = localize_pass(layouts, border, name)
    program = run_passes(found.program, TORCH_PASSES, whole=False)
    return StagePass(border, replace(found, program=program), layouts.timed(border.fragment))


def _part(
    number: int, layouts: StageLayouts, ranks: RankMesh, passes: Sequence[StagePass]
) -> StagePart:
    """What the driver knows of a stage."""
    of = layouts.decisions
    inputs = {v: layouts[v] for v in of.graph.inputs if v in layouts.known}
    totals: dict[int, tuple[str, TensorType]] = {}
    for each in passes:
        if each.program.stage == number:
            for value, join in each.program.totals:
                kind = of.types[value]
                shape = layouts[value].local_shape(kind.shape, of.mesh)
                totals[value] = join, TensorType(kind.dtype, shape)
    return StagePart(ranks, inputs, layouts.same, totals)
