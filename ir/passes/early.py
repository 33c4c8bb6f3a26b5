"""Early totals: sums over the batch that cheap ops make of the step's inputs, taken before the first microbatch.

    loss = sum(nll * mask) / sum(mask)

Every microbatch's gradient is divided by `sum(mask)`, which is known from the labels alone. Its ops
are run once more, on the whole batch; what read the total reads this one.

    before   %m = ne %y 0                %n = reduce_sum %m   %g = div %m %n
    after    %m = ne %y 0  %Y = copy %y  %M = ne %Y 0  %N = reduce_sum %M   %g = div %m %N

The copy is where the microbatches end: it shows the whole batch, and so does all that is made of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..graph import Graph, Op, deciding
from ..ops import COMPOSITES, CONTRACTIONS, DECOMPOSITIONS
from ..values import FreshIds
from .dead import drop_dead_ops, live_ops
from .microbatch import WHOLE, Refusal, TimeAxis, time_axis, totals_waited_for

EARLY = "~early"  # ends the tags of ops that run on the whole batch first
# What is not run twice for a total: the total then waits for the last microbatch.
DEAR = CONTRACTIONS | COMPOSITES | DECOMPOSITIONS | {"while", "cond", "user_kernel", "pallas_call"}


def with_early_totals(graph: Graph, batch: Mapping[int, int]) -> tuple[Graph, TimeAxis | Refusal]:
    """The graph, with those totals early that passes wait for, and its time axis."""
    axis = time_axis(graph, batch)
    if isinstance(axis, TimeAxis):
        return graph, axis
    totals = totals_waited_for(graph, batch) - dear_values(graph, batch)
    if not totals:
        return graph, axis
    changed = with_totals_early(graph, batch, totals)
    return changed, time_axis(changed, batch)


def with_totals_early(graph: Graph, batch: Mapping[int, int], totals: Collection[int]) -> Graph:
    """The graph with these totals taken from the whole batch before the first microbatch."""
    inputs = {graph.inputs[p] for p in batch}
    return drop_dead_ops(_Early(graph, inputs, totals).run(), graph)


def dear_values(graph: Graph, batch: Mapping[int, int]) -> set[int]:
    """Values of the batch that a dear op is needed for."""
    dear = _Dear({graph.inputs[p] for p in batch})
    dear.run(graph.ops)
    return dear.values


@dataclass
class _Dear:
    """Values of the batch that a dear op is needed for. `examples`: values that depend on the batch."""

    examples: set[int]
    values: set[int] = field(default_factory=lambda: set())

    def run(self, ops: Iterable[Op]) -> None:
        for op in ops:
            if self.examples.isdisjoint(op.inputs):
                continue
            if op.regions:
                self._regions(op)
                continue
            if op.kind == "optimization_barrier":
                self._pass(zip(op.inputs, op.outputs, strict=True))
                continue
            self.examples.update(op.outputs)
            if op.kind in DEAR or op.regions or not self.values.isdisjoint(op.inputs):
                self.values.update(op.outputs)

    def _regions(self, op: Op) -> None:
        consts, carry = op.loop_inputs
        for region in op.regions:
            self._pass(zip(op.inputs, region.inputs, strict=True))
        before = -1
        while before != (before := len(self.examples) + len(self.values)):
            for region in op.regions:
                self.run(region.ops)
            for end in op.returning if carry else ():
                for start in op.regions:
                    self._pass(zip(end.outputs[:carry], start.inputs[consts:], strict=False))
        for region in op.returning:
            self._pass(zip(region.outputs, op.outputs, strict=True))
        if not self.examples.isdisjoint(deciding(op)):
            self.examples.update(op.outputs)

    def _pass(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, result in pairs:
            for known in (self.examples, self.values):
                if source in known:
                    known.add(result)


class _Early:
    """The ops that totals are made of, run on the whole batch too, each beside the op it repeats."""

    def __init__(self, graph: Graph, batch: Collection[int], totals: Collection[int]):
        self.graph, self.totals, self.fresh = graph, totals, FreshIds(graph)
        self.tags = dict(zip(graph.inputs, graph.input_tags or map(str, graph.inputs), strict=True))
        self.counts = dict(
            zip(graph.inputs, graph.input_counts or (1,) * len(graph.inputs), strict=True)
        )
        self.batch = batch
        self.names: dict[int, int] = {}  # value of the batch -> the same of the whole batch
        self.known: dict[object, tuple[int, ...]] = {}

    def run(self) -> Graph:
        needed, _ = live_ops(self.graph.ops, set(self.totals))
        at = {v: i for i, op in enumerate(self.graph.ops) for v in op.outputs}
        beside: dict[int, list[Op]] = defaultdict(list)
        for op in needed:
            beside[at[op.outputs[0]]].extend(self._whole(op))
        swap = {v: self.names[v] for v in self.totals}
        ops = [
            new for i, op in enumerate(self.graph.ops) for new in (_reading(op, swap), *beside[i])
        ]
        outputs = tuple(swap.get(v, v) for v in self.graph.outputs)
        return replace(self.graph, types=self.fresh.types, ops=tuple(ops), outputs=outputs)

    def _whole(self, op: Op) -> Iterator[Op]:
        yield from (
            self._copy(v)
            for v in dict.fromkeys(op.inputs)
            if v in self.batch and v not in self.names
        )
        if self.names.keys().isdisjoint(op.inputs):
            return
        if op.kind == "optimization_barrier":  # of a recomputation, which has no second one
            self.names |= {
                r: self.names.get(v, v) for v, r in zip(op.inputs, op.outputs, strict=True)
            }
            return
        key = (op.kind, op.attrs, tuple(self.names.get(v, v) for v in op.inputs))
        if key in self.known and not op.regions:
            self.names |= dict(zip(op.outputs, self.known[key], strict=True))
            return
        found = self.fresh.clone(op, self.names, EARLY, op.count)
        self.known[key] = found.outputs
        yield found

    def _copy(self, value: int) -> Op:
        self.names[value] = self.fresh.like(value)
        return Op(
            "copy",
            (value,),
            (self.names[value],),
            tag=self.tags[value] + WHOLE,
            count=self.counts[value],
        )


def _reading(op: Op, names: Mapping[int, int]) -> Op:
    return (
        replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))
        if names.keys() & set(op.inputs)
        else op
    )
