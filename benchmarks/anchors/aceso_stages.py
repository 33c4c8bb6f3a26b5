"""Seconds and memory of many stages at once, for operators that run in one way; what to recompute in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from .aceso_profile import STATES, Recorded, Split, Stage
from .recompute import Choice, Recompute, choices

CAPS = 6  # limits tried on the largest recomputed run


class Way:
    """All operators of a model, each run in a given way."""

    def __init__(self, recorded: Recorded, batch: int, splits: tuple[Split, ...]) -> None:
        self.recorded, self.splits = recorded, splits
        self.profile = p = recorded.profile(splits, batch)
        self.each = p.forward + p.backward
        self.work, self.weights, self.activations = map(_sums, (self.each, p.weights, p.activations))
        self.arriving = np.array([*map(recorded.moving, p.input), 0.0])
        self.leaving = np.array([0.0, *map(recorded.moving, p.output)])
        self.inputs = np.array([*p.input, 0.0])
        self.reserved = [_Largest(p.reserved_forward), _Largest(p.reserved_backward)]

    def seconds(self, a: np.ndarray, b: np.ndarray, behind: int, memory: float, slowest: float) -> np.ndarray:
        """Of stages [a, b) with k stages behind; inf where one does not fit or is slower than `slowest`."""
        found = self.work[b] - self.work[a] + self.arriving[a] + self.leaving[b]
        found[found > slowest] = np.inf
        over = self._over(a, b, behind, memory)
        large = np.flatnonzero((over > 0) & np.isfinite(found))
        if len(large):
            more = [self._more(r, over[large], a[large], b[large], behind) for r in self._recomputes]
            found[large] += np.min(more, axis=0)
        return found

    def stage(self, first: int, last: int, behind: int, memory: float) -> Stage:
        """One stage, with what its best plan recomputes."""
        splits = self.splits[first:last]
        a, b = np.array([first]), np.array([last])
        over = self._over(a, b, behind, memory)
        if over[0] <= 0:
            return Stage(first, last, splits, frozenset())
        best = min(self._recomputes, key=lambda r: float(self._more(r, over, a, b, behind)[0]))
        inside = [[layer for layer in layers if first <= layer.start and layer.stop <= last] for layers in self._kinds]
        picked = best.picked(float(over[0] + best.largest) / (behind + 1), [len(layers) for layers in inside])
        recomputed = frozenset(
            layer.start + i
            for layers, own in zip(inside, picked, strict=True)
            for layer, choice in zip(layers, own, strict=True)
            for i in choice.operators
        )
        return Stage(first, last, splits, recomputed)

    def _over(self, a: np.ndarray, b: np.ndarray, behind: int, memory: float) -> np.ndarray:
        """MB over the limit with nothing recomputed."""
        weights = self.weights[b] - self.weights[a]
        kept = self.activations[b] - self.activations[a] + self.inputs[a]
        reserved = sum(largest.between(a, b - 1) for largest in self.reserved)
        return STATES * weights + np.maximum(weights, reserved) + (behind + 1) * kept - memory

    def _more(self, r: Recompute, over: np.ndarray, a: np.ndarray, b: np.ndarray, behind: int) -> np.ndarray:
        whole = [np.maximum(done[b] - begun[a], 0).astype(float) for begun, done in self._counts]
        return r.seconds((over + r.largest) / (behind + 1), whole)

    @cached_property
    def _kinds(self) -> list[list[range]]:
        """Layers that are alike: the same operators, run in the same ways."""
        alike: dict[tuple[object, ...], list[range]] = {}
        for layer in self.recorded.layers:
            own = slice(layer.start, layer.stop)
            alike.setdefault((self.recorded.names[own], self.splits[own]), []).append(layer)
        return list(alike.values())

    @cached_property
    def _counts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per kind and position: how many layers begin before it, and how many end by it."""
        positions = np.arange(len(self.splits) + 1)
        return [
            (
                np.searchsorted([layer.start for layer in layers], positions),
                np.searchsorted([layer.stop for layer in layers], positions, side="right"),
            )
            for layers in self._kinds
        ]

    @cached_property
    def _recomputes(self) -> list[Recompute]:
        kinds = []
        for layers in self._kinds:
            own = slice(layers[0].start, layers[0].stop)
            kinds.append((self.profile.forward[own], self.profile.activations[own]))
        runs = sorted({run for s, f in kinds for choice in choices(s, f, np.inf) for run in _runs(choice, f)})
        return [Recompute(kinds, cap) for cap in sorted({runs[i] for i in _spread(len(runs), CAPS)})]


class _Largest:
    """The largest value of any span, by spans of powers of two."""

    def __init__(self, values: np.ndarray) -> None:
        self.levels = [values]
        while (step := 1 << (len(self.levels) - 1)) * 2 <= len(values):
            last = self.levels[-1]
            self.levels.append(np.maximum(last[:-step], last[step:]))

    def between(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of values a to b - 1; 0 where there are none."""
        found = np.zeros(len(a))
        level = np.log2(np.maximum(b - a, 1)).astype(int)
        for i, values in enumerate(self.levels):
            here = (level == i) & (b > a)
            found[here] = np.maximum(values[a[here]], values[b[here] - (1 << i)])
        return found


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _spread(count: int, most: int) -> Sequence[int]:
    """So many numbers below `count`, evenly."""
    return [round(x) for x in np.linspace(0, count - 1, min(count, most))]


def _runs(choice: Choice, freed: np.ndarray) -> Iterator[float]:
    """MB that each run of a choice frees."""
    for first in choice.operators:
        if first - 1 not in choice.operators:
            last = first
            while last + 1 in choice.operators:
                last += 1
            yield float(freed[first:last].sum())
