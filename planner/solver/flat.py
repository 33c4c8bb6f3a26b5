"""A pairwise problem as flat arrays, the form that compiled kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .onehot import Edge


class Flat(NamedTuple):
    """Nodes, edges and tables one after another; all tables finite.

    Choice p of node i has number `starts[i] + p`. Edge e joins `a[e] < b[e]` or any two
    nodes; its table lies row by row at `tables[at[e] : at[e + 1]]`, rows for a. The edges
    of node i are `near[first[i] : first[i + 1]]`. Vectors per edge end lie at `at_a`, `at_b`.
    """

    starts: np.ndarray
    a: np.ndarray
    b: np.ndarray
    at: np.ndarray
    tables: np.ndarray
    at_a: np.ndarray
    at_b: np.ndarray
    first: np.ndarray
    near: np.ndarray


def flatten(sizes: Sequence[int] | np.ndarray, edges: Sequence[Edge]) -> Flat:
    """`flatten([2, 3], [Edge(0, 1, table)])` has one 2x3 table."""
    sizes = np.asarray(sizes, dtype=np.int64)
    a = np.array([edge.a for edge in edges], dtype=np.int64)
    b = np.array([edge.b for edge in edges], dtype=np.int64)
    tables = [np.ascontiguousarray(edge.costs, dtype=float).ravel() for edge in edges]
    ends = np.concatenate([a, b])
    order = np.argsort(ends, kind="stable").astype(np.int64)
    return Flat(
        _offsets(sizes),
        a,
        b,
        _offsets(np.array([t.size for t in tables], dtype=np.int64)),
        np.concatenate(tables) if tables else np.zeros(0),
        _offsets(sizes[a]),
        _offsets(sizes[b]),
        _offsets(np.bincount(ends, minlength=sizes.size)),
        order % max(len(edges), 1),
    )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def cost_of(flat: Flat, costs: np.ndarray, choices: np.ndarray) -> float:
    """Cost of an assignment, where `costs` holds all nodes' costs one after another."""
    width = np.diff(flat.starts)[flat.b]
    pairs = flat.at[:-1] + choices[flat.a] * width + choices[flat.b]
    return float(costs[flat.starts[:-1] + choices].sum() + flat.tables[pairs].sum())
