"""The one-hot pairwise problem with memory over time: nodes hold bytes over half-open intervals.

minimise   sum_i cost_i[x_i] + sum_(a,b) cost_ab[x_a, x_b]
such that  at every moment t, the demands with first <= t < last sum to at most limits[t]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from .compiled import compiled
from .onehot import Edge, MemoryRow


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes that a node holds from moment `first` up to, not including, `last`.

    `Demand(4, 10, 12, np.array([1e9, 5e8]))`: node 4 holds 1e9 or 5e8 bytes at
    moments 10 and 11, by choice.
    """

    node: int
    first: int
    last: int
    nbytes: np.ndarray

    def later(self, moments: int) -> Demand:
        """The same, so many moments later."""
        return Demand(self.node, self.first + moments, self.last + moments, self.nbytes)


@dataclass(frozen=True)
class Live:
    """Costs and edges as in `onehot.OneHotProblem`, memory as demands over `limits.size` moments.

    `Live((np.array([1.0, 2.0]),), (), (Demand(0, 0, 1, np.array([9.0, 1.0])),), np.array([5.0]))`
    has one node; its first choice is cheaper and does not fit.
    """

    costs: tuple[np.ndarray, ...]
    edges: tuple[Edge, ...]
    demands: tuple[Demand, ...]
    limits: np.ndarray
    when: np.ndarray | None = None  # the moment each limit was given for; None: 0, 1, 2 ...
    labels: tuple[int, ...] = ()  # what the user calls the moments; none: 0, 1, 2 ...

    @property
    def moments(self) -> np.ndarray:
        return np.arange(self.limits.size) if self.when is None else self.when

    @property
    def sizes(self) -> np.ndarray:
        return np.array([cost.size for cost in self.costs], dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of each node's first choice when all choices are counted through."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @cached_property
    def entries(self) -> int:
        """Numbers in all tables: what one pass over the problem reads."""
        return int(self.sizes.sum()) + sum(edge.costs.size for edge in self.edges)

    @cached_property
    def table(self) -> DemandTable:
        return DemandTable.of(self)

    def cost(self, choices: Sequence[int] | np.ndarray) -> float:
        """Cost of one assignment, summed anew; inf when it is forbidden."""
        total = sum(float(cost[x]) for cost, x in zip(self.costs, choices, strict=True))
        return total + sum(float(e.costs[choices[e.a], choices[e.b]]) for e in self.edges)

    def choices_of(self, marked: np.ndarray) -> np.ndarray:
        """The assignment of the choices marked, one per node, counted through all nodes."""
        return np.flatnonzero(marked) - self.starts[:-1]

    def used(self, choices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Bytes held at each moment."""
        return self.table.used(np.asarray(choices, dtype=np.int64))

    def fits(self, choices: Sequence[int] | np.ndarray) -> bool:
        """Whether no moment is over its limit; whole bytes are compared exactly."""
        return bool((self.used(choices) <= self.limits).all())


@dataclass(frozen=True)
class DemandTable:
    """All demands as flat arrays: `nbytes[offset[d] + p]` is demand d's at choice p of its node."""

    node: np.ndarray
    first: np.ndarray
    last: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    owner: np.ndarray  # demand of each entry of nbytes
    slot: np.ndarray  # choice, counted through all nodes, of each entry of nbytes
    moments: int
    slots: int

    @staticmethod
    def of(live: Live) -> DemandTable:
        demands = sorted(live.demands, key=lambda d: d.node)
        counts = np.array([d.nbytes.size for d in demands], dtype=np.int64)
        nodes = np.array([d.node for d in demands], dtype=np.int64)
        offset = np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64)
        total: int = counts.sum()
        within = np.arange(total) - np.repeat(offset, counts)
        return DemandTable(
            nodes,
            np.array([d.first for d in demands], dtype=np.int64),
            np.array([d.last for d in demands], dtype=np.int64),
            offset,
            np.concatenate([d.nbytes for d in demands]).astype(float) if demands else np.zeros(0),
            np.repeat(np.arange(len(demands)), counts),
            np.repeat(live.starts[nodes], counts) + within,
            live.limits.size,
            int(live.starts[-1]),
        )

    def used(self, choices: np.ndarray) -> np.ndarray:
        held = self.nbytes[self.offset + choices[self.node]]
        return self.summed(held)

    def summed(self, held: np.ndarray) -> np.ndarray:
        """Sums over time of one number per demand."""
        count = self.moments + 1
        change = np.bincount(self.first, held, count) - np.bincount(self.last, held, count)
        return np.cumsum(change)[:-1]

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the most bytes that each moment could see, node by node."""
        least, most = self.ranges()
        return self.summed(least), self.summed(most)

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the most bytes of each demand."""
        if not self.node.size:
            return np.zeros(0), np.zeros(0)
        least = np.minimum.reduceat(self.nbytes, self.offset)
        return least, np.maximum.reduceat(self.nbytes, self.offset)

    def priced(self, prices: np.ndarray) -> np.ndarray:
        """What every choice of every node pays at these prices per byte and moment."""
        upto = np.concatenate([[0.0], np.cumsum(prices)])
        rate = (upto[self.last] - upto[self.first])[self.owner]
        return np.bincount(self.slot, self.nbytes * rate, self.slots)


def tighten(live: Live) -> Live:
    """The same problem with fewer moments and demands.

    What a node holds whatever is chosen goes off the limits; of a run of moments
    only those stay at which nothing more is about to start before something ends;
    moments that hold whatever is chosen go.
    """
    table = live.table
    least, most = table.ranges()
    varies = (most > least) & (table.last > table.first)
    limits = live.limits - table.summed(least)
    tight = table.summed(np.where(varies, most - least, 0.0)) > limits
    keep = _peaks(limits.astype(float), table.first[varies], table.last[varies]) & tight
    place = np.concatenate([[0], np.cumsum(keep)])
    first, last = place[table.first], place[table.last]
    rest = np.split(table.nbytes - least[table.owner], table.offset[1:])
    demands = tuple(
        Demand(int(table.node[d]), int(first[d]), int(last[d]), rest[d])
        for d in np.flatnonzero(varies & (last > first))
    )
    return Live(live.costs, live.edges, demands, limits[keep], live.moments[keep])


@compiled
def _peaks(limits: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Moments that no neighbouring moment covers: one per run between an end and the next start.

    Within a run of starts the last moment holds all of them, so the earlier ones are
    covered when their limit is no less.
    """
    count = limits.size
    starts, ends = np.zeros(count + 1, dtype=np.bool_), np.zeros(count + 1, dtype=np.bool_)
    starts[first] = True
    ends[last] = True
    keep = np.zeros(count, dtype=np.bool_)
    best = -1  # the tightest moment since the last end, among those holding the same demands
    for t in range(count):
        if ends[t] and best >= 0:
            keep[best] = True
            best = -1
        if best < 0:
            best = t
        elif starts[t]:
            if limits[best] < limits[t]:
                keep[best] = True
            best = t
        elif limits[t] < limits[best]:
            best = t
    if best >= 0:
        keep[best] = True
    return keep


def restrict(live: Live, masks: Sequence[np.ndarray]) -> Live:
    """Only the choices whose mask is true."""
    index = [np.flatnonzero(mask) for mask in masks]
    return Live(
        tuple(cost[i] for cost, i in zip(live.costs, index, strict=True)),
        tuple(Edge(e.a, e.b, e.costs[np.ix_(index[e.a], index[e.b])]) for e in live.edges),
        tuple(Demand(d.node, d.first, d.last, d.nbytes[index[d.node]]) for d in live.demands),
        live.limits,
        live.when,
    )


def finite(live: Live, ceiling: float = inf) -> Live:
    """Cap every table so that all numbers are finite and no optimum below `ceiling` changes.

    Taking one entry of `least + (ceiling - sum of leasts)` already costs the ceiling.
    Without one the cap is more than any finite assignment costs.
    """
    tables = [*live.costs, *(edge.costs for edge in live.edges)]
    flat, sizes = (
        np.concatenate([table.ravel() for table in tables]),
        [table.size for table in tables],
    )
    starts = np.cumsum([0, *sizes[:-1]])
    leasts = np.minimum.reduceat(flat, starts)
    if ceiling < inf:
        span = max(ceiling - float(leasts.sum()), 0.0) * (1 + 1e-9) + 1e-9 * abs(ceiling)
    else:
        most = np.maximum.reduceat(np.where(np.isfinite(flat), flat, -inf), starts)
        span = 1.0 + 2 * float((most - leasts).sum())
    low = np.minimum(flat, np.repeat(leasts + span, sizes))
    places = zip(starts.tolist(), sizes, tables, strict=True)
    capped = [low[start : start + size].reshape(table.shape) for start, size, table in places]
    count = len(live.costs)
    edges = tuple(Edge(e.a, e.b, c) for e, c in zip(live.edges, capped[count:], strict=True))
    return replace(live, costs=tuple(capped[:count]), edges=edges)


def memory_rows(live: Live, active: np.ndarray) -> tuple[MemoryRow, ...]:
    """The memory rows of some moments."""
    usage: dict[int, dict[int, np.ndarray]] = {int(t): {} for t in np.flatnonzero(active)}
    moments = np.flatnonzero(active)
    for d in live.demands:
        for t in moments[np.searchsorted(moments, d.first) : np.searchsorted(moments, d.last)]:
            row = usage[int(t)]
            row[d.node] = row[d.node] + d.nbytes if d.node in row else d.nbytes
    return tuple(
        MemoryRow(f"moment {live.moments[t]}", float(live.limits[t]), row)
        for t, row in usage.items()
    )
