"""Which dims of a softmax may be cut, on every value of the body of a composite: what its rule is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..analysis.attention import Attention
from ..analysis.cross_entropy import CrossEntropy
from ..analysis.dealt import Parts
from ..analysis.key_spans import KeySpans, may_leave_out
from ..analysis.softmax import Softmax
from ..attrs import Attr
from ..graph import Op
from ..rules import rule_of
from ..rules.rule import NONE, Rule, cuttable
from .bodies import LOSS
from .composing import Body
from .online import online

One = TypeVar("One", bound=Softmax)


@dataclass(frozen=True)
class Cuts(Generic[One]):
    """Which dims of the softmax may be cut, on every value of a body."""

    body: Body[One]
    closings: Sequence[int]

    def _tokens(self, parts: Mapping[int, Parts]) -> list[int]:
        """Dims other than the keys that may be cut."""
        shape = self.body.types[self.body.one.softmax].shape
        return [
            d
            for d, size in enumerate(shape)
            if size > 1 and d not in self.body.one.keys and self._is_free(d, parts)
        ]

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


@dataclass(frozen=True)
class AttentionCuts(Cuts[Attention]):
    """The same of an attention; kernels take whole keys."""

    for_kernels: bool

    def attrs(self) -> dict[str, Attr]:
        """What the rule of the composite is made of; see `rules/composite.py`. Where blocks of keys come together,
        these are a further dim, of `keys` many, and may go round a ring of devices that cut the free dim `ring`. Where
        keys are left out, they are one too, and `spans` are the first and the end of `blocks` of them, by block of the
        free dim `rows`."""
        body, parts = self.body, self.body.parts()
        shape, free = body.types[body.one.softmax].shape, self._tokens(parts)
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
        if self.for_kernels or len(keys) != 1 or others != [*keys] or not rows:
            return None  # kernels take whole keys
        (keys,), numbers = body.one.keys, {v: c.data for v, c in body.numbers.items()}
        found = online(body.ops, body.types, parts, keys, free, self.closings, numbers)
        return None if found is None else max(rows, key=shape.__getitem__)

    def _spans(self, free: Sequence[int], parts: Mapping[int, Parts]) -> KeySpans | None:
        """Which keys a kernel leaves out, if the body comes to the same without them."""
        found, body = self.body.one.spans, self.body
        if found is None or found.rows not in free:
            return None
        numbers = {v: c.data for v, c in body.numbers.items()}
        fine = may_leave_out(body.ops, body.types, parts, found, self.closings, numbers)
        return found if fine else None


@dataclass(frozen=True)
class LossCuts(Cuts[CrossEntropy]):
    """The same of a cross-entropy: tokens, and the vocabulary where ops that sum over it bring parts together."""

    kind: str

    def attrs(self) -> dict[str, Attr]:
        """What the rule is made of. The vocabulary is the free dim `vocabulary`, if devices may share it; they then
        bring together `joined` maxima and sums of their parts. Of gradients, results numbered in `complete` are then
        the same on all of them, where others owe a sum."""
        body, parts = self.body, self.body.parts()
        free, (*keys,) = self._tokens(parts), body.one.keys
        if len(keys) != 1 or (joined := self._joined(keys[0], parts)) is None:
            return self._told(free, free, parts)
        named = [*free, *keys]
        told: dict[str, Attr] = {"vocabulary": len(free), "joined": joined}
        complete = self._complete(keys[0], parts)
        if self.kind != LOSS and complete:
            told["complete"] = tuple(self.closings.index(v) for v in complete)
        return {**self._told(named, named, parts), **told}

    def _joined(self, d: int, parts: Mapping[int, Parts]) -> int | None:
        """How many sums and maxima over a dim are brought together inside; None where that is not all it takes."""
        inside, size = 0, self.body.types[self.body.one.softmax].shape[d]
        complete = self._complete(d, parts)
        if self.kind == LOSS and len(complete) < len(self.closings):
            return None
        for op in self.body.ops:
            rule = rule_of(op, self.body.types)
            for factor in self._factors(op, rule, d, parts):
                if factor not in cuttable(rule) or rule.factors[factor].size != size:
                    return None
                if all(factor in {f for dim in dims for f in dim} for dims in rule.results):
                    continue
                if rule.factors[factor].reduction not in ("sum", "max", "min"):
                    return None
                inside += op.outputs[0] not in self.closings or op.outputs[0] in complete
        return inside

    def _complete(self, d: int, parts: Mapping[int, Parts]) -> list[int]:
        """Results that are made of all parts of a dim: the loss, and what no op sums over it last."""
        read = {v for op in self.body.ops for v in op.inputs}
        last = {
            op.outputs[0]
            for op in self.body.ops
            if (rule := rule_of(op, self.body.types))
            and any(rule.factors[f].reduction == "sum" for f in self._factors(op, rule, d, parts) if f >= 0)
        }  # fmt: skip
        without = [v for v in self.closings if all(p[0] != d for dim in parts.get(v, ()) for p in dim)]  # fmt: skip
        return [v for v in without if v in self.body.one.results or v in read or v not in last]

    def _factors(self, op: Op, rule: Rule, d: int, parts: Mapping[int, Parts]) -> set[int]:
        """Factors of an op that are a dim of the softmax, whole or in part."""
        sides = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
        return {
            dim[0] if dim else NONE
            for value, dims in sides
            for dim, told in zip(dims, parts.get(value, ()), strict=False)
            if any(part[0] == d for part in told)
        }
