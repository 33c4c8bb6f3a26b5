"""Softmax and its like, group norm; layer, batch and RMS norm are decomposed before (`decompose.py`)."""

from __future__ import annotations

from .builder import Builder, Value, maps
from .reductions import var_mean


@maps("_softmax.default")
def softmax(b: Builder, x: Value, dim: int, half_to_float: bool) -> Value:
    """Computed in f32 where the elements have fewer bits, as torch does."""
    wide = b.convert(x, _wide(x.dtype))
    weights = b.elementwise("exp", _below_maximum(b, wide, dim))
    found = b.elementwise("div", weights, b.reduce("reduce_sum", weights, [dim], keep=True))
    return b.convert(found, b.made.dtype)


@maps("_log_softmax.default")
def log_softmax(b: Builder, x: Value, dim: int, half_to_float: bool) -> Value:
    shifted = _below_maximum(b, b.convert(x, _wide(x.dtype)), dim)
    total = b.reduce("reduce_sum", b.elementwise("exp", shifted), [dim], keep=True)
    return b.convert(b.elementwise("sub", shifted, b.elementwise("log", total)), b.made.dtype)


def _below_maximum(b: Builder, x: Value, dim: int) -> Value:
    return b.elementwise("sub", x, b.reduce("reduce_max", x, [dim], keep=True))


def _wide(dtype: str) -> str:
    return "f32" if dtype in ("bf16", "f16") else dtype


@maps("native_group_norm.default")
def group_norm(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, many: int, channels: int, size: int, groups: int,
    eps: float,
) -> tuple[Value, Value, Value]:  # fmt: skip
    """Images [n, channels, ...] by group: normalised, their means, and what their deviations are divided by."""
    wide = b.convert(b.reshape(x, (many, groups, channels // groups * size)), _wide(x.dtype))
    variance, mean = var_mean(b, wide, 2, correction=0, keepdim=True)
    scale = b.elementwise("rsqrt", b.elementwise("add", variance, eps))
    found = b.reshape(b.elementwise("mul", b.elementwise("sub", wide, mean), scale), x.shape)
    for kind, given in (("mul", weight), ("add", bias)):
        if given is not None:
            spread = b.broadcast(given, (1, channels, *(1,) * (len(x.shape) - 2)), (1,))
            found = b.elementwise(kind, found, spread)
    kinds = b.results()
    return (
        b.convert(found, x.dtype), b.convert(b.squeeze(mean, [2]), kinds[1].dtype),
        b.convert(b.squeeze(scale, [2]), kinds[2].dtype),
    )  # fmt: skip
