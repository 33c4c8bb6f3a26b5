"""Products: matrices, convolutions, groups of rows that meet weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from string import ascii_letters

import torch
from torch.nn import functional

from ...ir.graph import Op
from .emit_shape import padded
from .shard import View

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def _dot(op: Op, view: View) -> Run:
    """Multiplied in the operands' type, or in that of the result where it is wider; as one product of matrices, or of
    stacks of them where there are batch dims."""
    sums = op.integers("lhs_contracting"), op.integers("rhs_contracting")
    batch = op.integers("lhs_batch"), op.integers("rhs_batch")
    free = [
        [d for d in range(len(dims)) if d not in (*sums[side], *batch[side])]
        for side, dims in enumerate(view.rule.operands)
    ]
    orders = (*batch[0], *free[0], *sums[0]), (*batch[1], *sums[1], *free[1])
    stacks, dtype = len(batch[0]), view.dtypes[0]
    multiply = torch.bmm if stacks else torch.mm

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        left, right = operands
        wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), dtype)
        left, right = left.to(wide).permute(orders[0]), right.to(wide).permute(orders[1])
        first, last = stacks + len(free[0]), stacks + len(sums[1])
        stack, rows, columns = left.shape[:stacks], left.shape[stacks:first], right.shape[last:]
        heads = (prod(stack),) if stacks else ()
        many, inner = prod(rows), prod(left.shape[first:])
        found = multiply(
            left.reshape(*heads, many, inner), right.reshape(*heads, inner, prod(columns))
        )
        return [found.view(*stack, *rows, *columns).to(dtype)]

    return run


def _equation(
    ranks: Sequence[int], sums: Sequence[Sequence[int]], batch: Sequence[Sequence[int]]
) -> str:
    """`abc,cd->abd`: batch dims first in the result, then what is left of either operand."""
    letters = iter(ascii_letters)
    names: list[dict[int, str]] = [{}, {}]
    for pairs in (zip(*batch, strict=True), zip(*sums, strict=True)):
        for left, right in pairs:
            names[0][left] = names[1][right] = next(letters)
    free = []
    for side, rank in enumerate(ranks):
        for dim in range(rank):
            if dim not in names[side]:
                names[side][dim] = next(letters)
                free.append(names[side][dim])
    left, right = (
        "".join(each[d] for d in range(rank)) for each, rank in zip(names, ranks, strict=True)
    )
    made = "".join([*(names[0][d] for d in batch[0]), *free])
    return f"{left},{right}->{made}"


def _convolution(op: Op, view: View) -> Run:
    """By torch's own, on images [batch, channel, ...] and kernels [out, in, ...]."""
    images, kernels, made = (op.integers(name) for name in ("lhs_spec", "rhs_spec", "out_spec"))
    strides, apart = op.integers("window_strides"), op.integers("rhs_dilation")
    between = [n - 1 for n in op.integers("lhs_dilation")]
    edges = [(low, high) for low, high in op.integer_rows("padding")]
    config = [(0, 0, 0), (0, 0, 0), *((*edge, n) for edge, n in zip(edges, between, strict=True))]
    convolve = _CONVOLUTIONS[len(strides)]
    by_feature, by_batch = op.integer("feature_group_count"), op.integer("batch_group_count")
    batch, feature = (view.rule.operands[0][d] for d in images[:2])
    if by_feature > 1:  # groups that are cut are fewer here
        by_feature = view.size(feature[:1])
    if by_batch > 1:
        by_batch = view.size(batch[:1])
    back = [made.index(d) for d in range(len(made))]
    dtype = view.dtypes[0]

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        x, w = operands[0].permute(images), operands[1].permute(kernels)
        x = padded(x, 0.0, config) if any(map(any, config)) else x
        if by_batch > 1:  # each group of images with kernels of its own
            rows = x.reshape(by_batch, -1, *x.shape[1:]).movedim(0, 1)
            x = rows.reshape(rows.shape[0], -1, *x.shape[2:])
        found = convolve(x, w, None, strides, 0, apart, max(by_feature, by_batch))
        return [found.permute(back).to(dtype)]

    return run


def _ragged_dot(op: Op, view: View) -> Run:
    """Rows of groups, one after another, each group with weights of its own:

        rows [m, k], weights [g, k, n], sizes [g] -> [m, n]
        rows [m, k], rows [m, n], sizes [g] -> [g, k, n]: gradients of the weights

    Sizes are those of all rows. Of rows that are cut each shard counts those of a group that it has; of groups that are
    cut it leaves zeros for the rows of others, a part of the sum.
    """
    [row] = op.integers("lhs_ragged_dimensions")
    sums = op.integers("lhs_contracting"), op.integers("rhs_contracting")
    batch = op.integers("lhs_batch"), op.integers("rhs_batch")
    groups = op.integers("rhs_group_dimensions")
    summed = row in sums[0]
    ranks = [len(dims) for dims in view.rule.operands[:2]]
    positions = view.positions(view.rule.operands[0][row])
    grouped = view.rule.results[0][0] if summed else view.rule.operands[1][groups[0]]
    cut = view.cut(grouped)
    first = view.offset(cut) if cut is not None else 0
    many, dtype = view.size(grouped), view.dtypes[0]
    if summed:
        equation = _equation(ranks, sums, batch)
    else:
        rest = [d for d in range(ranks[1]) if d != groups[0]]
        inner = [[rest.index(d) for d in dims] for dims in (sums[1], batch[1])]
        equation = _equation([ranks[0], len(rest)], (sums[0], inner[0]), (batch[0], inner[1]))
    other = sums[1][sums[0].index(row)] if summed else 0
    place = 0 if summed else [d for d in range(ranks[0]) if d not in sums[0]].index(row)

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        left, right, sizes = operands
        ends = sizes.cumsum(0)
        borders = torch.searchsorted(positions, torch.stack([ends - sizes, ends])).tolist()
        found = []
        for group in range(first, first + many):
            begin, end = borders[0][group], borders[1][group]
            rows = left.narrow(row, begin, end - begin)
            if summed:
                found.append(torch.einsum(equation, rows, right.narrow(other, begin, end - begin)))
            else:
                found.append(torch.einsum(equation, rows, right.select(groups[0], group - first)))
        if summed:
            return [torch.stack(found).to(dtype)]
        whole = left.new_zeros(view.shape(), dtype=dtype)
        for group, part in zip(range(first, first + many), found, strict=True):
            whole.narrow(place, borders[0][group], part.shape[place]).copy_(part)
        return [whole]

    return run


PRODUCTS: dict[str, Callable[[Op, View], Run]] = {
    "dot_general": _dot, "conv_general_dilated": _convolution, "ragged_dot_general": _ragged_dot,
}  # fmt: skip
