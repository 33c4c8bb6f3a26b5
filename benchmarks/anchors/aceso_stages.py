"""Seconds and memory of many stages at once, for operators that run in one way; what to recompute in each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from math import inf
from typing import Any

import numpy as np

from .aceso_profile import STATES, Recorded, Split, Stage
from .recompute import Choice, Recompute, cheapest, choices

CAPS = 6  # limits tried on the largest recomputed run


class Way:
    """All operators of a model, each run in a given way."""

    def __init__(self, recorded: Recorded, batch: int, splits: tuple[Split, ...]) -> None:
        self.recorded, self.splits = recorded, splits
        self.profile = p = recorded.profile(splits, batch)
        self.each = p.forward + p.backward
        self.work, self.weights, self.activations = map(
            _sums, (self.each, p.weights, p.activations)
        )
        self.arriving = np.array([*map(recorded.moving, p.input), 0.0])
        self.leaving = np.array([0.0, *map(recorded.moving, p.output)])
        self.inputs = np.array([*p.input, 0.0])
        self.reserved = [_Largest(p.reserved_forward), _Largest(p.reserved_backward)]

    def plain(self, a: Any, b: Any) -> Any:
        """Seconds of stages [a, b) with nothing recomputed."""
        return self.work[b] - self.work[a] + self.arriving[a] + self.leaving[b]

    def seconds(self, a: np.ndarray, b: np.ndarray, behind: int, memory: float) -> np.ndarray:
        """Of stages with k stages behind, whole layers recomputed alone; inf where one does not fit."""
        found, over = self.plain(a, b), self._over(a, b, behind, memory)
        large = np.flatnonzero(over > 0)
        if len(large):
            more = [
                self._more(r, over[large], a[large], b[large], behind) for r in self._recomputes
            ]
            found[large] += np.min(more, axis=0)
        return found

    def stage(
        self, first: int, last: int, behind: int, memory: float
    ) -> tuple[float, Stage | None]:
        """Seconds of one stage, and the stage with what it recomputes; parts of layers at its ends count too."""
        a, b = np.array([first]), np.array([last])
        plain = float(self.plain(first, last))
        splits, over = self.splits[first:last], float(self._over(a, b, behind, memory)[0])
        if over <= 0:
            return plain, Stage(first, last, splits, frozenset())
        found: tuple[float, Stage | None] = (inf, None)
        parts = self._parts(first, last)
        for cap in self._caps:
            kinds = [
                (self._front(kind, own.start, own.stop, cap), len(at))
                for (kind, own), at in parts.items()
            ]
            more, picked = cheapest(kinds, (over + cap) / (behind + 1))
            if plain + more < found[0]:
                again = (
                    start + i
                    for at, layers in zip(parts.values(), picked, strict=True)
                    for start, choice in zip(at, layers, strict=True)
                    for i in choice.operators
                )
                found = plain + more, Stage(first, last, splits, frozenset(again))
        return found

    def _parts(self, first: int, last: int) -> dict[tuple[int, range], list[int]]:
        """What a stage holds of layers: kind and which of their operators; where those layers begin."""
        found: dict[tuple[int, range], list[int]] = {}
        for kind, layers in enumerate(self._kinds):
            for layer in layers:
                own = range(
                    max(first, layer.start) - layer.start, min(last, layer.stop) - layer.start
                )
                if own:
                    found.setdefault((kind, own), []).append(layer.start)
        return found

    @cache  # noqa: B019
    def _front(self, kind: int, begin: int, end: int, cap: float) -> list[Choice]:
        layer = self._kinds[kind][0].start
        own = slice(layer + begin, layer + end)
        moved = choices(self.profile.forward[own], self.profile.activations[own], cap)
        return [
            Choice(c.freed, c.seconds, frozenset(i + begin for i in c.operators)) for c in moved
        ]

    def _over(self, a: np.ndarray, b: np.ndarray, behind: int, memory: float) -> np.ndarray:
        """MB over the limit with nothing recomputed."""
        weights = self.weights[b] - self.weights[a]
        kept = self.activations[b] - self.activations[a] + self.inputs[a]
        reserved = sum(largest.between(a, b - 1) for largest in self.reserved)
        return STATES * weights + np.maximum(weights, reserved) + (behind + 1) * kept - memory

    def _more(
        self, r: Recompute, over: np.ndarray, a: np.ndarray, b: np.ndarray, behind: int
    ) -> np.ndarray:
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
    def _caps(self) -> list[float]:
        """Limits on the largest recomputed run, from the least to the most that any good choice has."""
        runs = sorted({
            run
            for seconds, freed in self._layers
            for choice in choices(seconds, freed, inf)
            for run in _runs(choice, freed)
        })  # fmt: skip
        return sorted({runs[round(x)] for x in np.linspace(0, len(runs) - 1, CAPS)})

    @cached_property
    def _recomputes(self) -> list[Recompute]:
        return [Recompute(self._layers, cap) for cap in self._caps]

    @property
    def _layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Forward seconds and MB of each kind of layer's operators."""
        spans = [slice(layers[0].start, layers[0].stop) for layers in self._kinds]
        return [(self.profile.forward[own], self.profile.activations[own]) for own in spans]


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


def _runs(choice: Choice, freed: np.ndarray) -> Iterator[float]:
    """MB that each run of a choice frees."""
    for first in choice.operators:
        if first - 1 not in choice.operators:
            last = first
            while last + 1 in choice.operators:
                last += 1
            yield float(freed[first:last].sum())
