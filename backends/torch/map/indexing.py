"""Reads and writes where indices say. torch checks its indices, so that they are promised to be in bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....ir.graph import TensorType
from .builder import Builder, Operand, Value, maps
from .shape import zeros_of


@maps("embedding.default")
def embedding(b: Builder, table: Value, ids: Value, *_: Any) -> Value:
    return _rows(b, table, ids, 0)


@maps("index_select.default")
def index_select(b: Builder, x: Value, dim: int, ids: Value) -> Value:
    return _rows(b, x, _from_end(b, ids, x.shape[dim]), dim % len(x.shape))


def _rows(b: Builder, x: Value, ids: Value, dim: int) -> Value:
    """What lies at `ids` along one dim; theirs take its place."""
    shape = (*x.shape[:dim], *ids.shape, *x.shape[dim + 1 :])
    if (found := _in_order(b, x, {dim: ids}, dim, shape)) is not None:
        return found
    inside = [d for d in range(len(shape)) if not dim <= d < dim + len(ids.shape)]
    sizes = tuple(1 if d == dim else n for d, n in enumerate(x.shape))
    return b.op(
        "gather", [x, _column(b, ids)], TensorType(x.dtype, shape), collapsed_slice_dims=(dim,),
        offset_dims=tuple(inside), slice_sizes=sizes, start_index_map=(dim,),
    )  # fmt: skip


def _in_order(
    b: Builder, x: Value, ids: Mapping[int, Value], first: int, shape: tuple[int, ...]
) -> Value | None:
    """A look-up by indices of one shape that count one by one, as a slice of each dim; nothing where they do not.

    Dims of the indices are those from `first` on in the result, of this shape.
    """
    spans = {d: _span(b, each, x.shape[d]) for d, each in ids.items()}
    moving = [span.dim for span in spans.values() if span is not None and span.dim is not None]
    if None in spans.values() or len(set(moving)) < len(moving):
        return None
    rank = next(iter(ids.values())).type.rank
    rest = iter([d for d in range(len(shape)) if not first <= d < first + rank])
    places, gone = list[int](), list[int]()
    for d in range(len(x.shape)):
        span = spans.get(d)
        if span is None:
            places.append(next(rest))
            continue
        x = b.slice(x, d, span.start, span.start + span.many)
        if span.dim is None:
            gone.append(d)
        else:
            places.append(first + span.dim)
    x = b.transpose(b.squeeze(x, gone), sorted(range(len(places)), key=places.__getitem__))
    return x if x.shape == shape else b.broadcast(x, shape, sorted(places))


@dataclass(frozen=True, slots=True)
class _Span:
    """Indices start, start + 1, ... along one of their dims, or one index alone."""

    start: int
    many: int
    dim: int | None


def _span(b: Builder, ids: Value, size: int) -> _Span | None:
    """What indices are, if they count within a dim of this size."""
    known = b.counted.get(ids.number)
    if known is None or len(known.moving) > 1 or any(known.steps[d] != 1 for d in known.moving):
        return None
    low, high = known.range(ids.shape)
    return (
        _Span(low, high - low + 1, *(known.moving or (None,))) if low >= 0 and high < size else None
    )


def _column(b: Builder, ids: Value) -> Value:
    return b.broadcast(ids, (*ids.shape, 1), range(len(ids.shape)))


def _from_end(b: Builder, ids: Value, size: int) -> Value:
    """Negative indices count from the end."""
    below = b.elementwise("lt", ids, 0, made="bool")
    return b.select(below, b.elementwise("add", ids, size), ids, ids.dtype)


@maps("embedding_dense_backward.default")
def embedding_dense_backward(
    b: Builder, given: Value, ids: Value, many: int, padding_idx: int, scale_grad_by_freq: bool
) -> Value:
    if scale_grad_by_freq:
        raise b.refuse(
            "gradients of an embedding are scaled by how often ids occur.",
            "scale_grad_by_freq=False",
        )
    if padding_idx >= 0:
        padded = b.elementwise("eq", ids, padding_idx, made="bool")
        mask = b.broadcast(padded, given.shape, range(len(ids.shape)))
        given = b.select(mask, 0, given, given.dtype)
    elif (span := _span(b, ids, many)) is not None:
        axes = [d for d in range(len(ids.shape)) if d != span.dim]
        rows = b.reduce("reduce_sum", given, axes)
        rows = rows if span.dim is not None else b.reshape(rows, (1, given.shape[-1]))
        return b.pad(rows, [(span.start, many - span.start - span.many, 0), (0, 0, 0)])
    table = zeros_of(b, TensorType(given.dtype, (many, given.shape[-1])))
    return b.op(
        "scatter-add", [table, _column(b, ids), given], table.type, inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,), update_window_dims=(len(ids.shape),),
    )  # fmt: skip


# ---------------------------------------------------------------- along one dim, element by element


@maps("gather.default")
def gather(b: Builder, x: Value, dim: int, ids: Value, sparse_grad: bool = False) -> Value:
    """An index for every element of the result: the other dims are shared."""
    if not x.shape:
        return b.expand(x, ids.shape)
    dim %= len(x.shape)
    for d, size in enumerate(ids.shape):
        x = x if d == dim else b.slice(x, d, 0, size)
    shared = tuple(d for d in range(len(x.shape)) if d != dim)
    return b.op(
        "gather", [x, _column(b, ids)], TensorType(x.dtype, ids.shape), collapsed_slice_dims=(dim,), offset_dims=(),
        slice_sizes=(1,) * len(x.shape), start_index_map=(dim,), operand_batching_dims=shared,
        start_indices_batching_dims=shared,
    )  # fmt: skip


@maps("scatter.src")
def scatter_src(b: Builder, x: Value, dim: int, ids: Value, source: Value) -> Value:
    return _scattered(b, "scatter", x, dim, ids, source)


@maps("scatter.value")
def scatter_value(b: Builder, x: Value, dim: int, ids: Value, value: Operand) -> Value:
    return _scattered(b, "scatter", x, dim, ids, b.full(value, TensorType(x.dtype, ids.shape)))


@maps("scatter_add.default")
def scatter_add(b: Builder, x: Value, dim: int, ids: Value, source: Value) -> Value:
    return _scattered(b, "scatter-add", x, dim, ids, source)


def _scattered(b: Builder, kind: str, x: Value, dim: int, ids: Value, source: Value) -> Value:
    dim %= len(x.shape)
    shared = tuple(d for d in range(len(x.shape)) if d != dim)
    fewer = [d for d in shared if ids.shape[d] != x.shape[d]]
    if fewer:
        part = x
        for d in fewer:
            part = b.slice(part, d, 0, ids.shape[d])
        return _put_back(b, x, _scattered(b, kind, part, dim, ids, source), fewer)
    for d, size in enumerate(ids.shape):
        source = b.slice(source, d, 0, size)
    return b.op(
        kind, [x, _column(b, ids), b.convert(source, x.dtype)], x.type, inserted_window_dims=(dim,),
        scatter_dims_to_operand_dims=(dim,), update_window_dims=(), operand_batching_dims=shared,
        scatter_indices_batching_dims=shared,
    )  # fmt: skip


def _put_back(b: Builder, x: Value, part: Value, dims: Sequence[int]) -> Value:
    """An array whose first rows along some dims are others."""
    for n, d in enumerate(dims):
        rest = b.slice(x, d, part.shape[d], x.shape[d])
        for other in dims[n + 1 :]:
            rest = b.slice(rest, other, 0, part.shape[other])
        part = b.concatenate([part, rest], d)
    return part


# ---------------------------------------------------------------- x[i, :, j]


@maps("index.Tensor")
def index(b: Builder, x: Value, given: Sequence[Value | None]) -> Value:
    found = _indices(b, x, given)
    dims, first = [*found], _place([*found])
    shared = found[dims[0]].shape
    rest = [n for d, n in enumerate(x.shape) if d not in dims]
    shape = (*rest[:first], *shared, *rest[first:])
    if (sliced := _in_order(b, x, found, first, shape)) is not None:
        return sliced
    ids = _columns(b, found)
    inside = [d for d in range(len(shape)) if not first <= d < first + len(shared)]
    return b.op(
        "gather", [x, ids], TensorType(x.dtype, shape), collapsed_slice_dims=tuple(sorted(dims)),
        offset_dims=tuple(inside), slice_sizes=tuple(1 if d in dims else n for d, n in enumerate(x.shape)),
        start_index_map=tuple(dims),
    )  # fmt: skip


@maps("index_put.default")
def index_put(
    b: Builder, x: Value, given: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    found = _indices(b, x, given)
    dims, first = [*found], _place([*found])
    ids, shared = _columns(b, found), found[dims[0]].shape
    rest = [n for d, n in enumerate(x.shape) if d not in dims]
    updates = b.expand(b.convert(values, x.dtype), (*rest[:first], *shared, *rest[first:]))
    inside = [d for d in range(len(updates.shape)) if not first <= d < first + len(shared)]
    return b.op(
        "scatter-add" if accumulate else "scatter", [x, ids, updates], x.type, inserted_window_dims=tuple(sorted(dims)),
        scatter_dims_to_operand_dims=tuple(dims), update_window_dims=tuple(inside),
    )  # fmt: skip


def _indices(b: Builder, x: Value, given: Sequence[Value | None]) -> dict[int, Value]:
    """By which indices each dim is looked up, all of one shape and counted from the front."""
    found = {d: ids for d, ids in enumerate(given) if ids is not None}
    shape = tuple(torch.broadcast_shapes(*(ids.shape for ids in found.values())))
    wide = {d: b.convert(b.expand(ids, shape), "s64") for d, ids in found.items()}
    return {d: _from_end(b, ids, x.shape[d]) for d, ids in wide.items()}


def _columns(b: Builder, found: Mapping[int, Value]) -> Value:
    columns = [_column(b, ids) for ids in found.values()]
    return b.concatenate(columns, len(columns[0].shape) - 1)


def _place(dims: Sequence[int]) -> int:
    """Where dims of the indices go: to where they look things up, if that is one place; else to the front."""
    together = list(dims) == list(range(dims[0], dims[0] + len(dims)))
    return dims[0] if together else 0
