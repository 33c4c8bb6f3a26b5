"""What is read or written where ids say, and in order.

Places along a cut dim are counted from where this shard's part begins. Ids outside it are another shard's: a look-up
gives 0 for them, an update leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan, prod

import torch

from ...ir.graph import Op
from ...ir.rules.rule import Dim
from .emit_reductions import lowest
from .shard import View

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]
_UPDATES = {
    "scatter": "", "scatter-add": "sum", "scatter-sub": "sum", "scatter-mul": "prod", "scatter-max": "amax",
    "scatter-min": "amin",
}  # fmt: skip


def _gather(op: Op, view: View) -> Run:
    operand_dims = view.rule.operands[0]
    chosen, collapsed = op.integers("start_index_map"), op.integers("collapsed_slice_dims")
    window, batch = op.integers("offset_dims"), op.integers("operand_batching_dims")
    mode, whole_sizes = op.text("mode"), op.integers("slice_sizes")
    here = {c: f for c, d in enumerate(chosen) if (f := view.summed(operand_dims[d])) is not None}
    sizes = [
        size
        if d in batch or view.cut(dim) is None or view.summed(dim) is not None
        else view.size(dim)
        for d, (size, dim) in enumerate(zip(whole_sizes, operand_dims, strict=True))
    ]
    limits = [view.whole_size(operand_dims[d]) - whole_sizes[d] for d in chosen]
    layout = _Layout(
        sizes, chosen, window, [d for d in range(len(sizes)) if d not in (*collapsed, *batch)],
        dict(zip(batch, op.integers("start_indices_batching_dims"), strict=True)),
    )  # fmt: skip
    fill, first = _fill(op, view.dtypes[0]), view.is_first(list(here.values()))

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        x, ids = operands[0], operands[1].long()
        known = _between(ids, limits) if mode != "clip" else None
        ids = _clipped(ids, limits)
        mine = None
        if here:
            ids, mine = _inside(view, operand_dims, chosen, ids, here)
        found = x[layout.places(ids, tuple(view.shape()))]
        if mode == "fill_or_drop" and known is not None:
            missing = found.new_full((), fill if first else 0)
            found = torch.where(layout.spread(known, found.dim()), found, missing)
        if mine is not None:
            kept = mine if known is None or mode != "fill_or_drop" else mine | ~known
            found = torch.where(layout.spread(kept, found.dim()), found, found.new_zeros(()))
        return [found]

    return run


def _fill(op: Op, dtype: torch.dtype) -> float | int | bool:
    """What stands for elements outside: NaN, the least whole number, or what is said."""
    if op.has("fill_value"):
        return op.real("fill_value") if dtype.is_floating_point else int(op.real("fill_value"))
    if dtype == torch.bool:
        return True
    return (
        nan
        if dtype.is_floating_point or dtype.is_complex
        else lowest(dtype)
        if dtype.is_signed
        else torch.iinfo(dtype).max
    )


def _scatter(op: Op, view: View) -> Run:
    operand_dims, _, update_dims = view.rule.operands
    chosen = op.integers("scatter_dims_to_operand_dims")
    inserted, batch = op.integers("inserted_window_dims"), op.integers("operand_batching_dims")
    window, mode, how = op.integers("update_window_dims"), op.text("mode"), _UPDATES[op.kind]
    kept = [d for d in range(len(operand_dims)) if d not in (*inserted, *batch)]
    whole_sizes, sizes = [1] * len(operand_dims), [1] * len(operand_dims)
    for dim, place in zip(kept, sorted(window), strict=True):
        whole_sizes[dim] = view.whole_size(update_dims[place])
        sizes[dim] = view.size(update_dims[place])
    cut = {c: f for c, d in enumerate(chosen) if (f := view.cut(operand_dims[d])) is not None}
    here = {c: f for c, f in cut.items() if not any(f in dim for dim in update_dims)}
    limits = [view.whole_size(operand_dims[d]) - whole_sizes[d] for d in chosen]
    layout = _Layout(
        sizes,
        chosen,
        window,
        kept,
        dict(zip(batch, op.integers("scatter_indices_batching_dims"), strict=True)),
    )
    summed = [f for f in view.cuts if view.rule.factors[f].reduction == "sum"]
    counts = not summed or view.is_first(summed)

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        x, ids, updates = operands[0], operands[1].long(), operands[2]
        x = x if counts else torch.zeros_like(x)
        known = (
            torch.ones(ids.shape[:-1], dtype=torch.bool)
            if mode == "clip"
            else _between(ids, limits)
        )
        ids = _clipped(ids, limits)
        if here:
            ids, mine = _inside(view, operand_dims, chosen, ids, here)
            known = known & mine
        places = layout.places(ids, tuple(updates.shape))
        strides = [prod(x.shape[d + 1 :]) for d in range(x.dim())]
        lines = sum(
            (place * stride for place, stride in zip(places, strides, strict=True)),
            torch.zeros((), dtype=torch.long),
        )
        spare = x.numel()  # where what is left out goes
        lines = torch.where(layout.spread(known, updates.dim()), lines, spare).expand(updates.shape)
        flat = torch.cat([x.flatten(), x.new_zeros(1)])
        given = -updates if op.kind == "scatter-sub" else updates
        if how:
            flat = flat.scatter_reduce(0, lines.flatten(), given.flatten(), how)
        else:
            flat[lines.flatten()] = given.flatten()
        return [flat[:-1].reshape(x.shape)]

    return run


class _Layout:
    """Which elements of an operand the slices at ids are.

    Args:
        sizes: of a slice, in every dim of the operand.
        chosen: the operand's dims whose places ids say, one for each of their last dim.
        window: dims of the slices' array that are dims of a slice: in order, `kept` of the operand.
        batch: by dims of the operand of which each row has ids of its own, the dim of the ids.
    """

    def __init__(
        self, sizes: Sequence[int], chosen: Sequence[int], window: Sequence[int], kept: Sequence[int],
        batch: dict[int, int],
    ):  # fmt: skip
        self.sizes, self.chosen, self.batch = sizes, chosen, batch
        self.window, self.kept = sorted(window), kept

    def outer(self, rank: int) -> list[int]:
        """The dims of the slices' array that are dims of the ids."""
        return [d for d in range(rank) if d not in self.window]

    def spread(self, of_ids: Tensor, rank: int) -> Tensor:
        """A value for each slice, along the slices' array."""
        shape = [1] * rank
        for dim, size in zip(self.outer(rank), of_ids.shape, strict=True):
            shape[dim] = size
        return of_ids.reshape(shape)

    def places(self, ids: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """By dim of the operand, where the elements of an array of slices lie."""
        rank, outer = len(shape), self.outer(len(shape))
        found = []
        for dim, size in enumerate(self.sizes):
            place = torch.zeros([1] * rank, dtype=torch.long)
            if dim in self.chosen:
                place = place + self.spread(ids[..., self.chosen.index(dim)], rank)
            if dim in self.batch:
                at = outer[self.batch[dim]]
                place = place + torch.arange(shape[at]).reshape(
                    [-1 if d == at else 1 for d in range(rank)]
                )
            if dim in self.kept:
                at = self.window[list(self.kept).index(dim)]
                place = place + torch.arange(size).reshape(
                    [-1 if d == at else 1 for d in range(rank)]
                )
            found.append(place)
        if not found:
            return (torch.zeros(shape, dtype=torch.long),)
        return tuple(torch.broadcast_tensors(*found))


def _inside(
    view: View, dims: Sequence[Dim], chosen: Sequence[int], ids: Tensor, here: dict[int, int]
) -> tuple[Tensor, Tensor]:
    """Ids counted from this shard's part and brought into it; which of them were there."""
    columns, mine = list(ids.unbind(-1)), torch.ones(ids.shape[:-1], dtype=torch.bool)
    for c, factor in here.items():
        top = view.size(dims[chosen[c]]) - 1
        column = columns[c] - view.offset(factor)
        mine = mine & (column >= 0) & (column <= top)
        columns[c] = column.clamp(0, top)
    return torch.stack(columns, -1), mine


def _between(ids: Tensor, limits: Sequence[int]) -> Tensor:
    """Whether all of each are within 0..limit."""
    if not limits:
        return torch.ones(ids.shape[:-1], dtype=torch.bool)
    tops = torch.tensor(list(limits))
    return ((ids >= 0) & (ids <= tops)).all(-1)


def _clipped(ids: Tensor, limits: Sequence[int]) -> Tensor:
    tops = torch.tensor(list(limits), dtype=torch.long)
    return torch.minimum(ids.clamp(min=0), tops)


def _sort(op: Op, view: View) -> Run:
    """By the first operands, the very first most; what is equal stays in order."""
    dim, keys = op.integer("dimension"), op.integer("num_keys")

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        order = _order(operands[keys - 1], dim)
        for key in reversed(operands[: keys - 1]):
            order = order.gather(dim, _order(key.gather(dim, order), dim))
        return [x.gather(dim, order) for x in operands]

    return run


def _order(x: Tensor, dim: int) -> Tensor:
    return torch.sort(x, dim=dim, stable=True).indices


def _top_k(op: Op, view: View) -> Run:
    """Of equal ones the first."""
    axis, many, dtype = op.integer("axis"), op.integer("k"), view.dtypes[1]

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        found = torch.sort(operands[0], dim=axis, descending=True, stable=True)
        return [found.values.narrow(axis, 0, many), found.indices.narrow(axis, 0, many).to(dtype)]

    return run


INDEXING: dict[str, Callable[[Op, View], Run]] = {
    "gather": _gather, **dict.fromkeys(_UPDATES, _scatter), "sort": _sort, "top_k": _top_k,
}  # fmt: skip
