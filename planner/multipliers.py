"""Prices of memory: which seconds per row share to ask next, by cutting planes.

Every assignment x seen gives a cut: at prices p the Lagrangian is at most
cost(x) + p . (usage(x) - limit). The next prices lie between the best ones so far
and the maximiser of all cuts.

Source: Kelley, J. SIAM 8(4), 1960; in-out steps: Ben-Ameur & Neto, Networks 49(1), 2007.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog

STEP = 0.5  # how far from the best prices towards the maximiser of the cuts


class Prices:
    """The cuts of one Lagrangian and its best prices, one per memory row, all >= 0."""

    def __init__(self, rows: int, highest: float) -> None:
        self.best = np.zeros(rows)
        self.best_bound = -np.inf
        self.highest = highest
        self.heights: list[float] = []
        self.slopes: list[np.ndarray] = []

    def add_cut(self, cost: float, overflow: np.ndarray) -> None:
        """An assignment of this cost whose rows stand at `overflow = usage - limit`."""
        self.heights.append(cost)
        self.slopes.append(overflow)

    def observe(self, prices: np.ndarray, bound: float) -> None:
        """Remember the prices that gave the highest lower bound."""
        if bound > self.best_bound:
            self.best, self.best_bound = prices, bound

    def propose(self) -> tuple[np.ndarray, float]:
        """The next prices to ask, and a value that no prices can exceed.

        maximise t  with  t - p . overflow_k <= cost_k,  0 <= p <= highest
        """
        scale = max(1e-300, abs(self.highest))
        slopes = np.array(self.slopes)
        matrix = np.hstack([np.ones((len(slopes), 1)), -slopes])
        bounds: Sequence[tuple[float | None, float | None]] = [(None, None)]
        bounds = [*bounds, *[(0.0, 1.0)] * slopes.shape[1]]
        goal = np.zeros(matrix.shape[1])
        goal[0] = -1.0
        found = linprog(goal, matrix, np.array(self.heights) / scale, bounds=bounds)
        if found.x is None:
            return self.best, np.inf
        target = found.x[1:] * scale
        return self.best + STEP * (target - self.best), float(found.x[0]) * scale
