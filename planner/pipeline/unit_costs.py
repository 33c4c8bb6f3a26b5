"""What a solution of the intra-operator problem costs in each kind of unit of the forward pass.

Seconds are sums over the ops of one kind, so a stage of any layers is priced by adding up. Where communication runs
beside computation, what may hide is summed apart, and the longer side counts of a *stage's* pass: one layer's
exchanges hide behind another's products. No stage takes longer than its units one by one would.

    pass      alone + max(C + s H, H + s C)        backward and weight together, unless schedules split them
    once      apart + what gathers of weights add to the first forward pass, reductions to the last backward pass
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.execution import OVERLAPS, OverlapKind
from ...ir.graph import Op
from ...ir.passes.microbatch import TimeAxis
from ..intra.hideable import flow_of
from ..intra.outline import often
from ..intra.space import Space, Transfer
from ..intra.windows import SHARE
from .units import Cut


@dataclass(frozen=True, slots=True)
class Busy:
    """Seconds of one pass: of computation, of communication that runs `beside` it, and of what holds all up."""

    compute: float = 0.0
    beside: float = 0.0
    alone: float = 0.0

    @property
    def seconds(self) -> float:
        compute, beside = self.compute, self.beside
        return self.alone + max(compute + SHARE * beside, beside + SHARE * compute)

    def __add__(self, other: Busy) -> Busy:
        return Busy(
            self.compute + other.compute, self.beside + other.beside, self.alone + other.alone
        )

    def with_beside(self, more: float) -> float:
        """Seconds that so much more communication beside the pass adds to it."""
        return Busy(self.compute, self.beside + more, self.alone).seconds - self.seconds

    @property
    def serial(self) -> Busy:
        """The same if nothing overlapped."""
        return Busy(self.compute, 0.0, self.alone + self.beside)


@dataclass(frozen=True, slots=True)
class UnitSeconds:
    """One unit, or several: `forward`, `backward`, `weight` of one microbatch; once per step what is done `apart`, what
    is gathered `early`, behind the first forward pass, and what is reduced `late`, behind the last backward pass;
    `sent` and `handed` are bytes that one device gives to the next stage per microbatch, and once per step to others.
    """

    forward: Busy
    backward: Busy
    weight: Busy
    apart: float = 0.0
    early: float = 0.0
    late: float = 0.0
    sent: float = 0.0
    handed: float = 0.0

    @property
    def whole(self) -> float:
        """Seconds of a backward pass with the gradients of weights."""
        return (self.backward + self.weight).seconds

    @property
    def passes(self) -> float:
        """Seconds of one microbatch."""
        return self.forward.seconds + self.whole

    @property
    def once(self) -> float:
        """Seconds per step beside those of the passes."""
        both = self.backward + self.weight
        return self.apart + self.forward.with_beside(self.early) + both.with_beside(self.late)

    @property
    def hides(self) -> bool:
        """Whether any communication runs beside computation."""
        passes = self.forward.beside + self.backward.beside + self.weight.beside
        return passes + self.early + self.late > 0

    @property
    def serial(self) -> UnitSeconds:
        """The same if nothing overlapped."""
        once = self.apart + self.early + self.late
        forward, backward, weight = self.forward.serial, self.backward.serial, self.weight.serial
        return UnitSeconds(forward, backward, weight, once, sent=self.sent, handed=self.handed)


def together(runs: Sequence[float], each: Sequence[UnitSeconds]) -> UnitSeconds:
    """So many units of each kind, one after another; what crosses between them is left out."""
    pairs = [(n, unit) for n, unit in zip(runs, each, strict=True) if n]
    return UnitSeconds(
        _sum((n, u.forward) for n, u in pairs),
        _sum((n, u.backward) for n, u in pairs),
        _sum((n, u.weight) for n, u in pairs),
        apart=sum(n * u.apart for n, u in pairs),
        early=sum(n * u.early for n, u in pairs),
        late=sum(n * u.late for n, u in pairs),
        handed=sum(n * u.handed for n, u in pairs),
    )


def _sum(passes: Iterable[tuple[float, Busy]]) -> Busy:
    compute = beside = alone = 0.0
    for n, each in passes:
        compute += n * each.compute
        beside += n * each.beside
        alone += n * each.alone
    return Busy(compute, beside, alone)


def seconds_of_runs(each: Sequence[UnitSeconds], share: float) -> np.ndarray:
    """Of units `first` up to, not including, `last` in a row, at [first, last]: seconds per microbatch, a share of what
    is done once included."""

    def summed(*terms: float) -> np.ndarray:
        upto = np.concatenate([[0.0], np.cumsum(terms)])
        return upto[None, :] - upto[:, None]

    def busy(passes: Sequence[Busy], once: Sequence[float]) -> np.ndarray:
        compute, beside = (
            summed(*(p.compute for p in passes)),
            summed(*(p.beside for p in passes)),
        )
        long = np.maximum(compute + SHARE * beside, beside + SHARE * compute)
        beside = beside + summed(*once)
        longer = np.maximum(compute + SHARE * beside, beside + SHARE * compute)
        return summed(*(p.alone for p in passes)) + long + share * (longer - long)

    forward = busy([u.forward for u in each], [u.early for u in each])
    backward = busy([u.backward + u.weight for u in each], [u.late for u in each])
    return forward + backward + share * summed(*(u.apart for u in each))


def unit_seconds(
    cut: Cut, space: Space, choices: Sequence[int], overlap: Sequence[OverlapKind] = ()
) -> tuple[UnitSeconds, ...]:
    """Of each kind of unit, under one solution, where communication of these kinds may hide."""
    return _Seconds(cut, space, choices, overlap).run()


COMPUTE, ALONE = len(OVERLAPS), len(OVERLAPS) + 1  # columns after those of each kind of overlap


@dataclass
class _Seconds:
    """Sums are rows of seconds: of communication by kind, of computation, of what waits."""

    cut: Cut
    space: Space
    choices: Sequence[int]
    overlap: Sequence[OverlapKind]

    def run(self) -> tuple[UnitSeconds, ...]:
        self.tags = self.space.program.value_tags
        self.moves = self._transfers()
        return tuple(map(self._unit, range(len(self.cut.units.names))))

    def _transfers(self) -> dict[tuple[str, str], np.ndarray]:
        """(source, reader) -> one run of the layout changes between them."""
        found: dict[tuple[str, str], np.ndarray] = defaultdict(_none)
        flow = flow_of(self.space.program) if self.overlap else None
        for item in self.space.transfers:
            have, wanted = chosen_layouts(item, self.choices)
            if have != wanted:
                table = self.space.layouts.seconds(
                    np.array([have]), np.array([wanted]), item.nbytes, item.phase
                )
                kind = flow.kind(item.source, item.reader, item.phase) if flow else None
                column = OVERLAPS.index(kind) if kind in self.overlap and kind else ALONE
                found[item.source, item.reader][column] += float(table[0, 0])
        return found

    def _unit(self, kind: int) -> UnitSeconds:
        sums: dict[str, np.ndarray] = defaultdict(_none)
        alike = self.cut.units.kinds.count(kind)
        for fragment in self.cut.fragments(kind):
            name = fragment.kind if fragment.kind in ("forward", "backward", "weight") else "once"
            for op in fragment.ops:
                sums[name] += self._op(op) * (op.count / alike)
            for position in fragment.results:
                row = self._result(position)
                if name == "once":
                    sums[name] += row
                else:
                    sums[name][ALONE] += row.sum()
        for op in self.cut.unread.get(kind, ()):
            sums["once"] += self._op(op) * (op.count / alike)
        once = sums["once"]
        early, late = (float(once[OVERLAPS.index(each)]) for each in ("parameters", "gradients"))
        sent = self._bytes(self.cut.crossing(kind))
        handed = sum(self._bytes(v for v, _ in f[kind].sends) for f in self.cut.stages.updates)
        forward, backward, weight = (_busy(sums[k]) for k in ("forward", "backward", "weight"))
        apart = float(once.sum()) - early - late
        return UnitSeconds(forward, backward, weight, apart, early, late, sent, handed)

    def _op(self, op: Op) -> np.ndarray:
        """One run of an op, what it does to bring its operands included."""
        if op.regions:
            found = _none()
            for n, region in enumerate(op.regions):
                for inner in region.ops:
                    found += often(op, n) * self._op(inner)
            for (_, reader), seconds in self.moves.items():
                if reader.startswith(f"{op.tag}/in"):
                    found += seconds
            return found
        found = _none()
        for source in {self.tags[v] for v in op.inputs}:
            if (source, op.tag) in self.moves:
                found += self.moves[source, op.tag]
        if op.tag in self.space.op_node:
            choice = self.choices[self.space.op_node[op.tag]]
            settled = self.space.settled.get(op.tag)
            inside = float(settled[choice]) if settled is not None else 0.0
            found[ALONE] += inside
            found[COMPUTE] += float(self.space.own[op.tag][choice]) - inside
        return found

    def _result(self, position: int) -> np.ndarray:
        """Of bringing a result of the step to its layout."""
        graph = self.space.program.graph
        source = {o: graph.inputs[i] for i, o in graph.state}
        reader = self.tags[source[position]] if position in source else graph.output_name(position)
        return self.moves.get((self.tags[graph.outputs[position]], reader), _none())

    def _bytes(self, values: Iterable[int]) -> float:
        return sum(local_bytes(self.space, self.choices, v) for v in values)


def _none() -> np.ndarray:
    return np.zeros(len(OVERLAPS) + 2)


def _busy(row: np.ndarray) -> Busy:
    return Busy(float(row[COMPUTE]), float(row[:COMPUTE].sum()), float(row[ALONE]))


def chosen_layouts(item: Transfer, choices: Sequence[int]) -> tuple[int, int]:
    """The layout that a value has, and the one that its reader wants."""
    reader = item.consumer if item.consumer is not None else item.producer
    have, wanted = (
        table[0 if node is None or len(table) == 1 else choices[node]]
        for table, node in ((item.have, item.producer), (item.wanted, reader))
    )
    return int(have), int(wanted)


def local_bytes(space: Space, choices: Sequence[int], value: int) -> float:
    """Of one microbatch's part of a value on one device."""
    sizes, node = all_bytes(space, value)
    return float(sizes[0 if node is None or sizes.size == 1 else choices[node]])


def all_bytes(space: Space, value: int) -> tuple[np.ndarray, int | None]:
    """Of one microbatch's part of a value on one device, for each choice of the node that decides it."""
    graph, time = space.program.graph, space.program.time
    home = space.homes[space.program.value_tags[value]]
    split = isinstance(time, TimeAxis) and value in time.split
    whole = graph.types[value].nbytes / (space.microbatches if split else 1)
    return whole / space.layouts.ways(home.layouts), home.node
