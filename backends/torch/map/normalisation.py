"""Softmax and its like; layer, group, batch and RMS norm are decomposed before (`decompose.py`)."""

from __future__ import annotations

from .builder import Builder, Value, maps


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
