"""The space the planner searches: nodes with choices, and prices on nodes and edges.

A node is one decision: an op with the cheap ops that follow it, or a slot (an
input of the step, a boundary of a loop). Its choices are strategies of the op,
or layouts of the slot. Once every node has chosen, every value has a layout.
Ops of repeated layers share their node (equal tags), so depth costs nothing.

    dot ── add ── gelu ── dot         nodes: dot (+ nothing: it may owe a sum)
         ╲ copies, slots ╱                   add (+ gelu follows), dot
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np

from ...ir.execution import OverlapKind
from ...ir.graph import Op
from ...ir.mesh import Mesh
from ...ir.program import Program
from ...ir.rules.rule import Rule, Strategy
from ..cost.kernels import kernels_of
from ..cost.model import CostModel
from ..cost.ways import Ways
from .frame import CostClass, Decided, Decision, Frame, LayoutVariable, Place, frame_of
from .fused import fused_of
from .inside import Inside
from .layouts import Layouts
from .outline import Outer
from .uneven import ring_work, unevenness
from .windows import MANY, Timed, Windows, windows_of


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
    frame: Frame
    edges: dict[tuple[int, int], np.ndarray] = field(default_factory=lambda: {})
    # Op tag -> seconds of one run, per choice.
    own: dict[str, np.ndarray] = field(default_factory=lambda: {})
    # Of `own`, what it sends inside.
    settled: dict[str, np.ndarray] = field(default_factory=lambda: {})
    moved: list[np.ndarray] = field(default_factory=lambda: [])  # seconds of one run of each change
    runs: dict[str, float] = field(default_factory=lambda: {})  # op tag -> runs per step
    # How often each reading happens per step.
    read: np.ndarray = field(default_factory=lambda: np.zeros(0))
    windows: Windows | None = None  # None: nothing overlaps
    host_seconds: float = 0.0  # of a host that dispatches op by op beside its device
    overlap: tuple[OverlapKind, ...] = ()

    @property
    def homes(self) -> Mapping[str, LayoutVariable]:
        """By value tag."""
        return self.frame.homes

    @property
    def strategies(self) -> Mapping[str, list[Strategy]]:
        """By op tag, one per choice of its node."""
        return self.frame.strategies

    @property
    def op_node(self) -> Mapping[str, int]:
        return self.frame.op_node

    def layout(self, tag: str, choices: Sequence[int]) -> int:
        """The number of a value's layout under choices, by its tag."""
        home = self.homes[tag]
        return int(home.layouts[choices[home.node] if home.node is not None else 0])

    def codes(self, choices: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """By op tag, its strategy under choices."""
        return {
            tag: found[choices[self.op_node[tag]]].axes for tag, found in self.strategies.items()
        }

    def bytes_of(self, value: int) -> float:
        """Bytes of a whole value when it travels, of one microbatch."""
        whole = self.layouts.collectives.wire_bytes(self.program.graph.types[value])
        return whole / self.frame.outline.parts(value, self.microbatches)

    def inside(self, op: Op, rule: Rule, strategy: Strategy, ways: Sequence[float]) -> Inside:
        """What one run of an op sends; `ways` into how many parts each of its sides is cut."""
        kinds = [self.program.graph.types[v] for v in (*op.inputs, *op.outputs)]
        prices, beside = self.layouts.collectives, "tensor" in self.overlap
        return Inside(op, rule, strategy, prices, kinds, ways, beside)

    def seconds(self, choices: Sequence[int]) -> float:
        """Of a step under choices, with what overlaps."""
        timed = self.timed(choices)
        found = self.serial(choices) if timed is None else timed.seconds
        return max(found, self.host_seconds)

    def serial(self, choices: Sequence[int]) -> float:
        """Of a step under choices if nothing overlaps, or of what bounds it if prices are scaled."""
        chosen = list(zip(self.nodes, choices, strict=True))
        total = sum(float(node.seconds[x]) for node, x in chosen)
        return total + sum(
            float(table[choices[a], choices[b]]) for (a, b), table in sorted(self.edges.items())
        )

    def timed(self, choices: Sequence[int]) -> Timed | None:
        """Seconds of a step under choices by window; None where nothing overlaps."""
        if self.windows is None:
            return None
        own, inside = self._ops.of(choices)
        compute, beside = (own - inside) @ self.windows.ops, np.zeros(MANY + 1)
        exposed = float(inside @ self.windows.ops.sum(axis=1))
        hides, waits = self._hides
        for ((a, b), number), often, runs in zip(
            self.frame.changes.sums, hides, waits, strict=True
        ):
            seconds = self.moved[number][_at(a, choices), _at(b, choices)]
            beside += often * seconds
            exposed += runs * seconds
        exposed += float(compute[MANY] + beside[MANY])
        return Timed(compute[:MANY], beside[:MANY], exposed)

    @cached_property
    def _hides(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.windows is not None
        return self.windows.of_sums(self.frame.changes)

    def bounding(self, multipliers: np.ndarray) -> Space:
        """The same decisions at prices whose sum no step is faster than, by one multiplier per window."""
        assert self.windows is not None
        return self.counting(
            self.windows.op_runs(multipliers), self.windows.reading_runs(multipliers)
        )

    def counting(self, runs: np.ndarray, read: np.ndarray) -> Space:
        """The same decisions where ops count so often, in the outline's order, and so often readings."""
        seconds = self._ops.by_node(runs)
        nodes = [
            Node(node.tag, node.choices, node.members, seconds=each)
            for node, each in zip(self.nodes, seconds, strict=True)
        ]
        found = replace(self, nodes=nodes, edges={})
        sums = self.frame.changes
        for (place, number), many in zip(sums.sums, sums.runs(read).tolist(), strict=True):
            _add(found, place, many * self.moved[number])
        return found

    @cached_property
    def _ops(self) -> _Ops:
        tags = self.frame.outline.runs
        nodes = np.array([self.op_node[tag] for tag in tags], np.int64)
        choices = np.array([len(node.choices) for node in self.nodes], np.int64)
        starts = np.concatenate([[0], np.cumsum(choices)])
        sizes = choices[nodes]
        first = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        own = np.concatenate([np.zeros(0), *(self.own[tag] for tag in tags)])
        settled = np.zeros(own.size)
        for tag, start, size in zip(tags, first, sizes, strict=True):
            if tag in self.settled:
                settled[start : start + size] = self.settled[tag]
        slot = np.arange(own.size) + np.repeat(starts[nodes] - first, sizes)
        return _Ops(nodes, first, sizes, own, settled, slot, starts)

    @cached_property
    def transfers(self) -> list[Transfer]:
        """Every place where a value may change layout."""
        found, readings = list[Transfer](), self.frame.outline.readings
        for ((source, reader, k), reading), runs in zip(
            readings.items(), self.read.tolist(), strict=True
        ):
            home, wanted = self.homes[source], self.frame.wants[reader, k]
            sides = home.node, self.frame.reader(reading), home.layouts, wanted
            found.append(
                Transfer(source, reader, *sides, self.bytes_of(reading.value), runs, reading.phase)
            )
        return found


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
    overlap: tuple[OverlapKind, ...] = (),
    dealt: bool = False,
) -> Space:
    """Lay out the decisions of a prepared graph on the mesh of `layouts`, and price them.

    Args:
        decided: then every node has one choice: a strategy that somebody else made, to be priced.
        runs: by op tag, how often the seconds of an op of one layer count; by default as often as it
            runs in a step. Under "" for the step's results.
        overlap: kinds of communication that run beside computation; prices of nodes and edges are those of a
            step in which none does.
        dealt: sequences come dealt out so that devices which share positions have equal work in attention.
    """
    frame = frame_of(program, microbatches, layouts, decided)
    nodes = [
        Node(n.tag, n.choices, n.members, seconds=np.zeros(len(n.choices))) for n in frame.nodes
    ]
    space = Space(program, layouts.mesh, microbatches, layouts, nodes, frame, overlap=overlap)
    _Prices(space, frame, cost, runs, dealt).fill()
    space.windows = windows_of(frame.outline, microbatches, overlap) if overlap else None
    return space


class _Prices:
    """Prices the nodes of a frame and the edges between them."""

    def __init__(
        self,
        space: Space,
        frame: Frame,
        cost: CostModel,
        weights: Mapping[str, float] | None,
        dealt: bool,
    ):
        self.space, self.frame, self.cost, self.weights = space, frame, cost, weights
        self.dealt = dealt
        self.layouts, self.types = space.layouts, space.program.graph.types
        self.kernels = kernels_of(
            space.program, cost.fused_attention, cost.fusion, cost.execution_model.redone_inside
        )

    def fill(self) -> None:
        space, frame, outline = self.space, self.frame, self.frame.outline
        often = np.array([self._often(outer) for outer in outline.outers])
        runs = outline.op_runs(often)
        space.runs = dict(zip(outline.runs, runs.tolist(), strict=True))
        for alike, own, settled in self._owns():
            space.own.update(dict.fromkeys(alike.tags, own))
            if settled is not None:
                space.settled.update(dict.fromkeys(alike.tags, settled))
        space.read = outline.reading_runs(often)
        space.moved = frame.changes.seconds(
            self.layouts, [space.bytes_of(each.value) for each in frame.changes.changes]
        )
        model = self.cost.execution_model
        if model.runs_ops_alone and model.dispatches_beside:
            space.host_seconds = model.dispatch_seconds * sum(space.runs.values())
        counted = space.counting(runs, space.read)
        space.nodes, space.edges = counted.nodes, counted.edges

    def _often(self, outer: Outer) -> float:
        """How often in a step what runs once in this loop counts."""
        tag, split = outer
        if self.weights is not None:
            return self.weights.get(tag, self.weights[""])
        return self.space.microbatches if split else 1

    def _owns(self) -> Iterator[tuple[CostClass, np.ndarray, np.ndarray | None]]:
        """Seconds of one run of each op, per choice, and of these what it sends meanwhile, if anything."""
        fused = fused_of(self.frame, self.kernels, self.cost)
        found = [
            *zip(fused.alikes, fused.seconds(self.layouts, self.space.microbatches), strict=True)
        ]
        found += [(alike, self._kernel_seconds(alike)) for alike in fused.others]
        for alike, seconds in found:
            settled = self._settled(alike, seconds) if alike.settles else None
            yield alike, seconds if settled is None else seconds + settled, settled

    def _ways(self, alike: CostClass) -> np.ndarray:
        """Into how many parts each side is cut, per choice."""
        sides, many = self.layouts.ways(alike.sides), self.space.microbatches
        return np.where(alike.timed, many, 1) * sides if many > 1 and alike.timed.any() else sides

    def _kernel_seconds(self, alike: CostClass) -> np.ndarray:
        """Of an op that is a kernel of its own."""
        op, sides, work = alike.op, self._ways(alike), self.layouts.cut_ways(alike.cuts)
        if self.space.microbatches > 1 and alike.timed.any():
            work = work * self.space.microbatches
        chosen, launches = self.space.strategies[op.tag], 1.0
        if not self.dealt and op.has("rows"):
            work = work / np.array([unevenness(op, alike.rule, s, self.space.mesh) for s in chosen])
        if op.has("ring"):
            rings = [ring_work(op, alike.rule, s, self.space.mesh) for s in chosen]
            work = work / np.array([more for more, _ in rings])
            launches = np.array([many for _, many in rings])
        ways = Ways(list(sides[: len(op.inputs)]), list(sides[len(op.inputs) :]), work, launches)
        seconds = self.cost.op_seconds(op, alike.rule, self.types, ways, self.kernels)
        return seconds + np.zeros(len(work))

    def _settled(self, alike: CostClass, compute: np.ndarray) -> np.ndarray:
        """Seconds of what an op sends while it runs, per choice."""
        op, ways = alike.op, self._ways(alike)
        chosen = self.space.strategies[op.tag]
        seconds = np.zeros(len(chosen))
        for i, strategy in enumerate(chosen):
            inside = self.space.inside(op, alike.rule, strategy, ways[:, i].tolist())
            if not self.cost.exchanges and any(s.kind == "permute" for s in inside.sent()):
                seconds[i] = inf
            else:
                seconds[i] = sum(inside.seconds(float(compute[i])))
        return seconds


def _at(node: int | None, choices: Sequence[int]) -> int:
    return 0 if node is None else choices[node]


@dataclass(frozen=True)
class _Ops:
    """Seconds of one run of every op at every choice of its node: of op i from `first[i]` on, `sizes[i]` of them.

    node: of each op.
    settled: the part of `own` in which an op communicates.
    slot: of each entry, the choice it is at, counted through all nodes, of which node n has those from `starts[n]` on.
    """

    node: np.ndarray
    first: np.ndarray
    sizes: np.ndarray
    own: np.ndarray
    settled: np.ndarray
    slot: np.ndarray
    starts: np.ndarray

    def of(self, choices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each op under choices, its seconds and the part in which it communicates."""
        at = self.first + np.asarray(choices, np.int64)[self.node]
        return self.own[at], self.settled[at]

    def by_node(self, runs: np.ndarray) -> list[np.ndarray]:
        """Seconds of each choice of each node, where ops run so often."""
        total = np.bincount(self.slot, np.repeat(runs, self.sizes) * self.own, int(self.starts[-1]))
        return [total[start:end] for start, end in pairwise(self.starts.tolist())]


def _add(space: Space, place: Place, matrix: np.ndarray) -> None:
    """Add the price of layout changes to the node or edge it depends on."""
    a, b = place
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
