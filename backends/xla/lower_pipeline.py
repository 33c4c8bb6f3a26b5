"""From a plan with a pipeline to the programs of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.pipeline.staged import StagedStep, staged_step
from ...ir.plan import Plan
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
    step = staged_step(plan, captured.graph)
    stages = _stages(step, captured, devices)
    for number, stage in enumerate(stages):
        stage.layouts.know_inputs(step.inputs_of(number))
    # What several stages read on the same devices is one array: none of them may give it up.
    devices = [frozenset(stage.mesh.devices.flat) for stage in stages]
    alone = {
        k
        for k, where in enumerate(step.cut.homes)
        if len({devices[s] for s in where}) == len(where)
    }
    inputs = step.program.graph.inputs
    donated = frozenset(inputs[k] for k in captured.graph.donated & alone)
    return LoweredPipeline(plan, captured, step, stages, *link(stages, step.cut, donated))


def _stages(step: StagedStep, captured: Captured, devices: Any) -> list[StagePrograms]:
    plan, pipeline = step.plan, step.plan.pipeline
    assert pipeline is not None
    ends = [
        pipeline.first[rank] + part.mesh.size
        for rank, part in zip(step.ranks, step.parts, strict=True)
    ]
    used = used_devices(plan, devices, plan.device_count, f"pipeline of {len(ends)} stages")
    arrays = {v: _anywhere(array) for v, array in captured.binding.arrays.items()}
    found = []
    for part, end in zip(step.parts, ends, strict=True):
        mesh = device_mesh(part.mesh, used[end - part.mesh.size : end])
        local = LocalStep(
            part, step.program, captured.binding.ops, arrays, on_cpus(mesh), step.groups, platform_of(mesh)
        )  # fmt: skip
        found.append(StagePrograms(local, mesh))
    return found


def _anywhere(array: Any) -> Any:
    """A constant that is bound to no device."""
    return array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)
