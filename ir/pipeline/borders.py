"""How values lie on the stages of a pipeline, by a plan's decisions, and what crosses the border of each program.

Within a stage a value keeps the layout that its op left it in; to another stage it goes with its sums settled,
unless all have the same mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..graph import Op
from ..passes.decisions import Decisions
from ..rules import rule_of
from ..rules.rule import operand_sharding
from ..sharding import Sharding, replicated
from .stages import Fragment, Stages

PER_MICROBATCH = ("forward", "backward", "weight")


@dataclass(frozen=True)
class Message:
    """What leaves a stage as one array: a value, or several scalars of one type as a vector.

    `arrivals` tell how it lies on each stage that it goes to.
    """

    values: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    leaves: Sharding
    arrivals: Mapping[int, Sharding]


@dataclass(frozen=True)
class ProgramBorder:
    """What crosses into and out of the program of a fragment."""

    fragment: Fragment
    donates: tuple[int, ...]  # values taken that are given up
    keeps: tuple[int, ...]
    joins: frozenset[int]  # values kept of which it takes a list, one for each microbatch
    messages: tuple[Message, ...]

    @property
    def sends(self) -> tuple[int, ...]:
        """Values that it sends, message by message."""
        return tuple(v for message in self.messages for v in message.values)

    @property
    def receivers(self) -> list[int]:
        """Stages that it sends to."""
        return sorted({stage for message in self.messages for stage in message.arrivals})


@dataclass
class StageLayouts:
    """The layout of each value known on a stage: `layouts[value]`."""

    decisions: Decisions
    known: dict[int, Sharding] = field(default_factory=lambda: {})
    leaving: dict[int, Sharding] = field(default_factory=lambda: {})  # values sent to other stages
    same: dict[int, int] = field(
        default_factory=lambda: {}
    )  # prepared value -> the value it equals
    late: set[int] = field(default_factory=lambda: set[int]())  # what its updates take

    def __post_init__(self) -> None:
        types = self.decisions.types
        self.known |= {v: replicated(types[v].rank) for v in self.decisions.graph.constant_ids}

    def __getitem__(self, value: int) -> Sharding:
        return self.known[value]

    def know_inputs(self, inputs: Iterable[int]) -> None:
        """Inputs of the step that this stage reads or keeps."""
        self.known |= {v: self.decisions.slot(self.decisions.tags[v]) for v in inputs}

    def know(self, ops: Sequence[Op]) -> None:
        """Results of ops, in order."""
        for op in ops:
            for k, value in enumerate(op.outputs):
                self.known[value] = self.decisions.leaves(op, k, self.known)

    def send_as(self, value: int, others: Iterable[StageLayouts]) -> Sharding:
        """How a value leaves for other stages: as it is where all have the same mesh, else settled."""
        layout = self.known[value]
        alike = all(other.decisions.mesh == self.decisions.mesh for other in others)
        self.leaving[value] = layout if alike and layout.dims else Sharding(layout.dims)
        return self.leaving[value]

    def arrival(
        self, value: int, sent: Sharding, sender: StageLayouts, reader: Op | None
    ) -> Sharding:
        """How a value from another stage lies here: as there, or as its first reader wants it."""
        if self.decisions.mesh == sender.decisions.mesh:
            return sent
        if reader is None:
            return replicated(self.decisions.types[value].rank)
        rule, operand = rule_of(reader, self.decisions.types), reader.inputs.index(value)
        return Sharding(operand_sharding(rule, *self.decisions.cut(reader), operand).dims)

    def joins(self, fragment: Fragment, value: int) -> bool:
        """Whether a fragment takes what all microbatches made of a value; the step's inputs are whole as they are."""
        time, graph = self.decisions.time, self.decisions.graph
        made = time is not None and value in time.split and value not in graph.inputs
        return fragment.kind == "update" and made

    def timed(self, fragment: Fragment) -> bool:
        """Whether a fragment runs once per microbatch, on that one's part of the batch."""
        return self.decisions.time is not None and fragment.kind in PER_MICROBATCH

    def ends(self, position: int) -> Sharding:
        """The layout of an output: carried state leaves as it came in."""
        graph = self.decisions.graph
        source = {o: graph.inputs[i] for i, o in graph.state}
        if position in source:
            return self.known[source[position]]
        return Sharding(self.known[graph.outputs[position]].dims)

    def _renewed(self, fragment: Fragment, value: int) -> bool:
        """Whether the fragment makes the new value of an input, which may take its place: no update reads it under
        another number."""
        graph = self.decisions.graph
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
            (value,), layout = op.outputs, self.known[op.outputs[0]]
            source = self.same.get(op.inputs[0], op.inputs[0])
            if self.known[op.inputs[0]] == layout and (
                source in fragment.takes or source in fragment.gives
            ):
                self.same[value] = source
            elif (
                value in fragment.gives
                and (first := made.setdefault((source, layout), value)) != value
            ):
                self.same[value] = first
        return replace(fragment, gives=tuple(v for v in fragment.gives if v not in self.same))

    # ------------------------------------------------------------ borders

    def border(
        self, fragment: Fragment, donated: frozenset[int], stages: Sequence[StageLayouts]
    ) -> ProgramBorder:
        """What crosses into and out of a fragment whose values are all known.

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
        joined = frozenset(v for v in kept if self.joins(fragment, v))
        return ProgramBorder(fragment, gone, kept, joined, messages)

    def _messages(self, fragment: Fragment, stages: Sequence[StageLayouts]) -> tuple[Message, ...]:
        """Scalars of one type and way go together: a norm of all gradients is made of one per parameter."""
        types = self.decisions.types
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
        stages: Sequence[StageLayouts],
    ) -> Message:
        first = values[0]
        kind, layout = self.decisions.types[first], self.leaving[first]
        if len(values) > 1:
            return Message(
                values, (len(values),), kind.dtype, layout, dict.fromkeys(goal, replicated(0))
            )
        owed = [self.decisions.mesh.ways(tuple(sorted(layout.partial)))] if layout.partial else []
        arrivals = {s: stages[s].known[first] for s in goal}
        return Message(values, (*owed, *self._part(fragment, first)), kind.dtype, layout, arrivals)

    def _part(self, fragment: Fragment, value: int) -> tuple[int, ...]:
        """The shape that a fragment makes of a value: of one microbatch, if it runs for each."""
        shape, split = list(self.decisions.types[value].shape), self.decisions.split
        if self.timed(fragment) and value in split:
            shape[split[value]] //= self.decisions.plan.microbatches
        return tuple(shape)


def borders(
    stages: Sequence[StageLayouts], cut: Stages, donated: frozenset[int]
) -> list[ProgramBorder]:
    """Of all programs of a step, in an order in which values can be handed on. Stages know their inputs.

    Args:
        donated: values of inputs that may be given up.
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
                stages[stage].known[value] = stages[stage].arrival(value, sent, here, reader)
    for fragment in (each for fragments in cut.updates for each in fragments):
        stages[fragment.stage].late.update(fragment.takes)
    return [stages[f.stage].border(f, donated, stages) for f in order]


def _first_readers(order: Iterable[Fragment]) -> dict[tuple[int, int], Op]:
    """(stage, value) -> the first op there that reads it and says how it wants it."""
    found: dict[tuple[int, int], Op] = {}
    for fragment in order:
        for op in fragment.ops:
            if not op.regions and op.kind != "optimization_barrier":
                for value in op.inputs:
                    found.setdefault((fragment.stage, value), op)
    return found
