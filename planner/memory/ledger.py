"""Bytes on one device: lifetimes joined with the layouts that a space offers.

Rows for the solver, the peak of a solution and what it is made of, the least that any plan needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import copy
from functools import lru_cache

import numpy as np

from ...ir.graph import TensorType
from ...ir.mesh import Mesh
from ...ir.passes.copies import settles
from ...ir.passes.microbatch import TimeAxis
from ..cost.kernels import free_values
from ..intra.space import Space
from ..solver.live import Demand
from .aliases import Alias
from .lives import FIRST, LAST, Lifetimes


class Ledger:
    """Lifetimes joined with a space: rows for the solver, peaks of solutions."""

    def __init__(self, space: Space, lives: Lifetimes):
        self.space, self.lives = space, lives
        self.types = space.program.graph.types
        self.tags = space.program.value_tags
        self._bytes: dict[int, tuple[int | None, np.ndarray]] = {}
        for value in lives.causes:
            home = space.homes[self.tags[value]]
            made_anywhere = home.node is None and value not in space.program.graph.constant_ids
            full = 0.0 if made_anywhere else self.types[value].nbytes * lives.scale[value]
            self._bytes[value] = (
                home.node,
                full / space.layouts.ways(home.layouts) * ~self._unmoved(value),
            )

    def over(self, lives: Lifetimes) -> Ledger:
        """The same bytes over other lives of the same values."""
        found = copy(self)
        found.lives = lives
        return found

    def local_bytes(self, choices: tuple[int, ...]) -> dict[int, float]:
        """Bytes of every value; a copy that changes nothing has none."""
        found = {
            value: float(sizes[choices[node]] if node is not None else sizes[0])
            for value, (node, sizes) in self._bytes.items()
        }
        same = [
            c
            for c, s in self.lives.copies.items()
            if self._layout(c, choices) == self._layout(s, choices)
        ]
        return found | dict.fromkeys(same, 0.0)

    def _unmoved(self, value: int) -> np.ndarray:
        """The choices of a copy's node at which it lies like its source, whatever others choose."""
        mine = self.space.homes[self.tags[value]]
        source = self.lives.copies.get(value)
        its = mine if source is None else self.space.homes[self.tags[source]]
        if source is None or its.node not in (None, mine.node):
            return np.zeros(len(mine.layouts), bool)
        return mine.layouts == its.layouts

    def _layout(self, value: int, choices: tuple[int, ...]) -> int:
        home = self.space.homes[self.tags[value]]
        return int(home.layouts[choices[home.node] if home.node is not None else 0])

    def peak(self, nbytes: dict[int, float]) -> tuple[float, tuple[int, int]]:
        """Largest total, and the (moment, tick) where it is reached."""
        profile = self.lives.profile(nbytes)
        moment, tick = np.unravel_index(int(profile.argmax()), profile.shape)
        return float(profile[moment, tick]), (int(moment), int(tick))

    def demands(self, found: Mapping[int, Alias]) -> Iterator[Demand]:
        """All lives whose bytes a choice decides, when the nodes of copies may share memory.
        Moments are the ticks as `FIRST`, then the ticks as `LAST`."""
        for segment in self.lives.segments:
            node, sizes = self._bytes[segment.value]
            if node is None:
                continue
            if node in found:
                alias = found[node]
                sizes = sizes[alias.choices()]
                sizes = np.where(alias.shared() & (segment.value in alias.values), 0.0, sizes)
            for moment, weight in ((FIRST, segment.first), (LAST, segment.last)):
                if weight > 0:
                    shift = moment * self.lives.ticks
                    yield Demand(
                        node, segment.start + shift, segment.end + 1 + shift, weight * sizes
                    )

    def fixed(self) -> np.ndarray:
        """Bytes at each moment that no choice decides."""
        nbytes = {v: float(s[0]) if node is None else 0.0 for v, (node, s) in self._bytes.items()}
        return self.lives.profile(nbytes).ravel()

    def by_cause(self, choices: tuple[int, ...], at: tuple[int, int]) -> dict[str, float]:
        """What lies at a moment; a copy is what was gathered, or one that lies as its source does."""
        nbytes, causes = self.local_bytes(choices), self.lives.causes
        copies = [
            op for op in self.space.program.graph.ops if op.kind == "copy" and not settles(op)
        ]
        copied = {op.outputs[0]: op.inputs[0] for op in copies}
        found: dict[str, float] = defaultdict(float)
        for value, count in self.lives.alive(*at).items():
            same = value in copied and self._layout(value, choices) == self._layout(
                copied[value], choices
            )
            found["copies" if same else causes[value]] += count * nbytes[value]
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def least_peak(lives: Lifetimes, mesh: Mesh) -> float:
    """Bytes that no plan on this mesh can do without: every value cut as finely as it divides."""
    graph, time = lives.program.graph, lives.program.time
    split: Mapping[int, int] = (
        time.split if isinstance(time, TimeAxis) and lives.microbatches > 1 else {}
    )
    free = free_values(lives.program) | lives.copies.keys()
    nbytes: dict[int, float] = {}
    for value in lives.causes:
        shape = list(graph.types[value].shape)
        if value in split:
            shape[split[value]] //= lives.microbatches
        size = 0.0 if value in free else graph.types[value].nbytes * lives.scale[value]
        nbytes[value] = size / _most_ways(tuple(shape), mesh)
    return float(lives.profile(nbytes).max())


def least_bytes(kind: TensorType, split: int | None, microbatches: int, mesh: Mesh) -> float:
    """Of one microbatch's part of a value, cut as finely as it divides; `split` is the dim cut in time."""
    shape = list(kind.shape)
    parts = 1 if split is None else microbatches
    if split is not None:
        shape[split] //= microbatches
    return kind.nbytes / parts / _most_ways(tuple(shape), mesh)


@lru_cache(maxsize=65536)
def _most_ways(shape: tuple[int, ...], mesh: Mesh) -> int:
    """Into how many shards the axes can cut a tensor whose dims they must divide."""
    left = {shape: 1}  # what remains of the dims -> ways
    for size in mesh.shape:
        for dims, ways in list(left.items()):
            for d, n in enumerate(dims):
                if n % size == 0:
                    less = (*dims[:d], n // size, *dims[d + 1 :])
                    left[less] = max(left.get(less, 1), ways * size)
    return max(left.values())
