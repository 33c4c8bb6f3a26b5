"""Who makes and who reads each value of a step, in loops too, and which exponentials a softmax is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

from ..graph import Graph, Op
from ..ops import ADDITION, EXPONENTIAL, FORWARDING

# What a softmax's exponentials go through, unmixed with one another, on their way to products.
PURE = FORWARDING | {"select_n", "optimization_barrier", "mul", "div"}
_OF_SUMS = PURE | ADDITION | {"abs", "log", "max"}  # what a sum may go through before it divides


class Links:
    """Who makes and who reads a value, scans' bodies included."""

    def __init__(self, graph: Graph):
        self.graph, self.types = graph, graph.types
        self.writer: dict[int, Op] = {}
        self.readers = defaultdict[int, list[Op]](list)
        self.down = defaultdict[int, list[tuple[int, int]]](
            list
        )  # value -> (the same elsewhere, dims that gains)
        self.up = defaultdict[int, list[tuple[int, int]]](list)
        for visit in graph.visits:
            op = visit.op
            self.writer |= dict.fromkeys(op.outputs, op)
            for value in op.inputs:
                self.readers[value].append(op)
            if op.kind == "scan":
                self._enter(op)

    def _enter(self, op: Op) -> None:
        """What every turn is handed, the rows it takes and those it leaves; what is carried on is another each turn."""
        region, (consts, carry) = op.regions[0], op.loop_inputs
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            if i < consts or i >= consts + carry:
                self._link(outside, inside, 0 if i < consts else -1)
        for end, result in zip(region.outputs[carry:], op.outputs[carry:], strict=True):
            self._link(end, result, 1)

    def _link(self, source: int, result: int, gained: int) -> None:
        self.down[source].append((result, gained))
        self.up[result].append((source, -gained))

    def origins(self, value: int) -> dict[int, int]:
        """A value of a loop and what it is a row of, or stacked from: each with the dims that it has more."""
        found, waiting = {value: 0}, [value]
        while waiting:
            here = waiting.pop()
            for source, gained in self.up[here]:
                if source not in found:
                    found[source] = found[here] + gained
                    waiting.append(source)
        return found

    def first(self, value: int) -> int:
        """What a loop is handed in every turn, as it is outside of all loops."""
        while value in self.handed:
            value = self.handed[value]
        return value

    @cached_property
    def handed(self) -> dict[int, int]:
        """What every turn of a loop is handed: the same outside of it."""
        return {
            inside: found[0][0]
            for inside, found in self.up.items()
            if len(found) == 1 and not found[0][1]
        }

    @cached_property
    def leaving(self) -> frozenset[int]:
        """Results of the step, and of loops and branches what is more than a row."""
        found = set(self.graph.outputs)
        for visit in self.graph.visits:
            op = visit.op
            for region in op.regions:
                found.update(
                    region.outputs[: op.loop_inputs[1]] if op.kind == "scan" else region.outputs
                )
        return frozenset(found)

    @cached_property
    def totals(self) -> dict[int, int | None]:
        """Sums of weights, and what cheap ops make of those: each with what it is made of, a sum with None."""
        exps = [v.op.outputs[0] for v in self.graph.visits if v.op.kind in EXPONENTIAL]
        weights = {value for exp in exps for value in self.steps(exp, PURE)}
        found: dict[int, int | None] = {
            op.outputs[0]: None
            for value in weights
            for op in self.readers[value]
            if op.kind == "reduce_sum"
        }
        for total in tuple(found):
            found |= {v: u for v, u in self.steps(total, _OF_SUMS).items() if v not in found}
        return found

    def is_divided(self, exp: int) -> bool:
        """Whether weights are divided by a sum of weights, or the log of one is taken off before."""
        op = self.writer.get(self.writer[exp].inputs[0])
        if op is not None and op.kind == "sub" and op.inputs[1] in self.totals:
            return True
        readers = [(value, op) for value in self.steps(exp, PURE) for op in self.readers[value]]
        if any(
            op.kind == "div" and op.inputs[0] == v and op.inputs[1] in self.totals
            for v, op in readers
        ):
            return True
        sums = [op.outputs[0] for _, op in readers if op.kind == "reduce_sum"]
        return any(self._divides(value) for total in sums for value in self.steps(total, _OF_SUMS))

    def takes_log(self, values: Iterable[int]) -> bool:
        """Whether a log is taken of values or of what cheap ops make of them."""
        found = {v for value in values for v in self.steps(value, _OF_SUMS)}
        return any(op.kind == "log" for v in found for op in self.readers[v])

    def _divides(self, value: int) -> bool:
        return any(
            op.kind == "log" or (op.kind == "div" and op.inputs[1] == value)
            for op in self.readers[value]
        )

    def steps(self, start: int, kinds: frozenset[str]) -> dict[int, int | None]:
        """What ops of some kinds make of a value, scans passed, each with what it is made of."""
        waiting, found = [start], dict[int, int | None]({start: None})
        while waiting:
            value = waiting.pop()
            new = [other for other, _ in self.down[value]]
            for op in self.readers[value]:
                if op.kind == "optimization_barrier":
                    new += [r for v, r in zip(op.inputs, op.outputs, strict=True) if v == value]
                elif op.kind in kinds and not (op.kind == "div" and op.inputs[0] != value):
                    new += op.outputs
            fresh = [other for other in new if other not in found]
            found |= dict.fromkeys(fresh, value)
            waiting += fresh
        return found
