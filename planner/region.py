"""Large neighbourhoods of an assignment, solved as integer programs.

A region is a connected set of nodes, each with its most promising choices by the
bounds of the messages; all other nodes stay. Its size adapts to what HiGHS closes in time.

Source of the idea: Shaw, "Using constraint programming and local search methods to
solve vehicle routing problems", CP 1998.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from .contraction import contract
from .live import Live, memory_rows, restrict, tighten
from .mip import solve_mip
from .onehot import Problem
from .reductions import drop_dominated, drop_impossible, drop_slack_rows, reduced_from

COUNTS = (2, 3, 4, 6, 8, 12, 16)  # promising choices per node
FIRST_ENTRIES = 6000  # entries of the edge tables of a region
GROW, SHRINK = 1.5, 0.7
GAP = 1e-6
LEAST_SECONDS = 0.3


class Region:
    """`Region(rng).solve(live, bounds, choices, seconds)`: a better assignment, or None."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.entries = FIRST_ENTRIES
        self.turn = 0

    def solve(
        self, live: Live, bounds: np.ndarray, choices: np.ndarray, seconds: float
    ) -> np.ndarray | None:
        """One region's optimum when it is below the cost of `choices`."""
        if seconds < LEAST_SECONDS:
            return None
        count = COUNTS[self.turn % len(COUNTS)]
        self.turn += 1
        masks = self._masks(live, _promising(live, bounds, choices, count), choices)
        index = [np.flatnonzero(mask) for mask in masks]
        step = contract(restrict(live, masks))
        if step is None:
            return None
        small = tighten(step.live)
        problem = Problem(
            small.costs, small.edges, memory_rows(small, np.ones(small.limits.size, bool))
        )
        model = drop_impossible(reduced_from(problem))
        if not all(model.sizes):
            return None
        model = drop_dominated(drop_slack_rows(model))
        cost = live.cost(choices)
        found = solve_mip(
            model,
            [np.isfinite(edge.costs) for edge in model.edges],
            scale=cost,
            gap=GAP,
            seconds=seconds,
        )
        closed = found.bound >= cost * (1 - 2 * GAP) or found.choices is not None
        self.entries = int(self.entries * (GROW if closed else SHRINK))
        if found.choices is None:
            return None
        inner = step.lift(model.lift(found.choices))
        better = np.array([kept[x] for kept, x in zip(index, inner, strict=True)])
        return better if live.cost(better) < cost and live.fits(better) else None

    def _masks(
        self, live: Live, promising: Sequence[np.ndarray], choices: np.ndarray
    ) -> list[np.ndarray]:
        """Promising choices inside the region, the present one elsewhere."""
        inside = self._nodes(live, [int(mask.sum()) for mask in promising])
        masks = []
        for node, mask in enumerate(promising):
            if node not in inside:
                mask = np.zeros(mask.size, bool)
                mask[choices[node]] = True
            masks.append(mask)
        return masks

    def _nodes(self, live: Live, widths: Sequence[int]) -> set[int]:
        """Breadth first from random roots until the tables between its nodes are large enough."""
        near: list[list[int]] = [[] for _ in live.costs]
        for edge in live.edges:
            near[edge.a].append(edge.b)
            near[edge.b].append(edge.a)
        inside: set[int] = set()
        entries = 0
        for root in self.rng.permutation(len(near)):
            queue = deque([int(root)])
            while queue:
                node = queue.popleft()
                if node in inside or widths[node] == 1:
                    continue
                entries += widths[node] * (1 + sum(widths[j] for j in near[node] if j in inside))
                if entries > self.entries:
                    return inside
                inside.add(node)
                queue.extend(self.rng.permutation(near[node]).tolist())
        return inside


def _promising(live: Live, bounds: np.ndarray, choices: np.ndarray, count: int) -> list[np.ndarray]:
    """The `count` choices of each node with the lowest bounds, and the present one."""
    masks = []
    for node, of_node in enumerate(np.split(bounds, live.starts[1:-1])):
        rank = min(count, of_node.size) - 1
        order = np.argsort(of_node, kind="stable")[: rank + 1]
        mask = np.zeros(of_node.size, bool)
        mask[order] = True
        mask[choices[node]] = True
        masks.append(mask)
    return masks
