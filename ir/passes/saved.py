"""Less to save between the passes of a stage: the backward pass makes cheap values again.

Within one program XLA makes a cheap value again where it is read, and stores only what it is made of. A stage's forward
and backward passes are programs of their own, and all that the backward pass reads is handed from one to the other:

    dot ─▶ transpose ─▶ logistic ─▶ mul ─▶ dot      before: transpose, logistic, mul are saved (and what their
             └────────────────────▶──┘              gradients read besides)
                                                    after: transpose is, and mul, which a product reads

`save_less` lets the backward pass read clones, where that saves bytes and costs no pass through memory: a
chain of cheap ops runs within the kernels that read it. What a kernel reads itself stays saved, what is dear to make
too. Between blocks nothing changes, so that stages may be cut there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module

from ..graph import Graph, Op
from ..ops import CONTROL_FLOW, DIVISION, ELEMENTWISE, EXPONENTIAL, KERNELS, TRANSCENDENTAL, VIEWS
from ..values import BlockInstance, FreshIds, block_instances

DEAR = (TRANSCENDENTAL - EXPONENTIAL - {"logistic"}) | DIVISION | {"copy"}
CHEAP = (ELEMENTWISE - DEAR) | (VIEWS - {"optimization_barrier"})
WITHIN = "~within"  # ends the tags of ops that are made again within what reads them
STORED = KERNELS | CONTROL_FLOW  # what reads its operands from memory


def save_less(graph: Graph, phases: Sequence[str]) -> Graph:
    """Let the backward pass make again what is cheap; `phases` has one entry per top-level op."""
    chosen = _Chosen(graph, phases)
    again = {group: found for group in chosen.wanted if (found := chosen.again(group))}
    if not again:
        return graph
    fresh, redirect, ops = FreshIds(graph), dict[int, int](), list[Op]()
    starts = {chosen.first[group]: group for group in again}
    for position, op in enumerate(graph.ops):
        if position in starts:
            names: dict[int, int] = {}
            at = sorted(again[starts[position]])
            ops += [fresh.clone(graph.ops[i], names, WITHIN, graph.ops[i].count) for i in at]
            redirect |= {v: names[v] for i in at for v in graph.ops[i].outputs}
        if phases[position] == "backward":
            op = replace(op, inputs=tuple(redirect.get(v, v) for v in op.inputs))
        ops.append(op)
    return replace(graph, types=fresh.types, ops=tuple(ops))


@dataclass
class _Chosen:
    """Which forward ops are cloned, block by block."""

    graph: Graph
    phases: Sequence[str]

    def again(self, group: BlockInstance) -> set[int]:
        """Positions of a block's ops that the backward pass runs again, for what it reads of the block.

        What is saved is a smallest cut between what has to be, if it is used, and what is read: of several, the one
        nearest to what is read.
        """
        networkx = import_module("networkx")  # takes long to load, and few graphs need it
        read = self.wanted[group]
        ways = networkx.DiGraph()
        ways.add_nodes_from(("dear", "read"))
        ways.add_edges_from(((value, "kept"), "read") for value in read)
        left, seen = list(read), set(read)
        while left:
            value = left.pop()
            there = value in read and value in self.stored
            nbytes = 0 if there else self.graph.types[value].nbytes
            ways.add_edge((value, "made"), (value, "kept"), capacity=nbytes)
            sources = self._sources(value, group)
            if sources is None:
                ways.add_edge("dear", (value, "made"))
                continue
            ways.add_edges_from(((source, "kept"), (value, "made")) for source in sources)
            left += sources - seen
            seen |= sources
        _, (_, near) = networkx.minimum_cut(ways, "dear", "read")
        return {self.writer[value] for value in seen if (value, "made") in near}

    def _sources(self, value: int, group: BlockInstance) -> set[int] | None:
        """What of the forward pass a value can be made of again; None if it can't, or a kernel of the backward pass
        reads it, or another block reads it or what it is made of, which then may lie on another stage."""
        at = self.writer[value]
        op = self.graph.ops[at]
        if self.groups[at] != group or op.kind not in CHEAP or op.regions:
            return None
        if value in self.stored or self.read_in[value] - {group}:
            return None
        sources = {v for v in op.inputs if v in self.writer}
        beside = {group} | {self.groups[self.writer[v]] for v in sources}
        return sources if all(self.read_in[v] <= beside for v in sources) else None

    @cached_property
    def groups(self) -> list[BlockInstance]:
        return block_instances(self.graph.ops)

    @cached_property
    def writer(self) -> Mapping[int, int]:
        """Values of the forward pass -> position of the op that makes them."""
        passes = zip(self.graph.ops, self.phases, strict=True)
        return {
            v: at for at, (op, phase) in enumerate(passes) if phase == "forward" for v in op.outputs
        }

    @cached_property
    def read_in(self) -> Mapping[int, set[BlockInstance]]:
        """The blocks whose forward pass reads a value."""
        found: dict[int, set[BlockInstance]] = defaultdict(set)
        for op, phase, group in zip(self.graph.ops, self.phases, self.groups, strict=True):
            if phase == "forward":
                for v in op.inputs:
                    found[v].add(group)
        return found

    @cached_property
    def stored(self) -> frozenset[int]:
        """What kernels of the backward pass read, as it is or under another shape, and results of the step."""
        found = set(self.graph.outputs)
        for op, phase in zip(reversed(self.graph.ops), reversed(self.phases), strict=True):
            shows = op.kind in VIEWS and not found.isdisjoint(op.outputs)
            if phase != "forward" and (op.kind in STORED or shows):
                found.update(op.inputs)
        return frozenset(found)

    @cached_property
    def first(self) -> Mapping[BlockInstance, int]:
        """By block, the first op of the backward pass that reads what it made."""
        found: dict[BlockInstance, int] = {}
        for at, (op, phase) in enumerate(zip(self.graph.ops, self.phases, strict=True)):
            for v in op.inputs if phase == "backward" else ():
                if v in self.writer:
                    found.setdefault(self.groups[self.writer[v]], at)
        return found

    @cached_property
    def wanted(self) -> Mapping[BlockInstance, set[int]]:
        """By block, what the backward pass reads of it; nothing where a part of a block comes later than that."""
        found: dict[BlockInstance, set[int]] = defaultdict(set)
        for op, phase in zip(self.graph.ops, self.phases, strict=True):
            for v in op.inputs if phase == "backward" else ():
                if v in self.writer:
                    found[self.groups[self.writer[v]]].add(v)
        ends: dict[BlockInstance, int] = {}
        for at, (group, phase) in enumerate(zip(self.groups, self.phases, strict=True)):
            if phase == "forward":
                ends[group] = at
        return {group: values for group, values in found.items() if ends[group] < self.first[group]}
