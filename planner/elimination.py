"""Bucket elimination: the exact optimum of a pairwise problem of small tree-width.

Source: Dechter, "Bucket elimination", Artificial Intelligence 113, 1999.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from .onehot import Choices, Edge

CHUNK = 1 << 19  # table entries handled at once: 4 MiB of float64, about one L2 cache


@dataclass(frozen=True, slots=True)
class Order:
    """Nodes in the order they go, with those still there that each one touches.

    `entries`: table entries visited in all, which is the work; `largest`: in one table.
    """

    nodes: tuple[int, ...]
    scopes: tuple[tuple[int, ...], ...]
    entries: int
    largest: int


@dataclass(frozen=True, slots=True)
class _Factor:
    """Costs over a sorted tuple of nodes, one array dim each."""

    scope: tuple[int, ...]
    table: np.ndarray


def elimination_order(sizes: Sequence[int], edges: Iterable[Edge]) -> Order:
    """Greedy order: next goes the node whose elimination visits the fewest entries."""
    near: list[set[int]] = [set() for _ in sizes]
    for edge in edges:
        near[edge.a].add(edge.b)
        near[edge.b].add(edge.a)
    weight = {i: sizes[i] * prod(sizes[j] for j in near[i]) for i in range(len(sizes))}
    nodes: list[int] = []
    scopes: list[tuple[int, ...]] = []
    works: list[int] = [0]
    while weight:
        node = min(weight, key=lambda i: (weight[i], i))
        works.append(weight.pop(node))
        nodes.append(node)
        scopes.append(tuple(sorted(near[node])))
        for j in near[node]:
            near[j] = (near[j] | near[node]) - {j, node}
        for j in near[node]:
            weight[j] = sizes[j] * prod(sizes[k] for k in near[j])
    return Order(tuple(nodes), tuple(scopes), sum(works), max(works))


def eliminate(
    costs: Sequence[np.ndarray], edges: Iterable[Edge], order: Order
) -> tuple[float, Choices]:
    """The least cost and an assignment that has it.

    `eliminate([[0, 1], [0, 1]], [Edge(0, 1, [[9, 0], [9, 9]])], order)` is (1.0, (0, 1)).
    """
    buckets = _fill_buckets(costs, edges, order)
    value = 0.0
    best: list[np.ndarray] = []
    for step, (node, scope) in enumerate(zip(order.nodes, order.scopes, strict=True)):
        low, arg = _minimise_out(node, scope, buckets[step], [costs[j].size for j in scope])
        best.append(arg)
        if scope:
            buckets[_first(scope, order)].append(_Factor(scope, low))
        else:
            value += float(low)
    choices = [0] * len(costs)
    for node, scope, arg in zip(
        reversed(order.nodes), reversed(order.scopes), reversed(best), strict=True
    ):
        choices[node] = int(arg[tuple(choices[j] for j in scope)])
    return value, tuple(choices)


def _first(scope: Iterable[int], order: Order) -> int:
    """The step at which the first node of a scope goes."""
    members = frozenset(scope)
    return next(step for step, node in enumerate(order.nodes) if node in members)


def _fill_buckets(
    costs: Sequence[np.ndarray], edges: Iterable[Edge], order: Order
) -> list[list[_Factor]]:
    """Every node cost and edge cost, at the step where its first node goes."""
    step_of = {node: step for step, node in enumerate(order.nodes)}
    buckets = [[_Factor((node,), costs[node])] for node in order.nodes]
    for edge in edges:
        a, b, table = (edge.a, edge.b, edge.costs)
        if a > b:
            a, b, table = b, a, table.T
        buckets[min(step_of[a], step_of[b])].append(_Factor((a, b), table))
    return buckets


def _minimise_out(
    node: int, scope: tuple[int, ...], factors: Sequence[_Factor], sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and argmin over `node` of the sum of factors, as tables over `scope`."""
    tables = [_spread(factor, node, scope) for factor in factors]
    count = max(table.shape[0] for table in tables)
    step = max(1, CHUNK // max(1, prod(sizes)))
    low = np.full(sizes, np.inf)
    arg = np.zeros(sizes, dtype=np.int32)
    for start in range(0, count, step):
        part = sum((t[start : start + step] for t in tables[1:]), tables[0][start : start + step])
        part = np.broadcast_to(part, (part.shape[0], *sizes))
        index = part.argmin(axis=0) if part.shape[0] > 1 else np.zeros(sizes, dtype=np.int64)
        value = part.min(axis=0)
        better = value < low
        low = np.where(better, value, low)
        arg = np.where(better, index + start, arg)
    return low, arg


def _spread(factor: _Factor, node: int, scope: tuple[int, ...]) -> np.ndarray:
    """The factor with `node` as dim 0 and one dim, perhaps of size 1, per member of `scope`."""
    table = np.moveaxis(factor.table, factor.scope.index(node), 0)
    others = [j for j in factor.scope if j != node]
    sizes = dict(zip(others, table.shape[1:], strict=True))
    return table.reshape(table.shape[0], *(sizes.get(j, 1) for j in scope))
