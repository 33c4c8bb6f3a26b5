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
    """Greedy order: next goes the node whose elimination visits the fewest entries.

    A node with one choice is nobody's neighbour: it decides nothing, and a hub of
    such nodes would need a table of more dims than numpy has.
    """
    sizes = [int(size) for size in sizes]  # products of numpy's integers would overflow
    near: list[set[int]] = [set() for _ in sizes]
    for edge in edges:
        if sizes[edge.a] > 1 and sizes[edge.b] > 1:
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
    """Every node cost and edge cost, at the step where its first node with a choice goes."""
    step_of = {node: step for step, node in enumerate(order.nodes)}
    buckets = [[_Factor((node,), costs[node])] for node in order.nodes]
    for edge in edges:
        a, b, table = (edge.a, edge.b, edge.costs)
        if a > b:
            a, b, table = b, a, table.T
        open_ends = [node for node in (a, b) if costs[node].size > 1] or [a]
        buckets[min(step_of[node] for node in open_ends)].append(_Factor((a, b), table))
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


@dataclass(frozen=True, slots=True)
class Marginals:
    """Least cost with one choice fixed, `nodes[i][p]`, or one pair fixed, `pairs[edge][p, q]`."""

    nodes: tuple[np.ndarray, ...]
    pairs: tuple[np.ndarray, ...]


def min_marginals(costs: Sequence[np.ndarray], edges: Sequence[Edge], order: Order) -> Marginals:
    """All min-marginals by one elimination up the order and one pass back down.

    On the way down each bucket's table receives what the rest of the graph costs,
    so that its minima are those of the whole problem. All costs must be finite.
    """
    own = _fill_buckets(costs, edges, order)
    received, lows = _pass_up(own, order)
    down: dict[int, _Factor] = {}
    found: dict[tuple[int, ...], np.ndarray] = {}
    for step in reversed(range(len(order.nodes))):
        node, scope = order.nodes[step], order.scopes[step]
        factors = [*own[step], *received[step].values()]
        table = _sum_over(node, scope, [*factors, down.pop(step)] if scope else factors)
        elsewhere = 0.0 if scope else sum(lows.values()) - lows[step]
        belief = _Factor((node, *scope), table + elsewhere)
        for child, message in received[step].items():
            rest = _project(belief, message.scope) - message.table
            down[child] = _Factor(message.scope, rest)
        for factor in own[step]:
            found[factor.scope] = _project(belief, factor.scope)
        received[step] = {}  # its tables may be large
    return Marginals(
        tuple(found[i,] for i in range(len(costs))),
        tuple(found[e.a, e.b] if e.a < e.b else found[e.b, e.a].T for e in edges),
    )


def _pass_up(
    own: Sequence[Sequence[_Factor]], order: Order
) -> tuple[list[dict[int, _Factor]], dict[int, float]]:
    """What each bucket receives, by the step that sent it; the optimum of each component."""
    received: list[dict[int, _Factor]] = [{} for _ in order.nodes]
    lows: dict[int, float] = {}
    for step, (node, scope) in enumerate(zip(order.nodes, order.scopes, strict=True)):
        table = _sum_over(node, scope, [*own[step], *received[step].values()]).min(axis=0)
        if scope:
            received[_first(scope, order)][step] = _Factor(scope, table)
        else:
            lows[step] = float(table)
    return received, lows


def _sum_over(node: int, scope: tuple[int, ...], factors: Sequence[_Factor]) -> np.ndarray:
    """The sum of factors as a table over (node, *scope)."""
    tables = [_spread(factor, node, scope) for factor in factors if node in factor.scope]
    plain = [_spread_apart(factor, scope) for factor in factors if node not in factor.scope]
    total = sum(sorted([*tables, *plain], key=np.size))
    return np.asarray(total)


def _spread_apart(factor: _Factor, scope: tuple[int, ...]) -> np.ndarray:
    """A factor without the bucket's node, with dim 0 of size 1."""
    sizes = dict(zip(factor.scope, factor.table.shape, strict=True))
    return factor.table.reshape(1, *(sizes.get(j, 1) for j in scope))


def _project(belief: _Factor, scope: tuple[int, ...]) -> np.ndarray:
    """Minimum over all nodes outside `scope`, dims in the order of `scope`.

    Nodes of `scope` that the belief does not know have one choice: a dim of size 1.
    """
    gone = tuple(k for k, node in enumerate(belief.scope) if node not in scope)
    left = [node for node in belief.scope if node in scope]
    table = belief.table.min(axis=gone).transpose([left.index(n) for n in scope if n in left])
    return np.expand_dims(table, tuple(k for k, node in enumerate(scope) if node not in left))
