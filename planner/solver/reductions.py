"""Exact reductions: drop what no better assignment can hold, and remember how to go back.

The small problem that is left is a `Reduced`: finite float64 tables, rows as a
dense matrix with limits scaled to about 1, and the original index of each choice kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil, log2

import numpy as np

from .onehot import ROUNDING, Choices, Edge, OneHotProblem

PAIRS_AT_ONCE = 2000  # pairs of choices compared at once: tables of about 2 MB


@dataclass(frozen=True, slots=True)
class Reduced:
    """A problem with fewer choices.

    `usage[i][r, p]` is node i's share of row r's limit at choice p; the rows hold
    while every sum is <= `limits[r]`, which lies in (0.5, 1] where there is room.
    `rows[r]` and `kept[i][p]` are the original indices of row r and of choice p.
    """

    costs: tuple[np.ndarray, ...]
    edges: tuple[Edge, ...]
    usage: tuple[np.ndarray, ...]
    limits: np.ndarray
    rows: np.ndarray
    kept: tuple[np.ndarray, ...]

    @property
    def sizes(self) -> list[int]:
        return [cost.size for cost in self.costs]

    def lift(self, choices: Sequence[int]) -> Choices:
        """The same assignment in the original problem's indices."""
        return tuple(int(kept[x]) for kept, x in zip(self.kept, choices, strict=True))

    def lower(self, choices: Sequence[int]) -> Choices | None:
        """An original assignment in these indices; None when a choice of it was dropped."""
        found = [np.flatnonzero(k == x) for k, x in zip(self.kept, choices, strict=True)]
        return tuple(int(f[0]) for f in found) if all(f.size for f in found) else None


def reduced_from(problem: OneHotProblem) -> Reduced:
    """The whole problem in reduced form: parallel edges merged, rows scaled, all choices kept."""
    costs = tuple(np.asarray(cost, dtype=float) for cost in problem.costs)
    scales = [_row_scale(row.limit, row.usage.values()) for row in problem.rows]
    usage = [np.zeros((len(problem.rows), cost.size)) for cost in costs]
    for r, row in enumerate(problem.rows):
        for node, held in row.usage.items():
            usage[node][r] = np.asarray(held, dtype=float) / scales[r]
    limits = np.array([row.limit / s for row, s in zip(problem.rows, scales, strict=True)])
    kept = tuple(np.arange(cost.size) for cost in costs)
    return Reduced(
        costs, _merge_parallel(problem.edges), tuple(usage), limits, np.arange(limits.size), kept
    )


def _row_scale(limit: float, usages: Iterable[np.ndarray]) -> float:
    """Bytes that become 1: the limit, or without room the largest usage, as a power of two.

    Powers of two keep sums of whole bytes exact.
    """
    most = limit if limit > 0 else max((float(np.max(np.abs(u))) for u in usages), default=0.0)
    return 2.0 ** ceil(log2(most)) if most > 0 else 1.0


def _merge_parallel(edges: Sequence[Edge]) -> tuple[Edge, ...]:
    """One edge per pair of nodes, the lower node first."""
    tables: dict[tuple[int, int], np.ndarray] = {}
    for edge in edges:
        costs = np.asarray(edge.costs, dtype=float)
        key, table = ((edge.a, edge.b), costs) if edge.a < edge.b else ((edge.b, edge.a), costs.T)
        tables[key] = tables[key] + table if key in tables else table
    return tuple(Edge(a, b, table) for (a, b), table in sorted(tables.items(), key=lambda t: t[0]))


def keep(model: Reduced, masks: Sequence[np.ndarray]) -> Reduced:
    """Only the choices whose mask is true."""
    if all(mask.all() for mask in masks):
        return model
    index = [np.flatnonzero(mask) for mask in masks]
    return Reduced(
        tuple(cost[i] for cost, i in zip(model.costs, index, strict=True)),
        tuple(Edge(e.a, e.b, e.costs[np.ix_(index[e.a], index[e.b])]) for e in model.edges),
        tuple(usage[:, i] for usage, i in zip(model.usage, index, strict=True)),
        model.limits,
        model.rows,
        tuple(kept[i] for kept, i in zip(model.kept, index, strict=True)),
    )


def drop_impossible(model: Reduced) -> Reduced:
    """Drop choices without finite cost, without a finite partner, or too large for a row.

    Repeats until nothing changes. A node may lose all its choices: then the
    problem is infeasible.
    """
    while True:
        masks = _masks_by_rows(model)
        for node, cost in enumerate(model.costs):
            masks[node] &= np.isfinite(cost)
        for edge in model.edges:
            finite = np.isfinite(edge.costs)
            masks[edge.a] &= finite.any(axis=1)
            masks[edge.b] &= finite.any(axis=0)
        smaller = keep(model, masks)
        if smaller is model or not all(smaller.sizes):
            return smaller
        model = smaller


def _masks_by_rows(model: Reduced) -> list[np.ndarray]:
    """Choices that fit every row when all other nodes take their least there."""
    least = [usage.min(axis=1) for usage in model.usage]
    room = model.limits - sum(least) + 1e-9
    return [
        ((usage - low[:, None]) <= room[:, None]).all(axis=0)
        for usage, low in zip(model.usage, least, strict=True)
    ]


def drop_slack_rows(model: Reduced) -> Reduced:
    """Drop rows that hold whatever is chosen."""
    if not model.limits.size:
        return model
    most = sum(usage.max(axis=1) for usage in model.usage)
    tight = most > model.limits - ROUNDING
    return replace(
        model,
        usage=tuple(usage[tight] for usage in model.usage),
        limits=model.limits[tight],
        rows=model.rows[tight],
    )


def drop_dominated(model: Reduced) -> Reduced:
    """Drop each choice that another one of its node beats whatever the neighbours do.

    q beats p when cost(q) - cost(p) + sum over edges of max_y (edge(q, y) - edge(p, y)) <= 0
    and q needs no more bytes in any row. Nodes go one after another, as two equal
    choices must not drop each other.
    """
    around: list[list[tuple[int, int]]] = [[] for _ in model.costs]
    for index, edge in enumerate(model.edges):
        around[edge.a].append((index, 0))
        around[edge.b].append((index, 1))
    finite = clip(model)
    for node in range(len(model.costs)):
        if finite.costs[node].size > 1:
            tables = [np.moveaxis(finite.edges[e].costs, side, 0) for e, side in around[node]]
            mask = ~_dominated(finite.costs[node], tables, finite.usage[node])
            if not mask.all():
                touched = [e for e, _ in around[node]]
                model = _keep_at(model, node, mask, touched)
                finite = _keep_at(finite, node, mask, touched)
    return model


def _keep_at(model: Reduced, node: int, mask: np.ndarray, touched: Sequence[int]) -> Reduced:
    """`keep` for one node, which touches only its own edges."""
    edges = list(model.edges)
    for e in touched:
        edge = edges[e]
        costs = edge.costs[mask] if edge.a == node else edge.costs[:, mask]
        edges[e] = Edge(edge.a, edge.b, costs)

    def put(values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return (*values[:node], values[node][..., mask], *values[node + 1 :])

    return replace(
        model,
        costs=put(model.costs),
        edges=tuple(edges),
        usage=put(model.usage),
        kept=put(model.kept),
    )


def _dominated(cost: np.ndarray, tables: Sequence[np.ndarray], usage: np.ndarray) -> np.ndarray:
    """Mask of choices that some other choice beats; of equals the first one stays.

    A few columns of each table rule out nearly all pairs (q, p); the others are
    compared in full.
    """
    worse = cost[:, None] - cost[None, :]
    for table in tables:
        columns = table.T[:: max(1, table.shape[1] // 6)]
        worse = worse + reduce(np.maximum, (c[:, None] - c[None, :] for c in columns))
    beats = worse <= 0
    np.fill_diagonal(beats, False)
    q, p = np.nonzero(beats)
    right = (usage[:, q] <= usage[:, p]).all(axis=0)
    beats[q, p] = False
    q, p = q[right], p[right]
    beats[q, p] = _worse_by(cost, tables, q, p) <= 0
    first = np.arange(cost.size)
    beats &= ~beats.T | (first[:, None] < first[None, :])
    return np.any(beats, axis=0)


def _worse_by(
    cost: np.ndarray, tables: Sequence[np.ndarray], q: np.ndarray, p: np.ndarray
) -> np.ndarray:
    """How much choice q costs more than p at most, pair by pair."""
    worse = cost[q] - cost[p]
    for table in tables:
        for low in range(0, q.size, PAIRS_AT_ONCE):
            part = slice(low, low + PAIRS_AT_ONCE)
            worse[part] += (table[q[part]] - table[p[part]]).max(axis=1)
    return worse


def clip(model: Reduced, budget: float | None = None) -> Reduced:
    """Cap every table so that all numbers are finite and no optimum below `budget` changes.

    Taking one entry of `least + (budget - sum of leasts)` already costs the budget.
    Without a budget the cap is more than any finite assignment costs.
    """
    tables = [*model.costs, *(edge.costs for edge in model.edges)]
    leasts = [float(table.min()) for table in tables]
    span = budget - sum(leasts) if budget is not None else 1.0 + 2 * sum(map(_range, tables))
    span = max(span, 0.0) * (1 + 1e-9)
    capped = [np.minimum(t, low + span) for t, low in zip(tables, leasts, strict=True)]
    count = len(model.costs)
    edges = tuple(Edge(e.a, e.b, c) for e, c in zip(model.edges, capped[count:], strict=True))
    return replace(model, costs=tuple(capped[:count]), edges=edges)


def _range(table: np.ndarray) -> float:
    finite = table[np.isfinite(table)]
    return float(finite.max() - finite.min())
