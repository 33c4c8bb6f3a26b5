"""The forward pass in units that a pipeline may be cut between: layers, and parts of what is no layer.

    whole graph   start | layer | layer | layer | layer | layer | end
    small graph   start | layer | layer (stands for 3)  | layer | end
    kinds           0       1           2                   3     4

Units are found from the blocks of a folded graph, and where little crosses (`narrow.py`); a stage is a run of
them. Everything that a pipeline costs is known per *kind*, so it does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from math import ceil

import numpy as np

from ...ir.analysis.blocks import HEAVY, Block, Folded
from ...ir.errors import PlanError
from ...ir.graph import Graph, Op
from ...ir.pipeline.stage_places import Classes
from ...ir.pipeline.stages import Fragment, Stages, cut_stages
from ...ir.program import Program
from ...ir.units import counted
from .dealing import deal
from .narrow import OpOrder

MANY = 1_000_003  # what a repeated layer is counted as, so that its share of a count can be told
HALVES = ("first half", "second half")


@dataclass(frozen=True)
class Units:
    """`kinds[i]` is the kind of unit i of the whole graph, which begins at op `cuts[i]`;
    kind k begins at op `small_cuts[k]` of the small graph, is called `names[k]`, has so much `work[k]` in the
    forward pass, and `alike[k]` is a number that repeats of one layer share."""

    kinds: tuple[int, ...]
    cuts: tuple[int, ...]
    small_cuts: tuple[int, ...]
    names: tuple[str, ...]
    alike: tuple[int, ...]
    work: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def middle(self) -> int:
        """The kind that most units are."""
        return max(range(len(self.names)), key=self.kinds.count)

    @cached_property
    def repeats(self) -> int:
        """How many units run the same ops as the one that most are."""
        return self.repeats_of(self.middle)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each of them ends: the number of the unit after it."""
        alike = self.alike[self.middle]
        return tuple(i + 1 for i, kind in enumerate(self.kinds) if self.alike[kind] == alike)

    def repeats_of(self, kind: int | None) -> int:
        """How many units run the same ops as those of a kind; 0 of None."""
        if kind is None:
            return 0
        return sum(self.alike[each] == self.alike[kind] for each in self.kinds)

    def evenly(self, stages: int) -> tuple[int, ...]:
        """The first unit of each stage: equally many for each, or equal work where no layer repeats."""
        if self.repeats == 1:
            firsts = deal([[self.work[kind] for kind in self.kinds]] * stages)
            assert firsts is not None
            return firsts
        return tuple(ceil(len(self) * stage / stages) for stage in range(stages))

    def words(self, first: int, last: int) -> str:
        """Units `first` up to, not including, `last`: "start, layers 1-6, first half of layer 7"."""
        found: list[tuple[str, int]] = []  # name, number of the layer or part
        for i in range(first, last):
            name = self.names[self.kinds[i]]
            whole = found and found[-1] == (HALVES[0], self._numbers[i]) and name == HALVES[1]
            found[len(found) - bool(whole) :] = [("layer" if whole else name, self._numbers[i])]
        groups = (
            (name, [number for _, number in run])
            for name, run in groupby(found, key=lambda each: each[0])
        )
        return ", ".join(_words(name, numbers) for name, numbers in groups)

    @cached_property
    def _numbers(self) -> tuple[int, ...]:
        """Of each unit, which of its sort it is, from 1; both halves of a layer have its number."""
        layers, parts, found = 0, 0, list[int]()
        for kind in self.kinds:
            name = self.names[kind]
            layers, parts = layers + (name in ("layer", HALVES[0])), parts + (name == "part")
            found.append(parts if name == "part" else layers)
        return tuple(found)


def _words(name: str, numbers: list[int]) -> str:
    if name in HALVES:
        return f"{name} of layer {numbers[0]}"
    if name not in ("layer", "part"):
        return name
    return f"{name}s {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{name} {numbers[0]}"


@dataclass(frozen=True)
class _Found:
    """A unit: where it begins in the whole graph and, or what stands for it, in the small one."""

    start: int
    small: int
    name: str
    alike: int


def find_units(folded: Folded, program: Program, stages: int = 0) -> Units:
    """Cut places of a folded graph.

    Args:
        program: its small graph, prepared without recomputation.
        stages: layers are cut in two, where little crosses, if there are fewer than two for each.
    """
    finder = _Finder(folded, program)
    found = finder.find(stages)
    numbers = {place: k for k, place in enumerate(dict.fromkeys(each.small for each in found))}
    kinds = tuple(numbers[each.small] for each in found)
    small_cuts = (0, *list(numbers)[1:])
    together = np.add.reduceat(finder.line.work, small_cuts)
    first = [kinds.index(k) for k in range(len(numbers))]
    return Units(
        kinds, (0, *(each.start for each in found[1:])), small_cuts, tuple(found[i].name for i in first),
        tuple(found[i].alike for i in first), tuple(float(w) / kinds.count(k) for k, w in enumerate(together)),
    )  # fmt: skip


class _Finder:
    def __init__(self, folded: Folded, program: Program):
        self.whole, self.blocks = folded.whole, folded.blocks
        self.forward = frozenset(op.tag for op in Classes(program).forward)
        self.line = OpOrder.of(folded.small, self.forward)
        self.layers = [block for block in folded.blocks if self._is_layer(block)]
        kept = np.ones(len(folded.whole.ops), bool)
        for block in folded.blocks:
            for repeat in range(block.repeats):
                first = block.start + repeat * block.period
                kept[first : first + block.period] = block.kept(repeat) == repeat
        self.small_at = [
            0,
            *accumulate(map(int, kept)),
        ]  # of each op of the whole graph: how many come before it
        self.whole_at = np.flatnonzero(kept)

    def find(self, stages: int) -> list[_Found]:
        found: list[_Found] = []
        halves = sum(block.repeats for block in self.layers) < 2 * stages
        at = 0
        for number, block in enumerate(self.layers):
            found += self._unlike(at, block.start, "between" if found else "start")
            half = self._middle(block) if halves else None
            for repeat in range(block.repeats):
                start, kept = (block.start + n * block.period for n in (repeat, block.kept(repeat)))
                here, there = start, self.small_at[kept]
                found.append(
                    _Found(here, there, "layer" if half is None else HALVES[0], 2 * number)
                )
                if half is not None:
                    found.append(_Found(here + half, there + half, HALVES[1], 2 * number + 1))
            at = block.start + block.period * block.repeats
        found += self._unlike(at, len(self.whole.ops), "end" if found else "all")
        return found

    def _is_layer(self, block: Block) -> bool:
        ops = self.whole.ops[block.start : block.start + block.period]
        return any(op.kind in HEAVY and op.tag in self.forward for op in ops)

    def _unlike(self, first: int, end: int, name: str) -> list[_Found]:
        """What is no layer: one unit, or parts if it is much."""
        if self.forward.isdisjoint(op.tag for op in self.whole.ops[first:end]):
            return []
        small = self.small_at[first]
        cuts = self.line.cuts(small, self.small_at[end], self._closed)
        starts = [(first, small), *((int(self.whole_at[cut]), cut) for cut in cuts)]
        return [_Found(here, there, "part" if cuts else name, -1 - there) for here, there in starts]

    @cached_property
    def _closed(self) -> frozenset[int]:
        """Places in the small graph within repeats that stand for others."""
        found = set[int]()
        for block in self.blocks:
            if block.repeats > 3:
                end = self.small_at[block.start + block.period * block.repeats]
                found.update(range(self.small_at[block.start] + 1, end))
        return frozenset(found)

    def _middle(self, block: Block) -> int | None:
        """How many ops of a layer are its first half."""
        first = self.small_at[block.start + block.period]
        found = self.line.middle(first, first + block.period)
        return None if found is None else found - first


@dataclass(frozen=True, eq=False)
class Cut:
    """A prepared small program cut into its kinds of units, as if each were a stage."""

    units: Units
    program: Program
    stages: Stages

    @classmethod
    def of(cls, units: Units, program: Program, captured: Graph, microbatches: int) -> Cut:
        """Raises PlanError where the step cannot be pipelined."""
        cuts = units.small_cuts
        stages = cut_stages(program, captured, cuts, microbatches, splits=True, folded=True)
        return cls(units, program, stages)

    def fragments(self, kind: int) -> Iterator[Fragment]:
        """All that one kind of unit runs."""
        yield self.stages.prepare[kind]
        yield self.stages.forward[kind]
        yield self.stages.backward[kind]
        yield self.stages.weight[kind]
        yield from (fragments[kind] for fragments in self.stages.updates)

    @cached_property
    def owners(self) -> dict[int, frozenset[int]]:
        """Value -> the kinds of units that hold it."""
        found: dict[int, set[int]] = {}
        for kind in range(len(self.units.names)):
            for fragment in self.fragments(kind):
                for value in _made(fragment.ops):
                    found.setdefault(value, set()).add(kind)
        for value, homes in zip(self.program.graph.inputs, self.stages.homes, strict=True):
            found.setdefault(value, set()).update(homes)
        return {value: frozenset(kinds) for value, kinds in found.items()}

    @cached_property
    def unread(self) -> dict[int, list[Op]]:
        """Kind -> ops whose results only layers that are folded away read (norms of their gradients)."""
        placed = {
            op.outputs
            for k in range(len(self.units.names))
            for f in self.fragments(k)
            for op in f.ops
        }
        found: dict[int, list[Op]] = {}
        owner = {value: max(kinds) for value, kinds in self.owners.items()}
        for op in self.program.graph.ops:
            if op.outputs not in placed and op.kind != "optimization_barrier":
                kind = next((owner[v] for v in op.inputs if v in owner), 0)
                owner.update(dict.fromkeys(op.outputs, kind))
                found.setdefault(kind, []).append(op)
        return found

    @cached_property
    def passes(self) -> dict[str, str]:
        """Op tag -> forward, backward (gradients of what comes in), weight, or once."""
        found: dict[str, str] = {}
        for kind in range(len(self.units.names)):
            for fragment in self.fragments(kind):
                name = (
                    fragment.kind if fragment.kind in ("forward", "backward", "weight") else "once"
                )
                found.update((op.tag, name) for op in fragment.ops)
        return found

    def class_of(self, tag: str) -> tuple[str, bool]:
        """The pass of an op, and whether the layers that most units are run it."""
        return self.passes.get(tag, "once"), self.kind_of(tag) == self.units.middle

    def kind_of(self, tag: str) -> int | None:
        """The kind of unit that runs an op, one of those alike; None for ops of no unit."""
        return self._kinds.get(tag)

    @cached_property
    def _kinds(self) -> dict[str, int]:
        middle = self.units.middle
        order = sorted(
            range(len(self.units.names)), key=lambda kind: kind == middle
        )  # of those alike, the middle one
        return {
            op.tag: kind
            for kind in order
            for fragment in self.fragments(kind)
            for op in fragment.ops
        }

    def saved(self, kind: int) -> tuple[int, ...]:
        """Values of one microbatch that the forward pass of a unit leaves for later."""
        return self.stages.forward[kind].gives

    def received(self, kind: int) -> tuple[int, ...]:
        """Values of an earlier unit that a unit's backward pass reads again."""
        late = {v for name in ("backward", "weight") for v in self.stages.of(name, kind).takes}  # type: ignore[arg-type]
        sent = {v for fragment in self.stages.forward for v, to in fragment.sends if to == kind}
        return tuple(sorted(late & sent))

    def kept(self, kind: int) -> tuple[int, ...]:
        """Values that wait for the pass that makes the gradients of weights."""
        return self.stages.weight[kind].takes

    def crossing(self, kind: int) -> tuple[int, ...]:
        """Values that a unit hands to later ones, per microbatch."""
        return tuple(dict.fromkeys(v for v, _ in self.stages.forward[kind].sends))


def _made(ops: Iterable[Op]) -> Iterator[int]:
    """What ops make and, within loops, what their bodies have."""
    for op in ops:
        yield from op.outputs
        for region in op.regions:
            yield from region.inputs
            yield from _made(region.ops)


def counted_as_many(graph: Graph, units: Units) -> Graph:
    """The small graph with its repeated layers counted as `MANY`."""

    def many(op: Op) -> Op:
        return replace(op, count=MANY) if op.count > 1 else op

    counts = tuple(MANY if count > 1 else 1 for count in graph.input_counts)
    return replace(graph, ops=tuple(map(many, graph.ops)), input_counts=counts)


def check_enough(units: Units, stages: int, devices: int) -> None:
    """Raises PlanError where there are fewer units than stages; the fix divides the devices."""
    if len(units) < stages:
        near = [n for n in range(1, len(units) + 1) if devices % n == 0][-3:]
        raise PlanError(
            f"the forward pass has {counted(len(units), 'part')} to cut between, fewer than {stages} stages.",
            where="request: pp", fix=f"{' or '.join(map(str, near))} {'stage' if near == [1] else 'stages'}",
        )  # fmt: skip


def runs_of(units: Units, first: int, last: int) -> tuple[int, ...]:
    """How many units of each kind a stage of units `first` to `last` has."""
    found = [0] * len(units.names)
    for kind in units.kinds[first:last]:
        found[kind] += 1
    return tuple(found)
