"""Bytes on one device of a stage: the lives of its layers, and what more microbatches leave behind.

    peak = the stage's layers with one microbatch on its way
         + (held - 1) * what one microbatch's forward pass leaves for later

The first are lives as without a pipeline, but for what a forward pass leaves: each pass is a program of its own, which
makes all of that from its start, and takes all of it to its end.

Lives are worked out once per program, repeated layers counted as `MANY`, and read off for any number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...ir.cluster import Cluster
from ...ir.graph import Op
from ...ir.microbatch import TimeAxis
from ...ir.program import Program
from ...ir.roles import roles
from ..memory.ledger import Ledger
from ..memory.lifetimes import Lifetimes, Segment, lifetimes, ticks_of
from ..memory.storage import as_xla
from ..solver.live import Demand
from ..space import Space
from .unit_costs import all_bytes, local_bytes
from .units import MANY, Cut, counted_as_many

Runs = tuple[int, ...]  # how many units of each kind a stage has


@dataclass(frozen=True, eq=False)
class Holdings:
    """Lives of one program, from which those of any stage are read."""

    cut: Cut
    lives: Lifetimes

    @classmethod
    def of(cls, cut: Cut, microbatches: int, cluster: Cluster) -> Holdings:
        program = cut.program
        many = replace(program, graph=counted_as_many(program.graph, cut.units))
        lives = lifetimes(many, microbatches, roles(program.graph), as_xla(program, cluster.device.kind))
        return cls(cut, _in_passes(cut, lives))

    def counted(self, microbatches: int) -> Holdings:
        """The same with another number of microbatches; both above 1, or equal."""
        if microbatches == self.lives.microbatches:
            return self
        found = Holdings(self.cut, self.lives.counted(microbatches))
        found.__dict__["owned"] = self.owned  # who holds what does not depend on it
        return found

    @property
    def split(self) -> Mapping[int, int]:
        """Value -> the dim that microbatches cut."""
        return _split(self.cut.program)

    @cached_property
    def owned(self) -> np.ndarray:
        """Shape (segments, kinds): which kinds of units hold the value; all of them where nobody does."""
        found = np.ones((len(self.lives.segments), len(self.cut.units.names)), bool)
        for i, each in enumerate(self.lives.segments):
            if kinds := self.cut.owners.get(each.value):
                found[i] = [kind in kinds for kind in range(found.shape[1])]
        return found

    def weights(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """Of each segment on a stage, as the first and as the last of its layers runs."""
        _, _, _, first, last = self.lives.arrays
        many = np.where(self.owned, np.array(runs), 0).max(axis=1)
        return _counted(first, many), _counted(last, many)

    def of_stage(self, runs: Runs) -> Lifetimes:
        """The lives on a stage, one microbatch at a time."""
        weights = zip(*self.weights(runs), strict=True)
        pairs = zip(self.lives.segments, weights, strict=True)
        kept = [replace(s, first=int(first), last=int(last)) for s, (first, last) in pairs if first or last]
        return replace(self.lives, segments=tuple(kept))

    def left(self, runs: Runs, late: bool = False) -> dict[int, int]:
        """Value -> how many of it one microbatch leaves on a stage; with `late`, of what waits for weight passes."""
        found: dict[int, int] = {}
        inputs = self.cut.program.graph.inputs
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
        found = []
        for value, many in self.left(runs).items() if held > 1 else ():
            sizes, node = all_bytes(space, value)
            if node is not None:
                found.append(Demand(node, shift, shift + 2 * self.lives.ticks, (held - 1) * many * sizes))
        return found


def _in_passes(cut: Cut, lives: Lifetimes) -> Lifetimes:
    """What forward passes leave lives from the first forward op to the last one of the backward pass.

    That is stored, also what within one program would be made again or be part of another value.
    """
    inside = [each for op, each in _ticks(lives) if cut.passes.get(op.tag, "once") != "once"]
    graph, split = cut.program.graph, _split(cut.program) if lives.microbatches > 1 else {}
    left = {v for kind in range(len(cut.units.names)) for v in cut.saved(kind)} - set(graph.inputs)
    if not inside or not left:
        return lives
    start, end = inside[0][0], max(last for _, last in inside)
    many = {v: op.count for op in lives.program.graph.ops for v in op.outputs if v in left}
    held = [Segment(v, start, end, many.get(v, 1), many.get(v, 1)) for v in left]
    others = [each for each in lives.segments if each.value not in left]
    later = [replace(s, start=max(s.start, end + 1)) for s in lives.segments if s.value in left and s.end > end]
    return replace(
        lives, segments=(*others, *held, *later),
        causes=dict.fromkeys(left, "activations") | lives.causes,
        scale={v: 1 / lives.microbatches if v in split else 1.0 for v in left} | lives.scale,
    )  # fmt: skip


def _split(program: Program) -> Mapping[int, int]:
    return program.time.split if isinstance(program.time, TimeAxis) else {}


def _ticks(lives: Lifetimes) -> Iterator[tuple[Op, tuple[int, int]]]:
    """Each op of the program and its first and last tick."""
    tick = 1
    for op in lives.program.graph.ops:
        long = ticks_of(op)
        yield op, (tick, tick + long - 1)
        tick += long


def _counted(weight: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Weights of `MANY` layers (or one fewer) as those of so many."""
    return np.where(weight >= MANY - 1, np.maximum(0, many - (MANY - weight)), np.minimum(weight, many))


@dataclass(eq=False)
class StageMemory:
    """Peaks of stages under one solution."""

    holdings: Holdings
    space: Space
    choices: Sequence[int]
    _peaks: dict[Runs, tuple[float, float, float]] = field(default_factory=dict)

    @cached_property
    def _sizes(self) -> np.ndarray:
        nbytes = Ledger(self.space, self.holdings.lives).local_bytes(tuple(self.choices))
        return np.array([nbytes[each.value] for each in self.holdings.lives.segments])

    def parts(self, runs: Runs) -> tuple[float, float, float]:
        """Peak with one microbatch; bytes that one leaves behind; of these, what waits for weight passes."""
        if runs not in self._peaks:
            lives = self.holdings.lives
            _, start, end, _, _ = lives.arrays
            most = 0.0
            for weight in self.holdings.weights(runs):
                total = np.zeros(lives.ticks + 1)
                np.add.at(total, start, self._sizes * weight)
                np.add.at(total, end + 1, -self._sizes * weight)
                most = max(most, float(np.cumsum(total)[:-1].max()))
            left, late = (
                sum(n * local_bytes(self.space, self.choices, v) for v, n in self.holdings.left(runs, when).items())
                for when in (False, True)
            )
            self._peaks[runs] = most, left, late
        return self._peaks[runs]

    def by_cause(self, runs: Runs, held: float) -> dict[str, float]:
        """The peak's bytes by cause."""
        lives = self.holdings.of_stage(runs)
        ledger = Ledger(self.space, lives)
        _, at = ledger.peak(ledger.local_bytes(tuple(self.choices)))
        found = ledger.by_cause(tuple(self.choices), at)
        found["microbatches in flight"] = (held - 1) * self.parts(runs)[1]
        return {cause: size for cause, size in found.items() if size}
