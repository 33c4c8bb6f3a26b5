"""Lives of the values of a pipeline's stage, where each pass is a program of its own.

    prepare    state, casts and gathered weights
    forward    for one microbatch; what it leaves for the backward pass is among its results
    backward   with the gradients of weights; or without, and those are made in a pass of their own
    update     once per step; in rounds, with an exchange after each, where gradients are clipped by their norm

A program has all of its arguments to its end and all of its results from its start; what lies between is found as for
any program. So one timeline holds them one after another, and the lives of what goes from one to another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ...ir.analysis.roles import roles
from ...ir.execution import OverlapKind
from ...ir.execution_model import ExecutionModel
from ...ir.graph import ITEM_BYTES, Graph
from ...ir.passes.copies import settles
from ...ir.passes.microbatch import TimeAxis
from ...ir.program import Program
from ..memory.lifetimes import CopyReading, lifetimes, readings
from ..memory.lives import Lifetimes, Segment
from ..memory.storage import storage_of
from .units import Cut, counted_as_many


@dataclass(frozen=True)
class _Pass:
    """A program of all kinds of units, as part of the timeline that begins at tick `start`."""

    program: Program
    lives: Lifetimes
    readings: list[CopyReading]
    start: int

    @property
    def end(self) -> int:
        return self.start + self.lives.ticks - 1

    def later(self, each: Segment) -> Segment:
        return replace(each, start=each.start + self.start, end=each.end + self.start)


@dataclass(eq=False)
class Passes:
    """The passes of a program that is cut into units, its repeated layers counted as many, as a backend runs them."""

    cut: Cut
    microbatches: int
    execution_model: ExecutionModel
    splits: bool  # whether gradients of weights have a pass of their own
    overlap: tuple[OverlapKind, ...] = ()

    def __post_init__(self) -> None:
        self.graph: Graph = counted_as_many(self.cut.program.graph, self.cut.units)
        self.phases = self.cut.program.phases
        time = self.cut.program.time
        self.time = time if isinstance(time, TimeAxis) and self.microbatches > 1 else None
        self.totals = frozenset(self.time.totals if self.time else ()) & self._read_after
        self.many = {v: op.count for op in self.graph.ops for v in op.outputs}

    @cached_property
    def apart(self) -> Passes:
        """With gradients of weights in a pass of their own."""
        return replace(self, splits=True)

    @cached_property
    def owned(self) -> np.ndarray:
        """Shape (segments of `lives`, kinds): which kinds of units hold the value; all of them where nobody does."""
        return self.owners(each.value for each in self.lives.segments)

    def owners(self, values: Iterable[int]) -> np.ndarray:
        """The same of some values."""
        kinds, everyone = (
            range(len(self.cut.units.names)),
            frozenset(range(len(self.cut.units.names))),
        )
        found = [self.cut.owners.get(value) or everyone for value in values]
        return np.array([[kind in owning for kind in kinds] for owning in found], bool).reshape(
            -1, len(kinds)
        )

    @cached_property
    def _ops(self) -> list[list[int]]:
        """Positions of the ops of each pass."""
        stages = self.cut.stages
        backward = (
            [stages.backward, stages.weight]
            if self.splits
            else [(*stages.backward, *stages.weight)]
        )
        programs = (stages.prepare, stages.forward, *backward, *stages.updates)
        made = [{v for f in program for op in f.ops for v in op.outputs} for program in programs]
        made[self._first_update] |= {
            v for ops in self.cut.unread.values() for op in ops for v in op.outputs
        }
        ops = list(enumerate(self.graph.ops))
        return [[k for k, op in ops if not part.isdisjoint(op.outputs)] for part in made]

    @property
    def _first_update(self) -> int:
        return 4 if self.splits else 3

    @cached_property
    def _reads(self) -> list[set[int]]:
        return [{v for k in ops for v in self.graph.ops[k].inputs} for ops in self._ops]

    @cached_property
    def _makes(self) -> list[set[int]]:
        return [{v for k in ops for v in self.graph.ops[k].outputs} for ops in self._ops]

    @property
    def _read_after(self) -> set[int]:
        """Values that the passes make for the updates."""
        late = self._first_update
        read = set(self.graph.outputs).union(*self._reads[late:])
        return read & set[int]().union(*self._makes[1:late])

    @cached_property
    def _last(self) -> dict[int, int]:
        """Value that a pass makes for a later one -> the last that reads it."""
        found: dict[int, int] = {}
        made = set[int]()
        for number, (reads, makes) in enumerate(zip(self._reads, self._makes, strict=True)):
            found.update(dict.fromkeys(reads & made - makes, number))
            made |= makes
        return found | {v: len(self._ops) - 1 for v in self.graph.outputs if v in made}

    def _last_read(self, value: int) -> int:
        """The last pass that reads a value, be it that other units make it anew there."""
        reading = (number for number, reads in enumerate(self._reads) if value in reads)
        return self._last[value] if value in self._last else max(reading)

    @cached_property
    def parts(self) -> list[_Pass]:
        found: list[_Pass] = []
        for number, positions in enumerate(self._ops):
            program = self._program(number, positions)
            storage = storage_of(program, self.execution_model)
            start = found[-1].end + 1 if found else 0
            reads = readings(program, storage)
            lives = lifetimes(program, 1, {}, storage, self.overlap, self.cut.program)
            found.append(_Pass(program, lives, reads, start))
        return found

    def _program(self, number: int, positions: list[int]) -> Program:
        graph, reads, makes = self.graph, self._reads[number], self._makes[number]
        inputs = tuple(sorted(reads - makes - graph.constant_ids))
        outputs = tuple(sorted((makes & self._last.keys()) - self.totals))
        counts = (
            dict(zip(graph.inputs, graph.input_counts, strict=True)) if graph.input_counts else {}
        )
        state = [(graph.inputs[i], graph.outputs[o], i in graph.donated) for i, o in graph.state]
        renewed = [
            (inputs.index(a), outputs.index(b), d)
            for a, b, d in state
            if a in inputs and b in outputs
        ]
        small = replace(
            graph, ops=tuple(graph.ops[k] for k in positions), inputs=inputs, outputs=outputs,
            input_names=(), output_names=(), input_tags=(),
            input_counts=tuple(counts.get(v, self.many.get(v, 1)) for v in inputs),
            state=tuple((a, b) for a, b, _ in renewed), donated=frozenset(a for a, _, d in renewed if d),
        )  # fmt: skip
        return Program(small, tuple(self.phases[k] for k in positions), self.cut.program.time)

    # ------------------------------------------------------------ the timeline

    @property
    def programs(self) -> list[tuple[int, int]]:
        """The first and the last tick of each pass."""
        return [(part.start, part.end) for part in self.parts]

    def border(self, kind: int, name: Literal["forward", "backward"]) -> Iterator[Segment]:
        """What the first unit of a stage takes from the stage before, and hands on to it in the backward pass; or the
        last unit, the other way round. A program has what it takes to its end, and what is widened as f32 too.
        """
        number = 1 if name == "forward" else 2
        here = self.parts[number]
        fragments = getattr(self.cut.stages, name)
        taken = {v for each in fragments for v, to in each.sends if to == kind}
        given = {v for v, _ in fragments[kind].sends} - self._last.keys()
        again = self.cut.received(kind) if name == "forward" else ()
        ends = {
            v: self.parts[self._last_read(v)].end if v in again else here.end
            for v in (*taken, *given)
        }
        widened = self.execution_model.widened
        for v, end in ends.items():
            yield Segment(v, here.start, end, 1, 1)
            if v in taken and self.graph.types[v].dtype in widened:
                yield from [Segment(v, here.start, here.end, 1, 1)] * 2

    @property
    def handed(self) -> Iterator[tuple[Segment, int]]:
        """What updates hand to other units, and a kind of unit: that which has it as a result of a round, and that
        which gets it, until it is read for the last time."""
        for part, fragments in zip(
            self.parts[self._first_update :], self.cut.stages.updates, strict=True
        ):
            for kind, fragment in enumerate(fragments):
                for value, to in fragment.sends:
                    last = self.parts[self._last[value]] if value in self._last else part
                    yield Segment(value, part.start, part.end, 1, 1), kind
                    yield Segment(value, part.start, max(part.end, last.end), 1, 1), to

    @cached_property
    def lives(self) -> Lifetimes:
        """Of one microbatch; the first `held` segments are of what is kept from program to program."""
        graph, parts, crossing = self.graph, self.parts, self.crossing
        inside = [each for part in parts for each in self._inside(part)]
        counts = graph.input_counts or (1,) * len(graph.inputs)
        ticks = parts[-1].end + 1
        whole = [
            Segment(v, 0, ticks - 1, count, count)
            for v, count in zip(graph.inputs, counts, strict=True)
        ]
        made = [
            (part, set(part.program.graph.inputs)) for part in reversed(parts)
        ]  # inside loops too
        causes = {
            v: cause
            for part, given in made
            for v, cause in part.lives.causes.items()
            if v not in given
        }
        names = roles(self.cut.program.graph)
        causes |= {v: names.get(k, "inputs") for k, v in enumerate(graph.inputs)}
        causes = {each.value: "activations" for each in crossing} | causes
        segments = (*whole, *crossing, *inside)
        scale = {each.value: self._scale(each.value) for each in segments}
        copies = self._one_array({each.value for each in crossing})
        copies |= {c: s for part in parts for c, s in part.lives.copies.items()}
        return Lifetimes(
            replace(self.cut.program, graph=graph),
            self.microbatches,
            segments,
            ticks,
            causes,
            scale,
            copies,
        )

    def _one_array(self, crossing: AbstractSet[int]) -> dict[int, int]:
        """What may be the same memory as a copy that `prepare` leaves: its source, where that is a copy that no other
        program reads, and further copies of it."""
        left: dict[int, list[int]] = defaultdict(list)
        for copy, source in self.copies.items():
            if copy in crossing and source in self.copies and source not in crossing:
                left[source].append(copy)
        return {same: first for source, (first, *more) in left.items() for same in (source, *more)}

    @cached_property
    def copies(self) -> dict[int, int]:
        """Copies that are prepared, and what they show if their layout is the same."""
        prepared = {self.graph.ops[k].outputs[0] for k in self._ops[0]}
        return {copy: source for copy, source in self.copied.items() if copy in prepared}

    @cached_property
    def copied(self) -> dict[int, int]:
        """All copies of what is not a gradient, and what they are of."""
        copies = [op for op in self.graph.ops if op.kind == "copy" and not settles(op)]
        return {op.outputs[0]: op.inputs[0] for op in copies}

    @property
    def constants(self) -> frozenset[int]:
        return self.graph.constant_ids

    @property
    def held(self) -> int:
        return len(self.graph.inputs) + len(self.crossing)

    @cached_property
    def crossing(self) -> list[Segment]:
        """What a pass makes for later ones, or what microbatches add up, of all layers."""
        return [*self._sums(), *self._handed_on()]

    def _sums(self) -> Iterator[Segment]:
        for v in sorted(self.totals):
            yield Segment(v, 0, self.parts[-1].end, self.many[v], self.many[v])

    def _handed_on(self) -> Iterator[Segment]:
        for number, part in enumerate(self.parts):
            for v in part.program.graph.outputs:
                if v in self._makes[number] and not self._renewed(part, v):
                    yield Segment(
                        v, part.start, self.parts[self._last[v]].end, self.many[v], self.many[v]
                    )

    def _renewed(self, part: _Pass, value: int) -> bool:
        """New state is written over donated old state, but where ops run alone."""
        if self.execution_model.runs_ops_alone:
            return False
        graph = part.program.graph
        return any(graph.outputs[o] == value for i, o in graph.state if i in graph.donated)

    def _inside(self, part: _Pass) -> Iterator[Segment]:
        """Lives within one program: of arguments and results only those of wider copies."""
        graph = part.program.graph
        inputs, outputs = set(graph.inputs), set(graph.outputs)
        own = set(inputs)  # whose first life is that of the argument itself
        for each in part.lives.segments:
            width = int(part.lives.scale[each.value])
            copies = (
                width - 1
                if each.value in outputs
                else 1
                if each.value in inputs | self.totals
                else width
            )
            yield from [part.later(each)] * (copies if each.value not in own else 0)
            own.discard(each.value)

    def _scale(self, value: int) -> float:
        if self.time is None or value in self.graph.inputs:
            return 1.0
        if value in self.totals:
            return max(1.0, 4 / max(1, ITEM_BYTES[self.graph.types[value].dtype]))
        return 1 / self.microbatches if value in self.time.split else 1.0

    @cached_property
    def readings(self) -> list[list[CopyReading]]:
        """Of each pass."""
        return [
            [replace(each, lives=tuple(map(part.later, each.lives))) for each in part.readings]
            for part in self.parts
        ]
