"""Threshold accepting over tree moves: runs whose tolerance falls, one after another.

Source: Dueck & Scheuer, "Threshold accepting", J. Comput. Phys. 90, 1990.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from .tree_moves import TreeMoves

TOLERANCES = (0.0, 0.001, 0.01, 0.1, 0.3)  # share of the cost that a first move may add
TREES = (200, 20)  # most nodes of a tree
RUN_PASSES = 1000  # work of a whole run: so often all tables
BATCHES = 40  # steps in which the tolerance falls
LAST_TOLERANCE = 3e-3  # of the first one


class Walker:
    """Runs of threshold accepting; a tolerance stays in use while it finds something better."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tolerance = 0  # index into TOLERANCES
        self.batch = 0  # batches made, each with a seed of its own
        self.stopped = False

    def run(
        self, moves: TreeMoves, start: np.ndarray, prices: np.ndarray, work: float, end: float
    ) -> np.ndarray:
        """The best assignment met with so much work, or until `end`."""
        best, least = start, moves.live.cost(start)
        most = float(RUN_PASSES * moves.live.entries)
        while work > 0 and perf_counter() < end and not self.stopped:
            found, cost = self._once(moves, best, least, prices, min(work, most), end)
            work -= most
            if cost < least:
                best, least = found, cost
            else:
                self.tolerance = (self.tolerance + 1) % len(TOLERANCES)
        return best

    def _once(
        self, moves: TreeMoves, start: np.ndarray, cost: float, prices: np.ndarray,
        work: float, end: float,
    ) -> tuple[np.ndarray, float]:  # fmt: skip
        """One run whose tolerance falls to nearly nothing by its end."""
        first = TOLERANCES[self.tolerance] * abs(cost)
        best, least, choices = start, cost, start
        for batch in range(BATCHES):
            choices, found, value = moves.run(
                choices,
                prices,
                seed=(self.seed * 1_000_003 + self.batch) % 2**32,
                work=work / BATCHES,
                most_nodes=TREES[self.batch // BATCHES % len(TREES)],
                tolerance=first * LAST_TOLERANCE ** (batch / BATCHES),
            )
            self.batch += 1
            if value < least:
                best, least = found, value
            if perf_counter() > end or self.stopped:
                break
        return best, least
