"""The fragments of pipeline stages as jitted programs, each on the devices of its stage.

Values cross from one program to another as global arrays. Within a stage a value keeps the layout
that its op left it in. A sum that is still owed over some mesh axes crosses as a stack, one slice
for each device that owes a part, so that gradients of all microbatches are added up first and
reduced once. To another stage a value goes with its sums settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from ...ir.graph import Op
from ...ir.local.program import LocalProgram
from ...ir.pipeline.stages import Fragment, Stages
from ...ir.rules import rule_of
from ...ir.rules.rule import operand_sharding
from ...ir.sharding import Sharding, replicated
from ..runtime.programs import Message, StageDevices, StageProgram
from .devices import crossing_spec, named_sharding, options_for, partition_spec
from .dtypes import jax_dtype
from .joins import JOIN, start
from .spmd import KnownValues, LocalArray, LocalStep

PER_MICROBATCH = ("forward", "backward", "weight")


@dataclass
class StagePrograms:
    """One stage: its walker, its devices, and the layout of each value known there."""

    local: LocalStep
    mesh: DeviceMesh
    layouts: dict[int, Sharding] = field(default_factory=dict)
    leaving: dict[int, Sharding] = field(default_factory=dict)  # values sent to other stages
    same: dict[int, int] = field(default_factory=dict)  # prepared value -> the value it equals
    late: set[int] = field(default_factory=set)  # what its updates take

    def __post_init__(self) -> None:
        types = self.local.types
        self.layouts |= {v: replicated(types[v].rank) for v in self.local.graph.constant_ids}

    # ------------------------------------------------------------ layouts

    def know_inputs(self, inputs: Iterable[int]) -> None:
        """Inputs of the step that this stage reads or keeps."""
        self.layouts |= {v: self.local.decisions.slot(self.local.decisions.tags[v]) for v in inputs}

    def know(self, ops: Sequence[Op]) -> None:
        """Results of ops, in order."""
        for op in ops:
            for k, value in enumerate(op.outputs):
                self.layouts[value] = self.local.decisions.leaves(op, k, self.layouts)

    def sharding(self, layout: Sharding) -> NamedSharding:
        return named_sharding(self.mesh, layout)

    def sharding_of(self, value: int) -> NamedSharding:
        return self.sharding(self.layouts[value])

    def send_as(self, value: int, others: Iterable[StagePrograms]) -> Sharding:
        """How a value leaves for other stages: as it is where all have the same mesh, else settled."""
        layout = self.layouts[value]
        alike = all(other.local.mesh == self.local.mesh for other in others)
        self.leaving[value] = layout if alike and layout.dims else Sharding(layout.dims)
        return self.leaving[value]

    def arrival(
        self, value: int, sent: Sharding, sender: StagePrograms, reader: Op | None
    ) -> Sharding:
        """How a value from another stage lies here: as there, or as its first reader wants it."""
        if self.local.mesh == sender.local.mesh:
            return sent
        if reader is None:
            return replicated(self.local.types[value].rank)
        rule, strategy = rule_of(reader, self.local.types), self.local.decisions.strategy(reader)
        return Sharding(
            operand_sharding(rule, strategy, self.local.mesh, reader.inputs.index(value)).dims
        )

    # ------------------------------------------------------------ programs

    def local_program(self, fragment: Fragment) -> LocalProgram:
        """What one device runs of a fragment. Sums that it leaves partial are handed on so."""
        local = self.local
        given = {v: self.layouts[v] for v in fragment.takes}
        timed = local.time is not None and fragment.kind in PER_MICROBATCH
        left = (*fragment.totals, *fragment.gives, *(v for v, _ in fragment.sends))
        return local.piece(fragment.ops, given, timed, dict.fromkeys(left)).program

    def build(
        self, fragment: Fragment, donated: frozenset[int], stages: Sequence[StagePrograms]
    ) -> StageProgram:
        """Jit a fragment whose values are all known.

        Args:
            donated: inputs of the step that may be given up, values of theirs.
            stages: all of the step, to which it may send.
        """
        if fragment.kind == "prepare":
            fragment = self._without_copies(fragment)
        messages = self._messages(fragment, stages)
        gone = tuple(
            v
            for v in fragment.takes
            if v in donated and v in fragment.drops and self._renewed(fragment, v)
        )
        kept = tuple(v for v in fragment.takes if v not in gone)
        body = _Body(self, fragment, gone, kept, [message.values for message in messages])
        ins = (
            PartitionSpec(),
            [*body.total_specs, *self._specs(gone)],
            [self._spec_of(v, fragment) for v in kept],
        )
        outs = (
            PartitionSpec(), body.total_specs, self._specs(fragment.gives),
            [crossing_spec(message.leaves) for message in messages],
            [partition_spec(self.ends(o)) for o in fragment.results],
        )  # fmt: skip
        sharded = jax.shard_map(body, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        sharded.__name__ = f"{fragment.kind}_{fragment.stage}"  # type: ignore[attr-defined]  for profilers
        call = jax.jit(
            sharded, donate_argnums=1, compiler_options=options_for(self.mesh, self.local.plan)
        )
        joined = frozenset(v for v in kept if self.joins(fragment, v))
        return StageProgram(fragment, call, gone, kept, joined, messages)

    def _messages(self, fragment: Fragment, stages: Sequence[StagePrograms]) -> tuple[Message, ...]:
        """Scalars of one type and way go together: a norm of all gradients is made of one per parameter."""
        types = self.local.types
        goals: dict[int, list[int]] = {}
        for value, stage in fragment.sends:
            goals.setdefault(value, []).append(stage)
        groups: dict[Any, list[int]] = {}
        for value, goal in goals.items():
            alone = value if types[value].rank or types[value].dtype == "key" else None
            groups.setdefault((alone, types[value].dtype, tuple(goal)), []).append(value)
        return tuple(
            self._message(fragment, tuple(found), key[2], stages) for key, found in groups.items()
        )

    def _message(
        self,
        fragment: Fragment,
        values: tuple[int, ...],
        goal: Iterable[int],
        stages: Sequence[StagePrograms],
    ) -> Message:
        first = values[0]
        kind, layout = self.local.types[first], self.leaving[first]
        if len(values) > 1:
            return Message(
                values, (len(values),), kind.dtype, layout, dict.fromkeys(goal, replicated(0))
            )
        owed = [self.local.mesh.ways(tuple(sorted(layout.partial)))] if layout.partial else []
        arrivals = {s: stages[s].layouts[first] for s in goal}
        return Message(values, (*owed, *self._part(fragment, first)), kind.dtype, layout, arrivals)

    def _part(self, fragment: Fragment, value: int) -> tuple[int, ...]:
        """The shape that a fragment makes of a value: of one microbatch, if it runs for each."""
        shape, time = list(self.local.types[value].shape), self.local.time
        if time is not None and fragment.kind in PER_MICROBATCH and value in time.split:
            shape[time.split[value]] //= self.local.plan.microbatches
        return tuple(shape)

    def devices(self, totals: Sequence[int]) -> StageDevices:
        """What the driver knows of the stage, whose passes add up totals."""
        inputs = {v: self.layouts[v] for v in self.local.graph.inputs if v in self.layouts}
        return StageDevices(self.mesh, inputs, self.same, tuple(totals), self.zeros(totals))

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

    def ends(self, position: int) -> Sharding:
        """The layout of an output: carried state leaves as it came in."""
        graph = self.local.graph
        source = {o: graph.inputs[i] for i, o in graph.state}
        if position in source:
            return self.layouts[source[position]]
        return Sharding(self.layouts[graph.outputs[position]].dims)

    def _renewed(self, fragment: Fragment, value: int) -> bool:
        """Whether the fragment makes the new value of an input, which may take its place: no update reads it under
        another number."""
        graph = self.local.graph
        outputs = {graph.inputs[i]: o for i, o in graph.state}
        read = {self.same[v] for v in self.late & self.same.keys()}
        return outputs.get(value) in fragment.results and value not in read

    def _without_copies(self, fragment: Fragment) -> Fragment:
        """Copies that keep the layout are the value itself; others to one layout, as of weights gathered for the
        forward and for the backward pass, are one: passes of both kinds alternate, so both would live all along."""
        made: dict[tuple[int, Sharding], int] = {}
        for op in fragment.ops:
            if op.kind != "copy":
                continue
            (value,), layout = op.outputs, self.layouts[op.outputs[0]]
            source = self.same.get(op.inputs[0], op.inputs[0])
            if self.layouts[op.inputs[0]] == layout and (
                source in fragment.takes or source in fragment.gives
            ):
                self.same[value] = source
            elif (
                value in fragment.gives
                and (first := made.setdefault((source, layout), value)) != value
            ):
                self.same[value] = first
        return replace(fragment, gives=tuple(v for v in fragment.gives if v not in self.same))

    def _specs(self, values: Iterable[int]) -> list[PartitionSpec]:
        return [crossing_spec(self.layouts[v]) for v in values]

    def _spec_of(self, value: int, fragment: Fragment) -> Any:
        spec = crossing_spec(self.layouts[value])
        return [spec] * self.local.plan.microbatches if self.joins(fragment, value) else spec

    def joins(self, fragment: Fragment, value: int) -> bool:
        """Whether a fragment takes what all microbatches made of a value; the step's inputs are whole as they are."""
        time, graph = self.local.time, self.local.graph
        made = time is not None and value in time.split and value not in graph.inputs
        return fragment.kind == "update" and made


@dataclass(frozen=True)
class _Body:
    """What one device runs of a fragment."""

    stage: StagePrograms
    fragment: Fragment
    gone: tuple[int, ...]
    kept: tuple[int, ...]
    sent: Sequence[tuple[int, ...]]

    @property
    def total_specs(self) -> list[PartitionSpec]:
        return [crossing_spec(self.stage.layouts[v]) for v in self.fragment.totals]

    def __call__(self, moment: Any, given_up: Sequence[Any], kept: Sequence[Any]) -> Any:
        local, fragment = self.stage.local, self.fragment
        timed = local.time is not None and fragment.kind in PER_MICROBATCH
        scope = KnownValues({}, moment if timed else None)
        count = len(fragment.totals)
        for value, array in zip((*self.gone, *self.kept), (*given_up[count:], *kept), strict=True):
            scope.values[value] = self._taken(value, array, scope)
        local.run(fragment.ops, scope)
        sums = [
            self._added(v, a, scope) for v, a in zip(fragment.totals, given_up[:count], strict=True)
        ]
        gives = [_leaving(scope.values[v]) for v in fragment.gives]
        sent = [
            self._together([_leaving(self._settled(v, scope)) for v in values])
            for values in self.sent
        ]
        graph = local.graph
        results = [
            local.bring(scope.values[graph.outputs[o]], self.stage.ends(o))
            for o in fragment.results
        ]
        return moment + 0, sums, gives, sent, results

    def _taken(self, value: int, array: Any, scope: KnownValues) -> LocalArray:
        local, layout = self.stage.local, self.stage.layouts[value]
        if self.stage.joins(self.fragment, value) and local.time is not None:
            pieces = jnp.stack([_entering(piece, layout).array for piece in array])
            return local.joined(pieces, layout, local.time.split[value])
        held = _entering(array, layout)
        split = local.time.split if local.time is not None and scope.moment is not None else {}
        if value in split and value in local.graph.inputs:
            return LocalArray(local.now(held, layout, split[value], scope), layout)
        return (
            LocalArray(held.array.astype(jax_dtype(local.types[value].dtype)), layout)
            if self._is_total(value)
            else held
        )

    def _settled(self, value: int, scope: KnownValues) -> LocalArray:
        target = self.stage.leaving[value]
        return LocalArray(self.stage.local.bring(scope.values[value], target), target)

    def _together(self, arrays: Sequence[Any]) -> Any:
        return arrays[0] if len(arrays) == 1 else jnp.stack(arrays)

    def _is_total(self, value: int) -> bool:
        time = self.stage.local.time
        return self.fragment.kind == "update" and time is not None and value in time.totals

    def _added(self, value: int, total: Any, scope: KnownValues) -> Any:
        """The total and this microbatch's part of it."""
        time = self.stage.local.time
        assert time is not None
        held = scope.values[value]
        assert held.layout == self.stage.layouts[value], value
        part = _leaving(held)
        return JOIN[time.totals[value]](total, part.astype(total.dtype))


def _leaving(held: LocalArray) -> Any:
    return held.array[None] if held.layout.partial else held.array


def _entering(array: Any, layout: Sharding) -> LocalArray:
    return LocalArray(array[0] if layout.partial else array, layout)


def link(
    stages: Sequence[StagePrograms], cut: Stages, donated: frozenset[int]
) -> tuple[dict[tuple[str, int], StageProgram], list[list[StageProgram]]]:
    """Build all programs of a step: those of passes by (kind, stage), and the rounds of updates.

    Layouts are found in the order in which values can be handed on.
    """
    order = [*cut.prepare, *cut.forward, *reversed(cut.backward), *reversed(cut.weight)]
    order += [fragment for fragments in cut.updates for fragment in fragments]
    readers = _first_readers(order)
    for fragment in order:
        here = stages[fragment.stage]
        here.know(fragment.ops)
        goals: dict[int, list[int]] = {}
        for value, stage in fragment.sends:
            goals.setdefault(value, []).append(stage)
        for value, goal in goals.items():
            sent = here.send_as(value, [stages[s] for s in goal])
            for stage in goal:
                reader = readers.get((stage, value))
                stages[stage].layouts[value] = stages[stage].arrival(value, sent, here, reader)
    for fragment in (each for fragments in cut.updates for each in fragments):
        stages[fragment.stage].late.update(fragment.takes)
    own = donated - _shared(stages, cut)
    built = [stages[f.stage].build(f, own, stages) for f in order]
    passes = {(p.fragment.kind, p.fragment.stage): p for p in built if p.fragment.kind != "update"}
    flat = [p for p in built if p.fragment.kind == "update"]
    return passes, [flat[i : i + len(stages)] for i in range(0, len(flat), len(stages))]


def _shared(stages: Sequence[StagePrograms], cut: Stages) -> set[int]:
    """Inputs that several stages on the same devices read: one array for all, which none may give up."""
    found: set[int] = set()
    for value, where in zip(stages[0].local.graph.inputs, cut.homes, strict=True):
        if len({tuple(stages[s].mesh.devices.flat) for s in where}) < len(where):
            found.add(value)
    return found


def _first_readers(order: Iterable[Fragment]) -> dict[tuple[int, int], Op]:
    """(stage, value) -> the first op there that reads it and says how it wants it."""
    found: dict[tuple[int, int], Op] = {}
    for fragment in order:
        for op in fragment.ops:
            if not op.regions and op.kind != "optimization_barrier":
                for value in op.inputs:
                    found.setdefault((fragment.stage, value), op)
    return found
