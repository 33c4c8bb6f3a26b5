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

import numba
import numpy as np

from .compiled import compiled
from .flat import Flat, flatten
from .onehot import Edge

Saved = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one pass found; choices and their reduced costs are counted through all nodes.

    `bound <= optimum`; with choice c, the optimum is at least `floor + reduced[c]`,
    where `floor` is the bound of the pass before (so this needs two passes at equal costs).
    """

    bound: float
    floor: float
    choices: np.ndarray
    reduced: np.ndarray


class Messages:
    """The messages of one graph, kept warm between passes and price changes.

    `Messages(sizes, edges).sweep(costs)` passes over the nodes once, in turn
    forwards and backwards; `costs` are those of all nodes one after another.
    All costs must be finite.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, edges: Sequence[Edge]) -> None:
        self.flat = flat = flatten(sizes, edges)
        self.push_a = np.zeros(flat.at_a[-1])
        self.push_b = np.zeros(flat.at_b[-1])
        _begin(flat, self.push_a, self.push_b)
        self.constants = np.zeros(len(flat.starts) - 1)
        self.rest = np.zeros(flat.starts[-1])
        self.reduced = np.zeros(flat.starts[-1])
        self.choices = np.zeros(len(flat.starts) - 1, dtype=np.int64)
        self.forwards = False

    def sweep(self, costs: np.ndarray) -> Sweep:
        """Visit every node once."""
        self.forwards = not self.forwards
        floor = float(self.constants.sum())
        _sweep(
            self.forwards, self.flat, costs, self.push_a, self.push_b,
            self.constants, self.rest, self.reduced, self.choices,
        )  # fmt: skip
        return Sweep(float(self.constants.sum()), floor, self.choices.copy(), self.reduced.copy())

    def saved(self) -> Saved:
        """The messages as they are, for `restore`."""
        return self.push_a.copy(), self.push_b.copy(), self.constants.copy()

    def restore(self, saved: Saved) -> None:
        """Go back to saved messages, after any passes in either direction."""
        self.push_a[:], self.push_b[:], self.constants[:] = saved

    def pair_costs(self, index: int, edge: Edge) -> np.ndarray:
        """Reduced cost of every pair of one edge, valid after a sweep (add it to the bound)."""
        flat = self.flat
        push_a = self.push_a[flat.at_a[index] : flat.at_a[index + 1]]
        push_b = self.push_b[flat.at_b[index] : flat.at_b[index + 1]]
        left = self.rest[flat.starts[edge.a] : flat.starts[edge.a + 1]] - push_a
        right = self.rest[flat.starts[edge.b] : flat.starts[edge.b + 1]] - push_b
        return edge.costs + left[:, None] + right[None, :]


@compiled
def _begin(flat: Flat, push_a: np.ndarray, push_b: np.ndarray) -> None:
    """As after a backward pass: the least of each row, or column, is collected at the lower end of an edge."""
    for e in range(flat.a.size):
        rows = flat.at_a[e + 1] - flat.at_a[e]
        columns = flat.at_b[e + 1] - flat.at_b[e]
        table = flat.tables[flat.at[e] : flat.at[e + 1]].reshape((rows, columns))
        if flat.a[e] < flat.b[e]:
            for p in range(rows):
                push_a[flat.at_a[e] + p] = table[p].min()
        else:
            for q in range(columns):
                push_b[flat.at_b[e] + q] = table[:, q].min()


@compiled
def _sweep(
    forwards: bool,
    flat: Flat,
    costs: np.ndarray,
    push_a: np.ndarray,
    push_b: np.ndarray,
    constants: np.ndarray,
    rest: np.ndarray,
    reduced: np.ndarray,
    choices: np.ndarray,
) -> None:
    """One pass; all arrays but `costs` change in place."""
    count = flat.starts.size - 1
    visited = np.zeros(count, dtype=np.bool_)
    widest = 0
    for i in range(count):
        widest = max(widest, flat.starts[i + 1] - flat.starts[i])
    total, guide = np.empty(widest), np.empty(widest)
    for step in range(count):
        i = step if forwards else count - 1 - step
        start = flat.starts[i]
        size = flat.starts[i + 1] - start
        for p in range(size):
            total[p] = costs[start + p] - constants[i]
            guide[p] = costs[start + p]
        ahead = behind = 0
        for k in range(flat.first[i], flat.first[i + 1]):
            e = flat.near[k]
            at_a = flat.a[e] == i
            other = flat.b[e] if at_a else flat.a[e]
            push, here = (push_a, flat.at_a[e]) if at_a else (push_b, flat.at_b[e])
            if visited[other]:
                behind += 1
                _collect(flat, e, at_a, size, push_a, push_b, np.int64(choices[other]), guide)
            else:
                ahead += 1
                for p in range(size):
                    guide[p] += push[here + p]
            for p in range(size):
                total[p] += push[here + p]
        low = total[:size].min()
        share = 1.0 / max(ahead, behind, 1)
        for k in range(flat.first[i], flat.first[i + 1]):
            e = flat.near[k]
            at_a = flat.a[e] == i
            if not visited[flat.b[e] if at_a else flat.a[e]]:
                push, here = (push_a, flat.at_a[e]) if at_a else (push_b, flat.at_b[e])
                for p in range(size):
                    push[here + p] -= share * (total[p] - low)
        for p in range(size):
            reduced[start + p] = total[p] - low
            rest[start + p] = (total[p] - low) * (1.0 - share * ahead)
        constants[i] += low
        choices[i] = guide[:size].argmin()
        visited[i] = True


@numba.njit(inline="always")
def _collect(
    flat: Flat,
    e: int,
    at_a: bool,
    size: int,
    push_a: np.ndarray,
    push_b: np.ndarray,
    chosen: np.int64,
    guide: np.ndarray,
) -> None:
    """The min-marginals of edge e at one end, given what its other end took."""
    table, here_a, here_b = flat.at[e], flat.at_a[e], flat.at_b[e]
    if at_a:
        width = flat.at_b[e + 1] - here_b
        for p in range(size):
            low = np.inf
            row = table + p * width
            for q in range(width):
                low = min(low, flat.tables[row + q] - push_b[here_b + q])
            push_a[here_a + p] = low
            guide[p] += flat.tables[row + chosen]
        return
    for p in range(size):
        push_b[here_b + p] = np.inf
    for q in range(flat.at_a[e + 1] - here_a):
        row = table + q * size
        for p in range(size):
            push_b[here_b + p] = min(push_b[here_b + p], flat.tables[row + p] - push_a[here_a + q])
    for p in range(size):
        guide[p] += flat.tables[table + chosen * size + p]
