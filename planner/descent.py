"""Local search: one node at a time, first into the memory rows, then down in cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .onehot import Choices
from .reductions import Reduced


class Neighbourhood:
    """Costs of every one-node change of an assignment.

    `Neighbourhood(model).descend(choices)` returns a local optimum that fits the
    rows, or None when no chain of one-node changes leads into them.
    """

    def __init__(self, model: Reduced) -> None:
        self.model = model
        self.around: list[list[tuple[int, np.ndarray]]] = [[] for _ in model.costs]
        for edge in model.edges:
            self.around[edge.a].append((edge.b, edge.costs.T))
            self.around[edge.b].append((edge.a, edge.costs))

    def costs_at(self, node: int, choices: Sequence[int]) -> np.ndarray:
        """Cost of each choice of one node, its edges included."""
        total = self.model.costs[node].copy()
        for other, table in self.around[node]:
            total += table[choices[other]]
        return total

    def usage_of(self, choices: Sequence[int]) -> np.ndarray:
        """Share of each row's limit that an assignment takes."""
        held = [usage[:, x] for usage, x in zip(self.model.usage, choices, strict=True)]
        return np.sum(held, axis=0)

    def descend(self, choices: Sequence[int], rounds: int = 20) -> Choices | None:
        """Repair the rows, then change one node after another while that pays."""
        fitting = self.repair(list(choices))
        if fitting is None:
            return None
        current, used = fitting, self.usage_of(fitting)
        for _ in range(rounds):
            before = list(current)
            for node in range(len(current)):
                used = self._improve(node, current, used)
            if current == before:
                break
        return tuple(current)

    def _improve(self, node: int, choices: list[int], used: np.ndarray) -> np.ndarray:
        """Move one node to its cheapest choice that fits, in place; returns the rows' new sums."""
        costs, usage = self.costs_at(node, choices), self.model.usage[node]
        others = used - usage[:, choices[node]]
        fits = np.all(others[:, None] + usage <= self.model.limits[:, None], axis=0)
        best = int(np.where(fits, costs, np.inf).argmin())
        if fits[best] and costs[best] < costs[choices[node]]:
            choices[node] = best
        return others + usage[:, choices[node]]

    def repair(self, choices: list[int]) -> list[int] | None:
        """Make the change with the least seconds per overflow removed, until all rows hold."""
        used = self.usage_of(choices)
        for _ in range(4 * len(choices)):
            over = used - self.model.limits
            if not (over > 0).any():
                return choices
            best, move = np.inf, None
            for node in range(len(choices)):
                price, choice = self._cheapest_relief(node, choices, over)
                if price < best:
                    best, move = price, (node, choice)
            if move is None:
                return None
            node, choice = move
            usage = self.model.usage[node]
            used = used + usage[:, choice] - usage[:, choices[node]]
            choices[node] = choice
        return None

    def _cheapest_relief(
        self, node: int, choices: Sequence[int], over: np.ndarray
    ) -> tuple[float, int]:
        """The choice of one node with the least (seconds added) / (overflow removed)."""
        change = self.model.usage[node] - self.model.usage[node][:, [choices[node]]]
        after = np.maximum(over[:, None] + change, 0.0).sum(axis=0)
        relief = np.maximum(over, 0.0).sum() - after
        useful = np.flatnonzero(relief > 1e-12)
        if not useful.size:
            return np.inf, -1
        costs = self.costs_at(node, choices)
        added = costs[useful] - costs[choices[node]]
        price = np.where(added > 0, added / relief[useful], added * relief[useful])
        best = int(price.argmin())
        return float(price[best]), int(useful[best])
