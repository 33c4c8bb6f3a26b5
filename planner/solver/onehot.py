"""The one-hot pairwise problem: one choice per node, costs on nodes and edges, memory rows.

minimise   sum_i cost_i[x_i] + sum_(a,b) cost_ab[x_a, x_b]
such that  sum_i usage_ri[x_i] <= limit_r      for every row r
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np

Choices = tuple[int, ...]
Stop = Literal["proof", "time", "interrupt"]
# Relative rounding that a sum of a few thousand float64 may carry.
ROUNDING = 1e-11
PICOSECOND = 1e-12  # far below any kernel's launch: nothing real costs this little


@dataclass(frozen=True, slots=True)
class Edge:
    """Seconds that two nodes cost together.

    `Edge(0, 1, np.array([[0.0, 2e-3], [inf, 0.0]]))`: choice 1 of node 0 forbids
    choice 0 of node 1. Shape: (choices of a, choices of b).
    """

    a: int
    b: int
    costs: np.ndarray


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Bytes that may live at one point.

    `MemoryRow("stage 3", 80e9, {4: np.array([1e9, 5e8])})`: node 4 holds 1e9 or
    5e8 bytes there, by choice. Constant bytes are already taken from the limit.
    """

    name: str
    limit: float
    usage: Mapping[int, np.ndarray]


@dataclass(frozen=True, slots=True)
class OneHotProblem:
    """`OneHotProblem((np.array([1.0, 2.0]),), ())` has one node with two choices, best 0.

    Invariants: every node has a choice; edges join two different nodes.
    """

    costs: tuple[np.ndarray, ...]
    edges: tuple[Edge, ...]
    rows: tuple[MemoryRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Solution:
    """What the search can claim about its choices, in seconds.

    `optimal`: no assignment is cheaper by more than the asked gap. `feasible`
    with `choices=None`: nothing found yet, nothing refuted either, or the
    caller's cutoff was reached. `lower_bound` always holds.
    """

    status: Literal["optimal", "feasible", "infeasible"]
    stopped_by: Stop
    choices: Choices | None
    objective: float | None
    lower_bound: float
    reason: str = ""


def evaluate(problem: OneHotProblem, choices: Sequence[int]) -> float:
    """Seconds of one assignment, summed anew; inf when a forbidden choice or pair is taken."""
    nodes = sum(float(cost[x]) for cost, x in zip(problem.costs, choices, strict=True))
    return nodes + sum(float(e.costs[choices[e.a], choices[e.b]]) for e in problem.edges)


def row_usage(row: MemoryRow, choices: Sequence[int]) -> float:
    """Bytes that one assignment needs in one row."""
    return sum(float(usage[choices[node]]) for node, usage in row.usage.items())


def fits(problem: OneHotProblem, choices: Sequence[int]) -> bool:
    """Whether every memory row holds, exactly."""
    return all(row_usage(row, choices) <= row.limit for row in problem.rows)


def relative_gap(objective: float, bound: float) -> float:
    """`(objective - bound) / |objective|`; inf without an objective; a picosecond is nothing."""
    if objective == inf:
        return inf
    return max(0.0, objective - bound) / max(abs(objective), PICOSECOND)
