"""Explicit copies: places where a value may change its layout once for several readers.

A `copy` is an identity op. The planner may give it a layout of its own, so one
all-gather serves the query, key and value products, gathered weights of FSDP
have a name and a lifetime, and a gradient is reduced once for clipping and for
both moments. A copy that keeps the layout of its source costs nothing.

    prepared values (parameters, casts)   one copy for the step, then one per phase
    what was picked by index              one copy for both passes: what is sent to experts may be kept by them
    sums (products, reductions)           one per phase with two or more readers,
    and what scales, reshapes or adds     as a mean does, which could owe the sum to each
    up such
    other values                          one per phase with two or more heavy readers
    gradients of weights                  one where the backward pass makes them

The last may settle its sum at once, as FSDP does, so that a shard lies there until the update, or go on owing it. A
microbatch then adds up shards, or what it owes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ..graph import Graph, Op, Region
from ..ops import ADDITION, ALIASES, CONTRACTIONS, CONTROL_FLOW, LOSSES
from ..values import FreshIds

HEAVY = CONTRACTIONS | LOSSES | CONTROL_FLOW | {"gather", "scatter-add"}
SUMS = HEAVY | {"reduce_sum"}
SCALES = frozenset({"div", "mul", "neg", "convert_element_type", "reshape", "transpose"})
LAYOUT_BOUND = HEAVY | {"scatter"}
READING = (
    "forward",
    "backward",
    "update",
)  # phases whose ops may read a copy; a loss may be made again after them
SMALLEST = 2  # elements; scalars are not worth a decision of their own
SETTLING = (
    "~settled~backward"  # ends the tag of a copy that may settle a gradient's sum or go on owing it
)
# What makes gradients of weights, tables, and of what is added or scales.
WEIGHING = CONTRACTIONS | LOSSES | {"scatter-add", "reduce_sum"}


def settles(op: Op) -> bool:
    """Whether it is the copy behind a gradient."""
    return op.kind == "copy" and op.tag.endswith(SETTLING)


def insert_copies(graph: Graph, phases: Sequence[str]) -> Graph:
    """Give the planner its layout changes; `phases` has one entry per top-level op."""
    fresh = FreshIds(graph)
    ops = tuple(_inside(op, phase, fresh) for op, phase in zip(graph.ops, phases, strict=True))
    tags = dict(zip(graph.inputs, graph.input_tags, strict=True)) if graph.input_tags else {}
    writer = {v: (op, phase) for op, phase in zip(ops, phases, strict=True) for v in op.outputs}
    prepared = {v for v, (_, phase) in writer.items() if phase == "prepare"} | set(graph.inputs)
    prepared -= _made_anywhere(graph)
    counts = dict(zip(graph.inputs, graph.input_counts, strict=True)) if graph.input_counts else {}
    placer = _Placer(fresh, {v: op for v, (op, _) in writer.items()}, prepared, tags, counts)
    placer.settle(ops, phases)
    new_ops = placer.place(ops, phases)
    outputs = tuple(placer.settled.get(v, v) for v in graph.outputs)
    return replace(graph, types=fresh.types, ops=new_ops, outputs=outputs)


def _made_anywhere(graph: Graph) -> set[int]:
    """Constants spread out, as the zeros that a loop adds to: every device makes its part, in any layout."""
    known = set(graph.constant_ids)
    for op in graph.ops:
        if op.kind in ("broadcast_in_dim", "convert_element_type") and known.issuperset(op.inputs):
            known.update(op.outputs)
    return known


def _inside(op: Op, phase: str, fresh: FreshIds) -> Op:
    regions = tuple(_region(op, number, phase, fresh) for number in range(len(op.regions)))
    return replace(op, regions=regions) if regions else op


def _region(op: Op, number: int, phase: str, fresh: FreshIds) -> Region:
    region, (consts, carry) = op.regions[number], op.loop_inputs
    body = tuple(_inside(o, phase, fresh) for o in region.ops)
    tags = {v: f"{op.tag}/{f'{number}-' * (number > 0)}in{i}" for i, v in enumerate(region.inputs)}
    given = {*region.inputs[:consts], *region.inputs[consts + carry :]}
    placer = _Placer(fresh, {v: o for o in body for v in o.outputs}, given, tags, {})
    return Region(region.inputs, placer.place(body, [phase] * len(body)), region.outputs)


class _Placer:
    """Decides, for one list of ops, which values get copies, and rewrites the readers."""

    def __init__(
        self,
        fresh: FreshIds,
        writer: dict[int, Op],
        prepared: set[int],
        tags: dict[int, str],
        counts: dict[int, int],
    ):
        self.fresh, self.writer, self.prepared = fresh, writer, prepared
        self.tags, self.counts = tags, counts
        self.settled: dict[int, int] = {}  # gradient -> its copy that may settle it

    def settle(self, ops: Sequence[Op], phases: Sequence[str]) -> None:
        """Give a copy to each product of the backward pass that the update alone reads: a weight's gradient."""
        read: dict[int, set[str]] = defaultdict(set)
        for op, phase in zip(ops, phases, strict=True):
            for value in op.inputs:
                read[value].add(phase)
        for op, phase in zip(ops, phases, strict=True):
            for value in op.outputs if op.kind in WEIGHING and phase == "backward" else ():
                if read[value] == {"update"} and self._large(value):
                    self.settled[value] = self.fresh.like(value)

    def place(self, ops: Sequence[Op], phases: Sequence[str]) -> tuple[Op, ...]:
        readers: dict[tuple[int, str], list[int]] = defaultdict(list)
        for position, (op, phase) in enumerate(zip(ops, phases, strict=True)):
            for value in dict.fromkeys(op.inputs):
                readers[value, phase].append(position)
        before: dict[int, list[Op]] = defaultdict(list)
        rename: dict[tuple[int, int], int] = {}
        shared = self._shared_copies(ops, readers, before)
        for (value, phase), positions in readers.items():
            chosen = self._readers(ops, value, phase, positions)
            if not chosen:
                continue
            source = shared.get(value, self.settled.get(value, value))
            copy = self._copy(source, f"{self._tag(value)}~{phase}", self._count(value))
            before[chosen[0]].append(copy)
            rename.update({(position, value): copy.outputs[0] for position in chosen})
        return tuple(
            new
            for i, op in enumerate(ops)
            for new in (*before[i], self._reading(op, i, rename), *self._settling(op))
        )

    def _shared_copies(
        self,
        ops: Sequence[Op],
        readers: Mapping[tuple[int, str], list[int]],
        before: dict[int, list[Op]],
    ) -> dict[int, int]:
        """One copy for both passes of each value that both read heavily: of what is prepared, for the whole step."""
        shared: dict[int, int] = {}
        for value in dict.fromkeys(value for value, _ in readers):
            if value not in self.prepared and not self._dispatched(value):
                continue
            phases = [
                p for p in ("forward", "backward") if self._heavy(ops, readers.get((value, p), []))
            ]
            if len(phases) == 2 and self._large(value):
                first = min(found[0] for p in READING if (found := readers.get((value, p))))
                how = "step" if value in self.prepared else "both~forward"
                copy = self._copy(value, f"{self._tag(value)}~{how}", self._count(value))
                before[first].append(copy)
                shared[value] = copy.outputs[0]
        return shared

    def _dispatched(self, value: int) -> bool:
        """Whether it was picked by indices, as what is sent to experts is."""
        while (op := self.writer.get(value)) is not None and op.kind in ALIASES:
            value = op.inputs[0]
        return op is not None and op.kind == "gather"

    def _readers(
        self, ops: Sequence[Op], value: int, phase: str, positions: list[int]
    ) -> list[int]:
        """Positions that should read a copy of the value in this phase."""
        if not self._large(value) or (value in self.writer and self.writer[value].kind == "copy"):
            return []
        heavy = self._heavy(ops, positions)
        if value in self.prepared:
            return heavy if phase != "prepare" else []
        if len(positions) > 1 and value in self._sums:
            return positions
        if phase == "update" and len(positions) > 1:
            return positions
        return heavy if len(heavy) > 1 else []

    @cached_property
    def _sums(self) -> set[int]:
        """Sums, those that were scaled, as a mean is, and some added up, as the query, key and value products'
        gradients are: they can owe the sum to their readers.

        What came before a layer does not count: the first layer would have copies that others have not.
        """
        found = set[int]()
        for value, op in self.writer.items():
            within = [_layer(self.writer.get(v)) == _layer(op) and v in found for v in op.inputs]
            others = [v in self.writer and self.fresh.types[v].size > 1 for v in op.inputs]
            if (
                op.kind in SUMS
                or (op.kind in ADDITION and all(within))
                or (op.kind in SCALES and others.count(True) == 1 and within[others.index(True)])
            ):
                found.add(value)
        return found

    def _heavy(self, ops: Sequence[Op], positions: list[int]) -> list[int]:
        return [p for p in positions if ops[p].kind in LAYOUT_BOUND]

    def _large(self, value: int) -> bool:
        return self.fresh.types[value].size >= SMALLEST

    def _tag(self, value: int) -> str:
        if value in self.writer:
            op = self.writer[value]
            return f"{op.tag}:{op.outputs.index(value)}"
        return self.tags.get(value, f"in{value}")

    def _count(self, value: int) -> int:
        """How many layers a value stands for; its readers may stand for others."""
        return self.writer[value].count if value in self.writer else self.counts.get(value, 1)

    def _copy(self, source: int, tag: str, count: int) -> Op:
        return Op("copy", (source,), (self.fresh.like(source),), tag=tag, count=count)

    def _settling(self, op: Op) -> list[Op]:
        found = [v for v in op.outputs if v in self.settled]
        return [
            Op("copy", (v,), (self.settled[v],), tag=self._tag(v) + SETTLING, count=op.count)
            for v in found
        ]

    def _reading(self, op: Op, position: int, rename: dict[tuple[int, int], int]) -> Op:
        inputs = (rename.get((position, v), self.settled.get(v, v)) for v in op.inputs)
        return replace(op, inputs=tuple(inputs))


def _layer(op: Op | None) -> str:
    """The block whose ops a tag counts, as `block1` in `block1.17`; empty outside of blocks."""
    return op.tag.rpartition(".")[0] if op else ""
