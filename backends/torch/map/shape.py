"""The same elements in another shape or place; arrays made of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ....ir.graph import TensorType
from .builder import Builder, Operand, Value, maps


@maps("view.default", "_unsafe_view.default", "reshape.default", "_reshape_alias.default")
def view(b: Builder, x: Value, *_: Any) -> Value:
    return b.reshape(x, b.made.shape)


@maps("unsqueeze.default")
def unsqueeze(b: Builder, x: Value, dim: int) -> Value:
    shape = b.made.shape
    dim %= len(shape)
    return b.broadcast(x, shape, [d for d in range(len(shape)) if d != dim])


@maps("squeeze.dims", "squeeze.dim")
def squeeze(b: Builder, x: Value, dims: int | Sequence[int]) -> Value:
    given = [dims] if isinstance(dims, int) else dims
    if not x.shape:
        return x
    return b.squeeze(x, [d % len(x.shape) for d in given if x.shape[d] == 1])


@maps("squeeze.default")
def squeeze_all(b: Builder, x: Value) -> Value:
    return b.squeeze(x, [d for d, size in enumerate(x.shape) if size == 1])


@maps("permute.default")
def permute(b: Builder, x: Value, order: Sequence[int]) -> Value:
    return b.transpose(x, order)


@maps("transpose.int")
def transpose(b: Builder, x: Value, one: int, other: int) -> Value:
    order = list(range(len(x.shape)))
    order[one], order[other] = order[other], order[one]
    return b.transpose(x, order)


@maps("t.default")
def t(b: Builder, x: Value) -> Value:
    return b.transpose(x, range(len(x.shape))[::-1])


@maps("expand.default")
def expand(b: Builder, x: Value, *_: Any, implicit: bool = False) -> Value:
    return b.expand(x, b.made.shape)


@maps("repeat.default")
def repeat(b: Builder, x: Value, times: Sequence[int]) -> Value:
    """Each dim as (repeats, size)."""
    new = len(times) - len(x.shape)
    sizes = (1,) * new + x.shape
    split = [n for pair in zip(times, sizes, strict=True) for n in pair]
    spread = b.broadcast(x, split, [2 * (d + new) + 1 for d in range(len(x.shape))])
    return b.reshape(spread, b.made.shape)


@maps("cat.default")
def cat(b: Builder, values: Sequence[Value], dim: int = 0) -> Value:
    """Torch lets empty vectors be joined to anything."""
    kept = [b.convert(v, b.made.dtype) for v in values if v.shape != (0,)] or list(values[:1])
    return b.concatenate(kept, dim % len(kept[0].shape))


@maps("stack.default")
def stack(b: Builder, values: Sequence[Value], dim: int = 0) -> Value:
    rank = len(values[0].shape) + 1
    rows = [b.convert(value, b.made.dtype) for value in values]
    return b.concatenate([_row(b, row, dim % rank) for row in rows], dim % rank)


def _row(b: Builder, x: Value, dim: int) -> Value:
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return b.broadcast(x, shape, [d for d in range(len(shape)) if d != dim])


@maps("slice.Tensor")
def slice_(
    b: Builder,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    dim %= len(x.shape)
    first, last = bounds(x.shape[dim], start, end)
    return b.slice(x, dim, first, last, step)


def bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    """As Python reads the bounds of a slice: negative ones from the end, clamped."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


@maps("select.int")
def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    dim, index = dim % len(x.shape), index % x.shape[dim]
    return b.squeeze(b.slice(x, dim, index, index + 1), [dim])


@maps("split_with_sizes.default")
def split_with_sizes(b: Builder, x: Value, sizes: Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    dim %= len(x.shape)
    found: tuple[Value, ...] = b.op("split", [x], b.results(), axis=dim, sizes=tuple(sizes))
    return found


@maps("split.Tensor")
def split(b: Builder, x: Value, size: int, dim: int = 0) -> tuple[Value, ...]:
    return split_with_sizes(b, x, [kind.shape[dim] for kind in b.results()], dim)


@maps("slice_backward.default")
def slice_backward(
    b: Builder, given: Value, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Value:
    dim %= len(sizes)
    first, _ = bounds(sizes[dim], start, end)
    taken = given.shape[dim]
    after = sizes[dim] - first - (taken + (taken - 1) * (step - 1) if taken else 0)
    config = [(0, 0, 0)] * len(sizes)
    config[dim] = (first, after, step - 1)
    return b.pad(given, config)


@maps("select_backward.default")
def select_backward(b: Builder, given: Value, sizes: Sequence[int], dim: int, index: int) -> Value:
    dim, index = dim % len(sizes), index % sizes[dim]
    config = [(0, 0, 0)] * len(sizes)
    config[dim] = (index, sizes[dim] - index - 1, 0)
    return b.pad(_row(b, given, dim), config)


@maps("slice_scatter.default")
def slice_scatter(
    b: Builder, x: Value, source: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:  # fmt: skip
    if step != 1:
        raise b.refuse("the step writes every other row of a tensor.", "torch.stack and reshape")
    dim %= len(x.shape)
    first, last = bounds(x.shape[dim], start, end)
    return _between(b, x, source, dim, first, last)


@maps("select_scatter.default")
def select_scatter(b: Builder, x: Value, source: Value, dim: int, index: int) -> Value:
    dim, index = dim % len(x.shape), index % x.shape[dim]
    return _between(b, x, _row(b, source, dim), dim, index, index + 1)


def _between(b: Builder, x: Value, source: Value, dim: int, first: int, last: int) -> Value:
    before, after = b.slice(x, dim, 0, first), b.slice(x, dim, last, x.shape[dim])
    parts = [before, b.convert(source, x.dtype), after]
    return b.concatenate([part for part in parts if part.shape[dim]], dim)


@maps("constant_pad_nd.default")
def constant_pad(b: Builder, x: Value, padding: Sequence[int], fill: float = 0) -> Value:
    """Pairs from the last dim on; less than nothing cuts off."""
    pairs = [*zip(padding[::2], padding[1::2], strict=True)]
    config = [(0, 0, 0)] * (len(x.shape) - len(pairs)) + [(*pair, 0) for pair in reversed(pairs)]
    return b.pad(x, config, fill)


@maps("flip.default")
def flip(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    return b.op("rev", [x], x.type, dimensions=tuple(sorted(d % len(x.shape) for d in dims)))


@maps("roll.default")
def roll(b: Builder, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    shape = x.shape
    if not dims:
        x, dims = b.reshape(x, (prod(shape),)), [0]
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        if first := -shift % max(size, 1):
            dim %= len(x.shape)
            x = b.concatenate([b.slice(x, dim, first, size), b.slice(x, dim, 0, first)], dim)
    return b.reshape(x, shape)


@maps("tril.default")
def tril(b: Builder, x: Value, diagonal: int = 0) -> Value:
    return _triangle(b, x, diagonal, "ge")


@maps("triu.default")
def triu(b: Builder, x: Value, diagonal: int = 0) -> Value:
    return _triangle(b, x, diagonal, "le")


def _triangle(b: Builder, x: Value, diagonal: int, kept: str) -> Value:
    rows, columns = (b.iota(x.shape[-2:], d, "s32") for d in range(2))
    here = b.elementwise(kept, b.elementwise("add", rows, diagonal), columns, made="bool")
    return b.select(here, x, 0, x.dtype)


# ---------------------------------------------------------------- made of nothing


@maps("arange.start_step")
def arange(b: Builder, start: float, end: float, step: float = 1, **_: Any) -> Value:
    kind = b.made
    counted = b.iota(kind.shape, 0, kind.dtype)
    scaled = counted if step == 1 else b.elementwise("mul", counted, step)
    return scaled if start == 0 else b.elementwise("add", scaled, start)


@maps("arange.default")
def arange_to(b: Builder, end: float, **_: Any) -> Value:
    return arange(b, 0, end)


@maps("arange.start")
def arange_from(b: Builder, start: float, end: float, **_: Any) -> Value:
    return arange(b, start, end)


@maps(
    "full.default", "full_like.default", "new_full.default", "fill.Scalar", "fill.Tensor",
)  # fmt: skip
def full(b: Builder, _: Any, number: Operand, **__: Any) -> Value:
    return b.full(number, b.made)


@maps("scalar_tensor.default")
def scalar_tensor(b: Builder, number: float, **_: Any) -> Value:
    return b.number(number, b.made.dtype)


@maps(
    "zeros.default", "zeros_like.default", "new_zeros.default", "zero.default", "empty.memory_format",
    "empty_like.default", "new_empty.default", "new_empty_strided.default", "empty_permuted.default",
)  # fmt: skip
def zeros(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(0, b.made)


@maps("ones.default", "ones_like.default", "new_ones.default")
def ones(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(1, b.made)


def zeros_of(b: Builder, kind: TensorType) -> Value:
    return b.full(0, kind)
