"""Which dims of the softmax of an attention may be cut, on every value of its body: the rule of a composite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dealt import Parts
from .graph import Attr, Op
from .key_spans import KeySpans, may_leave_out
from .online import online
from .rule import cuttable
from .rules import rule_of

if TYPE_CHECKING:
    from .composites import Body


@dataclass(frozen=True)
class Cuts:
    """Which dims of the softmax may be cut, on every value of a body."""

    body: Body
    closings: Sequence[int]

    def attrs(self) -> dict[str, Attr]:
        """What the rule of the composite is made of; see `rules/composite.py`. Where blocks of keys come together,
        these are a further dim, of `keys` many, and may go round a ring of devices that cut the free dim `ring`. Where
        keys are left out, they are one too, and `spans` are the first and the end of `blocks` of them, by block of the
        free dim `rows`."""
        body, parts = self.body, self.body.parts()
        shape = body.types[body.one.softmax].shape
        free = [
            d
            for d, size in enumerate(shape)
            if size > 1 and d not in body.one.keys and self._is_free(d, parts)
        ]
        found, spans = self._told(free, free, parts), self._spans(free, parts)
        ring = self._ring(free, parts)
        if ring is not None and spans is not None and ring != spans.rows:
            ring = None
        if spans is not None or ring is not None:
            (keys,) = body.one.keys if spans is None else (spans.keys,)
            found |= {**self._told(free, [*free, keys], parts), "keys": shape[keys]}
        if ring is not None:
            found["ring"] = free.index(ring)
        if spans is not None:
            found |= {
                "rows": free.index(spans.rows), "spans": spans.spans, "blocks": spans.blocks
            }  # fmt: skip
        return found

    def _ring(self, free: Sequence[int], parts: Mapping[int, Parts]) -> int | None:
        """The dim of the queries, if blocks of keys come together."""
        body, rows = self.body, [d for d in free if d in self.body.one.rows]
        shape = body.types[body.one.softmax].shape
        keys = body.one.keys
        others = [d for d, size in enumerate(shape) if size > 1 and d not in free]
        if body.rewrite.for_kernels or len(keys) != 1 or others != [*keys] or not rows:
            return None  # kernels take whole keys
        (keys,), numbers = body.one.keys, {v: c.data for v, c in body.numbers.items()}
        found = online(body.ops, body.types, parts, keys, free, self.closings, numbers)
        return None if found is None else max(rows, key=shape.__getitem__)

    def _told(
        self, free: Sequence[int], named: Sequence[int], parts: Mapping[int, Parts]
    ) -> dict[str, Attr]:
        body = self.body
        shape = body.types[body.one.softmax].shape
        dims = [self._dims(value, parts, named) for value in (*body.inputs, *self.closings)]
        return {
            "sizes": tuple(shape[d] for d in free),
            "operands": tuple(dims[: len(body.inputs)]),
            "results": tuple(dims[len(body.inputs) :]),
            "linear": tuple(
                (k,) for k in range(len(body.inputs)) if self._is_linear(body.inputs[k])
            ),
        }

    def _spans(self, free: Sequence[int], parts: Mapping[int, Parts]) -> KeySpans | None:
        """Which keys a kernel leaves out, if the body comes to the same without them."""
        found, body = self.body.one.spans, self.body
        if found is None or found.rows not in free:
            return None
        numbers = {v: c.data for v, c in body.numbers.items()}
        fine = may_leave_out(body.ops, body.types, parts, found, self.closings, numbers)
        return found if fine else None

    def _dims(self, value: int, parts: Mapping[int, Parts], free: Sequence[int]) -> Attr:
        """By dim of a value, the free dims of the softmax that it is made of; () where it is cut by none."""
        known = parts.get(value, ((),) * self.body.types[value].rank)
        return tuple(
            tuple(free.index(d) for d, _, _ in dim) if all(p[0] in free for p in dim) else ()
            for dim in known
        )

    def _is_free(self, d: int, parts: Mapping[int, Parts]) -> bool:
        """Whether every op can do with a part of this dim, and no op but closings sums over it."""
        size = self.body.types[self.body.one.softmax].shape[d]
        for op in self.body.ops:
            rule = rule_of(op, self.body.types)
            sides = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
            for value, dims in sides:
                for dim, told in zip(dims, parts.get(value, ()), strict=False):
                    if not any(part[0] == d for part in told):
                        continue
                    if told[0] != (d, 1, size) or not dim or dim[0] not in cuttable(rule):
                        return False
                    factor = rule.factors[dim[0]]
                    if factor.size != size or (
                        factor.kind == "reduced" and not self._may_sum(op, factor.reduction)
                    ):
                        return False
        return True

    def _may_sum(self, op: Op, reduction: str) -> bool:
        return reduction == "sum" and op.outputs[0] in self.closings

    def _is_linear(self, value: int) -> bool:
        """Whether all closings are linear in a value, the others held fixed."""
        zeros = {v for v, c in self.body.numbers.items() if c.data == 0}
        linear = {value}
        for op in self.body.ops:
            rule = rule_of(op, self.body.types)
            touched = [k for k, v in enumerate(op.inputs) if v in linear]
            nothing = [k for k, v in enumerate(op.inputs) if v in zeros]
            if touched and not {tuple(touched), tuple(sorted(touched + nothing))}.isdisjoint(
                rule.linear
            ):
                linear.update(op.outputs)
            elif touched:
                return False
            elif tuple(nothing) in rule.linear:
                zeros.update(op.outputs)
        return linear.issuperset(self.closings)
