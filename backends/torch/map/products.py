"""Products and sums over what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....ir.graph import TensorType
from .builder import Builder, Value, maps, maps_library


@maps("mm.default")
def mm(b: Builder, x: Value, y: Value) -> Value:
    return b.dot(x, y, ((1,), (0,)))


@maps("bmm.default")
def bmm(b: Builder, x: Value, y: Value) -> Value:
    return b.dot(x, y, ((2,), (1,)), ((0,), (0,)))


@maps("addmm.default")
def addmm(
    b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    return _added(b, bias, mm(b, x, y), beta, alpha)


@maps("baddbmm.default")
def baddbmm(
    b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    return _added(b, bias, bmm(b, x, y), beta, alpha)


def _added(b: Builder, bias: Value, product: Value, beta: float, alpha: float) -> Value:
    product = product if alpha == 1 else b.elementwise("mul", product, alpha)
    if beta == 0:
        return product
    return b.elementwise("add", product, bias if beta == 1 else b.elementwise("mul", bias, beta))


@maps("mv.default")
def mv(b: Builder, x: Value, y: Value) -> Value:
    return b.dot(x, y, ((1,), (0,)))


@maps("dot.default")
def dot(b: Builder, x: Value, y: Value) -> Value:
    return b.dot(x, y, ((0,), (0,)))


@maps("_grouped_mm.default")
def grouped_mm(
    b: Builder, x: Value, y: Value, offsets: Value | None = None, bias: Value | None = None, out_dtype: Any = None
) -> Value:  # fmt: skip
    """Groups of rows end at `offsets`: a ragged product, of their differences.

    [m, k] · [g, k, n] -> [m, n]    [k, m] · [m, n] -> [g, k, n]
    """
    if bias is not None or offsets is None:
        raise b.refuse(
            "`grouped_mm` with a bias, or without offsets.", "torch.bmm, and add the bias"
        )
    return b.convert(_grouped(b, x, y, offsets), b.made.dtype)


@maps_library("transformers.grouped_mm_fallback.default")
def transformers_grouped_mm(b: Builder, x: Value, y: Value, offsets: Value) -> Value:
    return _grouped(b, x, y, offsets)


@maps_library("transformers.grouped_mm_fallback_backward.default")
def transformers_grouped_mm_backward(
    b: Builder, x: Value, y: Value, offsets: Value, given: Value
) -> tuple[Value, Value]:
    of_x = _grouped(b, given, b.transpose(y, (0, 2, 1)), offsets)
    return of_x, _grouped(b, b.transpose(x, (1, 0)), given, offsets)


def _grouped(b: Builder, x: Value, y: Value, offsets: Value) -> Value:
    sizes = _differences(b, offsets)
    if len(y.shape) == 3:
        return b.op(
            "ragged_dot_general", [x, y, sizes], TensorType(x.dtype, (x.shape[0], y.shape[2])), lhs_contracting=(1,),
            rhs_contracting=(1,), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,),
        )  # fmt: skip
    x = b.transpose(x, (1, 0))
    kind = TensorType(x.dtype, (sizes.shape[0], x.shape[1], y.shape[1]))
    return b.op(
        "ragged_dot_general", [x, y, sizes], kind, lhs_contracting=(0,), rhs_contracting=(0,),
        lhs_ragged_dimensions=(0,), rhs_group_dimensions=(),
    )  # fmt: skip


def _differences(b: Builder, offsets: Value) -> Value:
    many = offsets.shape[0]
    before = b.pad(b.slice(offsets, 0, 0, many - 1), [(1, 0, 0)])
    return b.elementwise("sub", offsets, before)


# ---------------------------------------------------------------- convolutions

Sizes = Sequence[int]


def _spec(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


def _swapped(rank: int) -> tuple[int, ...]:
    return (1, 0, *range(2, rank))


@maps("convolution.default")
def convolution(
    b: Builder, x: Value, weight: Value, bias: Value | None, stride: Sizes, padding: Sizes, dilation: Sizes,
    transposed: bool, output_padding: Sizes, groups: int,
) -> Value:  # fmt: skip
    """Images [n, c, ...], windows [out, in / groups, ...]."""
    if transposed:
        raise b.refuse(
            "a transposed convolution is not mapped yet.",
            "torch.nn.Upsample and a convolution, or torch.nn.PixelShuffle",
        )
    rank = len(x.shape)
    found = b.op(
        "conv_general_dilated", [x, weight], TensorType(x.dtype, b.made.shape), window_strides=tuple(stride),
        padding=tuple((p, p) for p in padding), lhs_dilation=(1,) * (rank - 2), rhs_dilation=tuple(dilation),
        lhs_spec=_spec(rank), rhs_spec=_spec(rank), out_spec=_spec(rank), feature_group_count=groups,
    )  # fmt: skip
    if bias is None:
        return found
    spread = b.broadcast(bias, (1, *bias.shape, *(1,) * (rank - 2)), (1,))
    return b.elementwise("add", found, spread)


@maps("convolution_backward.default")
def convolution_backward(
    b: Builder, given: Value, x: Value, weight: Value, bias_sizes: Sizes | None, stride: Sizes, padding: Sizes,
    dilation: Sizes, transposed: bool, output_padding: Sizes, groups: int, wanted: Sequence[bool],
) -> tuple[Value | None, Value | None, Value | None]:  # fmt: skip
    """Of images: with windows turned round. Of windows: images with gradients as windows. Of biases: a sum.

    Source: as XLA and JAX transpose convolutions (`jax._src.lax.convolution`).
    """
    if transposed:
        raise b.refuse(
            "the gradient of a transposed convolution is not mapped yet.", "another module"
        )
    rank = len(x.shape)
    spatial = range(2, rank)
    lefts, rights = list[tuple[int, int]](), list[tuple[int, int]]()
    for n, d in enumerate(spatial):
        reach = dilation[n] * (weight.shape[d] - 1) + 1
        spread = stride[n] * (given.shape[d] - 1) + 1
        before = reach - padding[n] - 1
        lefts.append((before, x.shape[d] + reach - 1 - spread - before))
        rights.append((padding[n], spread + reach - x.shape[d] - padding[n] - 1))
    of_x = of_weight = of_bias = None
    if wanted[0]:
        turned = b.op("rev", [weight], weight.type, dimensions=tuple(spatial))
        turned, spec = _by_group(b, turned, groups, rank)
        of_x = b.op(
            "conv_general_dilated", [given, turned], x.type, window_strides=(1,) * (rank - 2), padding=tuple(lefts),
            lhs_dilation=tuple(stride), rhs_dilation=tuple(dilation), lhs_spec=_spec(rank), rhs_spec=spec,
            out_spec=_spec(rank), feature_group_count=groups,
        )  # fmt: skip
    if wanted[1]:
        # Features are what images were, images what is summed; groups of features become groups of images.
        of_weight = b.op(
            "conv_general_dilated", [x, given], weight.type, window_strides=tuple(dilation), padding=tuple(rights),
            lhs_dilation=(1,) * (rank - 2), rhs_dilation=tuple(stride), lhs_spec=_swapped(rank),
            rhs_spec=_swapped(rank), out_spec=_swapped(rank), feature_group_count=1, batch_group_count=groups,
        )  # fmt: skip
    if wanted[2]:
        of_bias = b.reduce("reduce_sum", given, [0, *spatial])
    return of_x, of_weight, of_bias


def _by_group(b: Builder, weight: Value, groups: int, rank: int) -> tuple[Value, tuple[int, ...]]:
    """Windows whose outputs are the images' features, group by group: [g · in, out, ...] from [g · out, in, ...]."""
    if groups == 1:
        return weight, _swapped(rank)
    out, inside, *rest = weight.shape
    split = b.reshape(weight, (groups, out // groups, inside, *rest))
    moved = b.transpose(split, (0, 2, 1, *range(3, rank + 1)))
    return b.reshape(moved, (groups * inside, out // groups, *rest)), _spec(rank)
