"""Cost graphs of the ASPLOS 2025 / EuroSys 2025 contest on intra-operator parallelism.

A file holds nodes (half-open intervals, a cost and a usage per strategy), edges (costs
row by row over the pair of strategies) and one limit on the usage at any time. A cost
of 1e18 or more forbids.

Source of the format: the contest's published example, `{"problem": {"name", "nodes":
{"intervals", "costs", "usages"}, "edges": {"nodes", "costs"}, "usage_limit"}}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...ir.errors import UsageError
from ...ir.files import MIB, FileKind, read_bytes, unpacked
from ...ir.mistakes import in_words
from .live import Demand, Live
from .onehot import Edge

FORBIDDEN = 1e18
FILE = FileKind("cost graph", 1024 * MIB, "the path of a cost graph, .json or .json.gz")
Amount = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Nodes(_Part):
    intervals: list[tuple[int, int]]
    costs: list[list[Amount]]
    usages: list[list[Amount]]

    @model_validator(mode="after")
    def _same_lengths(self) -> _Nodes:
        count = len(self.intervals)
        if not count == len(self.costs) == len(self.usages):
            raise ValueError(
                f"{count} intervals, {len(self.costs)} costs and {len(self.usages)} usages;"
                " one of each per node is needed"
            )
        if not self.costs:
            raise ValueError("there are no nodes")
        for i, (costs, usages) in enumerate(zip(self.costs, self.usages, strict=True)):
            if not costs or len(costs) != len(usages):
                raise ValueError(
                    f"node {i} has {len(costs)} costs and {len(usages)} usages;"
                    " one of each per strategy is needed, and at least one strategy"
                )
        for i, (first, last) in enumerate(self.intervals):
            if first < 0 or last < first:
                raise ValueError(f"node {i}: [{first}, {last}) is not an interval")
        return self


class _Edges(_Part):
    nodes: list[tuple[int, int]]
    costs: list[list[Amount]]

    @model_validator(mode="after")
    def _same_lengths(self) -> _Edges:
        if len(self.nodes) != len(self.costs):
            raise ValueError(f"{len(self.nodes)} edges and {len(self.costs)} lists of costs")
        return self


class _Problem(_Part):
    name: str = ""
    nodes: _Nodes
    edges: _Edges
    usage_limit: Amount | None = None

    @model_validator(mode="after")
    def _edges_fit_nodes(self) -> _Problem:
        sizes = [len(costs) for costs in self.nodes.costs]
        for k, ((a, b), costs) in enumerate(zip(self.edges.nodes, self.edges.costs, strict=True)):
            if not (0 <= a < len(sizes) and 0 <= b < len(sizes)):
                raise ValueError(f"edge {k} joins nodes {a} and {b}; there are {len(sizes)}")
            if len(costs) != sizes[a] * sizes[b]:
                raise ValueError(
                    f"edge {k} has {len(costs)} costs; {sizes[a]} x {sizes[b]} are needed"
                )
        return self


class _File(_Part):
    problem: _Problem


def read(path: Path) -> Live:
    """The problem of a `.json` or `.json.gz` file.

    Raises:
        UsageError: the file cannot be read, is not JSON, or is not of the format.
    """
    text = unpacked(read_bytes(path, FILE), path, FILE)
    try:
        problem = _File.model_validate_json(text).problem
    except ValidationError as error:
        raise UsageError(
            f"{path} is not a cost graph: {_first_problem(error)}.",
            fix='a file of the form {"problem": {"nodes": ..., "edges": ..., "usage_limit": ...}}',
        ) from None
    return _live(problem)


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    wrong, where = in_words(error)
    return f"{where}: {wrong}" if where else wrong


def _live(problem: _Problem) -> Live:
    nodes = problem.nodes
    costs = [_allowed(np.array(costs, dtype=float)) for costs in nodes.costs]
    edges: list[Edge] = []
    for (a, b), flat in zip(problem.edges.nodes, problem.edges.costs, strict=True):
        table = _allowed(np.array(flat, dtype=float).reshape(costs[a].size, costs[b].size))
        if a == b:  # a node with itself: only equal strategies meet
            costs[a] = costs[a] + np.diagonal(table)
        else:
            edges.append(Edge(a, b, table))
    held = [(i, *ends) for i, ends in enumerate(nodes.intervals) if ends[1] > ends[0]]
    times = sorted({time for _, *ends in held for time in ends})
    place = {time: k for k, time in enumerate(times)}
    demands = tuple(
        Demand(i, place[first], place[last], np.array(nodes.usages[i], dtype=float))
        for i, first, last in held
    )
    limit = np.inf if problem.usage_limit is None else problem.usage_limit
    limits = np.full(max(len(times) - 1, 0), limit)
    return Live(tuple(costs), tuple(edges), demands, limits, labels=tuple(times[:-1]))


def _allowed(costs: np.ndarray) -> np.ndarray:
    return np.where(costs >= FORBIDDEN, np.inf, costs)
