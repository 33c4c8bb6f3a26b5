"""Integers and truth values that count: element [i, j] is start + steps[0] · i + steps[1] · j.

    iota [16] + 3                      Counted(3, (1,))
    iota [16] < 0                      Counted(0, (0,)): false everywhere, as no element is below 0

Models make positions and masks of these, by ways as long as `cumsum(position[1:] - position[:-1] != 1)`. What counts is
known as such through them, so that a graph has a number or an iota in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....ir.graph import TensorType

_BITS = {"bool": 1, "s8": 7, "u8": 8, "s16": 15, "s32": 31, "s64": 63}


@dataclass(frozen=True, slots=True)
class Counted:
    """Elements of an array by their place. The step along a dim of size 1 is 0."""

    start: int
    steps: tuple[int, ...]

    @property
    def moving(self) -> tuple[int, ...]:
        """The dims along which elements differ."""
        return tuple(d for d, step in enumerate(self.steps) if step)

    def range(self, shape: Sequence[int]) -> tuple[int, int]:
        """The smallest and the largest element."""
        ends = [step * (n - 1) for step, n in zip(self.steps, shape, strict=True)]
        return self.start + sum(min(e, 0) for e in ends), self.start + sum(max(e, 0) for e in ends)


Operands = Sequence[tuple[Counted | None, TensorType]]
Attrs = Mapping[str, Any]


def followed(kind: str, attrs: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    """What the result of an op counts, if that is known of its operands."""
    if kind not in _RULES or made.dtype not in _BITS or made.size == 0:
        return None
    found = _RULES[kind](attrs, operands, made)
    if found is None:
        return None
    steps = zip(found.steps, made.shape, strict=True)
    found = Counted(found.start, tuple(step if n > 1 else 0 for step, n in steps))
    low, high = found.range(made.shape)
    return found if -(1 << _BITS[made.dtype]) <= low and high < 1 << _BITS[made.dtype] else None


def _wide(operands: Operands, made: TensorType) -> list[Counted | None]:
    """Operands of an elementwise op; dims of size 1 and numbers are repeated."""
    rank = made.rank
    return [
        Counted(one.start, one.steps or (0,) * rank) if one is not None else None
        for one, _ in operands
    ]


# ---------------------------------------------------------------- element by element


def _add(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    one, other = _wide(operands, made)
    return _sum(one, other, 1)


def _sub(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    one, other = _wide(operands, made)
    return _sum(one, other, -1)


def _sum(one: Counted | None, other: Counted | None, sign: int) -> Counted | None:
    if one is None or other is None:
        return None
    steps = tuple(a + sign * b for a, b in zip(one.steps, other.steps, strict=True))
    return Counted(one.start + sign * other.start, steps)


def _mul(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    one, other = _wide(operands, made)
    if one is None or other is None or (one.moving and other.moving):
        return None
    number, counted = (one, other) if not one.moving else (other, one)
    return Counted(
        number.start * counted.start, tuple(number.start * step for step in counted.steps)
    )


def _compared(decide: Callable[[int, int], bool | None]) -> Any:
    """By the range of the difference."""

    def rule(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
        one, other = _wide(operands, made)
        off = _sum(one, other, -1)
        said = None if off is None else decide(*off.range(made.shape))
        return None if said is None else Counted(int(said), (0,) * made.rank)

    return rule


def _equal(low: int, high: int) -> bool | None:
    if low == high == 0:
        return True
    return False if low > 0 or high < 0 else None


def _below(low: int, high: int) -> bool | None:
    if high < 0:
        return True
    return False if low >= 0 else None


def _not(said: bool | None) -> bool | None:
    return None if said is None else not said


def _logical(settles: int) -> Any:
    """`and`, `or` of truth values: one that settles it is enough."""

    def rule(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
        if made.dtype != "bool":
            return None
        known = [one.start for one in _wide(operands, made) if one is not None and not one.moving]
        if settles not in known and len(known) < len(operands):
            return None
        return Counted(settles if settles in known else 1 - settles, (0,) * made.rank)

    return rule


def _negated(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    one = operands[0][0]
    if one is None or made.dtype != "bool" or one.moving:
        return None
    return Counted(1 - one.start, one.steps)


def _select(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    which, *cases = _wide(operands, made)
    return None if which is None or which.moving else cases[which.start]


def _convert(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    one, source = operands[0]
    if one is None or source.dtype not in _BITS:
        return None
    if made.dtype == "bool":
        return Counted(int(one.start != 0), one.steps) if not one.moving else None
    return one


# ---------------------------------------------------------------- moved


def _iota(attrs: Attrs, _: Operands, made: TensorType) -> Counted:
    return Counted(0, tuple(int(d == attrs["dimension"]) for d in range(made.rank)))


def _broadcast(attrs: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    one = operands[0][0]
    if one is None:
        return None
    held = dict(zip(attrs["broadcast_dimensions"], one.steps, strict=True))
    return Counted(one.start, tuple(held.get(d, 0) for d in range(made.rank)))


def _transpose(attrs: Attrs, operands: Operands, _: TensorType) -> Counted | None:
    one = operands[0][0]
    return one and Counted(one.start, tuple(one.steps[d] for d in attrs["permutation"]))


def _squeeze(attrs: Attrs, operands: Operands, _: TensorType) -> Counted | None:
    one, gone = operands[0][0], attrs["dimensions"]
    return one and Counted(one.start, tuple(s for d, s in enumerate(one.steps) if d not in gone))


def _reshape(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    """Of what is the same everywhere, or with dims of size 1 put in or taken out."""
    one, source = operands[0]
    if one is None or not one.moving:
        return one and Counted(one.start, (0,) * made.rank)
    if [n for n in source.shape if n > 1] != [n for n in made.shape if n > 1]:
        return None
    steps = iter([step for step, n in zip(one.steps, source.shape, strict=True) if n > 1])
    return Counted(one.start, tuple(next(steps) if n > 1 else 0 for n in made.shape))


def _slice(attrs: Attrs, operands: Operands, _: TensorType) -> Counted | None:
    one = operands[0][0]
    if one is None:
        return None
    firsts, strides = attrs["start_indices"], attrs.get("strides", (1,) * len(one.steps))
    return Counted(
        one.start + sum(step * first for step, first in zip(one.steps, firsts, strict=True)),
        tuple(step * stride for step, stride in zip(one.steps, strides, strict=True)),
    )


def _concatenate(attrs: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    """Where each piece goes on as the one before."""
    dim, known = attrs["dimension"], [one for one, _ in operands]
    if any(one is None for one in known):
        return None
    pieces = [one for one in known if one is not None]
    sizes = [kind.shape[dim] for _, kind in operands]
    steps = [one.steps[dim] for one, n in zip(pieces, sizes, strict=True) if n > 1]
    step = steps[0] if steps else pieces[1].start - pieces[0].start
    wanted = Counted(
        pieces[0].start, tuple(step if d == dim else s for d, s in enumerate(pieces[0].steps))
    )
    at = 0
    for piece, n in zip(pieces, sizes, strict=True):
        here = tuple(s if d != dim or n > 1 else 0 for d, s in enumerate(wanted.steps))
        if piece != Counted(wanted.start + step * at, here):
            return None
        at += n
    return wanted


# ---------------------------------------------------------------- many into one


def _cumsum(attrs: Attrs, operands: Operands, _: TensorType) -> Counted | None:
    """Of what is the same everywhere."""
    one = operands[0][0]
    if one is None or one.moving:
        return None
    dim, back = attrs["axis"], attrs["reverse"]
    steps = tuple(one.start if d == dim else 0 for d in range(len(one.steps)))
    return None if back else Counted(one.start, steps)


def _same(_: Attrs, operands: Operands, made: TensorType) -> Counted | None:
    """The largest, the smallest and the like of what is the same everywhere."""
    one = operands[0][0]
    return None if one is None or one.moving else Counted(one.start, (0,) * made.rank)


_RULES: dict[str, Callable[[Attrs, Operands, TensorType], Counted | None]] = {
    "add": _add, "sub": _sub, "mul": _mul,
    "eq": _compared(_equal), "ne": _compared(lambda low, high: _not(_equal(low, high))),
    "lt": _compared(_below), "ge": _compared(lambda low, high: _not(_below(low, high))),
    "gt": _compared(lambda low, high: _below(-high, -low)),
    "le": _compared(lambda low, high: _not(_below(-high, -low))),
    "and": _logical(0), "or": _logical(1), "not": _negated, "select_n": _select, "convert_element_type": _convert,
    "iota": _iota, "broadcast_in_dim": _broadcast, "transpose": _transpose, "squeeze": _squeeze, "reshape": _reshape,
    "slice": _slice, "concatenate": _concatenate, "cumsum": _cumsum,
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_and", "reduce_or"), _same),
}  # fmt: skip
