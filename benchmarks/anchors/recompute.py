"""What to recompute so that a stage fits: runs of operators within layers, cheapest per byte first.

A run of recomputed operators frees the activations of all but its last, and needs them again, one run at a
time. For a limit on the largest run, each layer has choices (MB freed, seconds more); along their convex
hull, layers are upgraded in order of seconds per MB, and the last upgrade takes the cheapest that suffices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """Recompute these operators of a layer (numbered within it)."""

    freed: float
    seconds: float
    operators: frozenset[int] = frozenset()


def choices(seconds: np.ndarray, freed: np.ndarray, largest: float) -> list[Choice]:
    """The best choices of one layer with no run freeing more than `largest`, least freed first.

    The layer's first operator is never recomputed, so that runs of two layers never meet.
    """
    fronts = [[Choice(0.0, 0.0)]] * 2  # choices among operators before each one
    for end in range(2, len(seconds) + 1):
        found = list(fronts[-1])
        for begin in range(1, end - 1):
            run = float(freed[begin : end - 1].sum())
            if run > largest:
                continue
            again, run_operators = float(seconds[begin:end].sum()), frozenset(range(begin, end))
            # the operator before a run is not recomputed
            for c in fronts[begin - 1]:
                found.append(Choice(c.freed + run, c.seconds + again, c.operators | run_operators))
        fronts.append(_front(found))
    return fronts[-1]


def _front(found: list[Choice]) -> list[Choice]:
    front: list[Choice] = []
    for choice in sorted(found, key=lambda c: (-c.freed, c.seconds)):
        if not front or choice.seconds < front[-1].seconds:
            front.append(choice)
    return front[::-1]


def hull(front: list[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of seconds over MB freed."""
    kept: list[Choice] = []
    for c in front:
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], c):
            kept.pop()
        kept.append(c)
    return kept


def _slope(a: Choice, b: Choice) -> float:
    return (b.seconds - a.seconds) / (b.freed - a.freed)


@dataclass(frozen=True)
class Upgrade:
    """One layer of a kind goes from one choice of its hull to the next."""

    kind: int
    before: Choice
    after: Choice


class Recompute:
    """The choices of all kinds of layers under one limit on the largest run."""

    def __init__(self, kinds: list[tuple[np.ndarray, np.ndarray]], largest: float) -> None:
        self.largest = largest
        self.fronts = [choices(seconds, freed, largest) for seconds, freed in kinds]
        steps = [
            Upgrade(kind, before, after)
            for kind, front in enumerate(self.fronts)
            for before, after in pairwise(hull(front))
        ]
        self.upgrades = sorted(steps, key=lambda u: _slope(u.before, u.after))

    def seconds(self, needed: np.ndarray, counts: list[np.ndarray]) -> np.ndarray:
        """The least seconds found that free so many MB, inf where nothing does; counts: whole layers per kind."""
        left, total = np.maximum(needed, 0.0), np.zeros_like(needed)
        for upgrade in self.upgrades:
            each = upgrade.after.freed - upgrade.before.freed
            whole = np.minimum(counts[upgrade.kind], np.floor(left / each))
            left, total = (
                left - whole * each,
                total + whole * (upgrade.after.seconds - upgrade.before.seconds),
            )
            some = (left > 0) & (whole < counts[upgrade.kind])
            last, more = self._last(upgrade, left)
            total, left = np.where(some, total + more, total), np.where(some, left - last, left)
        return np.where(left > 1e-9, np.inf, total)

    def _last(self, upgrade: Upgrade, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cheapest choice that frees as much as is left beyond what the layer frees: MB and seconds more."""
        front = self.fronts[upgrade.kind]
        freed = np.array([c.freed for c in front])
        at = np.minimum(np.searchsorted(freed, upgrade.before.freed + left - 1e-9), len(front) - 1)
        seconds = np.array([c.seconds for c in front])
        return freed[at] - upgrade.before.freed, seconds[at] - upgrade.before.seconds


def cheapest(
    parts: list[tuple[list[Choice], int]], needed: float
) -> tuple[float, list[list[Choice]]]:
    """Free so many MB in one stage: seconds, and for each kind of layer (its choices, how many) what each layer does.

    As `Recompute.seconds` goes about it; inf seconds where all together do not free enough.
    """
    picked = [[front[0]] * count for front, count in parts]
    steps = [
        (kind, pair) for kind, (front, _) in enumerate(parts) for pair in pairwise(hull(front))
    ]
    for kind, (before, after) in sorted(steps, key=lambda step: _slope(*step[1])):
        layers = picked[kind]
        for i, choice in enumerate(layers):
            if needed <= 0 or choice is not before:
                continue
            layers[i] = after
            if needed < after.freed - before.freed:
                layers[i] = next(
                    c for c in parts[kind][0] if c.freed >= before.freed + needed - 1e-9
                )
            needed -= layers[i].freed - before.freed
    total = sum(choice.seconds for layers in picked for choice in layers)
    return (total if needed <= 1e-9 else inf), picked
