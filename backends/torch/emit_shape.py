"""The same elements in other shapes and places; what is cut, put together or filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...ir.graph import Op
from .shard import View

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]
Padding = Sequence[tuple[int, int, int]]  # of each dim: before, behind, between elements


def _reshape(op: Op, view: View) -> Run:
    shape = view.shape()
    order = op.integers("dimensions") if op.has("dimensions") else None
    if order is None:
        return lambda operands: [operands[0].reshape(shape)]
    return lambda operands: [operands[0].permute(order).reshape(shape)]


def _broadcast(op: Op, view: View) -> Run:
    shape, dims = view.shape(), op.integers("broadcast_dimensions")

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        sizes = [1] * len(shape)
        for dim, size in zip(dims, operands[0].shape, strict=True):
            sizes[dim] = size
        return [operands[0].reshape(sizes).expand(shape)]

    return run


def _transpose(op: Op, view: View) -> Run:
    order = op.integers("permutation")
    return lambda operands: [operands[0].permute(order)]


def _reverse(op: Op, view: View) -> Run:
    dims = op.integers("dimensions")
    return lambda operands: [operands[0].flip(dims)]


def _slice(op: Op, view: View) -> Run:
    """A dim that is cut is taken whole."""
    starts, limits = op.integers("start_indices"), op.integers("limit_indices")
    strides = op.integers("strides") if op.has("strides") else (1,) * len(starts)
    taken = tuple(
        slice(None) if view.cut(dim) is not None else slice(start, limit, stride)
        for dim, start, limit, stride in zip(
            view.rule.operands[0], starts, limits, strides, strict=True
        )
    )
    return lambda operands: [operands[0][taken]]


def _split(op: Op, view: View) -> Run:
    axis, sizes = op.integer("axis"), list(op.integers("sizes"))
    return lambda operands: list(operands[0].split(sizes, axis))


def _unstack(op: Op, view: View) -> Run:
    axis = op.integer("axis")
    return lambda operands: list(operands[0].unbind(axis))


def _stack(op: Op, view: View) -> Run:
    axis = op.integer("axis")
    return lambda operands: [torch.stack(list(operands), axis)]


def _concatenate(op: Op, view: View) -> Run:
    dim = op.integer("dimension")
    return lambda operands: [torch.cat(list(operands), dim)]


def _tile(op: Op, view: View) -> Run:
    shape = view.shape()

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        repeats = [
            made // max(given, 1) for made, given in zip(shape, operands[0].shape, strict=True)
        ]
        return [operands[0].tile(repeats)]

    return run


def _pad(op: Op, view: View) -> Run:
    config = [(low, high, between) for low, high, between in op.integer_rows("padding_config")]
    return lambda operands: [padded(operands[0], operands[1], config)]


def padded(x: Tensor, value: Tensor | float, config: Padding) -> Tensor:
    """With elements of a value before, behind and between those of every dim; fewer than none crop."""
    shape = [
        max(low, 0) + n + max(n - 1, 0) * between + max(high, 0)
        for n, (low, high, between) in zip(x.shape, config, strict=True)
    ]
    found = x.new_empty(shape)
    found[...] = value
    places = tuple(
        slice(max(low, 0), max(low, 0) + n + max(n - 1, 0) * between, between + 1)
        for n, (low, _, between) in zip(x.shape, config, strict=True)
    )
    found[places] = x
    kept = tuple(
        slice(max(-low, 0), size - max(-high, 0))
        for size, (low, high, _) in zip(shape, config, strict=True)
    )
    return found[kept]


def _dynamic_slice(op: Op, view: View) -> Run:
    shape = view.shape()

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        x, *starts = operands
        return [x[_place(x, starts, shape)]]

    return run


def _dynamic_update_slice(op: Op, view: View) -> Run:
    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        x, update, *starts = operands
        found = x.clone()
        found[_place(x, starts, update.shape)] = update
        return [found]

    return run


def _place(x: Tensor, starts: Sequence[Tensor], shape: Sequence[int]) -> tuple[slice, ...]:
    """Where a slice lies, brought inside."""
    found = []
    for n, start, size in zip(x.shape, starts, shape, strict=True):
        first = min(max(int(start), 0), n - size) if size < n else 0
        found.append(slice(first, first + size))
    return tuple(found)


def _iota(op: Op, view: View) -> Run:
    shape, dim, dtype = view.shape(), op.integer("dimension"), view.dtypes[0]
    counted = view.positions(view.rule.results[0][dim]).to(dtype)
    sizes = [n if d == dim else 1 for d, n in enumerate(shape)]
    return lambda operands: [counted.reshape(sizes).expand(shape)]


SHAPE: dict[str, Callable[[Op, View], Run]] = {
    "reshape": _reshape, "squeeze": lambda op, view: _reshape(Op("reshape", (), ()), view),
    "broadcast_in_dim": _broadcast, "transpose": _transpose, "rev": _reverse, "slice": _slice, "split": _split,
    "unstack": _unstack, "stack": _stack, "concatenate": _concatenate, "tile": _tile, "pad": _pad,
    "dynamic_slice": _dynamic_slice, "dynamic_update_slice": _dynamic_update_slice, "iota": _iota,
}  # fmt: skip
