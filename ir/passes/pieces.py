"""Values in pieces, and the ops that are emitted for them.

A `Stack` stands for one value of the old graph that the new one holds as pieces. Ops on
stacks wait in a run, which is emitted piece by piece once somebody needs a result of it:

    old      %c = mul %a %b;  %d = add %c %a      with %a, %b, %c, %d of 3 layers
    new      mul add   mul add   mul add          so that `fold` finds 3 equal stretches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isinf

from ..attrs import Attr
from ..graph import Constant, Op, TensorType
from ..ops import ELEMENTWISE
from ..values import FreshIds
from .narrow import Attrs

_IDENTITY = {"add": 0, "max": -inf, "min": inf, "and": True, "or": False}


@dataclass(frozen=True, slots=True)
class Stack:
    """A value in pieces: piece k is row k of dim `dim`, without that dim."""

    dim: int
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One op for every piece: column k of operands and results belongs to piece k."""

    kind: str
    attrs: Attrs
    where: str
    operands: tuple[Sequence[int], ...]
    results: tuple[Sequence[int], ...]

    def op(self, k: int) -> Op:
        inputs, outputs = (
            tuple(column[k] for column in side) for side in (self.operands, self.results)
        )
        return Op(self.kind, inputs, outputs, self.attrs, where=self.where)


@dataclass
class Shared:
    """What all scopes of a graph have in common: values, constants, and what ops were before they lost a dim."""

    fresh: FreshIds
    constants: list[Constant]
    notes: dict[str, None] = field(default_factory=dict[str, None])
    narrowed: dict[tuple[str, Attrs], Attrs] = field(default_factory=dict[tuple[str, Attrs], Attrs])

    def number(self, data: float | bool, dtype: str) -> int:
        """A scalar constant, as one value per content."""
        kind = TensorType(dtype, ())
        if dtype.startswith(("s", "u")) and isinf(data):
            bits, signed = int(dtype[1:]), dtype.startswith("s")
            least = -(2 ** (bits - 1)) if signed else 0
            data = 2 ** (bits - signed) - 1 if data > 0 else least
        data = (
            data if dtype == "bool" else float(data) if dtype.startswith(("f", "bf")) else int(data)
        )
        for constant in self.constants:
            if self.fresh.types[constant.value] == kind and repr(constant.data) == repr(data):
                return constant.value
        value = self.fresh.value(kind)
        self.constants.append(Constant(value, data))
        return value


class PieceScope:
    """The ops of the step, or of one region, in the order they are emitted."""

    def __init__(self, shared: Shared):
        self.shared, self.types = shared, shared.fresh.types
        self.ops: list[Op] = []
        self._waiting: dict[int, list[_Waiting]] = {}  # by number of pieces
        self._due: dict[int, tuple[int, int]] = {}  # waiting value -> number of pieces, its piece
        self._known: dict[tuple[int, int], Stack] = {}  # (whole value, dim) -> its pieces
        self._whole: dict[Stack, int] = {}
        self._writer: dict[int, Op] = {}

    # ------------------------------------------------------------ emitting

    def emit(self, op: Op) -> None:
        """Append an op, after whatever it waits for."""
        for value in op.inputs:
            if value in self._due:
                self.flush(self._due[value][0])
        self.ops.append(op)
        self._writer.update(dict.fromkeys(op.outputs, op))

    def make(
        self, kind: str, inputs: Sequence[int], result: TensorType, where: str, **attrs: Attr
    ) -> int:
        """Emit one op of ours; returns its result."""
        value = self.shared.fresh.value(result)
        self.emit(Op(kind, tuple(inputs), (value,), tuple(sorted(attrs.items())), where=where))
        return value

    def spread(
        self, kind: str, attrs: Attrs, operands: Sequence[int | Sequence[int]],
        results: Sequence[Sequence[int]], where: str,
    ) -> None:  # fmt: skip
        """Let one op per piece wait. An operand is one value for all pieces, or one per piece."""
        count = len(results[0])
        columns = [(v,) * count if isinstance(v, int) else v for v in operands]
        for given, column in zip(operands, columns, strict=True):
            for k, value in enumerate(column):
                due = self._due.get(value)
                if due and (isinstance(given, int) or due[0] != count or due[1] > k):
                    self.flush(due[0])
        item = _Waiting(kind, attrs, where, tuple(columns), tuple(results))
        self._waiting.setdefault(count, []).append(item)
        self._due.update((v, (count, k)) for column in results for k, v in enumerate(column))

    def flush(self, count: int | None = None) -> None:
        """Emit what waits: the run of `count` pieces, or every run."""
        for found in list(self._waiting) if count is None else [count]:
            run = self._waiting.pop(found, [])
            for k in range(found):
                for item in run:
                    op = item.op(k)
                    self.ops.append(op)
                    for value in op.outputs:
                        self._due.pop(value, None)
                        self._writer[value] = op

    def like(self, kind: TensorType, count: int) -> tuple[int, ...]:
        return tuple(self.shared.fresh.value(kind) for _ in range(count))

    # ------------------------------------------------------------ whole and apart

    def whole(self, value: int | Stack, where: str) -> int:
        """Put a stack together: one op per piece and a join."""
        if isinstance(value, int):
            return value
        if value not in self._whole:
            kind, dim, count = self.types[value.pieces[0]], value.dim, len(value.pieces)
            row = TensorType(kind.dtype, _with(kind.shape, dim, 1))
            full = TensorType(kind.dtype, _with(kind.shape, dim, count))
            places = tuple(d for d in range(row.rank) if d != dim)
            attrs = _broadcast(row.shape, places)
            rows = self.like(row, count)
            self.spread("broadcast_in_dim", attrs, [value.pieces], [rows], where)
            made = (
                rows[0]
                if count == 1
                else self.make("concatenate", rows, full, where, dimension=dim)
            )
            self._whole[value] = made
            self._known[made, dim] = value
        return self._whole[value]

    def apart(self, value: int | Stack, dim: int, where: str) -> Stack:
        """Take a value apart along a dim."""
        if isinstance(value, Stack) and value.dim == dim:
            return value
        value = self.whole(value, where)
        if (value, dim) not in self._known:
            self._known[value, dim] = self._repeated(value, dim) or self._sliced(value, dim, where)
        return self._known[value, dim]

    def _repeated(self, value: int, dim: int) -> Stack | None:
        """The pieces of a value that was broadcast along this dim are one and the same."""
        piece, kind = self._single(value, dim), self.types[value]
        return None if piece is None else Stack(dim, (piece,) * kind.shape[dim])

    def _single(self, value: int, dim: int) -> int | None:
        """The one piece of a broadcast value, or of what elementwise ops make of such values."""
        op, kind = self._writer.get(value), self.types[value]
        piece = TensorType(kind.dtype, _without(kind.shape, dim))
        if op is None or op.kind not in {"broadcast_in_dim", *ELEMENTWISE}:
            return None
        if op.kind == "broadcast_in_dim":
            places = op.integers("broadcast_dimensions")
            if dim in places or len(op.inputs) > 1:
                return None
            moved = _broadcast(piece.shape, tuple(d - (d > dim) for d in places))
            return self.make(op.kind, op.inputs, piece, op.where, **dict(moved))
        inputs = [self._single(v, dim) if self.types[v].shape else v for v in op.inputs]
        known = tuple(v for v in inputs if v is not None)
        if len(known) < len(inputs):
            return None
        result = self.like(piece, 1)
        self.emit(Op(op.kind, known, result, op.attrs, where=op.where))
        return result[0]

    def _sliced(self, value: int, dim: int, where: str) -> Stack:
        kind = self.types[value]
        row = TensorType(kind.dtype, _with(_without(kind.shape, dim), dim, 1))
        flat = TensorType(kind.dtype, _without(kind.shape, dim))
        pieces: list[int] = []
        for k in range(kind.shape[dim]):
            start = tuple(k if d == dim else 0 for d in range(kind.rank))
            limit = tuple(k + 1 if d == dim else size for d, size in enumerate(kind.shape))
            taken = value
            if kind.shape[dim] > 1:
                taken = self.make(
                    "slice",
                    [value],
                    row,
                    where,
                    start_indices=start,
                    limit_indices=limit,
                )
            pieces.append(self.make("squeeze", [taken], flat, where, dimensions=(dim,)))
        return Stack(dim, tuple(pieces))

    # ------------------------------------------------------------ sums

    def combined(self, kind: str, pieces: Sequence[int], where: str) -> int:
        """Join partial results one after another by `add`, `max`, ...; the first meets the neutral element."""
        result = self.types[pieces[0]]
        start = self.repeated(self.shared.number(_IDENTITY[kind], result.dtype), result, where)
        sums = self.like(result, len(pieces))
        self.spread(kind, (), [(start, *sums[:-1]), pieces], [sums], where)
        return sums[-1]

    def repeated(self, scalar: int, kind: TensorType, where: str) -> int:
        return self.make(
            "broadcast_in_dim", [scalar], kind, where, **dict(_broadcast(kind.shape, ()))
        )

    def carried(self, value: int, where: str) -> int:
        """A start of a loop that is no literal: the first turn then looks like all others."""
        if any(value == c.value for c in self.shared.constants) and not self.types[value].shape:
            return self.repeated(value, self.types[value], where)
        return value


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim:])


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _broadcast(shape: tuple[int, ...], dims: tuple[int, ...]) -> Attrs:
    return (("broadcast_dimensions", dims), ("shape", shape))
