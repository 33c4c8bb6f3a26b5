"""Cut a chain of units into pipeline stages on groups of devices: exact, by dynamic programs over tables.

A table holds seconds: `[a, b, d]` is a stage of units a to b - 1 on d devices, inf where there is none.
Positions of a graph that is no chain are sets of units closed under "comes before" (ideals, see
`ideals.py`) in any order that puts subsets first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Units `first` up to, not including, `last`, on so many devices."""

    first: int
    last: int
    devices: int


@dataclass(frozen=True)
class Cuts:
    """The best pipelines from one position: `seconds[b, d]` covers the units before b with exactly d devices.

    at, devices: where the last stage of the best pipeline begins, and how many devices it has.
    """

    start: int
    seconds: np.ndarray
    at: np.ndarray
    devices: np.ndarray

    def pieces(self, end: int, devices: int) -> tuple[Piece, ...]:
        """The stages of the best pipeline to `end`, in order."""
        found: list[Piece] = []
        while end > self.start:
            piece = Piece(int(self.at[end, devices]), end, int(self.devices[end, devices]))
            found.append(piece)
            end, devices = piece.first, devices - piece.devices
        return tuple(reversed(found))


def least_slowest(start: int, first: np.ndarray, later: np.ndarray) -> Cuts:
    """Pipelines from `start` whose slowest stage is fastest.

    Args:
        first: the table of stages that begin the pipeline.
        later: the table of all other stages, with the devices as first dim: `[d, a, b]`.
    """
    ends, most = first.shape[1], first.shape[2]
    seconds = first[start].copy()
    at, devices = np.full((ends, most), start), np.tile(np.arange(most), (ends, 1))
    rows = np.arange(ends - start)
    for total in range(2, most):
        for own in range(1, total):
            slowest = np.maximum(seconds[start:, total - own, None], later[own, start:, start:])
            best = slowest.argmin(axis=0)
            found = slowest[best, rows]
            better = np.flatnonzero(found < seconds[start:, total]) + start
            seconds[better, total] = found[better - start]
            at[better, total], devices[better, total] = best[better - start] + start, own
    return Cuts(start, seconds, at, devices)
