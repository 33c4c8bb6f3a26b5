"""Many elements into one: over dims, along a dim, in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch

from ...ir.errors import LoweringError
from ...ir.graph import Op
from .emit_shape import padded
from .shard import View

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]
_BITWISE = {
    "reduce_and": torch.bitwise_and,
    "reduce_or": torch.bitwise_or,
    "reduce_xor": torch.bitwise_xor,
}
_ALONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cumsum": lambda x, dim: x.cumsum(dim, dtype=x.dtype),
    "cumprod": lambda x, dim: x.cumprod(dim, dtype=x.dtype),
    "cummax": lambda x, dim: x.cummax(dim).values,
    "cummin": lambda x, dim: x.cummin(dim).values,
    "cumlogsumexp": lambda x, dim: x.logcumsumexp(dim),
}
_IN_WINDOWS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "reduce_window_max": lambda x, dims: x.amax(dims),
    "reduce_window_min": lambda x, dims: x.amin(dims),
    "reduce_window_sum": lambda x, dims: x.sum(dims, dtype=x.dtype),
}


def lowest(dtype: torch.dtype) -> float | int:
    """Below all others of its type."""
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def highest(dtype: torch.dtype) -> float | int:
    return torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def _reduce(op: Op, view: View) -> Run:
    """Over no dims torch would reduce over all."""
    axes = op.integers("axes")
    if not axes:
        return list
    match op.kind:
        case "reduce_sum":
            return lambda operands: [operands[0].sum(axes, dtype=operands[0].dtype)]
        case "reduce_max":
            return lambda operands: [operands[0].amax(axes)]
        case "reduce_min":
            return lambda operands: [operands[0].amin(axes)]
        case "reduce_prod":
            one = lambda x, dim: x.prod(dim, dtype=x.dtype)  # noqa: E731
        case _:
            join = _BITWISE[op.kind]
            one = lambda x, dim: reduce(join, x.unbind(dim))  # noqa: E731
    falling = sorted(axes, reverse=True)
    return lambda operands: [reduce(one, falling, operands[0])]


def _arg(op: Op, view: View) -> Run:
    """The first one, as torch's own gives it for a dim."""
    [axis], dtype = op.integers("axes"), view.dtypes[0]
    function = torch.argmax if op.kind == "argmax" else torch.argmin
    return lambda operands: [function(operands[0], axis).to(dtype)]


def _along(op: Op, view: View) -> Run:
    function, axis = _ALONG[op.kind], op.integer("axis")
    if op.flag("reverse"):
        return lambda operands: [function(operands[0].flip(axis), axis).flip(axis)]
    return lambda operands: [function(operands[0], axis)]


def _in_windows(op: Op, view: View) -> Run:
    function, windows = _IN_WINDOWS[op.kind], _Windows(op)

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        dtype = operands[0].dtype
        fill = {"max": lowest, "min": highest, "sum": lambda _: 0}[op.kind.rpartition("_")[2]](
            dtype
        )
        view_of, dims = windows.of(padded(operands[0], fill, windows.padding))
        return [function(view_of, dims)]

    return run


def _select_and_scatter(op: Op, view: View) -> Run:
    """The gradient of a largest (or least) element of windows: each goes to the first such element of its window."""
    windows, largest = _Windows(op), op.text("select") == "ge"

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        source, x = operands
        fill = lowest(x.dtype) if largest else highest(x.dtype)
        wide = padded(x, fill, windows.padding)
        numbers = torch.arange(wide.numel()).reshape(wide.shape)
        values, places = windows.of(wide)[0], windows.of(numbers)[0]
        rank = x.dim()
        values, places = values.flatten(rank), places.flatten(rank)
        chosen = (values.argmax if largest else values.argmin)(rank, keepdim=True)
        where = places.gather(rank, chosen).flatten()
        found = torch.zeros(wide.numel(), dtype=source.dtype).index_add(0, where, source.flatten())
        crop = [(-low, -high, 0) for low, high, _ in windows.padding]
        return [padded(found.reshape(wide.shape), 0.0, crop)]

    return run


class _Windows:
    """Windows of some dims as further dims behind all others."""

    def __init__(self, op: Op):
        self.sizes, self.strides = op.integers("window_dimensions"), op.integers("window_strides")
        for name in ("base_dilation", "window_dilation"):
            if op.has(name) and set(op.integers(name)) != {1}:
                raise LoweringError(
                    f"windows with gaps ({name} {op.attr(name)}) cannot run on torch yet.",
                    where=op.where or None,
                    fix="run the step with --backend xla",
                )
        self.padding = [(low, high, 0) for low, high in op.integer_rows("padding")]

    def of(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The windows of what is padded already, and which dims they are."""
        rank = x.dim()
        for dim, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            x = x.unfold(dim, size, stride)
        return x, list(range(rank, 2 * rank))


REDUCTIONS: dict[str, Callable[[Op, View], Run]] = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", *_BITWISE), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_IN_WINDOWS, _in_windows),
    "select_and_scatter_add": _select_and_scatter,
}
