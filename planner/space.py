"""The space the planner searches: nodes with choices, and prices on nodes and edges.

A node is one decision: an op with the cheap ops that follow it, or a slot (an
input of the step, a boundary of a loop). Its choices are strategies of the op,
or layouts of the slot. Once every node has chosen, every value has a layout.
Ops of repeated layers share their node (equal tags), so depth costs nothing.

    dot ── add ── gelu ── dot         nodes: dot (+ nothing: it may owe a sum)
         ╲ copies, slots ╱                   add (+ gelu follows), dot
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..ir.graph import Op
from ..ir.mesh import Mesh
from ..ir.microbatch import TimeAxis
from ..ir.program import Program
from ..ir.rule import NONE, Rule, Strategy, settled_axes
from ..ir.rules import rule_of
from ..ir.sharding import Sharding, replicated
from .catalogue import Taken
from .cost.compute import Ways
from .cost.kernels import LEADERS, kernels_of, spreads_scalar
from .cost.model import CostModel
from .layouts import Layouts


@dataclass
class Node:
    """One decision. `choices` are strategies (op) or layouts (slot); `seconds` their own price."""

    tag: str
    choices: list[Strategy] | list[Sharding]
    seconds: np.ndarray
    members: list[str] = field(default_factory=list)  # op tags that this choice settles


@dataclass(frozen=True, slots=True)
class Home:
    """Where the layout of a value is decided: layout numbers per choice of a node.

    `node` is None for values that any device can make for itself (constants,
    masks): they lie replicated and slicing them is free.
    """

    node: int | None
    layouts: np.ndarray


@dataclass
class Space:
    """Everything one solve needs, for one program, mesh and microbatch count."""

    program: Program
    mesh: Mesh
    microbatches: int
    layouts: Layouts
    nodes: list[Node] = field(default_factory=list)
    edges: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)  # value tag -> home
    strategies: dict[str, list[Strategy]] = field(default_factory=dict)  # op tag -> per choice
    op_node: dict[str, int] = field(default_factory=dict)
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


class Decided(Protocol):
    """Decisions already made: the one strategy of each op, the order in which its axes cut one dim
    (empty: the mesh's), the one layout of each slot."""

    def strategy(self, op: Op, rule: Rule) -> Strategy: ...

    def order(self, op: Op) -> tuple[str, ...]: ...

    def layout(self, tag: str, value: int) -> Sharding: ...


def build(
    program: Program,
    microbatches: int,
    cost: CostModel,
    layouts: Layouts,
    decided: Decided | None = None,
    runs: Mapping[str, float] | None = None,
) -> Space:
    """Lay out the decisions of a prepared graph on the mesh of `layouts`.

    Args:
        decided: then every node has one choice: a strategy that somebody else made, to be priced.
        runs: by op tag, how often the seconds of an op of one layer count; by default as often as it
            runs in a step. Under "" for the step's results.
    """
    space = Space(program, layouts.mesh, microbatches, layouts)
    _Builder(space, cost, decided, runs).build()
    return space


class _Builder:
    """Walks the graph once to find nodes and transfers, then prices them all.

    Ops of equal tag share everything but the number of runs, so each tag is
    looked at once.
    """

    def __init__(
        self, space: Space, cost: CostModel, decided: Decided | None, weights: Mapping[str, float] | None
    ):
        self.space, self.cost, self.decided, self.weights = space, cost, decided, weights
        self.program, self.mesh, self.layouts = space.program, space.mesh, space.layouts
        self.graph = space.program.graph
        self.types = self.graph.types
        self.tags = space.program.value_tags
        self.time = space.program.time if isinstance(space.program.time, TimeAxis) else None
        self.kernels = kernels_of(self.program, cost.fused_attention, cost.fusion, cost.redone_inside)
        self.first: dict[str, tuple[Op, Rule]] = {}  # op tag -> one op that carries it
        self.taken: dict[str, Taken] = {}
        self.runs: dict[str, float] = defaultdict(int)
        space.runs = self.runs
        self.phases: dict[str, str] = {}
        # (reader tag, operand) -> layout per choice
        self.wants: dict[tuple[str, int], np.ndarray] = {}
        # (source tag, reader tag, operand) -> [value, consumer node, runs, phase]
        self.readings: dict[tuple[str, str, int], list] = {}

    # ------------------------------------------------------------ walk

    def build(self) -> None:
        for value in self.graph.inputs:
            if self.tags[value] not in self.space.homes:
                self._slot(self.tags[value], value)
        for constant in self.graph.constants:
            self._free(constant.value)
        for position, op in enumerate(self.graph.ops):
            self._op(op, op.count * self._runs(op, position), self.program.phases[position])
        self._outputs()
        self._price()

    def _runs(self, op: Op, position: int) -> float:
        if self.weights is not None:
            return self.weights.get(op.tag, self.weights[""])
        return self.space.microbatches if self.time and position in self.time.body else 1

    def _op(self, op: Op, runs: float, phase: str) -> None:
        if op.kind == "scan":
            self._scan(op, runs, phase)
        elif op.kind == "optimization_barrier":
            for source, result in zip(op.inputs, op.outputs, strict=True):
                self.space.homes[self.tags[result]] = self._home(source)
        elif op.tag not in self.space.op_node and self._is_free(op):
            for value in op.outputs:
                self._free(value)
            self._settle_scalar(op, runs, phase)
        else:
            self._count(op, runs, phase)

    def _count(self, op: Op, runs: float, phase: str) -> None:
        if op.tag not in self.space.op_node:
            rule = rule_of(op, self.types)
            self.first[op.tag] = (op, rule)
            self._decide(op, rule)
        self.runs[op.tag] += runs
        self.phases[op.tag] = phase
        for k, value in enumerate(op.inputs):
            self._read(value, op.tag, k, self.space.op_node[op.tag], runs, phase)

    def _read(
        self, value: int, reader: str, k: int, node: int | None, runs: float, phase: str
    ) -> None:
        key = (self.tags[value], reader, k)
        entry = self.readings.setdefault(key, [value, node, 0, phase])
        entry[2] += runs

    def _is_free(self, op: Op) -> bool:
        """Cheap and made from constants or one scalar alone: every device can make its own."""
        made = op.kind not in LEADERS and all(self._home(v).node is None for v in op.inputs)
        return made or spreads_scalar(op, self.types)

    def _settle_scalar(self, op: Op, runs: float, phase: str) -> None:
        """A scalar that is spread must be known everywhere: no sum owed."""
        for k, value in enumerate(op.inputs):
            home = self._home(value)
            if home.node is not None:
                whole = self.layouts.number(replicated(self.types[value].rank))
                self.wants[op.tag, k] = np.full(len(home.layouts), whole)
                self._read(value, op.tag, k, home.node, runs, phase)

    def _free(self, value: int) -> None:
        layout = self.layouts.numbers([replicated(self.types[value].rank)])
        self.space.homes.setdefault(self.tags[value], Home(None, layout))

    def _home(self, value: int) -> Home:
        return self.space.homes[self.tags[value]]

    # ------------------------------------------------------------ nodes

    def _slot(self, tag: str, value: int, owed: bool = False) -> int:
        shape = list(self.types[value].shape)
        dim = self._split_dim(value)
        if dim is not None:
            shape[dim] //= self.space.microbatches
        choices, numbers = self.layouts.slot(tuple(shape), owed)
        if self.decided:
            choices = [self.decided.layout(tag, value)]
            numbers = self.layouts.numbers(choices)
        node = self._node(Node(tag, choices, np.zeros(len(choices))))
        self.space.homes[tag] = Home(node, numbers)
        return node

    def _node(self, node: Node) -> int:
        self.space.nodes.append(node)
        return len(self.space.nodes) - 1

    def _split_dim(self, value: int) -> int | None:
        return self.time.split.get(value) if self.time and self.space.microbatches > 1 else None

    def _decide(self, op: Op, rule: Rule) -> None:
        """Let the op follow one of its operands, or make it a node."""
        if self.decided:
            taken = self.layouts.only(rule, self.decided.strategy(op, rule), self.decided.order(op))
            self._settle(op, self._node(Node(op.tag, taken.strategies, np.zeros(1))), taken)
            return
        time = self._time_factors(op, rule)
        if op.kind not in LEADERS and any(
            self._try_follow(op, rule, k, time) for k in self._by_size(op)
        ):
            return
        taken = self.layouts.taken(rule, time)
        if op.kind == "copy":
            taken = taken.at(np.array([min(s.axes) >= NONE for s in taken.strategies]))
        node = self._node(Node(op.tag, taken.strategies, np.zeros(len(taken.strategies))))
        self._settle(op, node, taken)

    def _time_factors(self, op: Op, rule: Rule) -> dict[int, int]:
        """The factor that is already cut into microbatches."""
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            dim = self._split_dim(value)
            if dim is not None:
                lead = next((f for f in dims[dim] if rule.factors[f].size > 1), None)
                return {lead: self.space.microbatches} if lead is not None else {}
        return {}

    def _by_size(self, op: Op) -> list[int]:
        """Operands worth following: decided somewhere, the largest and latest first."""
        decided = [i for i, v in enumerate(op.inputs) if self._home(v).node is not None]
        return sorted(decided, key=lambda i: (-self.types[op.inputs[i]].size, -op.inputs[i]))

    def _try_follow(self, op: Op, rule: Rule, operand: int, time: dict[int, int]) -> bool:
        home = self._home(op.inputs[operand])
        assert home.node is not None
        node = self.space.nodes[home.node]
        if self.types[op.outputs[0]].size > self.types[op.inputs[operand]].size:
            return False  # a broadcast may be cut in dims that its operand does not have
        taken, matched = self.layouts.followed(rule, operand, home.layouts, time)
        if not matched.all():
            if not np.all(_carries_sum(node)[~matched]):
                return False
            self._drop(home.node, matched)
        self._settle(op, home.node, taken)
        return True

    def _drop(self, number: int, keep: np.ndarray) -> None:
        """Give up choices of a node that one of its followers cannot take."""
        space, node = self.space, self.space.nodes[number]
        node.choices = [c for c, k in zip(node.choices, keep, strict=True) if k]  # type: ignore[assignment]
        node.seconds = node.seconds[keep]
        for tag, home in space.homes.items():
            if home.node == number:
                space.homes[tag] = Home(number, home.layouts[keep])
        for tag in node.members:
            self.taken[tag] = self.taken[tag].at(keep)
            space.strategies[tag] = self.taken[tag].strategies
            for k in range(len(self.first[tag][0].inputs)):
                self.wants[tag, k] = self.wants[tag, k][keep]

    def _settle(self, op: Op, node: int, taken: Taken) -> None:
        self.taken[op.tag] = taken
        self.space.strategies[op.tag] = taken.strategies
        self.space.op_node[op.tag] = node
        self.space.nodes[node].members.append(op.tag)
        for k, value in enumerate(op.outputs):
            self.space.homes[self.tags[value]] = Home(node, taken.numbers[len(op.inputs) + k])
        for k in range(len(op.inputs)):
            self.wants[op.tag, k] = taken.numbers[k]

    # ------------------------------------------------------------ loops and outputs

    def _scan(self, op: Op, runs: float, phase: str) -> None:
        region = op.regions[0]
        consts, carry = int(op.attr("num_consts")), int(op.attr("num_carry"))  # type: ignore[arg-type]
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            tag = f"{op.tag}/in{i}"
            if tag not in self.space.homes:
                self._slot(tag, inside)
            home = self.space.homes[tag]
            self.wants[tag, 0] = self._lifted(home) if i >= consts + carry else home.layouts
            self._read(outside, tag, 0, home.node, runs, phase)
        for inner in region.ops:
            self._op(inner, runs * op.trips, phase)
        for i, (result, inside) in enumerate(zip(op.outputs, region.outputs, strict=True)):
            tag = f"{op.tag}/in{consts + i}" if i < carry else f"{op.tag}/out{i}"
            if tag not in self.space.homes:
                self._slot(tag, inside, owed=phase == "backward")
            home = self.space.homes[tag]
            self.wants[tag, 1] = home.layouts
            self._read(inside, tag, 1, home.node, runs * op.trips, phase)
            layouts = home.layouts if i < carry else self._lifted(home)
            self.space.homes[self.tags[result]] = Home(home.node, layouts)

    def _lifted(self, home: Home) -> np.ndarray:
        """Layouts of the stacked tensor: the loop's dim stays whole."""
        known = [self.layouts.known[n] for n in home.layouts]
        return self.layouts.numbers([Sharding(((), *k.dims), k.partial) for k in known])

    def _outputs(self) -> None:
        """Carried state returns to the layout it came in; everything else settles its sums."""
        source = {o: i for i, o in self.graph.state}
        for position, value in enumerate(self.graph.outputs):
            if position in source:
                entry = self.graph.inputs[source[position]]
                tag = self.tags[entry]
                count = self.graph.input_counts[source[position]] if self.graph.input_counts else 1
                count *= self.weights[""] if self.weights is not None else 1
                self.wants[tag, 0] = self.space.homes[tag].layouts
                self._read(value, tag, 0, self.space.homes[tag].node, count, "update")
            elif self._home(value).node is not None:
                home, name = self._home(value), self.graph.output_name(position)
                known = [self.layouts.known[n] for n in home.layouts]
                self.wants[name, 0] = self.layouts.numbers([Sharding(k.dims) for k in known])
                self._read(value, name, 0, home.node, 1 if self.weights is None else self.weights[""], "update")

    # ------------------------------------------------------------ prices

    def _price(self) -> None:
        for tag, (op, rule) in self.first.items():
            node = self.space.nodes[self.space.op_node[tag]]
            own = self.space.own[tag] = self._own_seconds(op, rule)
            node.seconds = node.seconds + self.runs[tag] * own
        for (source, reader, k), (value, consumer, runs, phase) in self.readings.items():
            home = self.space.homes[source]
            parts = self.space.microbatches if self._split_dim(value) is not None else 1
            nbytes = self.layouts.collectives.wire_bytes(self.types[value]) / parts
            wanted = self.wants[reader, k]
            self._add(
                Transfer(
                    source, reader, home.node, consumer, home.layouts, wanted, nbytes, runs, phase
                )
            )

    def _own_seconds(self, op: Op, rule: Rule) -> np.ndarray:
        """Seconds of one run, per choice: compute, and reductions settled inside the op."""
        chosen, prices = self.space.strategies[op.tag], self.layouts.collectives
        parts = [
            self.space.microbatches if self._split_dim(v) is not None else 1
            for v in (*op.inputs, *op.outputs)
        ]
        operands = [
            self.layouts.ways(self.wants[op.tag, k]) * parts[k] for k in range(len(op.inputs))
        ]
        results = [
            self.layouts.ways(self.space.homes[self.tags[v]].layouts) * parts[len(op.inputs) + k]
            for k, v in enumerate(op.outputs)
        ]
        work = self.layouts.cut_ways(self.taken[op.tag]) * max(parts)
        seconds = self.cost.op_seconds(
            op, rule, self.types, Ways(operands, results, work), self.kernels
        )
        seconds = np.broadcast_to(seconds, (len(chosen),)).copy()
        inside = any(factor.reduction not in ("", "sum") for factor in rule.factors)
        for i, strategy in enumerate(chosen if inside else ()):
            for axes in settled_axes(rule, strategy, self.mesh).values():
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
        matrix = item.runs * self.layouts.seconds(
            item.have, item.wanted, item.nbytes, item.phase
        )
        if a is None and b is None:
            return
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


def _carries_sum(node: Node) -> np.ndarray:
    """Which choices of a node take in a sum that is still owed."""
    return np.array(
        [isinstance(c, Strategy) and min(c.axes, default=0) < NONE for c in node.choices]
    )
