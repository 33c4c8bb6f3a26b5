"""Late factors: numbers known after the last microbatch that gradients are only scaled by.

    loss = sum(nll * weight) / stop_gradient(sum(weight)),   weight made by the model

Each example's gradient is divided by `sum(weight)`, which the whole batch has to make first. But all that
follows is linear in that gradient, so the totals are as far off as each example is: the body runs without
the factor, and what it sums up is scaled.

    before   %g = mul %x %n(spread)       %t = reduce_sum (... %g ...)      body reads %n: no time axis
    after    (%x in place of %g)          %u = reduce_sum (... %x ...)      %t = scaled %u %n

What meets the factor must be linear in it by the ops' rules, or the graph stays as it is: another factor
added, an example compared, a result for each example. So must half floats, which overflow unscaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..graph import Graph, Op, TensorType
from ..ops import ELEMENTWISE, linear_in
from ..rules import rule_of
from ..values import FreshIds
from .dead import drop_dead_ops
from .microbatch import Followed, Refusal, TimeAxis, follow, time_axis

SCALED = "~scaled"  # within the tags of ops that are added
Factors = tuple[tuple[str, int], ...]  # (mul or div, a number), in order


def with_late_factors(graph: Graph, batch: Mapping[int, int]) -> tuple[Graph, TimeAxis | Refusal]:
    """The graph, changed where that gives it a time axis, and its time axis."""
    axis = time_axis(graph, batch)
    flow = follow(graph, batch) if isinstance(axis, Refusal) and batch else None
    if flow is None or not flow.whole or not flow.waits:
        return graph, axis
    try:
        changed = _Late(graph, flow).run()
    except _NotLinear:
        return graph, axis
    found = time_axis(changed, batch)
    return (changed, found) if isinstance(found, TimeAxis) else (graph, axis)


class _NotLinear(Exception):
    """Something that waits for a factor is used as more than a multiple of it."""


class _Late:
    """One walk. `owed`: value -> the value without its factors, and these."""

    def __init__(self, graph: Graph, flow: Followed):
        self.graph, self.flow, self.fresh = graph, flow, FreshIds(graph)
        self.types = self.fresh.types
        self.writer = {v: visit.op for visit in graph.visits for v in visit.op.outputs}
        self.zeros = {c.value for c in graph.constants if c.data == 0}
        self.owed: dict[int, tuple[int, Factors]] = {}
        self.names: dict[int, int] = {}  # total -> the same, scaled
        self.numbers: dict[int, int] = {}  # value -> the number that all its elements are

    def run(self) -> Graph:
        ops = tuple(new for op in self.graph.ops for new in self._visit(op))
        outputs = tuple(self.names.get(v, v) for v in self.graph.outputs)
        self._check(not any(v in self.owed for v in self.graph.outputs))
        changed = replace(self.graph, types=self.types, ops=ops, outputs=outputs)
        return drop_dead_ops(changed, self.graph)

    def _check(self, fits: bool) -> None:
        if not fits:
            raise _NotLinear

    def _visit(self, op: Op) -> Iterator[Op]:
        op = replace(op, inputs=tuple(self.names.get(v, v) for v in op.inputs))
        if any(v in self.flow.split for v in op.inputs):
            if any(self._is_late(v) for v in op.inputs):
                yield from self._factored(op)
                return
            if any(v in self.owed for v in op.inputs):
                yield from self._carried(op)
                return
        yield op

    def _is_late(self, value: int) -> bool:
        return value in self.flow.late or value in self.flow.totals or value in self.names.values()

    # ------------------------------------------------------------ where a factor comes in

    def _factored(self, op: Op) -> Iterator[Op]:
        """An example times a number: the example, and the number is owed."""
        late = [k for k, v in enumerate(op.inputs) if self._is_late(v)]
        self._check(
            op.kind in ("mul", "div") and len(late) == 1 and (op.kind == "mul" or late == [1])
        )
        example, result = op.inputs[1 - late[0]], op.outputs[0]
        self._check(self.types[example] == self.types[result] and self._keeps(result))
        made: list[Op] = []
        number = self._number(op.inputs[late[0]], made)
        yield from made
        base, before = self.owed.get(example, (example, ()))
        self.owed[result] = base, (*before, (op.kind, number))

    def _keeps(self, value: int) -> bool:
        return self.types[value].dtype in ("f32", "f64", "bf16")

    def _number(self, value: int, made: list[Op]) -> int:
        """The number that is spread over a value's elements; `made` gets the ops that make it."""
        if value in self.numbers:
            return self.numbers[value]
        op, kind = self.writer.get(value), self.types[value]
        if kind.rank == 0:
            return value
        self._check(op is not None)
        assert op is not None
        sources = tuple(self.names.get(v, v) for v in op.inputs)
        if op.kind in ("broadcast_in_dim", "reshape", "squeeze"):
            found = self._number(sources[0], made)
        else:
            self._check(op.kind in ELEMENTWISE and not op.regions)
            inputs = tuple(self._number(v, made) for v in sources)
            found = self.fresh.value(TensorType(kind.dtype, ()))
            made.append(replace(op, inputs=inputs, outputs=(found,), tag=f"{op.tag}{SCALED}"))
        self.numbers[value] = found
        return found

    # ------------------------------------------------------------ what is linear in it

    def _carried(self, op: Op) -> Iterator[Op]:
        """An op that reads owed values runs without the factors, and owes them."""
        kinds = {self.owed[v][1] for v in op.inputs if v in self.owed}
        if op.kind == "optimization_barrier":
            yield from self._held(op)
            return
        self._check(len(kinds) == 1)
        factors, owed = kinds.pop(), {k for k, v in enumerate(op.inputs) if v in self.owed}
        made = [True] * len(op.outputs)
        if op.kind in ("scan", "cond"):
            made = self._inside(op, [k in owed for k in range(len(op.inputs))])
        else:
            self._check(self._linear(op, owed))
        yield self._bare(op)
        for k, result in enumerate(op.outputs):
            if made[k]:
                yield from self._owing(op, k, result, factors)

    def _bare(self, op: Op) -> Op:
        return replace(
            op, inputs=tuple(self.owed[v][0] if v in self.owed else v for v in op.inputs)
        )

    def _held(self, op: Op) -> Iterator[Op]:
        for source, result in zip(op.inputs, op.outputs, strict=True):
            if source in self.owed:
                self.owed[result] = result, self.owed[source][1]
        yield self._bare(op)

    def _owing(self, op: Op, k: int, result: int, factors: Factors) -> Iterator[Op]:
        """A value of the body owes on; a total is scaled."""
        self._check(self._keeps(result))
        if result in self.flow.split:
            self.owed[result] = result, factors
            return
        self._check(self.flow.totals.get(result) == "sum")
        value = result
        for place, (kind, number) in enumerate(factors):
            tag = f"{op.tag}:{k}{SCALED}{place}"
            attrs = (("by", kind),)
            scaled = Op(
                "scaled",
                (value, number),
                (self.fresh.like(result),),
                attrs,
                where=op.where,
                tag=tag,
            )
            yield replace(scaled, count=op.count)
            value = scaled.outputs[0]
        self.names[result] = value

    def _linear(self, op: Op, owed: set[int]) -> bool:
        """Whether results are multiples of the owed operands; what is added to these must be zero."""
        if op.kind == "reduce_precision" or not all(self._keeps(v) for v in op.outputs):
            return False  # narrow floats overflow
        alternatives = rule_of(op, self.types).linear if not op.regions else ()
        if op.kind == "pad":  # whose rule leaves out what padding with zeros allows
            alternatives = linear_in(op.kind, len(op.inputs))
        return any(
            owed <= set(each) and all(self._is_zero(op.inputs[k]) for k in each if k not in owed)
            for each in alternatives
        )

    def _is_zero(self, value: int) -> bool:
        while value in self.writer and self.writer[value].kind in (
            "broadcast_in_dim",
            "convert_element_type",
            "copy",
        ):
            value = self.writer[value].inputs[0]
        return value in self.zeros

    def _inside(self, op: Op, owed: Sequence[bool]) -> list[bool]:
        return self._loop(op, owed) if op.kind == "scan" else self._branches(op, owed)

    def _branches(self, op: Op, owed: Sequence[bool]) -> list[bool]:
        """Which results of a cond owe; a branch that does not owe one must leave zeros for it."""
        self._check(not owed[0])  # the index
        owing: list[list[bool]] = []
        for region in op.regions:
            known = {v for v, owes in zip(region.inputs, owed, strict=True) if owes}
            self._follow(region.ops, known)
            owing.append([v in known for v in region.outputs])
        made = [any(ends) for ends in zip(*owing, strict=True)]
        for region, ends in zip(op.regions, owing, strict=True):
            zeros = map(self._is_zero, region.outputs)
            self._check(all(not m or o or z for m, o, z in zip(made, ends, zeros, strict=True)))
        return made

    def _loop(self, op: Op, owed: Sequence[bool]) -> list[bool]:
        """Which results of a scan owe what some of its operands owe."""
        region, (consts, carry) = op.regions[0], op.loop_inputs
        known = {v for v, owes in zip(region.inputs, owed, strict=True) if owes}
        while True:
            self._follow(region.ops, known)
            ends = [v in known for v in region.outputs]
            new = [region.inputs[consts + k] for k in range(carry) if ends[k]]
            if known.issuperset(new):
                break
            known.update(new)
        for k in range(carry):
            start, outside = region.inputs[consts + k], op.inputs[consts + k]
            same = ends[k] == (start in known) and (
                start not in known or owed[consts + k] or self._is_zero(outside)
            )
            self._check(same)
        return ends

    def _follow(self, ops: Iterable[Op], known: set[int]) -> None:
        for op in ops:
            owed = {k for k, v in enumerate(op.inputs) if v in known}
            if not owed:
                continue
            made = [True] * len(op.outputs)
            if op.kind in ("scan", "cond"):
                made = self._inside(op, [k in owed for k in range(len(op.inputs))])
            elif op.kind == "optimization_barrier":
                made = [k in owed for k in range(len(op.outputs))]
            else:
                self._check(self._linear(op, owed))
            known.update(v for v, owes in zip(op.outputs, made, strict=True) if owes)
