"""Prices of all ops of a frame that run within fused chains, worked out side by side.

    seconds of choice i of an op = fixed + sum over its sides of seconds[side] / ways[side, i]

The ops' choices lie one after another, so a whole frame is a handful of operations on long arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cost.compute import Terms
from ..cost.kernels import Kernels
from ..cost.model import CostModel
from .frame import CostClass, Frame
from .layouts import Layouts


@dataclass(frozen=True)
class Fused:
    """`alikes` run within chains, `others` are kernels of their own. Row k of `sides`, `timed` and `each` is the
    k-th side that costs something: its layout per choice, whether microbatches cut it, its seconds uncut."""

    alikes: list[CostClass]
    others: list[CostClass]
    ends: np.ndarray
    fixed: np.ndarray
    sides: np.ndarray
    timed: np.ndarray
    each: np.ndarray
    cost: CostModel

    def seconds(self, layouts: Layouts, microbatches: int) -> list[np.ndarray]:
        """Of one run of each of `alikes`, per choice."""
        if not self.alikes:
            return []
        each = np.where(self.timed, self.each / microbatches, self.each)
        return np.split(self.fixed + (each / layouts.ways(self.sides)).sum(axis=0), self.ends[:-1])


def fused_of(frame: Frame, kernels: Kernels, cost: CostModel) -> Fused:
    """Lay out the ops of a frame; kept in it, as meshes and microbatch counts share it."""
    known: Fused | None = frame.memo.get((kernels, id(cost)))
    if known is None:
        known = frame.memo[kernels, id(cost)] = _laid_out(frame, kernels, cost)
    return known


def _laid_out(frame: Frame, kernels: Kernels, cost: CostModel) -> Fused:
    types, known = (
        frame.outline.program.graph.types,
        frame.outline.terms.setdefault((kernels, id(cost)), {}),
    )
    for alike in frame.alike(kernels):
        if alike.form not in known:
            known[alike.form] = cost.fused_terms(alike.op, types, kernels)
    priced = [(alike, known[alike.form]) for alike in frame.alike(kernels)]
    others = [alike for alike, terms in priced if terms is None]
    found = [(alike, terms) for alike, terms in priced if terms is not None]
    counts = [alike.sides.shape[1] for alike, _ in found]
    ends = np.cumsum(counts)
    rows, width = max((len(terms.sides) for _, terms in found), default=0), int(sum(counts))
    sides, timed, each = (
        np.zeros((rows, width), np.int64),
        np.zeros((rows, width), bool),
        np.zeros((rows, width)),
    )
    for (alike, terms), end, count in zip(found, ends.tolist(), counts, strict=True):
        _fill(alike, terms, slice(end - count, end), sides, timed, each)
    fixed = np.repeat([terms.fixed for _, terms in found], counts)
    return Fused([alike for alike, _ in found], others, ends, fixed, sides, timed, each, cost)


def _fill(
    alike: CostClass,
    terms: Terms,
    where: slice,
    sides: np.ndarray,
    timed: np.ndarray,
    each: np.ndarray,
) -> None:
    for row, (side, seconds) in enumerate(terms.sides.items()):
        sides[row, where], timed[row, where], each[row, where] = (
            alike.sides[side],
            alike.timed[side],
            seconds,
        )
