"""From a plan of equal stages to one jitted program on the devices of all stages.

State goes in and comes out as with a program per stage: each layer's arrays lie on the devices of its stage.
At the border the arrays of one place in every stage are seen as one array, split over the axis of stages,
without a copy. What is not layers lies on all stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from ...ir.analysis.blocks import fold
from ...ir.errors import LoweringError
from ...ir.mesh import STAGE
from ...ir.passes.microbatch import TimeAxis
from ...ir.pipeline.layered import STAGES, layered
from ...ir.pipeline.one_program import check_one_program
from ...ir.pipeline.part_cuts import part_cuts
from ...ir.pipeline.stages import cut_stages
from ...ir.plan import Pipeline, Plan
from ...ir.plan_checks import check_decisions
from ...ir.program import prepare
from ...ir.sharding import Sharding
from ..runtime.rendezvous import Rendezvous
from .capture import Captured
from .devices import (
    on_cpus,
    options_for,
    partition_spec,
    place,
    platform_of,
    processes_of,
    used_devices,
)
from .runtime import JaxDevices
from .single import SingleStep
from .spmd import LocalStep
from .unstack import Unstacked

Group = tuple[int, ...]  # positions of inputs or results, one per stage


@dataclass(eq=False)
class LoweredSingle:
    """A pipelined step on flat leaves, one program for all stages; as `Lowered` from outside."""

    plan: Plan
    captured: Captured
    program: Any  # jitted, on arrays that all stages share, then those of groups
    mesh: DeviceMesh
    inputs: Border
    results: Border
    apart: Unstacked | None = None  # how the user's leaves were taken apart, layer by layer

    by_tree = None  # arrays are put together before the program runs

    @property
    def input_shardings(self) -> tuple[NamedSharding, ...]:
        return self.inputs.shardings

    @property
    def output_shardings(self) -> tuple[NamedSharding, ...]:
        return self.results.shardings

    @cached_property
    def compiled(self) -> Any:
        """The XLA executable."""
        kinds = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.captured.binding.in_avals
        ]
        return self.program.lower(*self.inputs.kinds(kinds)).compile()

    def hlo(self) -> str:
        """The compiled program as text."""
        return self.compiled.as_text()

    @cached_property
    def joint(self) -> bool:
        """Whether the stages lie in several processes."""
        return len(processes_of(self.mesh)) > 1

    @cached_property
    def rendezvous(self) -> Rendezvous:
        return Rendezvous(JaxDevices(), in_turn=on_cpus(self.mesh))

    def placed(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Leaves where they lie first."""
        if self.joint:
            return [
                place(leaf, layout)
                for leaf, layout in zip(leaves, self.input_shardings, strict=True)
            ]
        return jax.device_put(list(leaves), list(self.input_shardings))

    def jitted(self, *leaves: Any) -> tuple[Any, ...]:
        """One step; donated leaves are given up."""
        return self.run(leaves)

    def run(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """One step from leaves that lie anywhere."""
        arrays = self.inputs.together(self.placed(leaves))
        if not self.joint:
            return self.results.apart(self.compiled(*arrays))

        def call() -> tuple[Any, Any]:
            found = self.compiled(*arrays)
            return found, found

        return self.results.apart(self.rendezvous.run("the step", processes_of(self.mesh), call))


@dataclass(frozen=True)
class Border:
    """Leaves of the step, and as the program has them: shared ones, then one array for each group.

    `specs` are the leaves' on the mesh of a stage. The array of a group has its dim 0 split over stages first,
    so that each device holds of it what it holds of its stage's leaf.
    """

    mesh: DeviceMesh
    specs: tuple[PartitionSpec, ...]
    ranks: tuple[int, ...]  # numbers of dims
    shared: tuple[int, ...]
    groups: tuple[Group, ...]

    @cached_property
    def shardings(self) -> tuple[NamedSharding, ...]:
        """Of the leaves: a stage's own lie on its devices, others on all."""
        meshes = dict.fromkeys(self.shared, self.mesh)
        stages = [DeviceMesh(devices, self.mesh.axis_names[1:]) for devices in self.mesh.devices]
        meshes |= {o: mesh for group in self.groups for o, mesh in zip(group, stages, strict=True)}
        return tuple(NamedSharding(meshes[o], spec) for o, spec in enumerate(self.specs))

    @cached_property
    def program_specs(self) -> tuple[PartitionSpec, ...]:
        return (
            *(self.specs[o] for o in self.shared),
            *(self._joined(group) for group in self.groups),
        )

    def _joined(self, group: Group) -> PartitionSpec:
        spec = self.specs[group[0]]
        first, rest = (spec[0], spec[1:]) if len(spec) else (None, ())
        axes = () if first is None else (first,) if isinstance(first, str) else tuple(first)
        return PartitionSpec((STAGE, *axes), *rest)

    def shape(self, group: Group, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (len(group) * shape[0], *shape[1:]) if shape else (len(group),)

    @cached_property
    def program_shardings(self) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(self.mesh, spec) for spec in self.program_specs)

    def kinds(self, leaves: Sequence[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
        """What the program takes, from what the step takes."""
        groups = [
            jax.ShapeDtypeStruct(self.shape(g, leaves[g[0]].shape), leaves[g[0]].dtype)
            for g in self.groups
        ]
        return [*(leaves[o] for o in self.shared), *groups]

    def together(self, leaves: Sequence[Any]) -> list[Any]:
        """The program's arrays, from leaves that lie as `shardings` say; nothing is copied but scalars."""
        layouts = self.program_shardings[len(self.shared) :]
        return [
            *(leaves[o] for o in self.shared),
            *(
                self._group([leaves[o] for o in g], layout)
                for g, layout in zip(self.groups, layouts, strict=True)
            ),
        ]

    def _group(self, leaves: Sequence[Any], layout: NamedSharding) -> Any:
        parts = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
        parts = parts if leaves[0].ndim else [part.reshape(1) for part in parts]
        shape = self.shape(tuple(range(len(leaves))), leaves[0].shape)
        return jax.make_array_from_single_device_arrays(shape, layout, parts, dtype=leaves[0].dtype)

    def apart(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Leaves of the program's arrays; nothing is copied but scalars."""
        found: list[Any] = [None] * len(self.specs)
        for o, array in zip(self.shared, arrays, strict=False):
            found[o] = array
        for group, array in zip(self.groups, arrays[len(self.shared) :], strict=True):
            shards = {shard.device: shard.data for shard in array.addressable_shards}
            shape = (array.shape[0] // len(group), *array.shape[1:]) if self.ranks[group[0]] else ()
            for o in group:
                layout = self.shardings[o]
                parts = [shards[d] for d in layout.device_set & shards.keys()]
                parts = parts if shape else [part.reshape(()) for part in parts]
                found[o] = jax.make_array_from_single_device_arrays(
                    shape, layout, parts, dtype=array.dtype
                )
        return tuple(found)


def lower_single(
    plan: Plan, captured: Captured, devices: Sequence[Any] | None = None
) -> LoweredSingle:
    """One program for all stages of a plan's pipeline, made for this very graph.

    Raises:
        PlanError: microbatches that cannot be.
        LoweringError: too few devices, a schedule other than gpipe, or stages that are not equal.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    _check(plan, pipeline)
    folded = fold(captured.graph)
    program = prepare(folded.whole, plan.recompute, in_stages=True)
    check_decisions(plan, program.graph, program.value_tags)
    cuts = part_cuts(folded, [stage.cut for stage in pipeline.stages])
    cut = cut_stages(program, folded.whole, cuts, plan.microbatches)
    check_one_program(program.graph, plan.strategies)
    parts, time = layered(program, cut), program.time
    assert isinstance(time, TimeAxis)
    mesh = _mesh(plan, pipeline, devices)
    local = LocalStep(
        plan,
        program,
        captured.binding.ops,
        captured.binding.arrays,
        on_cpus(mesh),
        platform=platform_of(mesh),
    )
    ins = _border(mesh, local.decisions.input_layouts(), parts.inputs, captured.graph.input_name)
    outs = _border(
        mesh, local.decisions.output_layouts(), parts.outputs, captured.graph.output_name
    )
    step = SingleStep(local, parts, time, ins.shared, outs.shared)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=ins.program_specs, out_specs=outs.program_specs, check_vma=False
    )
    sharded.__name__ = re.sub(r"\W", "_", plan.name)  # type: ignore[attr-defined]  for profilers
    jitted = jax.jit(
        sharded, in_shardings=ins.program_shardings, out_shardings=outs.program_shardings,
        donate_argnums=_donated(captured, ins), compiler_options=options_for(mesh, plan),
    )  # fmt: skip
    return LoweredSingle(plan, captured, jitted, mesh, ins, outs)


def _check(plan: Plan, pipeline: Pipeline) -> None:
    schedule, where = pipeline.read(plan.microbatches), f"pipeline of {len(pipeline.stages)} stages"
    unlike = [s for s in pipeline.stages if (s.mesh, s.strategies, s.slots) != _decisions(pipeline)]
    for refused, what, fix in (
        (
            schedule.name != "gpipe",
            f"one program for all stages runs gpipe, not {schedule.name}",
            "schedule=gpipe",
        ),
        (
            plan.microbatches < 2,
            "one program for all stages needs two microbatches or more",
            "microbatches=2",
        ),
        (len(pipeline.stages) < 2, "one program for all stages needs two stages or more", "pp=2"),
        (bool(unlike), "the stages have other meshes or layouts than each other", "stages alike"),
    ):
        if refused:
            raise LoweringError(f"{what}.", where=where, fix=f"{fix}; or {STAGES}")


def _decisions(pipeline: Pipeline) -> tuple[Any, ...]:
    first = pipeline.stages[0]
    return first.mesh, first.strategies, first.slots


def _mesh(plan: Plan, pipeline: Pipeline, devices: Sequence[Any] | None) -> DeviceMesh:
    stage = pipeline.stages[0].mesh
    used = used_devices(
        plan, devices, plan.device_count, f"pipeline of {len(pipeline.stages)} stages"
    )
    rows = [used[first : first + stage.size] for first in pipeline.first]
    if len({device.device_kind for row in rows for device in row}) > 1:
        raise LoweringError(
            "the stages lie on devices of several kinds.", where="pipeline", fix=STAGES
        )
    return DeviceMesh(np.array(rows).reshape(len(rows), *stage.shape), (STAGE, *stage.names))


def _border(
    mesh: DeviceMesh,
    layouts: Sequence[Sharding],
    groups: Sequence[Group],
    name: Callable[[int], str],
) -> Border:
    for group in groups:
        if unlike := [o for o in group if layouts[o] != layouts[group[0]]]:
            raise LoweringError(
                f"{name(group[0])} and {name(unlike[0])} are laid out in different ways.",
                where="pipeline",
                fix=STAGES,
            )
    own = {o for group in groups for o in group}
    shared = tuple(o for o in range(len(layouts)) if o not in own)
    specs = tuple(map(partition_spec, layouts))
    return Border(mesh, specs, tuple(len(layout.dims) for layout in layouts), shared, tuple(groups))


def _donated(captured: Captured, ins: Border) -> tuple[int, ...]:
    given = captured.graph.donated
    groups = enumerate(ins.groups, start=len(ins.shared))
    return tuple(k for k, o in enumerate(ins.shared) if o in given) + tuple(
        k for k, g in groups if given.issuperset(g)
    )
