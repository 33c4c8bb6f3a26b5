"""Sums of attention kept for its gradients: with them keys go round a ring once in the backward pass, not twice.

    o       = attention q k v              o m l         = attention q k v
    dq dk dv = attention_grad do q k v     dq dk dv      = attention_grad do q k v m l o

m is the maximum of each row, l its sum of exponentials. What else gradients sum over keys first, the weights times
their gradients, is what do and o come to row by row, as o is the weights times v (Dao, arXiv 2205.14135, appendix B.4):

    sum over keys of w * (do . v)  =  do . (sum over keys of w v)  =  do . o

That both are of the same weights is shown by structure: as products of the same factors. Where forward and backward
pass are loops of their own, nothing is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

from ..attrs import Attr
from ..graph import Graph, Op, TensorType
from ..ops import COMPOSITES, FORWARDING
from ..text import show
from .bodies import BACKWARD, body_of
from .online import Online, body_parts, online_body


def with_sums_kept(graph: Graph) -> Graph:
    """The graph with sums of forward attentions handed to the gradients that read the same; keys of all that may go
    round do where queries are cut (attr `round`)."""
    keeping = _Keeping(dict(graph.types))
    ops = keeping.ops(graph.ops)
    return replace(graph, ops=tuple(ops), types=keeping.types)


class _Keeping:
    def __init__(self, types: dict[int, TensorType]):
        self.types, self.unused = types, count(max(types) + 1)
        self.marks: dict[object, int] = {}

    def ops(self, ops: Sequence[Op]) -> list[Op]:
        found, forwards = list[Op](), list[int]()
        for op in ops:
            regions = tuple(replace(r, ops=tuple(self.ops(r.ops))) for r in op.regions)
            op = replace(op, regions=regions) if regions else op
            if op.kind in COMPOSITES and op.has("ring"):
                op = replace(op, attrs=tuple(sorted({**dict(op.attrs), "round": True}.items())))
                if op.kind == BACKWARD:
                    op = self._given(op, found, forwards)
                else:
                    forwards.append(len(found))
            found.append(op)
        return found

    def _given(self, op: Op, before: list[Op], forwards: Sequence[int]) -> Op:
        """Gradients that are handed what a forward attention keeps, if one before has it."""
        for at in reversed(forwards):
            pair = _Pair(self._read(before[at]), self._read(op))
            delta = pair.delta() if pair.alike() else None
            if delta is not None:
                before[at] = self._keeps(before[at], pair.forward)
                return _takes(op, before[at], delta)
        return op

    def _read(self, op: Op) -> _Reading:
        return _Reading(op, self.marks)

    def _keeps(self, op: Op, read: _Reading) -> Op:
        """A forward attention that gives its maxima and sums as well."""
        attrs: dict[str, Any] = dict(op.attrs)
        if "kept" in attrs:
            return op
        kept, graph = read.statistics, read.graph
        new = tuple(next(self.unused) for _ in kept)
        self.types |= {v: graph.types[k] for v, k in zip(new, kept, strict=True)}
        results = (*attrs["results"], *(read.dims(v) for v in kept))
        body = show(replace(graph, outputs=(*graph.outputs, *kept)))
        attrs |= {"body": body, "results": results, "kept": len(kept), "linear": ()}
        return replace(op, outputs=(*op.outputs, *new), attrs=tuple(sorted(attrs.items())))


def _takes(op: Op, forward: Op, delta: tuple[int, ...]) -> Op:
    """Gradients with what the forward attention keeps as further operands, its result the last."""
    attrs: dict[str, Any] = dict(op.attrs)
    of_forward: dict[str, Any] = dict(forward.attrs)
    o, *kept = forward.outputs
    graph, there = body_of(str(attrs["body"])), body_of(str(of_forward["body"]))
    (result, *stored), first = there.outputs, max(graph.types) + 1
    new = {first + k: there.types[v] for k, v in enumerate((*stored, result))}
    body = show(replace(graph, inputs=(*graph.inputs, *new), types={**graph.types, **new}))
    (of_result, *of_kept) = of_forward["results"]
    operands = (*attrs["operands"], *of_kept, of_result)
    attrs |= {"body": body, "operands": operands, "given": len(kept), "delta": delta}
    return replace(op, inputs=(*op.inputs, *kept, o), attrs=tuple(sorted(attrs.items())))


class _Reading:
    """A composite's body, its values marked: equal marks are equal values, in other bodies too."""

    def __init__(self, op: Op, marks: dict[object, int]):
        self.op, self.known = op, marks
        self.attrs: dict[str, Any] = dict(op.attrs)
        whole = body_of(str(self.attrs["body"]))
        many = int(self.attrs.get("kept", 0))
        self.graph: Graph = replace(whole, outputs=whole.outputs[: len(whole.outputs) - many])
        self.makers = {v: o for o in self.graph.ops for v in o.outputs}
        sizes = (*self.attrs["sizes"], self.attrs["keys"])
        self.parts = body_parts(self.graph, sizes, self.attrs["operands"])
        found = online_body(self.graph, sizes, self.parts)
        assert found is not None
        self.online: Online = found

    @property
    def statistics(self) -> tuple[int, ...]:
        return self.online.statistics

    def dims(self, value: int) -> Attr:
        return tuple(tuple(d for d, _, _ in dim if d >= 0) for dim in self.parts[value])

    @cached_property
    def marks(self) -> dict[int, int]:
        found = {
            v: self._mark("input", u)
            for v, u in zip(self.graph.inputs, self.op.inputs, strict=True)
        }
        for c in self.graph.constants:
            found[c.value] = self._mark("number", str(c.data), self.graph.types[c.value])
        for op in self.graph.ops:
            inputs = tuple(found[v] for v in op.inputs)
            for k, v in enumerate(op.outputs):
                found[v] = self._mark(op.kind, op.attrs, inputs, k)
        return found

    def _mark(self, *what: object) -> int:
        return self.known.setdefault(what, len(self.known))

    def factors(self, value: int) -> Counter[object]:
        """What a value is a product of, each with its power."""
        op, found = self.makers.get(value), Counter[object]()
        if op is None:
            found[self.marks[value]] += 1
        elif op.kind in FORWARDING:
            return self.factors(op.inputs[0])
        elif op.kind in ("mul", "div"):
            for v, sign in zip(op.inputs, (1, 1 if op.kind == "mul" else -1), strict=True):
                found.update({f: sign * n for f, n in self.factors(v).items()})
        elif op.kind == "integer_pow" and isinstance(by := op.attr("y"), int):
            found.update({f: by * n for f, n in self.factors(op.inputs[0]).items()})
        elif op.kind == "select_n" and (case := self._chosen(op)):
            found.update(self.factors(op.inputs[case]))
            found["chosen", self._bare(op.inputs[0]), case] += 1
        else:
            found[self.marks[value]] += 1
        return found

    def _bare(self, value: int) -> int:
        """The mark of a value, whatever it was spread or turned to."""
        while (op := self.makers.get(value)) is not None and op.kind in FORWARDING:
            value = op.inputs[0]
        return self.marks[value]

    def _chosen(self, op: Op) -> int | None:
        """The case of a choice that is not zeros, if the other is."""
        numbers = {self.marks[c.value] for c in self.graph.constants if c.data == 0}
        zeros = [self._bare(v) in numbers for v in op.inputs[1:]]
        return 1 + zeros.index(False) if sorted(zeros) == [False, True] else None


@dataclass(frozen=True)
class _Pair:
    forward: _Reading
    backward: _Reading

    def alike(self) -> bool:
        """Whether maxima and sums of the forward pass are the first ones that gradients need."""
        one, other = self.forward, self.backward
        if one.online.passes != 1 or len(one.graph.outputs) != 1 or other.online.passes != 2:
            return False
        mine, theirs = ([each.marks[v] for v in each.statistics] for each in (one, other))
        return mine == theirs[: len(mine)]

    def delta(self) -> tuple[int, ...] | None:
        """How the one sum that is left comes of do and o: which operand do is, and the power of l that both are
        multiplied by; () if none is left, None if it does not."""
        left = self.backward.statistics[len(self.forward.statistics) :]
        if not left:
            return ()
        maker = self.backward.makers[left[0]]
        if len(left) > 1 or maker.kind != "reduce_sum":
            return None
        product = self.forward.makers[self.forward.graph.outputs[0]]
        for k, v in enumerate(product.inputs[:2]):
            found = self._over(maker.inputs[0], product.inputs[1 - k], self.forward.marks[v])
            if found is not None:
                return found
        return None

    def _over(self, value: int, weights: int, mark: int) -> tuple[int, ...] | None:
        """Of a sum of the weights times do . v, with the `mark` of v."""
        left = self.backward.factors(value)
        left.subtract(self.forward.factors(weights))
        for do, of in self._products(mark):
            rest = {f: n for f, n in left.items() if n and f != of}
            (l,) = self.forward.online.sums
            if left[of] == 1 and {*rest} <= {self.forward.marks[l]} and self._one_width(do):
                return do, rest.get(self.forward.marks[l], 0)
        return None

    def _products(self, mark: int) -> list[tuple[int, int]]:
        """Operands of the gradients that are multiplied by what has this mark, with marks of the products."""
        found, read = list[tuple[int, int]](), self.backward
        for op in read.graph.ops:
            for k, v in enumerate(op.inputs[:2] if op.kind == "dot_general" else ()):
                if read.marks[v] == mark and op.inputs[1 - k] in read.graph.inputs:
                    at = read.graph.inputs.index(op.inputs[1 - k])
                    found.append((at, read.marks[op.outputs[0]]))
        return found

    def _one_width(self, do: int) -> bool:
        """Whether do and o have one dim beside rows and what keys have too, of one size."""
        widths: list[list[int]] = []
        sides = (self.backward, self.backward.graph.inputs[do], self.backward.attrs["operands"][do]), (
            self.forward, self.forward.graph.outputs[0], self.forward.attrs["results"][0]
        )  # fmt: skip
        for read, value, dims in sides:
            shape = read.graph.types[value].shape
            widths.append([n for n, dim in zip(shape, dims, strict=True) if not dim and n > 1])
        return len(widths[0]) == 1 and widths[0] == widths[1]
