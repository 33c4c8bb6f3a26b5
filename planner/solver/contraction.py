"""Exact contraction: nodes whose choice follows from a neighbour's become part of it.

Three reductions, repeated until none applies:

- a choice that no choice of some neighbour allows is dropped;
- an edge whose costs are `u[p] + v[q]` is folded into its two nodes;
- when every choice of b allows exactly one choice of a, a goes into b.

Nodes without a choice are folded away by the second. Published cost graphs of sharding
shrink to a fifth or a fortieth by these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .compiled import compiled
from .live import Demand, Live
from .onehot import Choices, Edge

SEPARABLE = 1e-9  # relative rounding within which an edge counts as u[p] + v[q]


@dataclass(frozen=True)
class Contracted:
    """A smaller problem; `origins[k]` maps each original node in node k to its choices.

    With node k at p, original node n takes choice `origins[k][n][p]`.
    """

    live: Live
    origins: tuple[dict[int, np.ndarray], ...]

    def lift(self, choices: Sequence[int] | np.ndarray) -> Choices:
        """The same assignment in the original problem."""
        count = sum(len(origin) for origin in self.origins)
        found = [0] * count
        for origin, x in zip(self.origins, choices, strict=True):
            for node, kept in origin.items():
                found[node] = int(kept[x])
        return tuple(found)

    def lower(self, choices: Sequence[int]) -> np.ndarray | None:
        """An original assignment in this problem; None when it was reduced away."""
        found = np.zeros(len(self.origins), dtype=np.int64)
        for k, origin in enumerate(self.origins):
            same = np.logical_and.reduce([kept == choices[n] for n, kept in origin.items()])
            if not same.any():
                return None
            found[k] = int(same.argmax())
        return found


def contract(live: Live) -> Contracted | None:
    """Contract as far as it goes; None when some node has no choice left."""
    work = _Work(live)
    if not work.run():
        return None
    return work.result(live)


class _Work:
    """The problem as adjacency tables, changed in place."""

    def __init__(self, live: Live) -> None:
        count = len(live.costs)
        self.costs = [np.asarray(cost, dtype=float) for cost in live.costs]
        self.near: list[dict[int, np.ndarray]] = [{} for _ in range(count)]
        self.demands: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in range(count)]
        self.origins: list[dict[int, np.ndarray]] = [
            {i: np.arange(cost.size)} for i, cost in enumerate(self.costs)
        ]
        for edge in live.edges:
            self._join(edge.a, edge.b, np.asarray(edge.costs, dtype=float))
        for d in live.demands:
            if d.last > d.first:
                self.demands[d.node].append((d.first, d.last, d.nbytes))

    def _join(self, a: int, b: int, table: np.ndarray) -> None:
        table = self.near[a][b] + table if b in self.near[a] else table
        self.near[a][b], self.near[b][a] = table, table.T

    def _part(self, a: int, b: int) -> None:
        del self.near[a][b], self.near[b][a]

    def run(self) -> bool:
        """Reduce until nothing changes; False when a node loses its last choice."""
        for node, cost in enumerate(self.costs):
            if not self._keep_possible(node, np.isfinite(cost)):
                return False
        waiting = {(a, b): None for a, near in enumerate(self.near) for b in near if a < b}
        while waiting:
            a, b = next(iter(waiting))
            del waiting[a, b]
            if b not in self.near[a]:
                continue
            ours, theirs, few, many = _counts(self.near[a][b])
            for node, allowed in ((a, ours), (b, theirs)) if few == 0 else ():
                if (allowed == 0).any():
                    if not self._keep_possible(node, allowed > 0):
                        return False
                    waiting.update(dict.fromkeys(self._edges(node)))
                    ours, theirs, few, many = _counts(self.near[a][b])
            if not self._fold_separable(a, b) and (leader := self._leader(a, b, *many)) is not None:
                follower = a if leader == b else b
                waiting.update(dict.fromkeys(self._merge(follower, leader)))
        return True

    def _edges(self, node: int) -> list[tuple[int, int]]:
        return [(min(node, other), max(node, other)) for other in self.near[node]]

    def _keep_possible(self, node: int, mask: np.ndarray) -> bool:
        """Drop the other choices of a node; whether one is left."""
        if not mask.all():
            self._keep(node, mask)
        return bool(mask.any())

    def _keep(self, node: int, mask: np.ndarray) -> None:
        self.costs[node] = self.costs[node][mask]
        self.origins[node] = {n: kept[mask] for n, kept in self.origins[node].items()}
        self.demands[node] = [(s, e, held[mask]) for s, e, held in self.demands[node]]
        for other, table in self.near[node].items():
            self.near[node][other] = table[mask]
            self.near[other][node] = self.near[node][other].T

    def _fold_separable(self, a: int, b: int) -> bool:
        """Fold an edge whose costs are a sum of two vectors into its nodes; whether it was one."""
        table = self.near[a][b]
        if not _separable(table):
            return False
        ours, theirs = table[:, 0], table[0] - table[0, 0]
        self.costs[a] = self.costs[a] + ours
        self.costs[b] = self.costs[b] + theirs
        self._part(a, b)
        return True

    def _leader(self, a: int, b: int, ours: int, theirs: int) -> int | None:
        """The end whose choice decides the other's, as each allows but one; of two such the one with more
        neighbours. Given are the most that a choice of either end allows."""
        leaders = [n for n, most in ((a, ours), (b, theirs)) if most == 1]
        return max(leaders, key=lambda n: len(self.near[n]), default=None)

    def _merge(self, node: int, leader: int) -> list[tuple[int, int]]:
        """`node` becomes part of `leader`; returns the edges that changed."""
        table = self.near[node][leader]
        choice = np.isfinite(table).argmax(axis=0)
        self.costs[leader] = (
            self.costs[leader] + self.costs[node][choice] + table[choice, np.arange(choice.size)]
        )
        self.demands[leader] += [(s, e, held[choice]) for s, e, held in self.demands[node]]
        for n, kept in self.origins[node].items():
            self.origins[leader][n] = kept[choice]
        self._part(node, leader)
        touched = list(self.near[node])
        for other in touched:
            self._join(leader, other, self.near[node][other][choice])
            self._part(node, other)
        self.demands[node], self.origins[node] = [], {}
        return [(min(leader, other), max(leader, other)) for other in touched]

    def result(self, original: Live) -> Contracted:
        alive = [i for i, origin in enumerate(self.origins) if origin]
        place = {node: k for k, node in enumerate(alive)}
        edges = tuple(
            Edge(place[a], place[b], np.ascontiguousarray(table))
            for a in alive
            for b, table in sorted(self.near[a].items())
            if a < b
        )
        demands = tuple(d for a in alive for d in _gathered(place[a], self.demands[a]))
        costs = tuple(self.costs[a] for a in alive)
        live = Live(costs, edges, demands, original.limits, original.when)
        return Contracted(live, tuple(self.origins[a] for a in alive))


def _gathered(node: int, demands: list[tuple[int, int, np.ndarray]]) -> list[Demand]:
    """Demands of one node, those over the same interval summed."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for first, last, held in demands:
        found[first, last] = found[first, last] + held if (first, last) in found else held
    return [Demand(node, first, last, held) for (first, last), held in sorted(found.items())]


@compiled
def _counts(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, tuple[int, int]]:
    """How many choices of the other end each choice of either end allows, the least of all and the most of each."""
    rows, columns = table.shape
    ours, theirs = np.zeros(rows, np.int64), np.zeros(columns, np.int64)
    for p in range(rows):
        for q in range(columns):
            if table[p, q] < np.inf:
                ours[p] += 1
                theirs[q] += 1
    return ours, theirs, min(ours.min(), theirs.min()), (ours.max(), theirs.max())


@compiled
def _separable(table: np.ndarray) -> bool:
    """Whether all is finite and `table[p, q]` is `u[p] + v[q]`, but for rounding."""
    rows, columns = table.shape
    largest, off = 0.0, 0.0
    for p in range(rows):
        for q in range(columns):
            if table[p, q] == np.inf:
                return False
            largest = max(largest, abs(table[p, q]))
            off = max(off, abs(table[p, q] - table[p, 0] - (table[0, q] - table[0, 0])))
    return off <= SEPARABLE * max(1.0, largest)
