"""Pooling: sums and maxima over windows of the last dims."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ....ir.graph import TensorType
from .builder import Builder, Value, maps

Sizes = Sequence[int]


def _pairs(given: Sizes, default: Sizes = ()) -> tuple[int, ...]:
    sizes = tuple(given) or tuple(default)
    return sizes * 2 if len(sizes) == 1 else sizes


def _windows(
    b: Builder, x: Value, kernel: Sizes, stride: Sizes, padding: Sizes, made: Sizes
) -> dict[str, tuple[int, ...] | tuple[tuple[int, int], ...]]:
    """Windows of the last dims as attributes; what `ceil_mode` adds is padding behind."""
    front = len(x.shape) - 2
    pads = [
        (before, max((many - 1) * step + window - size - before, 0))
        for before, many, step, window, size in zip(
            padding, made[-2:], stride, kernel, x.shape[-2:], strict=True
        )
    ]
    return {
        "window_dimensions": (1,) * front + tuple(kernel),
        "window_strides": (1,) * front + tuple(stride),
        "padding": ((0, 0),) * front + tuple(pads),
    }


def _reduced(
    b: Builder, kind: str, x: Value, shape: Sizes, windows: dict[str, tuple[int, ...] | tuple[tuple[int, int], ...]]
) -> Value:  # fmt: skip
    ones = (1,) * len(x.shape)
    made = TensorType(x.dtype, tuple(shape))
    return b.op(kind, [x], made, base_dilation=ones, window_dilation=ones, **windows)


@maps("max_pool2d_with_indices.default")
def max_pool(
    b: Builder, x: Value, kernel: Sizes, stride: Sizes = (), padding: Sizes = (0,), dilation: Sizes = (1,),
    ceil_mode: bool = False,
) -> tuple[Value, None]:  # fmt: skip
    """The places of the maxima are found again by the gradient, which alone may read them."""
    kernel = _pairs(kernel)
    _undilated(b, dilation)
    shape = b.made.shape
    windows = _windows(b, x, kernel, _pairs(stride, kernel), _pairs(padding), shape)
    return _reduced(b, "reduce_window_max", x, shape, windows), None


@maps("max_pool2d_with_indices_backward.default")
def max_pool_backward(
    b: Builder, given: Value, x: Value, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes,
    ceil_mode: bool, places: None,
) -> Value:  # fmt: skip
    kernel = _pairs(kernel)
    _undilated(b, dilation)
    windows = _windows(b, x, kernel, _pairs(stride, kernel), _pairs(padding), given.shape)
    return b.op("select_and_scatter_add", [given, x], x.type, select="ge", **windows)


def _undilated(b: Builder, dilation: Sizes) -> None:
    if set(dilation) != {1}:
        raise b.refuse("max pooling with dilation is not mapped.", "dilation=1")


@maps("avg_pool2d.default")
def avg_pool(
    b: Builder, x: Value, kernel: Sizes, stride: Sizes = (), padding: Sizes = (0,), ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    kernel = _pairs(kernel)
    stride, padding = _pairs(stride, kernel), _pairs(padding)
    many = _counted(b, kernel, padding, ceil_mode, count_include_pad, divisor_override)
    shape = b.made.shape
    total = _reduced(
        b, "reduce_window_sum", x, shape, _windows(b, x, kernel, stride, padding, shape)
    )
    return b.elementwise("div", total, float(many))


@maps("avg_pool2d_backward.default")
def avg_pool_backward(
    b: Builder, given: Value, x: Value, kernel: Sizes, stride: Sizes, padding: Sizes, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Value:  # fmt: skip
    kernel = _pairs(kernel)
    stride, padding = _pairs(stride, kernel), _pairs(padding)
    many = _counted(b, kernel, padding, ceil_mode, count_include_pad, divisor_override)
    return _spread(b, b.elementwise("div", given, float(many)), x, kernel, stride, padding)


def _spread(
    b: Builder, given: Value, x: Value, kernel: Sizes, stride: Sizes, padding: Sizes
) -> Value:
    """The transposed sum: strides become gaps, and windows step by one."""
    front = len(x.shape) - 2
    config = [(0, 0, 0)] * front
    for d, window, step, before in zip((-2, -1), kernel, stride, padding, strict=True):
        low = window - 1 - before
        wide = (given.shape[d] - 1) * step + 1
        config.append((low, x.shape[d] + window - 1 - wide - low, step - 1))
    padded = b.pad(given, config)
    ones = (1,) * len(x.shape)
    return _reduced(b, "reduce_window_sum", padded, x.shape, {
        "window_dimensions": (1,) * front + tuple(kernel), "window_strides": ones, "padding": ((0, 0),) * len(ones),
    })  # fmt: skip


def _counted(
    b: Builder,
    kernel: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> int:
    if ceil_mode or (any(padding) and not count_include_pad):
        raise b.refuse(
            "average pooling whose windows count differently at the border is not mapped.",
            "ceil_mode=False and count_include_pad=True",
        )
    return divisor or prod(kernel)


@maps("_adaptive_avg_pool2d.default")
def adaptive_avg_pool(b: Builder, x: Value, sizes: Sizes) -> Value:
    kernel = _even(b, x, sizes)
    windows = _windows(b, x, kernel, kernel, (0, 0), sizes)
    total = _reduced(b, "reduce_window_sum", x, b.made.shape, windows)
    return b.elementwise("div", total, float(prod(kernel)))


@maps("_adaptive_avg_pool2d_backward.default")
def adaptive_avg_pool_backward(b: Builder, given: Value, x: Value) -> Value:
    kernel = _even(b, x, given.shape[-2:])
    shared = b.elementwise("div", given, float(prod(kernel)))
    return _spread(b, shared, x, kernel, kernel, (0, 0))


def _even(b: Builder, x: Value, sizes: Sizes) -> tuple[int, ...]:
    if any(have % want for have, want in zip(x.shape[-2:], sizes, strict=True)):
        raise b.refuse(
            f"adaptive pooling of {x.shape[-2:]} to {tuple(sizes)} has windows of unequal size.",
            "sizes that divide evenly",
        )
    return tuple(have // want for have, want in zip(x.shape[-2:], sizes, strict=True))
