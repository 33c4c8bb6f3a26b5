"""Prices of memory: which seconds per row share to ask next, by a proximal bundle method.

Every assignment x seen gives a cut: at prices p the Lagrangian is at most
cost(x) + p . (usage(x) - limit). The next prices maximise the least of the cuts,
less a term that keeps them near the best prices so far.

Source: Kiwiel, "Proximity control in bundle methods", Math. Programming 46, 1990.
"""

from __future__ import annotations

import numpy as np

MAX_CUTS = 60
SERIOUS = 0.1  # share of the promised rise from which on the centre moves


class Prices:
    """The cuts of one Lagrangian and its best prices, one per memory row, all >= 0.

    `propose` -> ask the Lagrangian there -> `add_cut` and `observe` -> `propose` ...
    """

    def __init__(self, centre: np.ndarray, bound: float) -> None:
        self.centre = centre
        self.bound = bound
        self.reach = 0.0  # length of a step per unit of slope; 0: not known yet
        self.heights = np.zeros(0)
        self.slopes = np.zeros((0, centre.size))
        self.weights = np.zeros(0)
        self.promise = np.inf

    def add_cut(self, cost: float, overflow: np.ndarray) -> None:
        """An assignment of this cost whose rows stand at `overflow = usage - limit`."""
        if self.heights.size >= MAX_CUTS:
            self._forget(int(self.weights[:-1].argmin()))
        self.heights = np.append(self.heights, cost)
        self.slopes = np.vstack([self.slopes, overflow])
        self.weights = np.append(self.weights, 1.0 if not self.weights.size else 0.0)

    def _forget(self, index: int) -> None:
        self.heights = np.delete(self.heights, index)
        self.slopes = np.delete(self.slopes, index, axis=0)
        weights = np.delete(self.weights, index)
        self.weights = weights / max(weights.sum(), 1e-300)

    def observe(self, prices: np.ndarray, bound: float) -> bool:
        """Move the centre when the bound rose enough, and adapt the reach; whether it moved."""
        if self.bound == -np.inf:
            self.centre, self.bound = prices, bound
            return True
        rise, promised = bound - self.bound, self.promise - self.bound
        if rise < SERIOUS * promised:
            self.reach *= 0.85
            return False
        self.reach *= 1.6 if rise > 0.5 * promised else 1.0
        self.centre, self.bound = prices, bound
        return True

    def _step(self, best_cost: float) -> np.ndarray:
        if not self.reach:
            slope = self.slopes[-1]
            rise = best_cost - self.bound if best_cost < np.inf else abs(self.bound)
            self.reach = 0.5 * max(rise, 1e-12) / max(slope @ slope, 1e-6)
        self.weights = self._weigh()
        prices = self._prices(self.weights)
        self.promise = float((self.heights + self.slopes @ prices).min())
        return prices

    def propose(self, best_cost: float, least_rise: float) -> np.ndarray | None:
        """The next prices to ask; None when no cuts promise more than `least_rise`.

        `best_cost`: of a known assignment, sets the length of the first step.
        """
        for _ in range(4):
            prices = self._step(best_cost)
            if self.promise - self.bound > least_rise:
                return prices
            self.reach *= 4.0
        return None

    def _prices(self, weights: np.ndarray) -> np.ndarray:
        return np.maximum(self.centre + self.reach * (weights @ self.slopes), 0.0)

    def _weigh(self, rounds: int = 400) -> np.ndarray:
        """Weights of the cuts, summing to 1, that minimise the dual of the proximal step.

            heights . w + |max(0, centre + reach * slopes' w)|^2 / (2 reach)

        by accelerated projected gradients; the gradient is each cut's value at the prices.
        """
        weights = ahead = self.weights
        rate = 1.0 / max(self.reach * np.linalg.norm(self.slopes, 2) ** 2, 1e-300)
        momentum = 1.0
        for _ in range(rounds):
            gradient = self.heights + self.slopes @ self._prices(ahead)
            moved = _onto_simplex(ahead - rate * gradient)
            if (ahead - moved) @ (moved - weights) > 0:
                momentum = 1.0
            grown = 0.5 + np.sqrt(0.25 + momentum**2)
            ahead = moved + (momentum - 1.0) / grown * (moved - weights)
            weights, momentum = moved, grown
        return weights


def _onto_simplex(point: np.ndarray) -> np.ndarray:
    """The nearest point with entries >= 0 that sum to 1.

    Source: Duchi et al., "Efficient projections onto the l1-ball", ICML 2008.
    """
    falling = np.sort(point)[::-1]
    excess = np.cumsum(falling) - 1.0
    count = 1 + np.flatnonzero(falling * np.arange(1, point.size + 1) >= excess)[-1]
    return np.maximum(point - excess[count - 1] / count, 0.0)
