"""Who is alive when, as data: lives of values in ticks, whatever the mesh."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...ir.passes.microbatch import TimeAxis
from ...ir.program import Program

FIRST, LAST = 0, 1  # the two moments of a tick that stands for many layers


@dataclass(frozen=True, slots=True)
class Segment:
    """Ticks `start..end` (both included) of a value's life, and how many are alive."""

    value: int
    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Span:
    """Ticks of one repeat of a block (or one op outside blocks) and how many it stands for."""

    start: int
    end: int
    count: int
    name: tuple[str, int] | None


@dataclass(frozen=True)
class Lifetimes:
    """Who is alive when, for one program and microbatch count; independent of any mesh."""

    program: Program
    microbatches: int
    segments: tuple[Segment, ...]
    ticks: int
    causes: dict[int, str]
    scale: dict[int, float]  # value -> factor on its bytes (microbatches, wider accumulators)
    copies: dict[
        int, int
    ]  # copies of parameters, and lent gradients -> whose memory they share if they lie alike

    def counted(self, microbatches: int) -> Lifetimes:
        """The same lives with another microbatch count; both counts are above 1."""
        time = self.program.time
        split = (time.split.keys() if isinstance(time, TimeAxis) else set[int]()) - set(
            self.program.graph.inputs
        )
        fewer = self.microbatches / microbatches
        scale = {v: s * fewer if v in split else s for v, s in self.scale.items()}
        found = replace(self, microbatches=microbatches, scale=scale)
        found.__dict__["arrays"] = self.arrays  # only sizes differ
        return found

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        table = np.array(
            [(s.value, s.start, s.end, s.first, s.last) for s in self.segments], np.int64
        )
        return tuple(table.reshape(-1, 5).T)

    def profile(self, nbytes: dict[int, float]) -> np.ndarray:
        """Bytes alive, shape (2 moments, ticks), given local bytes per value."""
        values, start, end, first, last = self.arrays
        size = np.array([nbytes[int(v)] for v in values])
        total, count = np.zeros((2, self.ticks + 1)), self.ticks + 1
        for moment, weight in ((FIRST, first), (LAST, last)):
            total[moment] = np.bincount(start, size * weight, count) - np.bincount(
                end + 1, size * weight, count
            )
        return np.cumsum(total, axis=1)[:, :-1]

    def alive(self, moment: int, tick: int) -> dict[int, int]:
        """Value -> how many are alive at one moment."""
        values, start, end, first, last = self.arrays
        weight = last if moment == LAST else first
        here = np.flatnonzero((start <= tick) & (tick <= end) & (weight > 0))
        counts: dict[int, int] = defaultdict(int)
        for i in here:
            counts[int(values[i])] += int(weight[i])
        return counts
