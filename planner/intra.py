"""One intra-operator solve: a program on a mesh with a microbatch count under a memory limit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf

import numpy as np

from .memory import Ledger, Lifetimes
from .solver import Edge, MemoryRow, Problem, Solution, solve
from .space import Space

MOST_ROUNDS = 24  # rounds of adding the memory row that the last answer broke


@dataclass(frozen=True)
class Answer:
    """A solve's result. `peak` and `moment` say where the answer's memory is highest."""

    solution: Solution
    peak: float
    moment: tuple[int, int]
    rounds: int


def problem_of(space: Space) -> Problem:
    edges = tuple(Edge(a, b, matrix) for (a, b), matrix in sorted(space.edges.items()))
    return Problem(tuple(node.seconds for node in space.nodes), edges)


def solve_space(
    space: Space,
    lives: Lifetimes,
    limit: float,
    *,
    deadline: float,
    gap: float,
    seed: int,
    cutoff: float = inf,
) -> Answer:
    """Minimise predicted seconds with memory at every moment at most `limit`.

    Rows are added lazily: solve, find the moment where the answer is over the
    limit, add its row, solve again. Every bound on the way is a bound of the whole.
    """
    ledger, problem = Ledger(space, lives), problem_of(space)
    rows: dict[tuple[int, int], MemoryRow] = {}
    bound = 0.0
    for round_number in range(1, MOST_ROUNDS + 1):
        left = max(0.2, deadline - time.monotonic())
        current = Problem(problem.costs, problem.edges, tuple(rows.values()))
        solution = solve(current, time_limit=left, gap=gap, seed=seed, cutoff=cutoff)
        bound = max(bound, solution.lower_bound)
        if solution.choices is None:
            return Answer(solution, inf, (0, 0), round_number)
        peak, moment = ledger.peak(ledger.local_bytes(solution.choices))
        if peak <= limit:
            return Answer(_with_bound(solution, bound), peak, moment, round_number)
        if moment in rows or time.monotonic() > deadline:
            break
        rows[moment] = _row(ledger, moment, limit)
    stopped = Solution(
        "feasible", "time", None, None, bound, "no layout under the memory limit was found in time"
    )
    return Answer(stopped, inf, (0, 0), len(rows))


def _row(ledger: Ledger, moment: tuple[int, int], limit: float) -> MemoryRow:
    fixed, usage = ledger.row(*moment)
    return MemoryRow(
        f"tick {moment[1]}", limit - fixed, {n: np.asarray(u) for n, u in usage.items()}
    )


def _with_bound(solution: Solution, bound: float) -> Solution:
    return Solution(
        solution.status, solution.stopped_by, solution.choices, solution.objective,
        max(bound, solution.lower_bound), solution.reason,
    )  # fmt: skip
