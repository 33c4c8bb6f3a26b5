"""From a plan with a pipeline to the programs of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.analysis.blocks import fold
from ...ir.errors import LoweringError
from ...ir.passes.microbatch import TimeAxis, time_groups
from ...ir.pipeline.schedule import Schedule, check
from ...ir.pipeline.stages import cut_stages
from ...ir.plan import Pipeline, Plan, Stage
from ...ir.plan_checks import check_decisions
from ...ir.program import Program as Prepared
from ...ir.program import prepare
from .capture import Captured
from .devices import device_mesh, on_cpus, platform_of, used_devices
from .fragments import StagePrograms, link
from .pipeline import LoweredPipeline
from .spmd import LocalStep


def lower_pipeline(
    plan: Plan, captured: Captured, devices: Sequence[Any] | None = None
) -> LoweredPipeline:
    """The programs of a plan with a pipeline, made for this very graph.

    Raises:
        PlanError: cuts, microbatches or orders that cannot be.
        LoweringError: too few devices, a stage on several ranks, or a decision that is missing.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    schedule = pipeline.read(plan.microbatches)
    check(schedule)
    whole = fold(captured.graph).whole
    program = prepare(whole, plan.recompute, in_stages=True)
    check_decisions(plan, program.graph, program.value_tags)
    cuts = [stage.cut for stage in pipeline.stages]
    cut = cut_stages(program, whole, cuts, plan.microbatches, schedule.splits)
    stages = _stages(plan, pipeline, schedule, program, captured, devices)
    for stage, programs in enumerate(stages):
        homes = zip(program.graph.inputs, cut.homes, strict=True)
        programs.layouts.know_inputs(v for v, where in homes if stage in where)
    # What several stages read on the same devices is one array: none of them may give it up.
    devices = [frozenset(stage.mesh.devices.flat) for stage in stages]
    alone = {
        k for k, where in enumerate(cut.homes) if len({devices[s] for s in where}) == len(where)
    }
    donated = frozenset(program.graph.inputs[k] for k in captured.graph.donated & alone)
    passes, rounds = link(stages, cut, donated)
    return LoweredPipeline(plan, captured, schedule, cut, stages, passes, rounds)


def _stages(
    plan: Plan,
    pipeline: Pipeline,
    schedule: Schedule,
    program: Prepared,
    captured: Captured,
    devices: Any,
) -> list[StagePrograms]:
    held = [
        [rank for rank, stages in enumerate(schedule.held) if s in stages]
        for s in range(schedule.stages)
    ]
    if spread := [s for s, ranks in enumerate(held) if len(ranks) != 1]:
        raise LoweringError(
            f"stage {spread[0]} lies on {len(held[spread[0]])} ranks.",
            where=f"schedule {pipeline.schedule}",
            fix="a schedule in which each stage lies on one rank",
        )
    ends = [
        pipeline.first[ranks[0]] + stage.mesh.size
        for ranks, stage in zip(held, pipeline.stages, strict=True)
    ]
    used = used_devices(plan, devices, plan.device_count, f"pipeline of {len(ends)} stages")
    arrays = {v: _anywhere(array) for v, array in captured.binding.arrays.items()}
    groups = _groups(plan, pipeline, program)
    found = []
    for stage, end in zip(pipeline.stages, ends, strict=True):
        mesh = device_mesh(stage.mesh, used[end - stage.mesh.size : end])
        part = plan.model_copy(update=own_decisions(stage))
        local = LocalStep(
            part, program, captured.binding.ops, arrays, on_cpus(mesh), groups, platform_of(mesh)
        )
        found.append(StagePrograms(local, mesh))
    return found


def _anywhere(array: Any) -> Any:
    """A constant that is bound to no device."""
    return array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)


def _groups(plan: Plan, pipeline: Pipeline, program: Prepared) -> int | None:
    """A microbatch must have the same rows on every stage's mesh."""
    time = program.time
    if not isinstance(time, TimeAxis) or plan.microbatches == 1:
        return None
    return lcm(
        *(time_groups(time.parts, stage.mesh, plan.microbatches) for stage in pipeline.stages)
    )


def own_decisions(stage: Stage) -> dict[str, Any]:
    """What a stage decides for itself, of the fields of a plan."""
    given = {"strategies": stage.strategies, "slots": stage.slots}
    return {"mesh": stage.mesh, **{name: value for name, value in given.items() if value}}
