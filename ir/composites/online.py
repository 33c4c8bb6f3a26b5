"""Whether attention can be worked out a block of keys at a time, and how its blocks come together.

    m = max s        e = exp(s - m)        l = sum e        o = sum (e / l) v

Of one block, with l taken as 1, o is proportional to exp(-m) / l: it has the degrees m 1, l -1. Two blocks become one
by bringing both to the larger m; divided by the l of all blocks it is what all keys give (online softmax: Milakov &
Gimelshein, arXiv 1805.02867; as blocks: Dao et al., arXiv 2205.14135, section 3.1).

Gradients need such sums first (l, and what each query's weights times their gradients add up to), then all that is
made of them: two passes over the keys. A body is read op by op; whatever else meets keys is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..analysis.dealt import OTHER, Parts, spread
from ..analysis.key_spans import factor_of
from ..graph import Graph, Op, TensorType
from ..ops import ADDITION, EXPONENTIAL, FORWARDING
from ..rules import rule_of
from ..rules.factors import FLOATS

Degrees = tuple[tuple[int, int], ...]  # (a maximum or a sum, its power), in order; none: as it is
_LINEAR = FORWARDING | {"neg", "reduce_sum"}
_ALIKE = ADDITION | {"sub"}


@dataclass(frozen=True)
class Online:
    """How blocks of keys come together.

    Attributes:
        maximum: what scores are lowered by, the maximum of each row; None where they are not.
        base2: whether exponentials are powers of 2.
        sums: sums over keys that other ops read, in order.
        degrees: of `sums` and of results, how they depend on the maximum and on sums before them.
        passes: 1 if results come together as sums do, 2 if they need the sums of all keys first.
    """

    maximum: int | None
    base2: bool
    sums: tuple[int, ...]
    degrees: Mapping[int, Degrees]
    passes: int

    @property
    def statistics(self) -> tuple[int, ...]:
        """The maximum, if there is one, and the sums."""
        return self.sums if self.maximum is None else (self.maximum, *self.sums)


class _Refused(Exception):
    """Blocks of keys do not come together."""


def online(
    ops: Sequence[Op],
    types: Mapping[int, TensorType],
    parts: Mapping[int, Parts],
    keys: int,
    free: Collection[int],
    closings: Collection[int],
    numbers: Mapping[int, object],
) -> Online | None:
    """What a body says of its dim `keys`; None where blocks of it do not come together.

    Args:
        parts: dims of all values, told as parts of `keys` and of others. `free` are those that may be cut.
        closings: the body's results.
        numbers: what its constants are.
    """
    reading = _Reading(types, parts, keys, free, closings, numbers)
    try:
        for op in ops:
            reading.op(op)
        return reading.found()
    except _Refused:
        return None


@dataclass
class _Reading:
    types: Mapping[int, TensorType]
    parts: Mapping[int, Parts]
    keys: int
    free: Collection[int]
    closings: Collection[int]
    numbers: Mapping[int, object]
    maximum: int | None = None
    sums: list[int] = field(default_factory=lambda: [])
    exps: set[str] = field(default_factory=lambda: set())
    shifts: set[int] = field(default_factory=lambda: set())  # the maximum, as others read it
    lowered: set[int] = field(default_factory=lambda: set())  # scores less the maximum
    nothing: set[int] = field(default_factory=lambda: set())  # zeros
    ended: set[int] = field(default_factory=lambda: set())  # results that are sums over keys
    # None: not told by powers.
    degrees: dict[int, Degrees | None] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        self.nothing |= {v for v, data in self.numbers.items() if data == 0}

    def found(self) -> Online:
        by_keys = {v for v in self.closings if self.keys in self._dims(v)}
        if not self.ended | by_keys >= {*self.closings}:
            raise _Refused  # a result that every block would make anew
        statistics = {*self.sums, self.maximum} - {None}
        if not all(v is None or self._dims(v).issuperset(self.free) for v in statistics):
            raise _Refused
        known = {v: self.degrees.get(v, ()) for v in (*self.sums, *self.closings)}
        told = {v: d for v, d in known.items() if d is not None}
        once = not by_keys and len(told) == len(known)
        once = once and all(self._dims(v).issuperset(self.free) for v in self.closings)
        return Online(self.maximum, self.exps == {"exp2"}, tuple(self.sums), told, 1 if once else 2)

    def op(self, op: Op) -> None:
        if self.shifts.intersection(op.inputs):
            self._shifted(op)
        elif self.lowered.intersection(op.inputs):
            self._exponential(op)
        else:
            self._other(op)

    def _other(self, op: Op) -> None:
        rule = rule_of(op, self.types)
        keyed = factor_of(op, self.parts, self.keys, rule)
        if keyed is None:
            raise _Refused
        lost = keyed >= 0 and all(keyed not in dim for dims in rule.results for dim in dims)
        if lost and rule.factors[keyed].reduction == "max":
            self._maximum(op)
            return
        self.degrees.update(dict.fromkeys(op.outputs, self._degrees(op)))
        if lost:
            self._sum(op, rule.factors[keyed].reduction)
        groups = [*rule.linear, *([range(len(op.inputs))] if op.kind in FORWARDING else [])]
        if any(group and self.nothing.issuperset(op.inputs[k] for k in group) for group in groups):
            self.nothing.update(op.outputs)

    def _dims(self, value: int) -> set[int]:
        return {part[0] for dim in self.parts.get(value, ()) for part in dim}

    def _maximum(self, op: Op) -> None:
        if self.maximum is not None or self.degrees.get(op.inputs[0], ()) != ():
            raise _Refused
        self.maximum = op.outputs[0]
        self.shifts.add(self.maximum)

    def _shifted(self, op: Op) -> None:
        """The maximum may be spread and subtracted from scores, no more."""
        others = [v for v in op.inputs if v not in self.shifts]
        if op.kind in FORWARDING or (op.kind == "max" and self._are_lowest(others)):
            self.shifts.update(op.outputs)
        elif op.kind == "sub" and op.inputs[0] in others and not self.degrees.get(op.inputs[0], ()):
            self.lowered.update(op.outputs)
        else:
            raise _Refused
        if not self.shifts.isdisjoint(self.closings):
            raise _Refused

    def _are_lowest(self, values: Sequence[int]) -> bool:
        return all(self.numbers.get(v) == float("-inf") for v in values)

    def _exponential(self, op: Op) -> None:
        assert self.maximum is not None
        if op.kind in FORWARDING:
            self.lowered.update(op.outputs)
        elif op.kind in EXPONENTIAL:
            self.exps.add(op.kind)
            self.degrees[op.outputs[0]] = ((self.maximum, 1),)
        else:
            raise _Refused
        if len(self.exps) > 1 or not self.lowered.isdisjoint(self.closings):
            raise _Refused

    def _sum(self, op: Op, reduction: str) -> None:
        (value,) = op.outputs
        if reduction != "sum":
            raise _Refused
        if value in self.closings:
            self.ended.add(value)
        elif self.degrees[value] is None or self.types[value].dtype not in FLOATS:
            raise _Refused
        else:
            self.sums.append(value)

    def _of(self, value: int) -> Degrees | None:
        """As ops read a value; sums are numbers of their own."""
        return ((value, 1),) if value in self.sums else self.degrees.get(value, ())

    def _degrees(self, op: Op) -> Degrees | None:
        if op.kind == "select_n":
            return self._chosen(op)
        known = [self._of(v) for v in op.inputs if v not in self.nothing]
        if all(degrees == () for degrees in known):
            return ()
        if any(degrees is None for degrees in known) or self._leaves_floats(op):
            return None
        powers = [degrees for degrees in known if degrees is not None]
        if op.kind in ("mul", "dot_general"):
            return _product([(degrees, 1) for degrees in powers])
        if op.kind == "div" and len(powers) == 2:
            return _product([(powers[0], 1), (powers[1], -1)])
        if op.kind == "integer_pow":
            by = op.attr("y")
            return _product([(powers[0], by)]) if isinstance(by, int) else None
        alike = op.kind in _LINEAR or op.kind in _ALIKE
        return powers[0] if alike and len({*powers}) == 1 else None

    def _chosen(self, op: Op) -> Degrees | None:
        which, *cases = op.inputs
        known = {self._of(v) for v in cases if v not in self.nothing} or {()}
        return known.pop() if self._of(which) == () and len(known) == 1 else None

    def _leaves_floats(self, op: Op) -> bool:
        return any(self.types[v].dtype not in FLOATS for v in op.outputs)


def _product(factors: Sequence[tuple[Degrees, int]]) -> Degrees:
    found: dict[int, int] = {}
    for degrees, times in factors:
        for value, power in degrees:
            found[value] = found.get(value, 0) + power * times
    return tuple(sorted((v, p) for v, p in found.items() if p))


def body_parts(
    graph: Graph, sizes: Sequence[int], operands: Sequence[Sequence[tuple[int, ...]]]
) -> dict[int, Parts]:
    """Dims of all values of a body as free dims of these sizes, told by its operands, forwards and backwards."""
    known: dict[int, Parts] = {
        v: tuple(tuple((d, 1, sizes[d]) for d in dim) if dim else ((OTHER, 1, size),) if size > 1 else ()
                 for dim, size in zip(dims, graph.types[v].shape, strict=True))
        for v, dims in zip(graph.inputs, operands, strict=True)
    }  # fmt: skip
    return spread(graph.ops, graph.types, known)


def online_body(
    graph: Graph, sizes: Sequence[int], parts: Mapping[int, Parts], kept: int = 0
) -> Online | None:
    """What a composite's body says of its keys, the last of the dims of these sizes; its last results are `kept`
    maxima and sums."""
    keys, numbers = len(sizes) - 1, {c.value: c.data for c in graph.constants}
    closings = graph.outputs[: len(graph.outputs) - kept]
    return online(graph.ops, graph.types, parts, keys, range(keys), closings, numbers)
