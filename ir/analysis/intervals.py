"""Arrays of intervals: what is known of numbers of which only the least and the largest are.

    rows in [0, 15]  columns in [16, 31]      rows >= columns: surely not      rows - columns in [-31, -1]

They take the arithmetic of numpy's arrays, so that what is written for numbers works on them. A truth is an
interval from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Unknown(Exception):
    """Nothing can be said."""


@dataclass(frozen=True, eq=False)
class Interval(NDArrayOperatorsMixin):
    """From `low` to `high`, both included; arrays of one shape, or numbers."""

    low: Any
    high: Any

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Interval:
        """Raises Unknown where nothing is written for an operation."""
        if method != "__call__" or ufunc not in _RULES:
            raise Unknown
        return _RULES[ufunc](*map(interval, inputs))

    def __array_function__(self, *_: Any) -> Any:
        raise Unknown


def interval(value: Any) -> Interval:
    """The value, as the interval that it alone is in."""
    return value if isinstance(value, Interval) else Interval(np.asarray(value), np.asarray(value))


def hull(*each: Interval) -> Interval:
    """The smallest interval that holds all of them, place by place."""
    low, high = each[0].low, each[0].high
    for one in each[1:]:
        low, high = np.minimum(low, one.low), np.maximum(high, one.high)
    return Interval(low, high)


def chosen(which: Interval, yes: Interval, no: Interval) -> Interval:
    """One of two, by a truth; of both where that may be either."""
    either = hull(yes, no)
    return Interval(
        _where(which.low > 0, yes.low, _where(which.high > 0, either.low, no.low)),
        _where(which.low > 0, yes.high, _where(which.high > 0, either.high, no.high)),
    )


def _where(truth: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(truth, yes, no)


def _rising(function: Callable[..., Any]) -> Callable[..., Interval]:
    """Of a function that grows with each of its operands."""
    return lambda *each: Interval(
        function(*(one.low for one in each)), function(*(one.high for one in each))
    )


def _negative(a: Interval) -> Interval:
    return Interval(-a.high, -a.low)


def _subtract(a: Interval, b: Interval) -> Interval:
    return Interval(a.low - b.high, a.high - b.low)


def _multiply(a: Interval, b: Interval) -> Interval:
    with np.errstate(invalid="ignore"):
        ends = [x * y for x, y in product((a.low, a.high), (b.low, b.high))]
    return Interval(reduce(np.minimum, ends), reduce(np.maximum, ends))


def _absolute(a: Interval) -> Interval:
    least = np.where((a.low <= 0) & (a.high >= 0), 0, np.minimum(np.abs(a.low), np.abs(a.high)))
    return Interval(least, np.maximum(np.abs(a.low), np.abs(a.high)))


def _divided(a: Interval, b: Interval) -> tuple[Any, Interval]:
    """The divisor and the quotient rounded down, of what is not negative by one known number."""
    if np.any(b.low != b.high) or np.any(b.low <= 0) or np.any(a.low < 0):
        raise Unknown
    return b.low, Interval(a.low // b.low, a.high // b.low)


def _quotient(a: Interval, b: Interval) -> Interval:
    return _divided(a, b)[1]


def _remainder(a: Interval, b: Interval) -> Interval:
    by, whole = _divided(a, b)
    same = whole.low == whole.high
    return Interval(np.where(same, a.low % by, 0), np.where(same, a.high % by, by - 1))


def _truth(surely: Any, maybe: Any) -> Interval:
    return Interval(np.asarray(surely, np.int64), np.asarray(maybe, np.int64))


def _less(a: Interval, b: Interval) -> Interval:
    return _truth(a.high < b.low, a.low < b.high)


def _at_most(a: Interval, b: Interval) -> Interval:
    return _truth(a.high <= b.low, a.low <= b.high)


def _greater(a: Interval, b: Interval) -> Interval:
    return _less(b, a)


def _at_least(a: Interval, b: Interval) -> Interval:
    return _at_most(b, a)


def _equal(a: Interval, b: Interval) -> Interval:
    alone = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return _truth(alone, (a.low <= b.high) & (b.low <= a.high))


def _unequal(a: Interval, b: Interval) -> Interval:
    return _not(_equal(a, b))


def _not(a: Interval) -> Interval:
    _of_truths(a)
    return Interval(1 - a.high, 1 - a.low)


def _of_truths(*each: Interval) -> None:
    if any(np.any(one.low < 0) or np.any(one.high > 1) for one in each):
        raise Unknown


def _and(a: Interval, b: Interval) -> Interval:
    _of_truths(a, b)
    return Interval(np.minimum(a.low, b.low), np.minimum(a.high, b.high))


def _or(a: Interval, b: Interval) -> Interval:
    return _not(_and(_not(a), _not(b)))


_RULES: dict[Any, Callable[..., Interval]] = {
    np.add: _rising(np.add), np.subtract: _subtract, np.multiply: _multiply, np.absolute: _absolute,
    np.negative: _negative, np.sign: _rising(np.sign), np.trunc: _rising(np.trunc),
    np.maximum: _rising(np.maximum), np.minimum: _rising(np.minimum),
    np.fmod: _remainder, np.remainder: _remainder, np.floor_divide: _quotient,
    np.less: _less, np.less_equal: _at_most, np.greater: _greater,
    np.greater_equal: _at_least, np.equal: _equal, np.not_equal: _unequal,
    np.invert: _not, np.logical_not: _not, np.bitwise_and: _and, np.bitwise_or: _or,
    np.bitwise_xor: _unequal,
}  # fmt: skip
