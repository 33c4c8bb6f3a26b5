"""Local search: one node at a time, first into the memory rows, then down in cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .compiled import compiled
from .onehot import Choices
from .reductions import Reduced

MOST_WORK = 100_000_000  # entries of the rows that one repair may read: a fifth of a second
LEAST_RELIEF = 1e-12  # share of a limit below which a change relieves nothing


class Neighbourhood:
    """Costs of every one-node change of an assignment.

    `Neighbourhood(model).descend(choices)` returns a local optimum that fits the
    rows, or None when no chain of one-node changes leads into them.
    """

    def __init__(self, model: Reduced) -> None:
        self.model = model
        self.starts = np.concatenate([[0], np.cumsum(model.sizes)])
        self.owner = np.repeat(np.arange(len(model.costs)), model.sizes)
        self.usage = np.hstack(model.usage)  # (rows, choices of all nodes)
        self.by_choice = np.ascontiguousarray(self.usage.T)
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

    def cost(self, choices: Sequence[int]) -> float:
        """Cost of an assignment in this model."""
        model = self.model
        total = sum(float(c[x]) for c, x in zip(model.costs, choices, strict=True))
        return total + sum(float(e.costs[choices[e.a], choices[e.b]]) for e in model.edges)

    def usage_of(self, choices: Sequence[int]) -> np.ndarray:
        """Share of each row's limit that an assignment takes."""
        return self.usage[:, self.starts[:-1] + np.asarray(choices)].sum(axis=1)

    def descend(self, choices: Sequence[int], rounds: int = 20) -> Choices | None:
        """Repair the rows, then change one node after another while that pays."""
        current = self.repair(list(choices))
        if current is None:
            return None
        used = self.usage_of(current)
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
        cheaper = costs < costs[choices[node]]
        if not cheaper.any():
            return used
        others = used - usage[:, choices[node]]
        fits = np.all(others[:, None] + usage <= self.model.limits[:, None], axis=0)
        best = int(np.where(fits & cheaper, costs, np.inf).argmin())
        if fits[best] and cheaper[best]:
            choices[node] = best
        return others + usage[:, choices[node]]

    def repair(self, choices: list[int]) -> list[int] | None:
        """Make the change with the least seconds per overflow removed, until all rows hold."""
        over = self.usage_of(choices) - self.model.limits
        if not (over > 0).any():
            return choices
        costs = np.concatenate([self.costs_at(i, choices) for i in range(len(choices))])
        for _ in range(min(4 * len(choices), MOST_WORK // self.usage.size)):
            now = self.starts[:-1] + np.asarray(choices)
            move = _cheapest_relief(self.by_choice, self.owner, now, costs, over)
            if move < 0:
                return None
            node = int(self.owner[move])
            over = over + self.usage[:, move] - self.usage[:, self.starts[node] + choices[node]]
            choices[node] = int(move - self.starts[node])
            if not (over > 0).any():
                return choices
            for other, _ in self.around[node]:
                span = slice(self.starts[other], self.starts[other + 1])
                costs[span] = self.costs_at(other, choices)
        return None


@compiled
def _cheapest_relief(
    usage: np.ndarray, owner: np.ndarray, now: np.ndarray, costs: np.ndarray, over: np.ndarray
) -> int:
    """Which of all choices removes overflow for the fewest seconds per share; -1 for none.

    `usage` has a line per choice; `now` is the present choice of each node, counted through.
    """
    broken = np.flatnonzero(over > 0)
    best, least = -1, np.inf
    for p in range(owner.size):
        held = now[owner[p]]
        relief = 0.0
        for r in broken:
            relief += over[r] - max(0.0, over[r] + usage[p, r] - usage[held, r])
        if relief > LEAST_RELIEF:
            added = costs[p] - costs[held]
            price = added / relief if added > 0 else added * relief
            if price < least:
                best, least = p, price
    return best
