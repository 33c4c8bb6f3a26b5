"""Bytes on one device of a stage: the lives of its layers, and what more microbatches leave behind.

    peak = the stage's layers with one microbatch on its way
         + (held - 1) * what one microbatch's forward pass leaves for later

The first are lives as `passes` finds them, with copies of operands that are brought to another layout, and what the
stage takes from others and hands on.

Lives are worked out once per program, repeated layers counted as `MANY`, and read off for any number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...ir.execution import OverlapKind
from ...ir.execution_model import ExecutionModel
from ...ir.passes.microbatch import TimeAxis
from ...ir.pipeline.schedule import Schedule
from ...ir.program import Program
from ...ir.sharding import reshard
from ..intra.hideable import flow_of
from ..intra.space import Space, Transfer
from ..memory.ledger import Ledger
from ..memory.lives import Lifetimes, Segment
from ..solver.live import Demand
from .passes import Passes
from .unit_costs import all_bytes, chosen_layouts, local_bytes
from .units import MANY, Cut

Runs = tuple[int, ...]  # how many units of each kind a stage has
Copied = tuple[float, Sequence[Segment], int]  # bytes and lives of a copy, and what it is of


@dataclass(frozen=True, eq=False)
class Holdings:
    """Lives of one program, from which those of any stage are read; all counts above one share its passes."""

    cut: Cut
    microbatches: int
    passes: Passes
    _left: dict[tuple[Runs, bool], dict[int, int]] = field(default_factory=lambda: {}, repr=False)

    @classmethod
    def of(
        cls,
        cut: Cut,
        microbatches: int,
        execution_model: ExecutionModel,
        overlap: tuple[OverlapKind, ...] = (),
    ) -> Holdings:
        """With gradients of weights in the backward pass."""
        return cls(cut, microbatches, Passes(cut, microbatches, execution_model, False, overlap))

    @cached_property
    def lives(self) -> Lifetimes:
        known = self.passes.lives
        return (
            known if self.microbatches == known.microbatches else known.counted(self.microbatches)
        )

    @cached_property
    def apart(self) -> Holdings:
        """With gradients of weights in passes of their own."""
        return Holdings(self.cut, self.microbatches, self.passes.apart)

    def counted(self, microbatches: int) -> Holdings:
        """The same with another number of microbatches; both above 1, or equal."""
        return (
            self
            if microbatches == self.microbatches
            else Holdings(self.cut, microbatches, self.passes)
        )

    @property
    def split(self) -> Mapping[int, int]:
        """Value -> the dim that microbatches cut."""
        return _split(self.cut.program)

    def weights(self, runs: Runs, stages: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Of each segment on a stage, as the first and as the last of its layers runs; or, at least, on so many stages
        that have these units together, of each kind that they have at all one or more."""
        _, _, _, first, last = self.lives.arrays
        many = np.where(self.passes.owned, np.array(runs), 0).max(axis=1)
        return _counted(first, many, stages), _counted(last, many, stages)

    def in_programs(self, runs: Runs, stages: int = 1) -> Lifetimes:
        """The lives on a stage, or on several together, one microbatch at a time."""
        weights = zip(*self.weights(runs, stages), strict=True)
        pairs = zip(self.lives.segments, weights, strict=True)
        kept = [
            Segment(s.value, s.start, s.end, int(first), int(last))
            for s, (first, last) in pairs
            if first or last
        ]
        return replace(self.lives, segments=tuple(kept))

    def of_stage(self, runs: Runs) -> Lifetimes:
        """The least of them, be backward passes one program or two: as two, but for what the second waits for."""
        lives, programs = self.apart.in_programs(runs), self.apart.passes.programs
        waits = programs[2][0], programs[3][1]
        return replace(
            lives, segments=tuple(s for s in lives.segments if (s.start, s.end) != waits)
        )

    def left(self, runs: Runs, late: bool = False) -> Mapping[int, int]:
        """Value -> how many of it one microbatch leaves on a stage; with `late`, of what waits for weight passes."""
        if (runs, late) not in self._left:
            self._left[runs, late] = self._left_by(runs, late)
        return self._left[runs, late]

    def _left_by(self, runs: Runs, late: bool) -> dict[int, int]:
        found: dict[int, int] = {}
        inputs = set(self.cut.program.graph.inputs)
        for kind, many in enumerate(runs):
            for value in (self.cut.kept(kind) if late else self.cut.saved(kind)) if many else ():
                if value not in inputs:
                    found[value] = max(found.get(value, 0), many)
        if not late:
            first = next(kind for kind, many in enumerate(runs) if many)
            for value in self.cut.received(first):
                found.setdefault(value, 1)
        return found

    def demands(self, space: Space, runs: Runs, held: float, shift: int) -> list[Demand]:
        """What microbatches after the first leave behind, at all moments from `shift` on, for the solver."""
        found: list[Demand] = []
        for value, many in self.left(runs).items() if held > 1 else ():
            sizes, node = all_bytes(space, value)
            if node is not None:
                found.append(
                    Demand(node, shift, shift + 2 * self.lives.ticks, (held - 1) * many * sizes)
                )
        return found


def _shared(same: Sequence[Copied]) -> Copied:
    """One copy for several readers: from the first of them on, until the last is done."""
    size, longest, value = max(same, key=lambda copied: copied[1][-1].end)
    start = min(lives[0].start for _, lives, _ in same)
    return size, (replace(longest[0], start=start), *longest[1:]), value


def _split(program: Program) -> Mapping[int, int]:
    return program.time.split if isinstance(program.time, TimeAxis) else {}


def _counted(weight: np.ndarray, many: np.ndarray, stages: int = 1) -> np.ndarray:
    """Weights of `MANY` layers (or one fewer) as those of so many, on one stage or at least on so many together."""
    once = np.minimum(weight, many if stages == 1 else np.minimum(many, 1)) * stages
    return np.where(weight >= MANY - 1, np.maximum(0, many - stages * (MANY - weight)), once)


@dataclass(frozen=True)
class _Table:
    """Lives under one solution, one a row: ticks, weights as of `MANY` layers, local bytes, kinds of units, cause."""

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray
    sizes: np.ndarray
    owned: np.ndarray
    causes: tuple[str, ...]

    def alive(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of each row on a stage, as the first and as the last of its layers runs."""
        many = np.where(self.owned, np.array(runs), 0).max(axis=1)
        return self.sizes * _counted(self.first, many), self.sizes * _counted(self.last, many)

    def profile(self, nbytes: np.ndarray) -> np.ndarray:
        """Their sum at each tick."""
        count = int(self.end.max()) + 2
        return np.cumsum(
            np.bincount(self.start, nbytes, count) - np.bincount(self.end + 1, nbytes, count)
        )[:-1]


@dataclass(eq=False)
class StageMemory:
    """Peaks of stages under one solution."""

    holdings: Holdings
    space: Space
    choices: Sequence[int]
    _peaks: dict[Runs, tuple[float, float, float]] = field(default_factory=lambda: {})
    _borders: dict[int, np.ndarray] = field(default_factory=lambda: {})
    _local: dict[int, float] = field(default_factory=lambda: {})

    @cached_property
    def _apart(self) -> StageMemory:
        return StageMemory(self.holdings.apart, self.space, self.choices)

    def under(self, schedule: Schedule, rank: int) -> StageMemory:
        """With the passes that a rank has in a schedule. No stage waits for gradients of the first one, where all are
        made in one pass."""
        return self._apart if schedule.splits and 0 not in schedule.held[rank] else self

    @cached_property
    def _table(self) -> _Table:
        holdings, lives = self.holdings, self.holdings.lives
        moved, handed = list(self._moved()), list(holdings.passes.handed)
        segments = (*lives.segments, *(each for each, _ in (*moved, *handed)))
        names = ["moved"] * len(moved) + ["handed over"] * len(handed)
        causes = *(self._cause(each.value) for each in lives.segments), *names
        columns = [(each.start, each.end, each.first, each.last) for each in segments]
        sizes = [*self._sizes(), *(size for _, size in moved)]
        sizes += [self._local_bytes(each.value) for each, _ in handed]
        owned = holdings.passes.owners(each.value for each in segments)
        for row, (_, kind) in enumerate(handed, start=len(segments) - len(handed)):
            owned[row] = np.arange(owned.shape[1]) == kind
        start, end, first, last = np.array(columns, np.int64).T
        return _Table(start, end, first, last, np.array(sizes), owned, causes)

    def _cause(self, value: int) -> str:
        """A copy is what was gathered, or one that lies as its source does."""
        source = self.holdings.passes.copied.get(value)
        same = source is not None and self.layout(value) == self.layout(source)
        return "copies" if same else self.holdings.lives.causes[value]

    def _sizes(self) -> Iterator[float]:
        """Of each life. What is prepared in one layout twice is one array between programs, of which each makes wider
        copies of its own. A copy that another program leaves as a result is an array."""
        lives, passes = self.holdings.lives, self.holdings.passes
        nbytes = Ledger(self.space, lives).local_bytes(tuple(self.choices))
        seen = {
            (s.value, self.layout(s.value))
            for s in lives.segments[: passes.held]
            if s.value not in passes.copies
        }
        for i, each in enumerate(lives.segments):
            v, held = each.value, i < passes.held
            key = self.origin(v), self.layout(v)
            if v in passes.copies and key in seen:
                yield 0.0
            elif v in lives.copies and (held or v in passes.copies):
                yield self._local_bytes(v)
            else:
                yield nbytes[v]
            seen.update([key] if held else [])

    def origin(self, copy: int) -> int:
        """What a prepared copy is made of, through copies that lie alike; or what lies as it does; or itself."""
        copies, layout = self.holdings.passes.copies, self.layout(copy)
        while copy in copies and self.layout(copies[copy]) == layout:
            copy = copies[copy]
        return copies.get(copy, copy)

    def layout(self, value: int) -> int:
        return self.space.layout(self.space.program.value_tags[value], self.choices)

    def _moved(self) -> Iterator[tuple[Segment, float]]:
        """Operands brought to another layout, one copy for all ops of a program that want the same, and its bytes.
        What any device can make for itself (masks) is never laid out."""
        tags, layouts, constants = (
            self.space.program.value_tags,
            self.space.layouts,
            self.holdings.passes.constants,
        )
        items: dict[tuple[str, str], list[Transfer]] = {}
        for item in self.space.transfers:
            items.setdefault((item.source, item.reader), []).append(item)
        for program in self.holdings.passes.readings:
            found: dict[tuple[int, int], list[Copied]] = {}
            for each in program:
                if self.space.homes[tags[each.value]].node is None and each.value not in constants:
                    continue
                for item in items.get((tags[each.value], each.reader), ()):
                    have, wanted = chosen_layouts(item, self.choices)
                    if have != wanted:
                        size = item.nbytes / float(layouts.ways(np.array([wanted]))[0])
                        size *= self._parts_too(have, wanted)
                        found.setdefault((each.value, wanted), []).append(
                            (size, each.lives, each.value)
                        )
            copies = sorted(map(_shared, found.values()), key=lambda copy: copy[1][0].start)
            for (size, lives, _), start in zip(copies, self._starts(copies), strict=True):
                yield replace(lives[0], start=start), size
                yield from ((each, size) for each in lives[1:])

    def _starts(self, copies: Sequence[Copied]) -> Iterator[int]:
        """When copies are made: of gathered weights that hide, one gather early."""
        ahead, passes = None, self.holdings.passes
        early = "parameters" in passes.overlap
        batch = flow_of(passes.cut.program).batch if early else frozenset[str]()
        for _, lives, value in copies:
            start = lives[0].start
            if not early or self.space.program.value_tags[value] in batch:
                yield start
                continue
            yield start if ahead is None else ahead
            ahead = start

    def _parts_too(self, have: int, wanted: int) -> int:
        """How many times its bytes an exchange holds, where it exchanges parts that are arrays each: those given with
        those taken, then these with the whole that is put together of them."""
        if not self.holdings.passes.execution_model.exchanges_parts:
            return 1
        known = self.space.layouts.known
        steps = reshard(known[have], known[wanted]) or ()
        return 2 if any(step.kind == "all_to_all" for step in steps) else 1

    def travelling(self, value: int) -> float:
        """Bytes of one microbatch's part on one device when it travels."""
        return self.space.bytes_of(value) / float(
            self.space.layouts.ways(np.array([self.layout(value)]))[0]
        )

    def held_bytes(self, value: int) -> float:
        """Bytes of one device's part of what microbatches add up."""
        return self._local_bytes(value) * self.holdings.lives.scale[value]

    def _local_bytes(self, value: int) -> float:
        """Of one microbatch's part of a value on one device."""
        if value not in self._local:
            self._local[value] = local_bytes(self.space, self.choices, value)
        return self._local[value]

    def _profiles(self, runs: Runs) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As the first and as the last of a stage's layers runs: bytes of each row, and at each tick all of them, and
        those of what comes from other stages and goes to them."""
        table, border = self._table, self._border(runs)
        return [(nbytes, table.profile(nbytes) + border, border) for nbytes in table.alive(runs)]

    def _border(self, runs: Runs) -> np.ndarray:
        kinds, total = np.flatnonzero(runs), np.zeros(self.holdings.lives.ticks + 1)
        for kind in dict.fromkeys((int(kinds[0]), int(kinds[-1]))):
            if kind not in self._borders:
                passes, found = self.holdings.passes, np.zeros(total.size)
                for each in (*passes.border(kind, "forward"), *passes.border(kind, "backward")):
                    size = self._local_bytes(each.value)
                    found[each.start] += size
                    found[each.end + 1] -= size
                self._borders[kind] = found
            total += self._borders[kind]
        return np.cumsum(total)[:-1]

    def parts(self, runs: Runs) -> tuple[float, float, float]:
        """Peak with one microbatch; bytes that one leaves behind; of these, what waits for weight passes."""
        if runs not in self._peaks:
            most = max(float(total.max()) for _, total, _ in self._profiles(runs))
            left, late = (
                sum(n * self._local_bytes(v) for v, n in self.holdings.left(runs, when).items())
                for when in (False, True)
            )
            self._peaks[runs] = most, left, late
        return self._peaks[runs]

    def held(self, runs: Runs, microbatches: float) -> float:
        """Peak with so many microbatches on their way."""
        most, left, _ = self.parts(runs)
        return most + (microbatches - 1) * left

    def by_cause(self, runs: Runs, held: float) -> dict[str, float]:
        """The peak's bytes by cause, the largest first."""
        fullest, total, border = max(self._profiles(runs), key=lambda each: each[1].max())
        table, tick = self._table, int(total.argmax())
        found = {"handed over": float(border[tick])}
        for i in np.flatnonzero((table.start <= tick) & (tick <= table.end)):
            found[table.causes[i]] = found.get(table.causes[i], 0.0) + float(fullest[i])
        found = dict(sorted(found.items(), key=lambda each: -each[1]))
        found["microbatches in flight"] = (held - 1) * self.parts(runs)[1]
        return {cause: size for cause, size in found.items() if size}
