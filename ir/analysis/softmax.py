"""A softmax with the products around it, found by structure: what attention and cross-entropy have in common.

    product ─▶ [ everything with all dims of the softmax ] ─▶ products, sums, look-ups

A search starts at an `exp` whose results are divided by a sum of them. Its operand comes from products (the openings)
through ops that keep all dims; everything that has all those dims, on either side, belongs to it, and leaves it by
products and sums (and look-ups, where those may end it). Sizes play no part: dims are followed through dim rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..graph import Op
from ..ops import EXPONENTIAL
from .dealt import Parts, complete, followed, whole
from .links import PURE, Links

SUMMED = frozenset({"reduce_sum", "reduce_max", "reduce_min"})


@dataclass(frozen=True)
class Softmax:
    """One softmax, or one pass of it.

    Attributes:
        softmax: the exponentials. `keys` are its dims that are summed over.
        openings: all products that make something with all dims of the softmax, those of the backward pass too;
            `closings` the values that leave it.
        inside: what a fused kernel never writes. Of that `made` comes from openings. `dims` tells dims of values
            inside as those of the softmax.
    """

    softmax: int
    keys: frozenset[int]
    openings: tuple[int, ...]
    closings: tuple[int, ...]
    inside: frozenset[int]
    made: frozenset[int]
    dims: Mapping[int, Parts]


class SoftmaxFinder:
    """One softmax, from one `exp` of it. `parts` tell dims of values as those of the `exp`."""

    ending: frozenset[str] = SUMMED  # ops other than products that may take a value out

    def __init__(self, links: Links, exp: int):
        self.links, self.exp, self.kind = links, exp, links.types[exp]
        self.parts: dict[int, Parts] = {exp: whole(self.kind)}
        self.every = frozenset(d for d, size in enumerate(self.kind.shape) if size > 1)
        self.openings: dict[int, Op] = {}
        self.made: set[int] = set()  # of an opening, by ops that keep all dims
        self.given: set[int] = (
            set()
        )  # masks, biases, dropout: what else has all dims and is made for this alone
        self.left: dict[int, Op] = {}  # what leaves by other ops than products

    # ------------------------------------------------------------ what belongs to it

    def _full(self, parts: Parts) -> bool:
        return complete(parts, self.kind) >= self.every

    def _back(self, value: int) -> None:
        """Where a value with all dims comes from: openings, masks, what is handed in."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value in self.made or value in self.given:
                continue
            if value in self.links.leaving and self._bars(value, None):
                continue
            for other, gained in self.links.up[value]:
                self.parts.setdefault(other, shifted(self.parts[value], gained))
                waiting.append(other)
            op = self.links.writer.get(value)
            if op is None or op.regions:
                self.given.update(() if op is None else (value,))
                continue
            known = followed(op, self.links.types, self.parts)
            sources = [v for v in op.inputs if v in known and self._full(known[v])]
            if op.kind == "dot_general" and not sources:
                self.openings[value] = op
                self.made.add(value)
                continue
            self.given.add(value)
            for source in sources:
                self.parts.setdefault(source, known[source])
                waiting.append(source)

    def _onward(self) -> list[int] | None:
        """Follow what openings make; the products that leave, None where anything else reads it."""
        closings: list[int] = []
        waiting = list(self.openings)
        while waiting:
            value = waiting.pop()
            self.given.discard(value)
            if value in self.links.leaving and self._bars(value, None):
                return None
            for other, gained in self.links.down[value]:
                if other not in self.made:
                    self.parts[other] = shifted(self.parts[value], gained)
                    self.made.add(other)
                    waiting.append(other)
            for op in self.links.readers[value]:
                if op.regions:
                    if not self._is_linked(op, value) and self._bars(value, op):
                        return None
                    continue
                known = followed(op, self.links.types, self.parts)
                full = [v for v in op.outputs if v in known and self._full(known[v])]
                if not full and not self._leaves(op, known):
                    if self._bars(value, op):
                        return None
                    continue
                if not full and op.kind == "dot_general":
                    closings += [v for v in op.outputs if v not in closings]
                elif not full:
                    self.left |= dict.fromkeys(op.outputs, op)
                for result in full:
                    if result not in self.made:
                        self.parts[result] = known[result]
                        self.made.add(result)
                        waiting.append(result)
                waiting += self._beside(op, known)
        return closings

    def _bars(self, value: int, reader: Op | None) -> bool:
        """Whether a search ends at an op that reads what is inside and may not, or at a result of the step (None)."""
        return True

    def _is_linked(self, op: Op, value: int) -> bool:
        """Whether a loop only hands a value on to its turns, whole or row by row."""
        inside = {other for other, _ in self.links.down[value]}
        return op.kind == "scan" and all(
            r in inside for v, r in zip(op.inputs, op.regions[0].inputs, strict=True) if v == value
        )

    def _beside(self, op: Op, known: dict[int, Parts]) -> list[int]:
        """Other operands with all dims: masks, or the gradient of the weights, which opens the backward pass."""
        before = set(self.openings)
        for value in op.inputs:
            if (
                value not in self.made
                and value not in self.given
                and value in known
                and self._full(known[value])
            ):
                self.parts.setdefault(value, known[value])
                self._back(value)
        return [value for value in self.openings if value not in before]

    def _leaves(self, op: Op, known: dict[int, Parts]) -> bool:
        """Whether an op may end what is inside: a sum or maximum, a product with something from outside."""
        if op.kind in self.ending:
            return True
        inside = [v for v in op.inputs if v in self.made]
        return op.kind == "dot_general" and len(inside) == 1 and op.inputs[0] != op.inputs[1]

    def _pure(self) -> set[int]:
        """Weights: of an `exp`, by ops that scale, mask and convert, never by one that mixes in another product."""
        found: set[int] = set()
        for value in self.made:
            op = self.links.writer.get(value)
            if op is not None and op.kind in EXPONENTIAL:
                found.update(self._pure_from(value))
        return found

    def _pure_from(self, start: int) -> set[int]:
        waiting, found = [start], {start}
        while waiting:
            value = waiting.pop()
            steps = [other for other, _ in self.links.down[value]]
            for op in self.links.readers[value]:
                if op.kind == "optimization_barrier":
                    steps += [r for v, r in zip(op.inputs, op.outputs, strict=True) if v == value]
                elif op.kind in PURE and not any(v in self.made and v != value for v in op.inputs):
                    steps += op.outputs
            new = [v for v in steps if v in self.made and v not in found]
            found.update(new)
            waiting += new
        return found

    def _keys(self) -> frozenset[int] | None:
        """The dims that the softmax sums over, if all sums of weights agree."""
        self._weights = self._pure()
        found = set[frozenset[int]]()
        for value in self._weights:
            for op in self.links.readers[value]:
                if op.kind == "reduce_sum":
                    found.add(self._lost(op, op.outputs[0]))
                elif (
                    op.kind == "div" and op.inputs[0] == value and op.inputs[1] in self.links.totals
                ):
                    found.add(self._lost(op, op.inputs[1]))
            op = self.links.writer.get(value)
            before = (
                self.links.writer.get(op.inputs[0])
                if op is not None and op.kind in EXPONENTIAL
                else None
            )
            if (
                before is not None
                and before.kind == "sub"
                and before.inputs[1] in self.links.totals
            ):
                found.add(self._lost(before, before.inputs[1]))
        return next(iter(found)) if len(found) == 1 else None

    def _lost(self, op: Op, value: int) -> frozenset[int]:
        """The dims that a sum of weights, which this value beside weights is made of, has no more."""
        parts = followed(op, self.links.types, self.parts)[value]
        while (source := self.links.totals.get(value)) is not None:
            maker = self.links.writer.get(value)
            passed = dict(self.links.up[value]).get(source)
            if passed is not None:
                parts = shifted(parts, passed)
            elif maker is not None:
                parts = followed(maker, self.links.types, {value: parts})[source]
            value = source
        return self.every - complete(parts, self.kind)


def shifted(parts: Parts, gained: int) -> Parts:
    """Parts of the same value inside a loop, or stacked outside of it: with a leading dim less or more."""
    return parts[1:] if gained < 0 else ((), *parts) if gained else parts
