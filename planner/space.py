"""The space the planner searches: nodes with choices, and prices on nodes and edges.

A node is one decision: an op with the cheap ops that follow it, or a slot (an
input of the step, a boundary of a loop). Its choices are strategies of the op,
or layouts of the slot. Once every node has chosen, every value has a layout.
Ops of repeated layers share their node (equal tags), so depth costs nothing.

    dot ── add ── gelu ── dot         nodes: dot (+ nothing: it may owe a sum)
         ╲ copies, slots ╱                   add (+ gelu follows), dot
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..ir.graph import Op
from ..ir.mesh import Mesh
from ..ir.microbatch import TimeAxis
from ..ir.program import Program
from ..ir.rule import Rule, Strategy, operand_sharding, result_sharding, settled_axes
from ..ir.rules import rule_of
from ..ir.sharding import Sharding, replicated
from .cost import CostModel
from .layouts import Layouts, layouts_of
from .strategies import follow, strategies

# Ops that never follow: they do real work, or a layout of their own is the point.
LEADERS = frozenset({
    "dot_general", "conv_general_dilated", "copy", "gather", "scatter", "scatter-add", "sort",
    "top_k", "cumsum", "while", "cond", "dynamic_slice", "dynamic_update_slice", "concatenate",
    "select_and_scatter_add", "reduce_window_max", "reduce_window_sum", "random_bits", "threefry2x32",
})  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Transfer:
    """One place where a value may change layout, for pricing and for the report."""

    source: str  # value tag
    reader: str  # op or slot tag
    producer: int | None
    consumer: int | None  # None: `wanted` holds a single fixed layout
    have: np.ndarray
    wanted: np.ndarray
    nbytes: float
    runs: int
    phase: str


def build(program: Program, mesh: Mesh, microbatches: int, cost: CostModel) -> Space:
    """Lay out the decisions of a prepared graph on a mesh."""
    space = Space(program, mesh, microbatches, Layouts(cost.collectives(mesh)))
    _Builder(space, cost).build()
    return space


class _Builder:
    def __init__(self, space: Space, cost: CostModel):
        self.space, self.cost = space, cost
        self.program, self.mesh = space.program, space.mesh
        self.graph = space.program.graph
        self.types = self.graph.types
        self.tags = space.program.value_tags
        self.time = space.program.time if isinstance(space.program.time, TimeAxis) else None
        self.constants = self.graph.constant_ids
        self.in_memory = memory_values(self.program)

    # ------------------------------------------------------------ walk

    def build(self) -> None:
        for position, value in enumerate(self.graph.inputs):
            tag = self.tags[value]
            if tag not in self.space.homes:
                self._slot(tag, value, self.graph.input_name(position))
        for value in self.constants:
            self._free(value)
        for position, op in enumerate(self.graph.ops):
            runs = self.space.microbatches if self._in_body(position) else 1
            self._op(op, op.count * runs, self.program.phases[position])
        self._outputs()

    def _in_body(self, position: int) -> bool:
        return self.time is not None and position in self.time.body

    def _op(self, op: Op, runs: int, phase: str) -> None:
        if op.kind == "scan":
            self._scan(op, runs, phase)
            return
        if op.kind == "optimization_barrier":
            for source, result in zip(op.inputs, op.outputs, strict=True):
                self.space.homes[self.tags[result]] = self._home(source)
            return
        rule = rule_of(op, self.types)
        if op.tag not in self.space.op_node and not self._is_free(op):
            self._decide(op, rule)
        elif self._is_free(op):
            for value in op.outputs:
                self._free(value)
            return
        self._price(op, rule, runs, phase)

    def _is_free(self, op: Op) -> bool:
        """Made from constants alone and cheap: every device can make its own."""
        return op.kind not in LEADERS and all(self._home(v).node is None for v in op.inputs)

    def _free(self, value: int) -> None:
        layout = self.space.layouts.numbers([replicated(self.types[value].rank)])
        self.space.homes.setdefault(self.tags[value], Home(None, layout))

    def _home(self, value: int) -> Home:
        return self.space.homes[self.tags[value]]

    # ------------------------------------------------------------ nodes

    def _slot(self, tag: str, value: int, name: str, owed: bool = False) -> int:
        shape = list(self.types[value].shape)
        dim = self._split_dim(value)
        if dim is not None:
            shape[dim] //= self.space.microbatches
        choices = layouts_of(tuple(shape), self.mesh, owed)
        node = self._node(Node(tag, choices, np.zeros(len(choices))))
        self.space.homes[tag] = Home(node, self.space.layouts.numbers(choices))
        return node

    def _node(self, node: Node) -> int:
        self.space.nodes.append(node)
        return len(self.space.nodes) - 1

    def _split_dim(self, value: int) -> int | None:
        return self.time.split.get(value) if self.time and self.space.microbatches > 1 else None

    def _decide(self, op: Op, rule: Rule) -> None:
        """Let the op follow one of its operands, or make it a node."""
        time = self._time_factors(op, rule)
        if op.kind not in LEADERS:
            for operand in self._by_size(op):
                if self._try_follow(op, rule, operand, time):
                    return
        choices = strategies(rule, self.mesh, time)
        if op.kind == "copy":
            choices = [c for c in choices if all(code >= -1 for code in c.axes)]
        node = self._node(Node(op.tag, choices, np.zeros(len(choices))))
        self._settle(op, rule, node, choices)

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
        found: dict[int, Strategy | None] = {}
        for number in home.layouts:
            if number not in found:
                layout = self.space.layouts.known[number]
                grows = self.types[op.outputs[0]].size > self.types[op.inputs[operand]].size
                passes = not (layout.partial and grows)  # settle a sum before it is broadcast
                found[number] = follow(rule, operand, layout, self.mesh, time) if passes else None
        matched = [found[number] for number in home.layouts]
        failed = np.array([m is None for m in matched])
        if failed.any():
            if not np.all(_carries_sum(node)[failed]):
                return False
            self._drop(home.node, ~failed)
            matched = [m for m in matched if m is not None]
        self._settle(op, rule, home.node, matched)  # type: ignore[arg-type]
        return True

    def _drop(self, number: int, keep: np.ndarray) -> None:
        """Give up choices of a node that one of its followers cannot take."""
        space, node = self.space, self.space.nodes[number]
        node.choices = [c for c, k in zip(node.choices, keep, strict=True) if k]  # type: ignore[assignment]
        node.seconds = node.seconds[keep]
        for tag, home in space.homes.items():
            if home.node == number:
                space.homes[tag] = Home(number, home.layouts[keep])
        for tag in [*node.members]:
            space.strategies[tag] = [s for s, k in zip(space.strategies[tag], keep, strict=True) if k]
        for pair, matrix in space.edges.items():
            if number in pair:
                space.edges[pair] = matrix[keep] if pair[0] == number else matrix[:, keep]
        space.transfers = [_narrow(t, number, keep) for t in space.transfers]

    def _settle(self, op: Op, rule: Rule, node: int, chosen: list[Strategy]) -> None:
        self.space.strategies[op.tag] = chosen
        self.space.op_node[op.tag] = node
        self.space.nodes[node].members.append(op.tag)
        for k, value in enumerate(op.outputs):
            layouts = [result_sharding(rule, s, self.mesh, k) for s in chosen]
            self.space.homes[self.tags[value]] = Home(node, self.space.layouts.numbers(layouts))

    # ------------------------------------------------------------ prices

    def _price(self, op: Op, rule: Rule, runs: int, phase: str) -> None:
        node, chosen = self.space.op_node[op.tag], self.space.strategies[op.tag]
        parts = self._parts(op)
        seconds = self.space.nodes[node].seconds
        per_strategy: dict[Strategy, float] = {}
        for i, strategy in enumerate(chosen):
            if strategy not in per_strategy:
                per_strategy[strategy] = self._own_seconds(op, rule, strategy, parts)
            seconds[i] += runs * per_strategy[strategy]
        for k, value in enumerate(op.inputs):
            wanted = [operand_sharding(rule, s, self.mesh, k) for s in chosen]
            self._transfer(value, op.tag, node, self.space.layouts.numbers(wanted), runs, phase)

    def _parts(self, op: Op) -> list[int]:
        """Microbatches each operand, then each result, is cut into."""
        return [self.space.microbatches if self._split_dim(v) is not None else 1 for v in (*op.inputs, *op.outputs)]

    def _own_seconds(self, op: Op, rule: Rule, strategy: Strategy, parts: list[int]) -> float:
        seconds = self.cost.op_seconds(op, rule, self.types, strategy, self.mesh, parts, self.in_memory)
        for _, axes in settled_axes(rule, strategy, self.mesh).items():
            for k, value in enumerate(op.outputs):
                local = self.types[value].nbytes / parts[len(op.inputs) + k]
                ways = result_sharding(rule, strategy, self.mesh, k).ways(self.mesh)
                seconds += self.space.layouts.collectives.line("all_reduce", axes)(local / ways)
        return seconds

    def _transfer(self, value: int, reader: str, consumer: int | None, wanted: np.ndarray, runs: int, phase: str) -> None:
        home = self._home(value)
        nbytes = self.types[value].nbytes / (self.space.microbatches if self._split_dim(value) is not None else 1)
        item = Transfer(self.tags[value], reader, home.node, consumer, home.layouts, wanted, nbytes, runs, phase)
        self._add(item)

    def _add(self, item: Transfer) -> None:
        """Add the price of a layout change to the node or edge it depends on."""
        space = self.space
        space.transfers.append(item)
        if item.producer == item.consumer and item.producer is not None:
            if item.have is item.wanted or np.array_equal(item.have, item.wanted):
                return
            cells = space.layouts.seconds(item.have, item.wanted, item.nbytes)
            space.nodes[item.producer].seconds += item.runs * np.diagonal(cells)
            return
        matrix = item.runs * space.layouts.seconds(item.have, item.wanted, item.nbytes)
        if item.producer is None and item.consumer is None:
            return
        if item.producer is None:
            space.nodes[item.consumer].seconds += matrix[0]  # type: ignore[index]
        elif item.consumer is None:
            space.nodes[item.producer].seconds += matrix[:, 0]
        else:
            a, b = item.producer, item.consumer
            key, cell = ((a, b), matrix) if a < b else ((b, a), matrix.T)
            old = space.edges.get(key)
            space.edges[key] = cell.copy() if old is None else old + cell

    # ------------------------------------------------------------ loops and outputs

    def _scan(self, op: Op, runs: int, phase: str) -> None:
        region = op.regions[0]
        consts, carry = int(op.attr("num_consts")), int(op.attr("num_carry"))  # type: ignore[arg-type]
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            tag = f"{op.tag}/in{i}"
            if tag not in self.space.homes:
                self._slot(tag, inside, tag)
            home = self.space.homes[tag]
            wanted = self._lifted(home) if i >= consts + carry else home.layouts
            self._transfer(outside, tag, home.node, wanted, runs, phase)
        for inner in region.ops:
            self._op(inner, runs * op.trips, phase)
        for i, (result, inside) in enumerate(zip(op.outputs, region.outputs, strict=True)):
            tag = f"{op.tag}/in{consts + i}" if i < carry else f"{op.tag}/out{i}"
            if tag not in self.space.homes:
                self._slot(tag, inside, tag, owed=phase == "backward")
            home = self.space.homes[tag]
            self._transfer(inside, tag, home.node, home.layouts, runs * op.trips, phase)
            layouts = home.layouts if i < carry else self._lifted(home)
            self.space.homes[self.tags[result]] = Home(home.node, layouts)

    def _lifted(self, home: Home) -> np.ndarray:
        """Layouts of the stacked tensor: the loop's dim stays whole."""
        known = self.space.layouts.known
        return self.space.layouts.numbers([Sharding(((), *known[n].dims), known[n].partial) for n in home.layouts])

    def _outputs(self) -> None:
        """Carried state returns to the layout it came in; everything else settles its sums."""
        source = {o: self.graph.inputs[i] for i, o in self.graph.state}
        for position, value in enumerate(self.graph.outputs):
            name = self.graph.output_name(position)
            if position in source:
                count = self.graph.input_counts[self.graph.inputs.index(source[position])] if self.graph.input_counts else 1
                home = self._home(source[position])
                self._transfer(value, name, home.node, home.layouts, count, "update")
            elif self._home(value).node is not None:
                home = self._home(value)
                known = self.space.layouts.known
                settled = self.space.layouts.numbers([Sharding(known[n].dims) for n in home.layouts])
                self._transfer(value, name, home.node, settled, 1, "update")


def _carries_sum(node: Node) -> np.ndarray:
    """Which choices of a node take in a sum that is still owed."""
    return np.array([isinstance(c, Strategy) and min(c.axes, default=0) <= -2 for c in node.choices])


def _narrow(item: Transfer, number: int, keep: np.ndarray) -> Transfer:
    if number not in (item.producer, item.consumer):
        return item
    have = item.have[keep] if item.producer == number else item.have
    wanted = item.wanted[keep] if item.consumer == number else item.wanted
    return Transfer(
        item.source, item.reader, item.producer, item.consumer, have, wanted, item.nbytes, item.runs, item.phase
    )


def memory_values(program: Program) -> frozenset[int]:
    """Values that are written to memory; the rest live inside fused kernels.

    A value is written when a kernel makes or reads it, when it enters or leaves a
    loop or the step, or when it waits from one phase to another.
    """
    from .compute import KERNELS

    graph = program.graph
    found = {*graph.inputs, *graph.outputs}
    phase_of: dict[int, str] = {}

    def visit(ops: tuple[Op, ...], phase: Callable[[int], str]) -> None:
        for i, op in enumerate(ops):
            for value in op.inputs:
                if op.kind in KERNELS or op.kind == "scan" or phase_of.get(value, phase(i)) != phase(i):
                    found.add(value)
            if op.kind in KERNELS or op.kind == "scan":
                found.update(op.outputs)
            phase_of.update(dict.fromkeys(op.outputs, phase(i)))
            for region in op.regions:
                found.update(region.inputs)
                found.update(region.outputs)
                visit(region.ops, lambda _, p=phase(i): p)

    visit(graph.ops, lambda i: program.phases[i])
    return frozenset(found)
