"""Many elements into one, running sums, orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from ....ir.graph import TensorType
from .builder import Builder, Value, maps
from .elementwise import truth

Dims = int | Sequence[int] | None


def axes_of(x: Value, dims: Dims) -> tuple[int, ...]:
    """Dims as numbers from 0; none given are all."""
    if not x.shape:
        return ()
    given = [dims] if isinstance(dims, int) else list(dims or range(len(x.shape)))
    return tuple(d % len(x.shape) for d in given)


@maps("sum.dim_IntList", "sum.default")
def sum_(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> Value:
    return b.reduce("reduce_sum", b.convert(x, b.made.dtype), axes_of(x, dims), keepdim)


@maps("mean.dim", "mean.default")
def mean(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> Value:
    return averaged(b, b.convert(x, b.made.dtype), axes_of(x, dims), keepdim)


def averaged(b: Builder, x: Value, axes: Sequence[int], keep: bool) -> Value:
    many = prod(x.shape[d] for d in axes)
    return b.elementwise("div", b.reduce("reduce_sum", x, axes, keep), float(many))


@maps("var_mean.correction")
def var_mean(
    b: Builder,
    x: Value,
    dims: Dims = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Value, Value]:
    axes = axes_of(x, dims)
    average = averaged(b, x, axes, keep=True)
    off = b.elementwise("square", b.elementwise("sub", x, average))
    free = prod(x.shape[d] for d in axes) - (1 if correction is None else correction)
    variance = b.elementwise("div", b.reduce("reduce_sum", off, axes, keepdim), float(max(free, 0)))
    return variance, average if keepdim else b.squeeze(average, axes)


@maps("var.correction")
def var(
    b: Builder,
    x: Value,
    dims: Dims = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Value:
    return var_mean(b, x, dims, correction=correction, keepdim=keepdim)[0]


@maps("amax.default")
def amax(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False) -> Value:
    return b.reduce("reduce_max", x, axes_of(x, dims), keepdim)


@maps("amin.default")
def amin(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False) -> Value:
    return b.reduce("reduce_min", x, axes_of(x, dims), keepdim)


@maps("max.default")
def max_(b: Builder, x: Value) -> Value:
    return amax(b, x)


@maps("min.default")
def min_(b: Builder, x: Value) -> Value:
    return amin(b, x)


@maps("max.dim")
def max_dim(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return amax(b, x, dim, keepdim), argmax(b, x, dim, keepdim)


@maps("min.dim")
def min_dim(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return amin(b, x, dim, keepdim), argmin(b, x, dim, keepdim)


@maps("argmax.default")
def argmax(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _arg(b, "argmax", x, dim, keepdim)


@maps("argmin.default")
def argmin(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _arg(b, "argmin", x, dim, keepdim)


def _arg(b: Builder, kind: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    if dim is None:
        x, dim = b.reshape(x, (prod(x.shape),)), 0
    dim %= len(x.shape)
    rest = [d for d in range(len(x.shape)) if d != dim]
    made = TensorType("s64", tuple(x.shape[d] for d in rest))
    found: Value = b.op(kind, [x], made, axes=(dim,), index_dtype="s64")
    if not keepdim:
        return found
    return b.broadcast(found, [1 if d == dim else n for d, n in enumerate(x.shape)], rest)


@maps("any.default", "any.dim", "any.dims")
def any_(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False) -> Value:
    return b.reduce("reduce_or", truth(b, x), axes_of(x, dims), keepdim)


@maps("all.default", "all.dim", "all.dims")
def all_(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False) -> Value:
    return b.reduce("reduce_and", truth(b, x), axes_of(x, dims), keepdim)


@maps("prod.default", "prod.dim_int")
def prod_(b: Builder, x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> Value:
    return b.reduce("reduce_prod", b.convert(x, b.made.dtype), axes_of(x, dims), keepdim)


@maps("histc.default")
def histc(b: Builder, x: Value, bins: int = 100, min: float = 0, max: float = 0) -> Value:
    """How many elements are in each of `bins` spans of one length; the last one has its end, none what is outside."""
    if min == max:
        raise b.refuse("`histc` takes its range from the values.", "histc(x, bins, min, max)")
    flat = b.convert(
        b.reshape(x, (prod(x.shape),)), "f32" if x.dtype in ("bf16", "f16") else x.dtype
    )
    part = b.elementwise("div", b.elementwise("sub", flat, min), float(max - min))
    place = b.convert(b.elementwise("floor", b.elementwise("mul", part, float(bins))), "s64")
    place = b.elementwise("min", place, bins - 1)
    within = [
        b.elementwise(kind, flat, end, made="bool") for kind, end in (("ge", min), ("le", max))
    ]
    place = b.select(b.elementwise("and", *within), place, -1, "s64")
    shape = (flat.shape[0], bins)
    there = b.elementwise(
        "eq", b.broadcast(place, shape, (0,)), b.iota((bins,), 0, "s64"), made="bool"
    )
    return b.reduce("reduce_sum", b.convert(there, b.made.dtype), [0])


def _running(kind: str) -> Callable[..., Value]:
    def mapped(b: Builder, x: Value, dim: int, **_: Any) -> Value:
        x = b.convert(x, b.made.dtype)
        return b.op(kind, [x], x.type, axis=dim % len(x.shape)) if x.shape else x

    return mapped


maps("cumsum.default")(_running("cumsum"))
maps("cumprod.default")(_running("cumprod"))


# ---------------------------------------------------------------- orders


@maps("sort.default")
def sort(b: Builder, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, ...]:
    return sort_stable(b, x, dim=dim, descending=descending)


@maps("sort.stable")
def sort_stable(
    b: Builder, x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, ...]:
    """Keys with their places; downwards, of keys turned round."""
    dim %= len(x.shape)
    places = b.iota(x.shape, dim, "s64")
    keys = b.elementwise("neg", x) if descending else x
    kinds = (x.type, places.type)
    found: tuple[Value, ...] = b.op("sort", [keys, places], kinds, dimension=dim)
    return (b.elementwise("neg", found[0]) if descending else found[0], found[1])


@maps("topk.default")
def topk(
    b: Builder, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, ...]:
    """`top_k` counts places in 32 bits."""
    dim %= len(x.shape)
    shape = tuple(k if d == dim else n for d, n in enumerate(x.shape))
    keys = x if largest else b.elementwise("neg", x)
    kinds = (TensorType(x.dtype, shape), TensorType("s32", shape))
    values, places = b.op("top_k", [keys], kinds, axis=dim, k=k)
    return values if largest else b.elementwise("neg", values), b.convert(places, "s64")
