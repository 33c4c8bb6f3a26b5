"""The fragments of pipeline stages as jitted programs, each on the devices of its stage.

Values cross from one program to another as global arrays, laid out as `ir/pipeline/borders.py` says. A sum that
is still owed over some mesh axes crosses as a stack, one slice for each device that owes a part, so that
gradients of all microbatches are added up first and reduced once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from ...ir.local.pipeline import PassProgram
from ...ir.local.program import LocalProgram
from ...ir.passes.contract import run_passes
from ...ir.passes.localize_pipeline import localize_pass, pass_names
from ...ir.passes.order import PASSES
from ...ir.pipeline.borders import ProgramBorder, StageLayouts, borders
from ...ir.pipeline.stages import Stages
from ...ir.sharding import Sharding
from ..runtime.programs import StageDevices, StageProgram
from .devices import crossing_spec, named_sharding, options_for, partition_spec
from .dtypes import jax_dtype
from .joins import JOIN, start
from .spmd import LocalStep


@dataclass
class StagePrograms:
    """One stage: its walker, its devices, and the layout of each value known there (`layouts`)."""

    local: LocalStep
    mesh: DeviceMesh

    def __post_init__(self) -> None:
        self.layouts = StageLayouts(self.local.decisions)

    def sharding(self, layout: Sharding) -> NamedSharding:
        return named_sharding(self.mesh, layout)

    def sharding_of(self, value: int) -> NamedSharding:
        return self.sharding(self.layouts[value])

    # ------------------------------------------------------------ programs

    def pass_program(self, border: ProgramBorder, name: str) -> PassProgram:
        """What one device runs of a fragment."""
        found = localize_pass(self.layouts, border, name)
        return replace(found, program=run_passes(found.program, PASSES, whole=False))

    def build(self, border: ProgramBorder, local: PassProgram) -> StageProgram:
        """Jit what one device runs of a fragment."""
        fragment, messages = border.fragment, border.messages
        gone, kept = border.donates, border.keeps
        body = _Body(self, border, local.program)
        ins = (
            PartitionSpec(),
            [*body.total_specs, *self._specs(gone)],
            [self._spec_of(v, v in border.joins) for v in kept],
        )
        outs = (
            PartitionSpec(), body.total_specs, self._specs(fragment.gives),
            [crossing_spec(message.leaves) for message in messages],
            [partition_spec(self.layouts.ends(o)) for o in fragment.results],
        )  # fmt: skip
        sharded = jax.shard_map(body, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        sharded.__name__ = f"{fragment.kind}_{fragment.stage}"  # type: ignore[attr-defined]  for profilers
        call = jax.jit(
            sharded, donate_argnums=1, compiler_options=options_for(self.mesh, self.local.plan)
        )
        return StageProgram(fragment, gone, kept, border.joins, messages, call)

    def devices(self, totals: Sequence[int]) -> StageDevices:
        """What the driver knows of the stage, whose passes add up totals."""
        inputs = {v: self.layouts[v] for v in self.local.graph.inputs if v in self.layouts.known}
        return StageDevices(self.mesh, inputs, self.layouts.same, tuple(totals), self.zeros(totals))

    def zeros(self, totals: Sequence[int]) -> Callable[[], list[jax.Array]]:
        """A program that makes the totals before the first microbatch."""
        specs = self._specs(totals)

        def local() -> list[jax.Array]:
            return [self._zero(v) for v in totals]

        return jax.jit(
            jax.shard_map(local, mesh=self.mesh, in_specs=(), out_specs=specs, check_vma=False)
        )

    def _zero(self, value: int) -> jax.Array:
        kind, layout = self.local.types[value], self.layouts[value]
        shape = layout.local_shape(kind.shape, self.local.mesh)
        assert self.local.time is not None
        zero = start(
            self.local.time.totals[value], jax.ShapeDtypeStruct(shape, jax_dtype(kind.dtype))
        )
        return zero[None] if layout.partial else zero

    def _specs(self, values: Iterable[int]) -> list[PartitionSpec]:
        return [crossing_spec(self.layouts[v]) for v in values]

    def _spec_of(self, value: int, joined: bool) -> Any:
        spec = crossing_spec(self.layouts[value])
        return [spec] * self.local.plan.microbatches if joined else spec


@dataclass(frozen=True)
class _Body:
    """What one device runs of a fragment."""

    stage: StagePrograms
    border: ProgramBorder
    program: LocalProgram

    @property
    def total_specs(self) -> list[PartitionSpec]:
        return [crossing_spec(self.stage.layouts[v]) for v in self.border.fragment.totals]

    def __call__(self, moment: Any, given_up: Sequence[Any], kept: Sequence[Any]) -> Any:
        border, fragment, program = self.border, self.border.fragment, self.program
        totals, gone = given_up[: len(fragment.totals)], given_up[len(fragment.totals) :]
        arrays = dict(zip((*border.donates, *border.keeps), (*gone, *kept), strict=True))
        taken = [self._taken(v, arrays[v]) for v in fragment.takes]
        now = moment if self.stage.layouts.timed(fragment) else None
        made = self.stage.local.results(program, taken, now)
        left = map(_leaving, made, (program.shards[v].sharding for v in program.outputs))
        sums = [
            self._added(v, total, next(left))
            for v, total in zip(fragment.totals, totals, strict=True)
        ]
        gives = [next(left) for _ in fragment.gives]
        sent = [_together([next(left) for _ in message.values]) for message in border.messages]
        return moment + 0, sums, gives, sent, [*left]

    def _taken(self, value: int, array: Any) -> Any:
        local, layout = self.stage.local, self.stage.layouts[value]
        if value in self.border.joins:
            return jnp.stack([_entering(piece, layout) for piece in array])
        held, time = _entering(array, layout), local.time
        if self.border.fragment.kind == "update" and time is not None and value in time.totals:
            return held.astype(jax_dtype(local.types[value].dtype))
        return held

    def _added(self, value: int, total: Any, part: Any) -> Any:
        """The total and this microbatch's part of it."""
        time = self.stage.local.time
        assert time is not None
        return JOIN[time.totals[value]](total, part.astype(total.dtype))


def _together(arrays: Sequence[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else jnp.stack(arrays)


def _leaving(array: Any, layout: Sharding) -> Any:
    return array[None] if layout.partial else array


def _entering(array: Any, layout: Sharding) -> Any:
    return array[0] if layout.partial else array


def link(
    stages: Sequence[StagePrograms], cut: Stages, donated: frozenset[int]
) -> tuple[list[PassProgram], dict[str, StageProgram]]:
    """What one device runs of each fragment of a step, and all of them as programs, by name."""
    own = donated - _shared(stages, cut)
    found = borders([stage.layouts for stage in stages], cut, own)
    passes, programs = list[PassProgram](), dict[str, StageProgram]()
    for border, name in zip(found, pass_names(found), strict=True):
        stage = stages[border.fragment.stage]
        passes.append(stage.pass_program(border, name))
        programs[name] = stage.build(border, passes[-1])
    return passes, programs


def _shared(stages: Sequence[StagePrograms], cut: Stages) -> set[int]:
    """Inputs that several stages on the same devices read: one array for all, which none may give up."""
    found: set[int] = set()
    for value, where in zip(stages[0].local.graph.inputs, cut.homes, strict=True):
        if len({tuple(stages[s].mesh.devices.flat) for s in where}) < len(where):
            found.add(value)
    return found
