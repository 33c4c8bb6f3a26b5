"""The space the planner searches: nodes with choices, and prices on nodes and edges.

A node is one decision: an op with the cheap ops that follow it, or a slot (an
input of the step, a boundary of a loop). Its choices are strategies of the op,
or layouts of the slot. Once every node has chosen, every value has a layout.
Ops of repeated layers share their node (equal tags), so depth costs nothing.

    dot ── add ── gelu ── dot         nodes: dot (+ nothing: it may owe a sum)
         ╲ copies, slots ╱                   add (+ gelu follows), dot
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..ir.graph import Op
from ..ir.mesh import Mesh
from ..ir.program import Program
from ..ir.rule import Rule, Strategy, settled_axes
from .cost.compute import Ways
from .cost.kernels import kernels_of
from .cost.model import CostModel
from .frame import Decided, Decision, Frame, Home, Outer, frame_of
from .layouts import Layouts


@dataclass
class Node(Decision):
    """One decision, with the price of each choice by itself."""

    seconds: np.ndarray = field(kw_only=True)


@dataclass
class Space:
    """Everything one solve needs, for one program, mesh and microbatch count."""

    program: Program
    mesh: Mesh
    microbatches: int
    layouts: Layouts
    nodes: list[Node]
    homes: Mapping[str, Home]  # value tag -> home
    strategies: Mapping[str, list[Strategy]]  # op tag -> per choice
    op_node: Mapping[str, int]
    edges: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    transfers: list[Transfer] = field(default_factory=list)
    own: dict[str, np.ndarray] = field(default_factory=dict)  # op tag -> seconds of one run, per choice
    runs: dict[str, float] = field(default_factory=dict)  # op tag -> runs per step


@dataclass(frozen=True, slots=True)
class Transfer:
    """One place where a value may change layout, for pricing and for the report."""

    source: str  # value tag
    reader: str  # op or slot tag
    producer: int | None
    consumer: int | None
    have: np.ndarray
    wanted: np.ndarray
    nbytes: float  # of the whole tensor when it travels
    runs: float
    phase: str


def build(
    program: Program,
    microbatches: int,
    cost: CostModel,
    layouts: Layouts,
    decided: Decided | None = None,
    runs: Mapping[str, float] | None = None,
) -> Space:
    """Lay out the decisions of a prepared graph on the mesh of `layouts`, and price them.

    Args:
        decided: then every node has one choice: a strategy that somebody else made, to be priced.
        runs: by op tag, how often the seconds of an op of one layer count; by default as often as it
            runs in a step. Under "" for the step's results.
    """
    frame = frame_of(program, microbatches, layouts, decided)
    nodes = [Node(n.tag, n.choices, n.members, seconds=np.zeros(len(n.choices))) for n in frame.nodes]
    space = Space(
        program, layouts.mesh, microbatches, layouts, nodes, frame.homes, frame.strategies, frame.op_node
    )
    _Prices(space, frame, cost, runs).fill()
    return space


class _Prices:
    """Prices the nodes of a frame and the edges between them."""

    def __init__(self, space: Space, frame: Frame, cost: CostModel, weights: Mapping[str, float] | None):
        self.space, self.frame, self.cost, self.weights = space, frame, cost, weights
        self.layouts, self.types = space.layouts, space.program.graph.types
        self.tags = space.program.value_tags
        self.kernels = kernels_of(space.program, cost.fused_attention, cost.fusion, cost.redone_inside)
        self.changes: dict[tuple, np.ndarray] = {}  # of layout, priced: layers repeat them

    def fill(self) -> None:
        space = self.space
        for alike in self.frame.alike(self.kernels):
            own = self._own_seconds(*self.frame.first[alike[0]])
            for tag in alike:
                space.own[tag], space.runs[tag] = own, self._runs(self.frame.runs[tag])
                space.nodes[space.op_node[tag]].seconds += space.runs[tag] * own
        for (source, reader, k), reading in self.frame.readings.items():
            home = space.homes[source]
            nbytes = self.layouts.collectives.wire_bytes(self.types[reading.value]) / self._parts(reading.value)
            self._add(
                Transfer(
                    source, reader, home.node, reading.consumer, home.layouts, self.frame.wants[reader, k],
                    nbytes, self._runs(reading.runs), reading.phase,
                )
            )  # fmt: skip

    def _runs(self, times: Mapping[Outer, float]) -> float:
        if self.weights is not None:
            usual = self.weights[""]
            return sum(many * self.weights.get(tag, usual) for (tag, _), many in times.items())
        return sum(many * (self.space.microbatches if split else 1) for (_, split), many in times.items())

    def _parts(self, value: int) -> int:
        return self.frame.parts(value, self.space.microbatches)

    def _own_seconds(self, op: Op, rule: Rule) -> np.ndarray:
        """Seconds of one run, per choice: compute, and reductions settled inside the op."""
        chosen, prices = self.space.strategies[op.tag], self.layouts.collectives
        parts = [self._parts(v) for v in (*op.inputs, *op.outputs)]
        sides, whole = self.frame.ways(op, self.layouts)
        operands = [sides[k] * parts[k] for k in range(len(op.inputs))]
        results = [sides[k] * parts[k] for k in range(len(op.inputs), len(sides))]
        work = whole * max(parts)
        seconds = self.cost.op_seconds(
            op, rule, self.types, Ways(operands, results, work), self.kernels
        )
        seconds = np.broadcast_to(seconds, (len(chosen),)).copy()
        inside = any(factor.reduction not in ("", "sum") for factor in rule.factors)
        for i, strategy in enumerate(chosen if inside else ()):
            for axes in settled_axes(rule, strategy, self.space.mesh).values():
                for value, ways in zip(op.outputs, results, strict=True):
                    nbytes = prices.wire_bytes(self.types[value]) / ways[i]
                    seconds[i] += prices.line("all_reduce", axes)(nbytes)
        return seconds

    def _add(self, item: Transfer) -> None:
        """Add the price of a layout change to the node or edge it depends on."""
        space, (a, b) = self.space, (item.producer, item.consumer)
        space.transfers.append(item)
        if a == b and np.array_equal(item.have, item.wanted):
            return
        if a is None and b is None:
            return
        matrix = item.runs * self._change(item)
        if a == b:
            space.nodes[a].seconds += np.diagonal(matrix)  # type: ignore[index]
        elif a is None:
            space.nodes[b].seconds += matrix[0]  # type: ignore[index]
        elif b is None:
            space.nodes[a].seconds += matrix[:, 0]
        else:
            key, cell = ((a, b), matrix) if a < b else ((b, a), matrix.T)
            old = space.edges.get(key)
            space.edges[key] = cell.copy() if old is None else old + cell

    def _change(self, item: Transfer) -> np.ndarray:
        """Seconds of one run of a change, from each layout to each."""
        key = item.have.tobytes(), item.wanted.tobytes(), item.nbytes, item.phase == "update"
        if key not in self.changes:
            self.changes[key] = self.layouts.seconds(item.have, item.wanted, item.nbytes, item.phase)
        return self.changes[key]
