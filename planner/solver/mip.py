"""What is left as a mixed-integer program, solved by HiGHS.

One binary per choice, one continuous variable per pair of an edge, and the sums
of the pairs tied to the choices (the local polytope):

    sum_p x_ip = 1,   sum_q z_pq = x_p,   sum_p z_pq = x_q,   sum_i usage_i . x_i <= limit
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from threading import Thread
from time import perf_counter
from typing import Protocol

import highspy
import numpy as np

from .onehot import Choices, Edge
from .reductions import Reduced

HEAR = 0.1  # seconds within which Ctrl-C is heard
GRACE = 1.0  # seconds after the time limit in which HiGHS may still answer
OBJECTIVE_SCALE = 1e3  # HiGHS' tolerances are absolute, about 1e-7
sparse = import_module("scipy.sparse")  # which has no types


class _ByEntry(Protocol):
    """What is read of a sparse matrix by entries."""

    data: np.ndarray
    coords: tuple[np.ndarray, np.ndarray]


class _ByRow(Protocol):
    """What is read of a sparse matrix row by row."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    nnz: int


@dataclass(frozen=True, slots=True)
class MipAnswer:
    """`bound` holds for the program given; `choices` may miss a row by HiGHS' 1e-6.

    `work` is what it took: simplex iterations times entries of the matrix.
    """

    infeasible: bool
    choices: Choices | None
    bound: float
    work: float


@dataclass(frozen=True, slots=True)
class _Ties:
    """Equality rows `matrix @ (x, z) = right` and the cost of each pair variable."""

    matrix: _ByRow
    right: np.ndarray
    pair_costs: np.ndarray


def solve_mip(
    model: Reduced, allowed: Sequence[np.ndarray], *, scale: float, gap: float, seconds: float
) -> MipAnswer:
    """Minimise over the choices of `model` and the pairs that `allowed[edge]` marks.

    `scale`: a cost near the optimum. HiGHS runs in a thread of its own, which ends by its
    time limit, so that Ctrl-C is heard at once.
    """
    starts = np.concatenate([[0], np.cumsum(model.sizes)])
    ties = _tie_pairs(model, allowed, starts)
    costs = np.concatenate([*model.costs, ties.pair_costs])
    unit = (abs(scale) or float(np.abs(costs).max()) or 1.0) / OBJECTIVE_SCALE
    costs = costs / unit
    integrality = np.zeros(costs.size)
    integrality[: starts[-1]] = 1
    rows, lower, upper = ties.matrix, ties.right, ties.right
    if model.limits.size:
        usage = sparse.csr_array(np.hstack(model.usage))
        usage.resize(model.limits.size, costs.size)
        rows = sparse.csr_array(sparse.vstack([rows, usage]))
        lower = np.concatenate([lower, np.full(model.limits.size, -np.inf)])
        upper = np.concatenate([upper, model.limits])
    found = _highs(_Program(costs, integrality, rows, lower, upper), gap, seconds)
    choices = None if found.values is None else _read(found.values, starts)
    return MipAnswer(found.infeasible, choices, found.bound * unit, found.iterations * rows.nnz)


@dataclass(frozen=True, slots=True)
class _Program:
    """Least `costs @ x` with `lower <= rows @ x <= upper` and x in [0, 1], whole where marked."""

    costs: np.ndarray
    integrality: np.ndarray
    rows: _ByRow
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True, slots=True)
class _Found:
    infeasible: bool
    values: np.ndarray | None
    bound: float
    iterations: int


def _highs(program: _Program, gap: float, seconds: float) -> _Found:
    """HiGHS on one program, in a thread of its own so that Ctrl-C is heard; it then ends too."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.HandleUserInterrupt = True
    solver.setOptionValue("time_limit", max(0.05, seconds))
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("threads", 1)
    height, width = program.lower.size, program.costs.size
    rows = program.rows
    solver.passModel(
        width, height, rows.nnz, int(highspy.MatrixFormat.kRowwise), int(highspy.ObjSense.kMinimize),
        0.0, program.costs, np.zeros(width), np.ones(width), program.lower, program.upper,
        rows.indptr.astype(np.int32), rows.indices.astype(np.int32), rows.data.astype(float),
        program.integrality.astype(np.int32),
    )  # fmt: skip
    worker = Thread(target=solver.run, daemon=True)
    worker.start()
    late = perf_counter() + seconds + GRACE
    try:
        while worker.is_alive():
            worker.join(HEAR)
            if perf_counter() > late:  # it looks at its clock too rarely: leave it behind
                solver.cancelSolve()
                return _Found(False, None, -np.inf, 0)
    except KeyboardInterrupt:
        solver.cancelSolve()
        raise
    infeasible = solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible
    info = solver.getInfo()
    if info.primal_solution_status != int(highspy.SolutionStatus.kSolutionStatusFeasible):
        return _Found(infeasible, None, info.mip_dual_bound, info.simplex_iteration_count)
    values = np.array(solver.getSolution().col_value)
    return _Found(infeasible, values, info.mip_dual_bound, info.simplex_iteration_count)


def _read(values: np.ndarray, starts: np.ndarray) -> Choices:
    return tuple(int(values[low:high].argmax()) for low, high in pairwise(starts))


def _tie_pairs(model: Reduced, allowed: Sequence[np.ndarray], starts: np.ndarray) -> _Ties:
    """One choice per node; each pair's sums equal to its two choices."""
    count = len(model.costs)
    owner = np.repeat(np.arange(count), model.sizes)
    one_each: _ByEntry = sparse.coo_array((np.ones(owner.size), (owner, np.arange(owner.size))))
    blocks, heights = [one_each], [count]
    pair_costs, width = [np.zeros(0)], int(starts[-1])
    for edge, mask in zip(model.edges, allowed, strict=True):
        blocks.append(_tie_edge(edge, mask, starts, width))
        heights.append(sum(mask.shape))
        pair_costs.append(edge.costs[mask])
        width += int(mask.sum())
    padded = [
        sparse.coo_array((block.data, block.coords), shape=(height, width))
        for block, height in zip(blocks, heights, strict=True)
    ]
    right = np.zeros(sum(heights))
    right[:count] = 1.0
    return _Ties(sparse.csr_array(sparse.vstack(padded)), right, np.concatenate(pair_costs))


def _tie_edge(edge: Edge, mask: np.ndarray, starts: np.ndarray, first: int) -> _ByEntry:
    """Rows `sum of pairs - choice = 0` for every choice of both ends."""
    p, q = np.nonzero(mask)
    left, right = map(int, mask.shape)
    pairs = first + np.arange(p.size)
    ends = np.concatenate([starts[edge.a] + np.arange(left), starts[edge.b] + np.arange(right)])
    rows = np.concatenate([p, left + q, np.arange(left + right)])
    columns = np.concatenate([pairs, pairs, ends])
    values = np.concatenate([np.ones(2 * p.size), -np.ones(left + right)])
    return sparse.coo_array((values, (rows, columns)), shape=(left + right, first + p.size))
