"""Element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch

from ...ir.errors import LoweringError
from ...ir.graph import Op
from .dtypes import torch_dtype
from .shard import View

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs, "ceil": torch.ceil, "floor": torch.floor, "is_finite": torch.isfinite, "neg": torch.neg,
    "not": torch.bitwise_not, "square": torch.square, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "log2": torch.log2,
    "logistic": torch.sigmoid, "tanh": torch.tanh, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan,
    "asin": torch.asin, "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh,
    "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh, "atan2": torch.atan2, "erf": torch.erf,
    "erfc": torch.erfc, "erf_inv": torch.erfinv, "lgamma": torch.lgamma, "digamma": torch.digamma,
    "bessel_i0e": torch.special.i0e, "bessel_i1e": torch.special.i1e, "real": torch.real, "imag": torch.imag,
    "conj": torch.conj_physical, "complex": torch.complex, "nextafter": torch.nextafter,
    "add": torch.add, "add_any": torch.add, "sub": torch.sub, "mul": torch.mul, "rem": torch.fmod, "pow": torch.pow,
    "max": torch.maximum, "min": torch.minimum, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le,
    "gt": torch.gt, "ge": torch.ge, "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "shift_left": torch.bitwise_left_shift, "shift_right_arithmetic": torch.bitwise_right_shift,
    "clamp": lambda low, x, high: torch.minimum(torch.maximum(x, low), high),
    "one_minus_square": lambda x: 1 - x * x,
}  # fmt: skip
_IDENTITIES = ("copy", "name", "stop_gradient", "optimization_barrier")
_LEAST = -87.33  # whose exponential is a normal number, if hardly
_NOTHING = torch.exp(torch.tensor(_LEAST)).item()
# (exponent bits, mantissa bits) of the types that a value may be rounded to
_PRECISIONS = {(8, 7): torch.bfloat16, (5, 10): torch.float16, (8, 23): torch.float32}


def _function(name: str) -> Callable[[Op, View], Run]:
    function = _FUNCTIONS[name]
    return lambda op, view: lambda operands: [function(*operands)]


def _divide(op: Op, view: View) -> Run:
    """Of whole numbers, rounded towards zero."""
    mode = None if view.dtypes[0].is_floating_point or view.dtypes[0].is_complex else "trunc"
    return lambda operands: [torch.div(*operands, rounding_mode=mode)]


def _sign(op: Op, view: View) -> Run:
    """NaN stays."""
    return lambda operands: [
        torch.where(operands[0] != operands[0], operands[0], operands[0].sign())
    ]


def _cube_root(op: Op, view: View) -> Run:
    return lambda operands: [operands[0].sign() * operands[0].abs().pow(1 / 3)]


def _exp(op: Op, view: View) -> Run:
    """In f32 on CPUs with 0 for what is below normal numbers, as XLA has it. MKL takes 5 ns for each element that ends
    there, 16 ns where it is subnormal, and 1 ns for others, of which masks and losses have few (torch 2.13, EPYC)."""
    if view.dtypes[0] != torch.float32:
        return lambda operands: [torch.exp(operands[0])]

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        if operands[0].device.type != "cpu":
            return [torch.exp(operands[0])]
        return [torch.threshold_(operands[0].clamp(min=_LEAST).exp_(), _NOTHING, 0.0)]

    return run


def _integer_power(op: Op, view: View) -> Run:
    power = op.integer("y")
    if power == 1:
        return list
    return lambda operands: [operands[0].pow(power)]


def _round(op: Op, view: View) -> Run:
    if op.text("rounding_method") == "to_nearest_even":
        return lambda operands: [operands[0].round()]
    away = lambda x: torch.where(x.frac().abs() == 0.5, x + x.sign() / 2, x.round())  # noqa: E731
    return lambda operands: [away(operands[0])]


def _shift_right_logical(op: Op, view: View) -> Run:
    bits = torch.iinfo(view.dtypes[0]).bits

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        x, by = operands
        kept = torch.bitwise_left_shift(torch.full_like(x, -2), (bits - 1 - by).clamp(min=0))
        return [torch.where(by == 0, x, (x >> by) & ~kept)]

    return run


def _convert(op: Op, view: View) -> Run:
    dtype = torch_dtype(op.text("new_dtype"))
    return lambda operands: [operands[0].to(dtype)]


def _reduce_precision(op: Op, view: View) -> Run:
    bits = op.integer("exponent_bits"), op.integer("mantissa_bits")
    if bits not in _PRECISIONS:
        raise LoweringError(
            f"torch has no type of {bits[0]} exponent and {bits[1]} mantissa bits to round to.",
            where=op.where or None,
            fix="round to bf16 or f16, or run the step with --backend xla",
        )
    dtype = _PRECISIONS[bits]
    return lambda operands: [operands[0].to(dtype).to(operands[0].dtype)]


def _bitcast(op: Op, view: View) -> Run:
    dtype, shape = view.dtypes[0], view.shape()

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        found = operands[0].contiguous().view(dtype)
        return [found.reshape(shape)]

    return run


def _select(op: Op, view: View) -> Run:
    """Case `which` of several."""

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        which, *cases = operands
        if which.dtype == torch.bool:
            return [torch.where(which, cases[-1], cases[0])]
        pairs = enumerate(cases[1:], 1)
        return [
            reduce(
                lambda found, case: torch.where(which == case[0], case[1], found), pairs, cases[0]
            )
        ]

    return run


def _identity(op: Op, view: View) -> Run:
    return list


def _log_sum_exp(op: Op, view: View) -> Run:
    """The logarithm of a row's sum of powers, and what was taken off the exponents before."""

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        total, *shift = operands
        return [sum(shift, total.log().float())]

    return run


ELEMENTWISE: dict[str, Callable[[Op, View], Run]] = {
    **{name: _function(name) for name in _FUNCTIONS},
    **dict.fromkeys(_IDENTITIES, _identity),
    "div": _divide, "exp": _exp, "sign": _sign, "cbrt": _cube_root, "integer_pow": _integer_power, "round": _round,
    "shift_right_logical": _shift_right_logical, "convert_element_type": _convert,
    "reduce_precision": _reduce_precision, "bitcast_convert_type": _bitcast, "select_n": _select,
    "log_sum_exp": _log_sum_exp,
}  # fmt: skip
