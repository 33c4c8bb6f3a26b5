"""Statistics per microbatch: what a step takes over the batch and computes each example with (batch norm), on request.

    %s = reduce_sum %x    %d = mul %s 1/B    %y = sub %x %d    %r = mul %d 0.1        %y waits for the whole batch

    before   %y and %r read %d
    body     %s = reduce_sum %x   %e = estimated %s   %d = mul %e 1/B   %y = sub %x %d   %a = averaged %d
    after    %r = mul %a 0.1

`estimated` multiplies one microbatch's sum by the number of microbatches: what the sum over the batch would be, were
all like it. The backward pass sums over the batch what the forward pass spread over it, so the same change makes its
sums those of a step on one microbatch. `averaged` divides by that number, and the parts are summed up: what of
all this leaves the body is the mean over microbatches, as gradients accumulated by hand are. With one microbatch both
do nothing.

Gradients are multiplied by statistics too (of a scale, by the deviation): in the body, for the mean of products is
not the product of means. What the optimizer does with them comes after.

Totals that the inputs alone decide stay those of the whole batch (`early.py`), but for one that a statistic meets: the
count of a masked mean is of the examples that were summed. Maxima, and sums within loops, stay refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ..graph import Graph, Op
from ..rules import rule_of
from ..rules.factors import FLOATS
from ..values import FreshIds
from .early import dear_values, with_totals_early
from .microbatch import (
    AVERAGED,
    ESTIMATED,
    Followed,
    Refusal,
    TimeAxis,
    follow,
    time_axis,
    totals_waited_for,
)


def with_statistics_apart(
    graph: Graph, batch: Mapping[int, int]
) -> tuple[Graph, TimeAxis | Refusal]:
    """The graph with its statistics taken per microbatch, and its time axis; as it was, where that gives it none."""
    axis = time_axis(graph, batch)
    flow = follow(graph, batch) if isinstance(axis, Refusal) and batch else None
    if flow is None or not flow.whole or not flow.waits:
        return graph, axis
    early = totals_waited_for(graph, batch) - _statistics(graph, batch, flow)
    found = with_totals_early(graph, batch, early) if early else graph
    flow = follow(found, batch)
    changed = _Apart(found, flow, totals_waited_for(found, batch)).run()
    apart = time_axis(changed, batch) if changed is not None else axis
    return (
        (changed, apart) if changed is not None and isinstance(apart, TimeAxis) else (graph, axis)
    )


def statistics_of(graph: Graph) -> tuple[str, ...]:
    """Where a prepared graph takes statistics per microbatch, each place once."""
    writer = {v: op for op in graph.ops for v in op.outputs}
    sums = (writer[op.inputs[0]] for op in graph.ops if op.kind == ESTIMATED)
    return tuple(dict.fromkeys(op.where for op in sums if op.where))


def _can_be(graph: Graph, flow: Followed, value: int) -> bool:
    return flow.totals[value] == "sum" and graph.types[value].dtype in FLOATS


def _statistics(graph: Graph, batch: Mapping[int, int], flow: Followed) -> set[int]:
    """Totals that are waited for and that products make, and those that meet them on the way to who waits."""
    waited = totals_waited_for(graph, batch)
    found = set(waited & dear_values(graph, batch))
    needed = _between(graph, flow, waited)
    between = [op for op in graph.ops if not needed.isdisjoint(op.outputs)]
    before: set[int] = set()
    while found != before:
        before = set(found)
        found |= {
            v for group in _meeting(between, waited) if not found.isdisjoint(group) for v in group
        }
    return found


def _meeting(between: Sequence[Op], waited: Collection[int]) -> Iterator[set[int]]:
    """Totals that one value is made of."""
    made: dict[int, set[int]] = {v: {v} for v in waited}
    for op in between:
        sources = {total for v in op.inputs for total in made.get(v, ())}
        made.update(dict.fromkeys(op.outputs, sources))
        yield sources


def _between(graph: Graph, flow: Followed, totals: Collection[int]) -> set[int]:
    """Values made of totals that who waits is made of."""
    return _made_of_totals(graph, flow, [v for v in flow.waits if v not in totals])


def _made_of_totals(graph: Graph, flow: Followed, wanted: Iterable[int]) -> set[int]:
    """Late values that the wanted ones are made of, down to totals."""
    writer = {v: op for op in graph.ops for v in op.outputs}
    found, stack = set[int](), list(wanted)
    while stack:
        value = stack.pop()
        if value in flow.late and value not in found:
            found.add(value)
            stack.extend(writer[value].inputs)
    return found


def _products(graph: Graph, flow: Followed, between: Collection[int]) -> set[int]:
    """Late values that are no multiple of a sum of what microbatches have: statistics times gradients. Before the last
    op that reads an example, or of totals: the optimizer comes after, and what it does it does to means."""
    found = set[int]()
    last = max(i for i, op in enumerate(graph.ops) if any(v in flow.split for v in op.inputs))
    for i, op in enumerate(graph.ops):
        varying = {v for v in op.inputs if v in flow.late or v in flow.totals}
        if (
            len(varying) < 2
            or varying.isdisjoint(between)
            or any(v in flow.split for v in op.inputs)
        ):
            continue
        owed = {k for k, v in enumerate(op.inputs) if v in varying}
        together = any(owed <= set(operands) for operands in rule_of(op, graph.types).linear)
        if not together and (i < last or not varying.isdisjoint(flow.totals)):
            found.update(op.outputs)
    return found


class _Apart:
    """One walk. `own`: total -> what a microbatch takes it for; `means`: value of a microbatch -> its mean over all."""

    def __init__(self, graph: Graph, flow: Followed, totals: Collection[int]):
        self.graph, self.flow, self.fresh = graph, flow, FreshIds(graph)
        between = _between(graph, flow, totals)
        products = _products(graph, flow, between)
        self.between = between | _made_of_totals(graph, flow, products)
        sources = {
            v for op in graph.ops if not self.between.isdisjoint(op.outputs) for v in op.inputs
        }
        self.totals = {*totals, *(sources & flow.totals.keys())}
        self.own: dict[int, int] = {}
        self.means: dict[int, int] = {}

    def run(self) -> Graph | None:
        """The changed graph; None where something in between can have no mean."""
        ops = tuple(new for op in self.graph.ops for new in self._visit(op))
        outputs = tuple(self.means.get(v, v) for v in self.graph.outputs)
        if not all(self.graph.types[v].dtype in FLOATS for v in self._leaving):
            return None
        if not all(_can_be(self.graph, self.flow, v) for v in self.totals):
            return None
        if any(op.regions for op in ops if not self.between.isdisjoint(op.outputs)):
            return None
        return replace(self.graph, types=self.fresh.types, ops=ops, outputs=outputs)

    def _visit(self, op: Op) -> Iterator[Op]:
        names = self.own if self._is_of_microbatch(op) else self.means
        yield replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))
        for k, value in enumerate(op.outputs):
            if value in self.totals:
                yield self._added(op, k, ESTIMATED, self.own)
            elif value in self._leaving:
                yield self._added(op, k, AVERAGED, self.means)

    def _is_of_microbatch(self, op: Op) -> bool:
        return not self.between.isdisjoint(op.outputs) or any(
            v in self.flow.split for v in op.inputs
        )

    @cached_property
    def _leaving(self) -> set[int]:
        """What is made of statistics in the body and read after it."""
        after = (op for op in self.graph.ops if not self._is_of_microbatch(op))
        return self.between & {*self.graph.outputs, *(v for op in after for v in op.inputs)}

    def _added(self, op: Op, k: int, kind: str, names: dict[int, int]) -> Op:
        value = op.outputs[k]
        names[value] = self.fresh.like(value)
        return Op(
            kind,
            (value,),
            (names[value],),
            where=op.where,
            tag=f"{op.tag}:{k}~{kind}",
            count=op.count,
        )
