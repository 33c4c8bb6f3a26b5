"""Ops that work element by element, with scalar and size-1 operands broadcast."""

from __future__ import annotations

from collections.abc import Sequence

from ..rule import Rule
from .factors import Call, Dims, Factors, require, rule_for

_UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e",
    "cbrt", "ceil", "clz", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "integer_pow", "is_finite", "lgamma", "log", "log1p", "log2",
    "logistic", "not", "one_minus_square", "population_count", "round", "rsqrt", "sign",
    "sin", "sinh", "sqrt", "square", "tan", "tanh",
)  # fmt: skip
_LINEAR_UNARY = (
    "averaged", "conj", "convert_element_type", "copy", "estimated", "imag", "name", "neg", "real", "reduce_precision",
    "scaled", "stop_gradient",
)  # fmt: skip
_BINARY = (
    "and", "atan2", "eq", "eq_to", "ge", "gt", "le", "le_to", "lt", "lt_to", "max", "min",
    "log_sum_exp", "mulhi", "ne", "nextafter", "or", "pow", "rem", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "xor",
)  # fmt: skip
_LINEAR_BINARY = ("add", "add_any", "sub", "complex")
# Kinds whose parameters know nothing of shapes: the same op does for any part of its operands.
KINDS = frozenset(
    (*_UNARY, *_LINEAR_UNARY, *_BINARY, *_LINEAR_BINARY, "clamp", "mul", "div", "select_n")
)


@rule_for(*_UNARY, *_BINARY, "clamp")
def nonlinear(call: Call) -> Rule:
    return elementwise(call)


@rule_for(*_LINEAR_UNARY)
def linear_unary(call: Call) -> Rule:
    return elementwise(call, [(0,)])


@rule_for(*_LINEAR_BINARY)
def additive(call: Call) -> Rule:
    return elementwise(call, [(0, 1)])


@rule_for("mul")
def mul(call: Call) -> Rule:
    return elementwise(call, [(0,), (1,)])


@rule_for("div")
def div(call: Call) -> Rule:
    return elementwise(call, [(0,)])


@rule_for("select_n")
def select_n(call: Call) -> Rule:
    """`select_n(which, *cases)`: linear in all cases together."""
    return elementwise(call, [tuple(range(1, len(call.operands)))])


@rule_for("bitcast_convert_type")
def bitcast(call: Call) -> Rule:
    """Between types of equal width; otherwise a trailing dim comes or goes."""
    operand, result = call.operands[0].shape, call.results[0].shape
    common = min(len(operand), len(result))
    require(operand[:common] == result[:common])
    factors = Factors()
    shared = factors.like(operand[:common])
    tails = [factors.wholes(shape[common:]) for shape in (operand, result)]
    return factors.rule([shared + tails[0]], [shared + tails[1]])


def elementwise(call: Call, linear: Sequence[tuple[int, ...]] = ()) -> Rule:
    factors = Factors()
    shape = call.results[0].shape
    dims = factors.like(shape)
    operands = [broadcast_dims(dims, kind.shape, shape) for kind in call.operands]
    require(all(result.shape == shape for result in call.results))
    return factors.rule(operands, [dims] * len(call.results), linear)


def broadcast_dims(dims: Dims, shape: tuple[int, ...], to: tuple[int, ...]) -> Dims:
    """Dims of an operand that is a scalar or has size 1 where it is repeated."""
    if not shape:
        return ()
    require(len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True)))
    return tuple(
        dim if size == full else () for dim, size, full in zip(dims, shape, to, strict=True)
    )
