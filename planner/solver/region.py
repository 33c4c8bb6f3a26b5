"""Large neighbourhoods of an assignment, solved as integer programs.

A region is a connected set of nodes, each with its most promising choices by the
bounds of the messages; all other nodes stay. Its size adapts to what HiGHS closes in time.

Source of the idea: Shaw, "Using constraint programming and local search methods to
solve vehicle routing problems", CP 1998.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from .contraction import contract
from .live import Demand, Live, memory_rows, tighten
from .mip import solve_mip
from .onehot import Choices, Edge, OneHotProblem
from .reductions import Reduced, drop_dominated, drop_impossible, drop_slack_rows, reduced_from

COUNTS = (2, 3, 4, 6, 8, 12, 16)  # promising choices per node
FIRST_ENTRIES = 6000  # entries of the edge tables of a region
GROW, SHRINK = 1.5, 0.7
GAP = 1e-6
LEAST_SECONDS = 2.0  # less is not enough for a program of a useful size
MOMENTS, MOMENTS_MORE = 100, 10  # memory rows of the first program; added when it breaks others

Near = list[dict[int, np.ndarray]]  # per node, its neighbours' tables with rows for the node


class RegionSearch:
    """`RegionSearch(rng).solve(live, bounds, choices, seconds)`: a better assignment, or None."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.entries = FIRST_ENTRIES
        self.turn = 0
        self.known: tuple[Live, Near] | None = None

    def solve(
        self, live: Live, bounds: np.ndarray, choices: np.ndarray, seconds: float
    ) -> np.ndarray | None:
        """One region's optimum when it is below the cost of `choices`."""
        if seconds < LEAST_SECONDS:
            return None
        near = self._near(live)
        count = COUNTS[self.turn % len(COUNTS)]
        self.turn += 1
        kept = _promising(live, bounds, choices, count)
        inside = self._grow(near, [k.size for k in kept])
        if not inside:
            return None
        part = _part_of(live, near, choices, inside, kept)
        step = contract(part)
        if step is None:
            return None
        small = tighten(step.live)
        before = part.cost([int(np.flatnonzero(kept[i] == choices[i])[0]) for i in inside])
        chosen = self._best(small, live.cost(choices), perf_counter() + seconds)
        self.entries = int(self.entries * (SHRINK if chosen is None else GROW))
        if chosen is None:
            return None
        inner = step.lift(chosen)
        if not part.cost(inner) < before:
            return None
        better = choices.copy()
        better[inside] = [kept[i][x] for i, x in zip(inside, inner, strict=True)]
        return better if live.fits(better) else None

    def _best(self, live: Live, scale: float, deadline: float) -> Choices | None:
        """The optimum, with the moments that could overflow most and those that answers broke."""
        excess = live.table.extremes()[1] - live.limits
        active = np.zeros(excess.size, bool)
        active[np.argsort(-excess)[:MOMENTS]] = True
        while perf_counter() < deadline:
            problem = OneHotProblem(live.costs, live.edges, memory_rows(live, active))
            model = drop_impossible(reduced_from(problem))
            if not all(model.sizes):
                return None
            chosen = _closed(drop_dominated(drop_slack_rows(model)), scale, deadline)
            if chosen is None:
                return None
            over = live.used(chosen) - live.limits
            if not (over > 0).any():
                return chosen
            active[np.argsort(-over)[:MOMENTS_MORE]] = True
        return None

    def _near(self, live: Live) -> Near:
        if self.known is None or self.known[0] is not live:
            near: Near = [{} for _ in live.costs]
            for edge in live.edges:
                near[edge.a][edge.b], near[edge.b][edge.a] = edge.costs, edge.costs.T
            self.known = live, near
        return self.known[1]

    def _grow(self, near: Near, widths: Sequence[int]) -> list[int]:
        """Breadth first from random roots until the tables between its nodes are large enough."""
        inside: dict[int, None] = {}
        entries = 0
        for root in self.rng.permutation(len(near)):
            queue = deque([int(root)])
            while queue:
                node = queue.popleft()
                if node in inside or widths[node] == 1:
                    continue
                entries += widths[node] * (1 + sum(widths[j] for j in near[node] if j in inside))
                if entries > self.entries and inside:
                    return sorted(inside)
                inside[node] = None
                queue.extend(self.rng.permutation(list(near[node])).astype(int).tolist())
        return sorted(inside)


def _closed(model: Reduced, scale: float, deadline: float) -> Choices | None:
    if max(model.sizes) == 1:
        return model.lift((0,) * len(model.sizes))
    allowed = [np.isfinite(edge.costs) for edge in model.edges]
    seconds = max(0.1, deadline - perf_counter())
    found = solve_mip(model, allowed, scale=scale, gap=GAP, seconds=seconds).choices
    return None if found is None else model.lift(found)


def _part_of(
    live: Live, near: Near, choices: np.ndarray, inside: Sequence[int], kept: Sequence[np.ndarray]
) -> Live:
    """The problem of some nodes and some of their choices while all others stay."""
    place = {node: k for k, node in enumerate(inside)}
    costs, edges = list[np.ndarray](), list[Edge]()
    for k, node in enumerate(inside):
        cost = live.costs[node][kept[node]]
        for other, table in near[node].items():
            if other not in place:
                cost = cost + table[kept[node], choices[other]]
            elif node < other:
                part = table[np.ix_(kept[node], kept[other])]
                edges.append(Edge(k, place[other], part))
        costs.append(cost)
    demands = tuple(
        Demand(place[d.node], d.first, d.last, d.nbytes[kept[d.node]])
        for d in live.demands
        if d.node in place
    )
    free = live.limits - live.used(choices)
    for d in live.demands:
        if d.node in place:
            free[d.first : d.last] += d.nbytes[choices[d.node]]
    return Live(tuple(costs), tuple(edges), demands, free)


def _promising(live: Live, bounds: np.ndarray, choices: np.ndarray, count: int) -> list[np.ndarray]:
    """The `count` choices of each node with the lowest bounds, and the present one."""
    kept: list[np.ndarray] = []
    for node, of_node in enumerate(np.split(bounds, live.starts[1:-1])):
        lowest = np.argsort(of_node, kind="stable")[:count]
        kept.append(np.union1d(lowest, choices[node]))
    return kept
