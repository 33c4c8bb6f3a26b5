"""From a plan and a captured step to a jitted program on this process's devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding

from ...ir.analysis.blocks import fold
from ...ir.composites.attention_op import composed
from ...ir.errors import MismatchError
from ...ir.fingerprint import fingerprint
from ...ir.local.program import LocalProgram
from ...ir.plan import Plan
from ...ir.plan_checks import check_decisions
from ...ir.program import prepare
from ..runtime.rendezvous import Rendezvous
from .capture import Captured
from .compat import weakened
from .devices import (
    device_mesh,
    on_cpus,
    options_for,
    partition_spec,
    place,
    platform_of,
    processes_of,
    used_devices,
)
from .lower_pipeline import lower_pipeline
from .lower_single import LoweredSingle, lower_single
from .pipeline import LoweredPipeline
from .runtime import JaxDevices
from .spmd import LocalStep
from .unstack import unstack


class OtherShapes(Exception):
    """A program was called with arguments that it was not made for."""


@dataclass(frozen=True)
class Lowered:
    """A sharded step on flat leaves.

    `jitted(*leaves)` takes global arrays (they are laid out as `input_shardings`
    say) and returns the flat results. Donated leaves are given up.
    """

    plan: Plan
    captured: Captured
    local: LocalStep
    sharded: Callable[..., Sequence[Any]]  # the traced function inside `jitted`
    jitted: Callable[..., Sequence[Any]]
    mesh: DeviceMesh
    input_shardings: tuple[NamedSharding, ...]
    output_shardings: tuple[NamedSharding, ...]

    apart = None  # layers are taken apart for pipelines only

    @property
    def program(self) -> LocalProgram:
        """What each device runs, as planned."""
        return self.local.program

    @cached_property
    def compiled(self) -> Any:
        """The XLA executable."""
        return self.compile()

    def compile(self, options: Mapping[str, str] | None = None) -> Any:
        """Compile from abstract inputs, with options of XLA's (names as in XLA_FLAGS)."""
        avals = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
            for aval, sharding in zip(
                self.captured.binding.in_avals, self.input_shardings, strict=True
            )
        ]
        return self.jitted.lower(*avals).compile(compiler_options=options)  # type: ignore[attr-defined]

    @cached_property
    def joint(self) -> bool:
        """Whether the mesh lies in several processes."""
        return len(processes_of(self.mesh)) > 1

    @cached_property
    def rendezvous(self) -> Rendezvous:
        return Rendezvous(JaxDevices(), in_turn=on_cpus(self.mesh))

    def placed(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Leaves laid out as the program takes them."""
        if self.joint:
            return [
                place(leaf, layout)
                for leaf, layout in zip(leaves, self.input_shardings, strict=True)
            ]
        return jax.device_put(list(leaves), list(self.input_shardings))

    def run(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """One step from leaves that lie anywhere."""
        if not self.joint:
            return self.compiled(*self.placed(leaves))

        def call() -> tuple[Any, Any]:
            found = self.jitted(*self.placed(leaves))
            return found, found

        return self.rendezvous.run("the step", processes_of(self.mesh), call)

    @cached_property
    def by_tree(self) -> Callable[..., Any] | None:
        """The same program on the user's own positional arguments, so that jax takes them
        apart itself: its compiled dispatch is several times quicker than ours could be.

        Called with other shapes it raises OtherShapes. None where jax cannot do this:
        keyword arguments, or part of an argument donated.
        """
        binding, donated = self.captured.binding, self.captured.graph.donated
        marks = [position in donated for position in range(len(binding.in_avals))]
        try:
            (given, named), (shardings, _) = (
                jax.tree.unflatten(binding.in_tree, marks),
                jax.tree.unflatten(binding.in_tree, list(self.input_shardings)),
            )
            results = jax.tree.unflatten(binding.out_tree, list(self.output_shardings))
        except Exception:  # a user's container that holds nothing but arrays
            return None
        numbers = [i for i, arg in enumerate(given) if any(jax.tree.leaves(arg))]
        if named or not all(all(jax.tree.leaves(given[i])) for i in numbers):
            return None

        def step(*args: Any) -> Any:
            leaves = jax.tree.leaves(args)
            found = [(leaf.shape, leaf.dtype) for leaf in leaves]
            if found != [(aval.shape, aval.dtype) for aval in binding.in_avals]:
                raise OtherShapes
            return jax.tree.unflatten(binding.out_tree, self.sharded(*leaves))

        return jax.jit(
            step, in_shardings=shardings, out_shardings=results, donate_argnums=tuple(numbers),
            compiler_options=options_for(self.mesh, self.plan),
        )  # fmt: skip

    def hlo(self) -> str:
        """The compiled program as text."""
        return self.compiled.as_text()


AnyLowered = Lowered | LoweredPipeline | LoweredSingle


def lower(plan: Plan, captured: Captured, devices: Sequence[Any] | None = None) -> AnyLowered:
    """Build the sharded program of a plan, or the programs of its pipeline.

    Args:
        plan: made for this very graph (fingerprints are compared).
        captured: the step, from `capture`.
        devices: as many as the plan's mesh has; by default this process sees them.

    Raises:
        MismatchError: the plan was made for another graph.
        LoweringError: too few devices, or the plan misses a decision.
    """
    _check_graph(plan, captured)
    if plan.pipeline is not None:
        apart = unstack(captured) if plan.pipeline.unstacked else None
        lowerer = lower_single if plan.pipeline.program == "single" else lower_pipeline
        lowered = lowerer(
            plan, _as_planned(plan, captured if apart is None else apart.captured), devices
        )
        lowered.apart = apart
        return lowered
    mesh = device_mesh(plan.mesh, used_devices(plan, devices, plan.mesh.size, f"mesh {plan.mesh}"))
    captured = _as_planned(plan, captured)
    program = prepare(fold(captured.graph).whole, plan.recompute)
    check_decisions(plan, program.graph, program.value_tags)
    local = LocalStep(
        plan,
        program,
        captured.binding.ops,
        captured.binding.arrays,
        on_cpus(mesh),
        platform=platform_of(mesh),
    )
    in_specs = tuple(map(partition_spec, local.decisions.input_layouts()))
    out_specs = tuple(map(partition_spec, local.decisions.output_layouts()))
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    if any(aval.weak_type for aval in captured.binding.out_avals):
        sharded = _weakly(sharded, captured.binding.out_avals)
    sharded.__name__ = re.sub(r"\W", "_", plan.name)  # type: ignore[attr-defined]  for profilers
    in_shardings = tuple(NamedSharding(mesh, spec) for spec in in_specs)
    out_shardings = tuple(NamedSharding(mesh, spec) for spec in out_specs)
    jitted = jax.jit(
        sharded,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=tuple(sorted(captured.graph.donated)),
        compiler_options=options_for(mesh, plan),
    )
    return Lowered(plan, captured, local, sharded, jitted, mesh, in_shardings, out_shardings)


def _weakly(
    sharded: Callable[..., Sequence[Any]], avals: Sequence[Any]
) -> Callable[..., Sequence[Any]]:
    """The same program; Python numbers in the state keep their weak types."""
    return lambda *leaves: tuple(weakened(sharded(*leaves), avals))


def _as_planned(plan: Plan, captured: Captured) -> Captured:
    """The step with the batch that the plan was made for, which may have been told, and attention as planned."""
    graph = composed(captured.graph, plan.attention, plan.cluster, plan.loss, plan.backend)
    return replace(
        captured, graph=graph if plan.batch is None else replace(graph, batch=plan.batch.known)
    )


def _check_graph(plan: Plan, captured: Captured) -> None:
    found = fingerprint(captured.graph)
    if found != plan.graph:
        raise MismatchError(
            f"the plan was made for graph {plan.graph[:12]}, this step is graph {found[:12]}.",
            where=f"plan `{plan.name}`, mesh {plan.mesh}",
            fix="plan this step again, with the shapes and options it will run with",
        )
