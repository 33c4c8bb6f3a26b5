"""Element by element: arithmetic, comparisons, choices, conversions.

Operands are brought to the type that torch computes in: that of the result, or what operands promote to where
the result is a truth value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dtypes import dtype_name, torch_dtype
from .builder import Builder, Operand, Value, maps


def promoted(one: Operand, other: Operand) -> str:
    """The type that torch compares in: numbers of Python give way to tensors, those of rank 0 to others."""
    operands: list[Any] = [
        torch.empty((1,) * len(o.shape), dtype=torch_dtype(o.dtype)) if isinstance(o, Value) else o
        for o in (one, other)
    ]
    return dtype_name(torch.result_type(*operands))


# ---------------------------------------------------------------- of one operand

_UNARY = {
    "abs": "abs", "acos": "acos", "asin": "asin", "atan": "atan", "ceil": "ceil", "cos": "cos", "cosh": "cosh",
    "digamma": "digamma", "erf": "erf", "erfc": "erfc", "exp": "exp", "exp2": "exp2", "expm1": "expm1",
    "floor": "floor", "lgamma": "lgamma",
    "log": "log", "log1p": "log1p", "log2": "log2", "neg": "neg", "rsqrt": "rsqrt", "sigmoid": "logistic",
    "sign": "sign", "sin": "sin", "sinh": "sinh", "sqrt": "sqrt", "tan": "tan", "tanh": "tanh",
}  # fmt: skip


def _unary(kind: str) -> Callable[..., Value]:
    def mapped(b: Builder, x: Value) -> Value:
        return b.elementwise(kind, x, dtype=b.made.dtype)

    return mapped


for _name, _kind in _UNARY.items():
    maps(f"{_name}.default")(_unary(_kind))


@maps("round.default")
def round_(b: Builder, x: Value) -> Value:
    return b.op("round", [x], x.type, rounding_method="to_nearest_even")


@maps("reciprocal.default")
def reciprocal(b: Builder, x: Value) -> Value:
    return b.elementwise("div", 1.0, x, dtype=b.made.dtype)


@maps("relu.default")
def relu(b: Builder, x: Value) -> Value:
    return b.elementwise("max", x, 0)


@maps("trunc.default")
def trunc(b: Builder, x: Value) -> Value:
    return b.elementwise(
        "mul", b.elementwise("sign", x), b.elementwise("floor", b.elementwise("abs", x))
    )


@maps("isnan.default")
def isnan(b: Builder, x: Value) -> Value:
    return b.elementwise("ne", x, x, made="bool")


@maps("isinf.default")
def isinf(b: Builder, x: Value) -> Value:
    return b.elementwise("eq", b.elementwise("abs", x), float("inf"), made="bool")


@maps("logical_not.default", "bitwise_not.default")
def not_(b: Builder, x: Value) -> Value:
    if x.dtype == "bool" or b.made.dtype != "bool":
        return b.elementwise("not", x)
    return b.elementwise("eq", x, 0, made="bool")


@maps(
    "_to_copy.default", "clone.default", "alias.default", "detach.default", "lift_fresh_copy.default",
    "_conj.default", "contiguous.default", "positive.default",
)  # fmt: skip
def convert(b: Builder, x: Value, **_: Any) -> Value:
    return b.convert(x, b.made.dtype)


@maps("to.dtype")
def to_dtype(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    return b.convert(x, b.made.dtype)


@maps("copy.default")
def copy(b: Builder, target: Value, source: Value, non_blocking: bool = False) -> Value:
    return b.expand(b.convert(source, target.dtype), target.shape)


# ---------------------------------------------------------------- of two

_BINARY = {"mul": "mul", "atan2": "atan2", "maximum": "max", "minimum": "min"}
_COMPARED = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
_BITWISE = {"bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor"}
_SHIFTS = {"left": "shift_left", "right": "shift_right_arithmetic"}
_LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}


def _binary(kind: str) -> Callable[..., Value]:
    def mapped(b: Builder, x: Operand, y: Operand) -> Value:
        made = "and" if kind == "mul" and b.made.dtype == "bool" else kind
        return b.elementwise(made, x, y, dtype=b.made.dtype)

    return mapped


def _compared(kind: str) -> Callable[..., Value]:
    def mapped(b: Builder, x: Operand, y: Operand) -> Value:
        return b.elementwise(kind, x, y, dtype=promoted(x, y), made="bool")

    return mapped


def _logical(kind: str) -> Callable[..., Value]:
    def mapped(b: Builder, x: Value, y: Value) -> Value:
        return b.elementwise(kind, truth(b, x), truth(b, y))

    return mapped


def truth(b: Builder, x: Value) -> Value:
    """Whether an element is not 0."""
    return x if x.dtype == "bool" else b.elementwise("ne", x, 0, made="bool")


for _name, _kind in _BINARY.items():
    maps(f"{_name}.{'default' if _name != 'mul' else 'Tensor'}")(_binary(_kind))
maps("mul.Scalar")(_binary("mul"))
for _name, _kind in _COMPARED.items():
    maps(f"{_name}.Tensor", f"{_name}.Scalar")(_compared(_kind))
for _name, _kind in _BITWISE.items():
    maps(f"{_name}.Tensor", f"{_name}.Scalar")(_binary(_kind))
for _name, _kind in _SHIFTS.items():
    maps(f"__{_name[0]}shift__.Scalar", f"__{_name[0]}shift__.Tensor")(_binary(_kind))
    maps(f"bitwise_{_name}_shift.Tensor", f"bitwise_{_name}_shift.Tensor_Scalar")(_binary(_kind))
for _name, _kind in _LOGICAL.items():
    maps(f"{_name}.default")(_logical(_kind))


@maps("add.Tensor", "add.Scalar")
def add(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> Value:
    return b.elementwise("add", x, _scaled(b, y, alpha), dtype=b.made.dtype)


@maps("sub.Tensor", "sub.Scalar")
def sub(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> Value:
    return b.elementwise("sub", x, _scaled(b, y, alpha), dtype=b.made.dtype)


@maps("rsub.Scalar", "rsub.Tensor")
def rsub(b: Builder, x: Value, y: Operand, alpha: float = 1) -> Value:
    return b.elementwise("sub", y, _scaled(b, x, alpha), dtype=b.made.dtype)


def _scaled(b: Builder, x: Operand, alpha: float) -> Operand:
    if alpha == 1:
        return x
    if not isinstance(x, Value):
        return x * alpha
    return b.elementwise("mul", x, alpha, dtype=b.made.dtype)


@maps("div.Tensor", "div.Scalar")
def div(b: Builder, x: Operand, y: Operand) -> Value:
    return b.elementwise("div", x, y, dtype=b.made.dtype)


@maps("div.Tensor_mode", "div.Scalar_mode")
def div_mode(b: Builder, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    """Integers divide towards 0; towards what is below, a negative rest takes one off."""
    dtype = b.made.dtype
    if rounding_mode is None:
        return div(b, x, y)
    if dtype[0] in "su" and dtype != "bool":
        quotient = b.elementwise("div", x, y, dtype=dtype)
        if rounding_mode == "trunc":
            return quotient
        rest = b.elementwise("rem", x, y, dtype=dtype)
        uneven = b.elementwise("ne", rest, 0, made="bool")
        low = b.elementwise(
            "ne", b.elementwise("lt", rest, 0, made="bool"),
            b.elementwise("lt", b.as_value(y, dtype), 0, made="bool"), made="bool",
        )  # fmt: skip
        one_less = b.elementwise("sub", quotient, 1)
        return b.select(b.elementwise("and", uneven, low), one_less, quotient, dtype)
    quotient = b.elementwise("div", x, y, dtype=dtype)
    return b.elementwise("floor", quotient) if rounding_mode == "floor" else trunc(b, quotient)


@maps("fmod.Tensor", "fmod.Scalar")
def fmod(b: Builder, x: Operand, y: Operand) -> Value:
    return b.elementwise("rem", x, y, dtype=b.made.dtype)


@maps("remainder.Tensor", "remainder.Scalar")
def remainder(b: Builder, x: Operand, y: Operand) -> Value:
    """Has the sign of the divisor, where `rem` has that of the dividend."""
    dtype = b.made.dtype
    rest = b.elementwise("rem", x, y, dtype=dtype)
    uneven = b.elementwise("ne", rest, 0, made="bool")
    divisor = b.as_value(y, dtype)
    differ = b.elementwise(
        "ne",
        b.elementwise("lt", rest, 0, made="bool"),
        b.elementwise("lt", divisor, 0, made="bool"),
    )
    moved = b.elementwise("add", rest, divisor)
    return b.select(b.elementwise("and", uneven, differ), moved, rest, dtype)


@maps("pow.Tensor_Scalar")
def power(b: Builder, x: Value, exponent: float) -> Value:
    dtype = b.made.dtype
    x = b.convert(x, dtype)
    if exponent == 2:
        return b.elementwise("square", x)
    if exponent == 0.5:
        return b.elementwise("sqrt", x)
    if exponent == -0.5:
        return b.elementwise("rsqrt", x)
    if exponent == int(exponent) and abs(exponent) < 128:
        return b.op("integer_pow", [x], x.type, y=int(exponent))
    return b.elementwise("pow", x, exponent)


@maps("pow.Scalar", "pow.Tensor_Tensor")
def power_of(b: Builder, base: Operand, exponent: Value) -> Value:
    return b.elementwise("pow", base, exponent, dtype=b.made.dtype)


# ---------------------------------------------------------------- of three


@maps("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(b: Builder, which: Value, yes: Operand, no: Operand) -> Value:
    return b.select(which, yes, no, b.made.dtype)


@maps("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(b: Builder, x: Value, mask: Value, fill: Operand) -> Value:
    return b.select(mask, fill, x, x.dtype)


@maps("clamp.default", "clamp.Tensor")
def clamp(b: Builder, x: Value, low: Operand | None = None, high: Operand | None = None) -> Value:
    found = b.convert(x, b.made.dtype)
    found = found if low is None else b.elementwise("max", found, low)
    return found if high is None else b.elementwise("min", found, high)


@maps("clamp_min.default", "clamp_min.Tensor")
def clamp_min(b: Builder, x: Value, low: Operand) -> Value:
    return clamp(b, x, low)


@maps("clamp_max.default", "clamp_max.Tensor")
def clamp_max(b: Builder, x: Value, high: Operand) -> Value:
    return clamp(b, x, None, high)


@maps("lerp.Scalar", "lerp.Tensor")
def lerp(b: Builder, start: Value, end: Value, weight: Operand) -> Value:
    """start + weight (end - start); from the other end for a weight of a half or more, as torch rounds it."""
    way = b.elementwise("sub", end, start)
    if isinstance(weight, Value) or weight < 0.5:
        return b.elementwise("add", start, b.elementwise("mul", way, weight))
    return b.elementwise("sub", end, b.elementwise("mul", way, 1 - weight))


@maps("addcmul.default")
def addcmul(b: Builder, x: Value, one: Value, other: Value, value: float = 1) -> Value:
    return b.elementwise("add", x, _scaled(b, _product(b, one, other), value))


@maps("addcdiv.default")
def addcdiv(b: Builder, x: Value, one: Value, other: Value, value: float = 1) -> Value:
    return b.elementwise("add", x, _scaled(b, b.elementwise("div", one, other), value))


def _product(b: Builder, one: Value, other: Value) -> Value:
    if one == other:
        return b.elementwise("square", one)
    return b.elementwise("mul", one, other)


# ---------------------------------------------------------------- activations


@maps("leaky_relu.default")
def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    return b.select(
        b.elementwise("gt", x, 0, made="bool"), x, b.elementwise("mul", x, slope), x.dtype
    )


@maps("hardtanh.default")
def hardtanh(b: Builder, x: Value, low: float = -1, high: float = 1) -> Value:
    return clamp(b, x, low, high)
