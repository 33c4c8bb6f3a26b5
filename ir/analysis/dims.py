"""Dims of values that are the same thing, all over a step: classes of dims.

    y = x @ w     x [B, D] · w [D, F] -> y [B, F]     B of x and y, D of x and w, F of w and y

Two dims are of one class when a factor of some op's dim rule joins them. A dim of several
parts (B·T) has a class for each, found again where it is taken apart. Values that no input
reaches (masks, positions counted out) join nothing: one array of zeros may serve as a batch
here and as a width there.

On the way is noted what ops do to classes: sum them up while others stay (`sums`), loop over
them, need them whole or look places up in them, draw random numbers from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..graph import Graph, Op, Region, TensorType
from ..ops import ADDITION, INDEXED, RANDOM
from ..rules import rule_of
from ..rules.rule import Rule

LOOKED_UP = INDEXED | {"dynamic_slice", "dynamic_update_slice"}
Parts = tuple[tuple[int, int], ...]  # (class, size) of the parts of a dim, major to minor


@dataclass
class DimClasses:
    """What was found; classes are numbers, told apart after `find`."""

    types: Mapping[int, TensorType]
    # Value -> parts of its dims.
    dims: dict[int, tuple[Parts, ...]] = field(default_factory=lambda: {})
    # Result -> (summed, kept).
    sums: dict[int, set[tuple[int, frozenset[int]]]] = field(default_factory=lambda: {})
    mapped: set[int] = field(default_factory=lambda: set())  # a loop runs over it
    # Mapped, and hands more than sums from turn to turn.
    recurrent: set[int] = field(default_factory=lambda: set())
    handled: set[int] = field(default_factory=lambda: set())
    drawn: set[int] = field(default_factory=lambda: set())
    _parents: list[int] = field(default_factory=lambda: [])
    _rests: dict[tuple[int, int], int] = field(default_factory=lambda: {})

    # ------------------------------------------------------------ what others ask

    def of(self, value: int, dim: int) -> int:
        """The class of a dim, or of the major part of it."""
        return self.find(self.dims[value][dim][0][0])

    def find(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    # ------------------------------------------------------------ joining

    def new(self) -> int:
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def join(self, one: Parts, other: Parts) -> None:
        """Parts of equal sizes are the same; of unequal ones the major parts are."""
        for (a, size), (b, length) in zip(one, other, strict=False):
            a, b = self.find(a), self.find(b)
            self._parents[max(a, b)] = min(a, b)
            if size != length:
                return

    def settle(self) -> None:
        """All is joined: every class by its final number."""
        for marks in (self.mapped, self.recurrent, self.handled, self.drawn):
            marks.update([self.find(c) for c in marks])
        for result, found in self.sums.items():
            self.sums[result] = {
                (self.find(c), frozenset(map(self.find, kept))) for c, kept in found
            }

    # ------------------------------------------------------------ ops

    def enter(self, value: int) -> None:
        """An input: every dim is a class of its own so far."""
        self.dims[value] = tuple(((self.new(), size),) for size in self.types[value].shape)

    def run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            if not any(v in self.dims for v in op.inputs):
                continue
            if op.kind == "scan":
                self._loop(op)
            elif op.regions:
                self._branches(op)
            elif op.kind == "optimization_barrier":
                self.dims |= {
                    r: self.dims[v]
                    for v, r in zip(op.inputs, op.outputs, strict=True)
                    if v in self.dims
                }
            elif (rule := rule_of(op, self.types)).opaque:
                self._guess(op)
            else:
                self._simple(op, rule)

    def _simple(self, op: Op, rule: Rule) -> None:
        factors: dict[int, Parts] = {}
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            for parts, dim in zip(self.dims.get(value, ()), dims, strict=False):
                for factor, found in self._dealt(parts, [(f, rule.factors[f].size) for f in dim]):
                    if factor in factors:
                        self.join(factors[factor], found)
                    else:
                        factors[factor] = found
        self._note(op, rule, factors)
        for result, dims in zip(op.outputs, rule.results, strict=True):
            shape = self.types[result].shape
            told = [any(f in factors for f in dim) for dim in dims]
            self.dims[result] = tuple(
                self._gathered(dim, factors, rule, size)
                for dim, size in zip(dims, shape, strict=True)
            )
            self._keep_places(op, rule, result, told)

    def _dealt(self, parts: Parts, factors: list[tuple[int, int]]) -> Iterator[tuple[int, Parts]]:
        """The parts that each factor of a dim is, as far as their sizes agree."""
        left = [part for part in parts if part[1] > 1]
        for factor, size in factors:
            taken: list[tuple[int, int]] = []
            while size > 1 and left:
                number, length = left.pop(0)
                if length > size:
                    taken.append((number, size))
                    if length % size == 0:
                        left.insert(0, (self._rest(number, size), length // size))
                    break
                taken.append((number, length))
                if size % length:
                    break
                size //= length
            if taken:
                yield factor, tuple(taken)

    def _rest(self, number: int, size: int) -> int:
        """What is left of a class when its major part of this size is taken off."""
        key = (self.find(number), size)
        if key not in self._rests:
            self._rests[key] = self.new()
        return self._rests[key]

    def _gathered(
        self, dim: Sequence[int], factors: dict[int, Parts], rule: Rule, size: int
    ) -> Parts:
        """The parts of a result's dim; a factor that no operand told is a class of its own."""
        for factor in dim:
            if factor not in factors:
                factors[factor] = ((self.new(), rule.factors[factor].size),)
        long = tuple(part for factor in dim for part in factors[factor] if part[1] > 1)
        return long or ((self.new(), size),)

    def _note(self, op: Op, rule: Rule, factors: Mapping[int, Parts]) -> None:
        """What the op does to the classes of its operands."""
        kept = {f for dims in rule.results for dim in dims for f in dim}
        alive = frozenset(c for f in kept & factors.keys() for c, _ in factors[f])
        summed = [f for f in factors if f not in kept and rule.factors[f].kind == "reduced"]
        for result in op.outputs if summed else ():
            self.sums.setdefault(result, set()).update(
                (c, alive) for f in summed for c, _ in factors[f]
            )
        whole = [f for f in factors if rule.factors[f].kind in ("whole", "halo")]
        looked_up = op.kind in LOOKED_UP
        whole += [f for f in factors if looked_up and f not in kept]
        marks = self.drawn if op.kind in RANDOM else self.handled
        marks.update(c for f in whole for c, _ in factors[f])

    def _keep_places(self, op: Op, rule: Rule, result: int, told: Sequence[bool]) -> None:
        """Dims that an op cuts or joins (slice, concatenate) stay what they are, in their place."""
        found, shape = list(self.dims[result]), self.types[result].shape
        for value, dims in reversed([*zip(op.inputs, rule.operands, strict=True)]):
            if value not in self.dims or len(dims) != len(shape):
                continue
            for d, dim in enumerate(dims):
                lost = any(rule.factors[f].kind in ("whole", "halo") for f in dim)
                if lost and not told[d] and shape[d] > 1 and self.types[value].shape[d] > 1:
                    found[d] = ((self.dims[value][d][0][0], shape[d]),)
        self.dims[result] = tuple(found)

    def _guess(self, op: Op) -> None:
        """No rule: a result's dim is the operand's of the same place and size."""
        known = [v for v in op.inputs if v in self.dims]
        for value in known:
            marks = self.drawn if op.kind in RANDOM else self.handled
            marks.update(parts[0][0] for parts in self.dims[value])
        for result in op.outputs:
            shape = self.types[result].shape
            self.dims[result] = tuple(self._like(known, d, size) for d, size in enumerate(shape))

    def _like(self, values: list[int], dim: int, size: int) -> Parts:
        for value in values:
            if self.types[value].shape[dim : dim + 1] == (size,):
                return self.dims[value][dim]
        return ((self.new(), size),)

    # ------------------------------------------------------------ loops

    def _loop(self, op: Op) -> None:
        region, (consts, carry) = op.regions[0], op.loop_inputs
        over = ((self.new(), op.trips),)
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            if outside not in self.dims:
                continue
            if i < consts + carry:
                self.dims[inside] = self.dims[outside]
            else:
                self.join(over, self.dims[outside][0])
                self.dims[inside] = self.dims[outside][1:]
        for _ in range(2):  # the second time the carries are known
            self.run(region.ops)
            for start, end in zip(region.inputs[consts:], region.outputs[:carry], strict=False):
                self._meet(start, end)
        self.mapped.add(over[0][0])
        if any(self._hands_on(region, consts + k, k) for k in range(carry)):
            self.recurrent.add(over[0][0])
        for k, (result, end) in enumerate(zip(op.outputs, region.outputs, strict=True)):
            if end in self.dims:
                self.dims[result] = self.dims[end] if k < carry else (over, *self.dims[end])
                if k < carry:
                    kept = frozenset(c for parts in self.dims[end] for c, _ in parts)
                    self.sums.setdefault(result, set()).add((over[0][0], kept))

    def _branches(self, op: Op) -> None:
        """A branch is handed what the op reads, and its ends are the results; so are the turns of a while."""
        consts, carry = op.loop_inputs
        for region in op.regions:
            for outside, inside in zip(op.inputs, region.inputs, strict=True):
                if outside in self.dims:
                    self.dims[inside] = self.dims[outside]
        for _ in range(2 if carry else 1):  # the second time the carries are known
            for region in op.regions:
                self.run(region.ops)
            for region in op.regions if carry else ():
                for start, end in zip(region.inputs[consts:], op.returning[0].outputs, strict=True):
                    self._meet(start, end)
        for region in op.returning:
            for result, end in zip(op.outputs, region.outputs, strict=True):
                self._meet(result, end)

    def _hands_on(self, region: Region, start: int, end: int) -> bool:
        """Whether a carry of floats is more than a sum that grows."""
        value = region.inputs[start]
        if not self.types[value].is_float:
            return False
        readers = [op for op in region.ops if value in op.inputs]
        while len(readers) == 1 and readers[0].kind in ADDITION | {"convert_element_type"}:
            value = readers[0].outputs[0]
            readers = [op for op in region.ops if value in op.inputs]
        return bool(readers) or value != region.outputs[end]

    def _meet(self, start: int, end: int) -> None:
        """A carry's two ends are the same; so are a result and the end of each branch."""
        if end in self.dims and start in self.dims:
            for one, other in zip(self.dims[start], self.dims[end], strict=True):
                self.join(one, other)
        elif end in self.dims:
            self.dims[start] = self.dims[end]


def classes_of(graph: Graph) -> DimClasses:
    """The classes of all dims of a step."""
    found = DimClasses(graph.types)
    for value in graph.inputs:
        found.enter(value)
    found.run(graph.ops)
    found.settle()
    return found
