"""Sequential tree-reweighted message passing: a lower bound and an assignment, fast.

Every edge table is re-parametrised by two vectors,

    table'(p, q) = table(p, q) - push_a(p) - push_b(q)

and what is taken from edges is added to their nodes. One pass visits the nodes
in order; each node collects the min-marginals of its edges, gives its minimum to
the constant term, and spreads the rest over the edges to nodes not yet visited.
All terms stay >= 0, so the constant is a lower bound, exact on trees.

Source: Kolmogorov, "A new look at reweighted message passing", TPAMI 37(5), 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .onehot import Choices, Edge


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass found.

    `bound <= optimum`; with node i at p, the optimum is at least `floor + reduced[i][p]`,
    where `floor` is the bound of the pass before (so this needs two passes at equal costs).
    """

    bound: float
    floor: float
    choices: Choices
    reduced: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    """One end of an edge: its table seen from node `here` as (choices there, choices here)."""

    edge: int
    there: int
    table: np.ndarray


class Messages:
    """The messages of one graph, kept warm between passes and price changes.

    `Messages(costs, edges).sweep(costs)` passes over the nodes once, in turn
    forwards and backwards. All costs must be finite.
    """

    def __init__(self, costs: Sequence[np.ndarray], edges: Sequence[Edge]) -> None:
        self.sides: list[list[_Side]] = [[] for _ in costs]
        for index, edge in enumerate(edges):
            forward = np.ascontiguousarray(edge.costs)
            self.sides[edge.a].append(_Side(index, edge.b, np.ascontiguousarray(forward.T)))
            self.sides[edge.b].append(_Side(index, edge.a, forward))
        self.push = {(e, i): np.zeros(costs[i].size) for i, e in self._ends()}
        self.rest = [np.zeros(cost.size) for cost in costs]
        self.constants = np.zeros(len(costs))
        self.forwards = False
        for i, side in ((i, side) for i, sides in enumerate(self.sides) for side in sides):
            if i < side.there:  # as after a backward pass: every edge is collected at its lower end
                self.push[side.edge, i] = side.table.min(axis=0)

    def _ends(self) -> list[tuple[int, int]]:
        return [(i, side.edge) for i, sides in enumerate(self.sides) for side in sides]

    def sweep(self, costs: Sequence[np.ndarray]) -> Pass:
        """Visit every node once."""
        self.forwards = not self.forwards
        count, floor = len(costs), float(self.constants.sum())
        choices = [-1] * count
        reduced: list[np.ndarray] = [self.rest[0]] * count
        for i in range(count) if self.forwards else reversed(range(count)):
            guide = self._visit(i, costs[i], choices, reduced)
            choices[i] = int(guide.argmin())
        return Pass(float(self.constants.sum()), floor, tuple(choices), tuple(reduced))

    def _visit(
        self, i: int, cost: np.ndarray, choices: list[int], reduced: list[np.ndarray]
    ) -> np.ndarray:
        """Collect, keep the minimum, spread; returns what decoding should minimise at `i`."""
        total, guide, ahead, behind = cost - self.constants[i], cost.copy(), [], 0
        for side in self.sides[i]:
            if choices[side.there] >= 0:
                there = self.push[side.edge, side.there]
                collected = np.subtract(side.table, there[:, None]).min(axis=0)
                guide += side.table[choices[side.there]]
                self.push[side.edge, i] = collected
                behind += 1
            else:
                collected = self.push[side.edge, i]
                guide += collected
                ahead.append(side.edge)
            total += collected
        self.constants[i] += (low := float(total.min()))
        reduced[i] = rest = total - low
        share = 1.0 / max(len(ahead), behind, 1)
        for edge in ahead:
            self.push[edge, i] = self.push[edge, i] - share * rest
        self.rest[i] = rest * (1.0 - share * len(ahead))
        return guide

    def pair_costs(self, index: int, edge: Edge) -> np.ndarray:
        """Reduced cost of every pair of one edge, valid after a sweep (add it to the bound)."""
        left = self.rest[edge.a] - self.push[index, edge.a]
        right = self.rest[edge.b] - self.push[index, edge.b]
        return edge.costs + left[:, None] + right[None, :]
