"""What share of all pairs of queries and keys a mask keeps, where the program counts it out itself.

    rows >= columns    of iotas: (T + 1) / 2T         rows - columns < w and so on

The mask is worked out at some places (all of them, where there are few) or for whole blocks of places, element by
element back to iotas and numbers. A mask that depends on an input, or on an unknown array of constants, is taken
to keep all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..fingerprint import digest_of
from ..graph import Graph, Op, TensorType
from .dealt import OTHER, Parts
from .intervals import Interval, Unknown, chosen, interval

ROWS, COLUMNS = 64, 1 << 14  # places looked at, at most, along one dim and along all others
LARGEST = 1 << 27  # elements of an array of constants that are made to compare
LOW = -1e4  # added to a score, or in its place, it leaves no weight

# One array of places, or of intervals of them, per dim, broadcast against each other.
Index = tuple[Any, ...]


def _same(operand: Any) -> Any:
    return operand


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs, "sign": np.sign,
    "max": np.maximum, "min": np.minimum, "rem": np.fmod, "div": np.floor_divide,
    "eq": np.equal, "ne": np.not_equal, "ge": np.greater_equal,
    "gt": np.greater, "le": np.less_equal, "lt": np.less,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.logical_not,
    "stop_gradient": _same, "copy": _same, "reduce_precision": _same,
}  # fmt: skip


class Masks:
    """Values of a graph that are made of iotas and numbers, at some places."""

    def __init__(self, graph: Graph, writer: Mapping[int, Op], same: Mapping[int, int]):
        self.types, self.writer = graph.types, writer
        self.same = same  # what a loop is handed: the same outside of it
        self.numbers = {c.value: c.data for c in graph.constants}

    def at(self, value: int, places: Index) -> Interval:
        """The value at these places, of which a dim of size 1 has the first alone; raises Unknown."""
        while value in self.same:
            value = self.same[value]
        kind = self.types[value]
        places = (
            tuple(p if n > 1 else 0 for p, n in zip(places, kind.shape, strict=True))
            if places
            else ()
        )
        if value in self.numbers:
            return interval(self._number(value, places))
        op = self.writer.get(value)
        if op is None or op.regions:
            raise Unknown
        if op.kind in _ELEMENTWISE:
            operands, operand = (
                [self._beside(v, places) for v in op.inputs],
                self.types[op.inputs[0]],
            )
            if (op.kind == "not" and operand.dtype != "bool") or (
                op.kind == "div" and operand.is_float
            ):
                raise Unknown
            return _representable(_ELEMENTWISE[op.kind](*operands), kind)
        return interval(self._moved(op, places))

    def _beside(self, value: int, places: Index) -> Any:
        """An operand of an elementwise op: a number is the same everywhere."""
        return self.at(value, places if self.types[value].rank else ())

    def _number(self, value: int, places: Index) -> Any:
        data = self.numbers[value]
        return _usual(self.types[value], data)(places) if isinstance(data, str) else data

    def _moved(self, op: Op, places: Index) -> Any:
        """Of ops that take an element from elsewhere, choose or convert it."""
        source = self.types[op.inputs[0]] if op.inputs else None
        if op.kind == "iota":
            return places[op.integer("dimension")]
        if source is None:
            raise Unknown
        if op.kind == "convert_element_type":
            return self._converted(op, places)
        if op.kind == "select_n" and len(op.inputs) == 3:
            which, no, yes = (self._beside(v, places) for v in op.inputs)
            return chosen(which, yes, no)
        if op.kind == "broadcast_in_dim":
            at = [places[d] for d in op.integers("broadcast_dimensions")]
            return self.at(op.inputs[0], tuple(at))
        if op.kind == "transpose":
            order = op.integers("permutation")
            return self.at(op.inputs[0], tuple(places[order.index(d)] for d in range(source.rank)))
        if op.kind in ("reshape", "squeeze"):
            return self.at(
                op.inputs[0], _reshaped(places, self.types[op.outputs[0]].shape, source.shape)
            )
        raise Unknown

    def _converted(self, op: Op, places: Index) -> Interval:
        found, kind = self.at(op.inputs[0], places), self.types[op.outputs[0]]
        if kind.dtype == "bool":
            return np.not_equal(found, 0)  # type: ignore[return-value]  # numpy does not know that it returns ours
        return found if kind.is_float else _representable(np.trunc(found), kind)  # type: ignore[arg-type]


def _representable(found: Interval, kind: TensorType) -> Interval:
    """Itself; raises Unknown where integers of this type would overflow."""
    if kind.dtype != "bool" and not kind.is_float:
        bits = np.iinfo(f"{'u' * (kind.dtype[0] == 'u')}int{kind.dtype[1:]}")
        if np.any(found.low < bits.min) or np.any(found.high > bits.max):
            raise Unknown
    return found


@lru_cache(maxsize=64)
def _usual(kind: TensorType, digest: str) -> Callable[[Index], Any]:
    """What an array of constants with this digest holds at places, if masks are made of such; raises Unknown."""
    dtype = {
        "s32": np.int32,
        "s64": np.int64,
        "u32": np.uint32,
        "f32": np.float32,
        "bool": np.bool_,
    }.get(kind.dtype)
    if dtype is None or kind.size > LARGEST:
        raise Unknown
    for array, found in _candidates(kind.shape, dtype):
        if digest_of(array) == digest:
            return found
    raise Unknown


def _candidates(
    shape: tuple[int, ...], dtype: Any
) -> Iterator[tuple[np.ndarray, Callable[[Index], Any]]]:
    """Positions counted, and triangles of ones."""
    if [n for n in shape if n > 1] == [max(shape, default=1)]:
        yield (
            np.arange(max(shape), dtype=dtype).reshape(shape),
            lambda at: at[shape.index(max(shape))],
        )
    if len(shape) > 1:
        yield np.tril(np.ones(shape, dtype)), lambda at: np.greater_equal(at[-2], at[-1])
        yield np.triu(np.ones(shape, dtype), 1), lambda at: np.less(at[-2], at[-1])


def _reshaped(places: Index, shape: Sequence[int], source: Sequence[int]) -> Index:
    flat = np.zeros((), np.int64)
    for at, size in zip(places, shape, strict=True):
        flat = flat * size + at
    found: list[Any] = []
    for size in reversed(source):
        found.append(flat % size)
        flat = flat // size
    return tuple(reversed(found))


def places(shape: Sequence[int], queries: frozenset[int], keys: frozenset[int]) -> Index:
    """Places spread evenly over the longest dim of the queries and over keys; the first of other dims."""
    rows = max(queries, key=lambda d: shape[d], default=None)
    found: list[Any] = [0] * len(shape)
    wanted = [*([] if rows is None else [rows]), *sorted(keys)]
    for n, d in enumerate(wanted):
        many = min(shape[d], ROWS if d == rows else COLUMNS)
        spread = (np.arange(many) * 2 + 1) * shape[d] // (2 * many)
        found[d] = spread.reshape([-1 if k == n else 1 for k in range(len(wanted))])
    return tuple(found)


def elsewhere(parts: Parts, at: Index, kind: TensorType) -> Index:
    """Places of a value of this type as places of another one that has its dims."""
    found: list[Any] = []
    for dim in parts:
        place: Any = 0
        for d, before, size in dim:
            part = (
                Interval(0, size - 1)
                if d == OTHER
                else at[d] // (kind.shape[d] // (before * size)) % size
            )
            place = place * size + part
        found.append(place)
    return tuple(found)


class Kept:
    """Which places may be left and which surely are, as masks take more and more away."""

    def __init__(self, masks: Masks, at: Index):
        self.masks = masks
        shape = np.broadcast_shapes(*(np.shape(interval(p).low) for p in at))
        self.possible: Any = np.ones(shape, bool)
        self.certain: Any = np.ones(shape, bool)

    def chosen(self, which: int, at: Index, low: int, there: Index, when: bool) -> bool:
        """Scores are kept where the choice `which` is `when`, as what stands there otherwise leaves no weight.
        Returns whether that is known."""
        try:
            if not np.all(self.masks.at(low, there).high <= LOW):
                return False
            found = self.masks.at(which, at)
        except Unknown:
            self.certain &= False
            return False
        yes, no = (found.high > 0, found.low > 0), (found.low <= 0, found.high <= 0)
        self._keep(*(yes if when else no))
        return True

    def added(self, value: int, at: Index) -> bool:
        """Scores have this added. Returns whether it is known."""
        try:
            found = self.masks.at(value, at)
        except Unknown:
            return False
        self._keep(found.high > LOW, found.low > LOW)
        return True

    def _keep(self, possible: Any, certain: Any) -> None:
        self.possible = self.possible & possible
        self.certain = self.certain & certain

    @property
    def share(self) -> float:
        """Of all places; at least one, as nobody masks everything."""
        return max(float(self.possible.mean()), 1 / self.possible.size)

    def longest(self, keys: frozenset[int]) -> float:
        """Of the keys of one row, where it is most; rows come first in `places`."""
        axes = tuple(range(self.possible.ndim - len(keys), self.possible.ndim))
        return max(float(self.possible.mean(axis=axes).max()), 1 / self.possible.size)
