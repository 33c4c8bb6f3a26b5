"""gather and scatter: which dims pass through, which are looked up.

In a gather every operand dim is one of

    batching   shared with an index dim (take_along_axis)         parallel
    full       its slice is the whole dim                         parallel
    looked up  its slice is 1 and an index column chooses it      reduced by sum
    other      a longer slice, or a fixed one                     whole

A cut looked-up dim works by masking: each shard answers the ids that fall in
its part and 0 elsewhere, so exactly one shard contributes. In a scatter the
dim chosen by an index is parallel: each shard drops the ids outside its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan

from ..attrs import number
from .factors import INTEGERS, NUMBERS, Factors, OpCall, Reduction, require, rule_for
from .rule import Dim, Rule

# What an index out of range does: the nearest place is taken, nothing is (a look-up is filled), or there is none.
_MODES = {"clip", "fill_or_drop", "promise_in_bounds"}
_SCATTERED: dict[str, Reduction] = {
    "scatter-add": "sum",
    "scatter-sub": "sum",
    "scatter-max": "max",
    "scatter-min": "min",
}


@dataclass(frozen=True, slots=True)
class Window:
    """Dimension numbers under names that gather and scatter share.

    `slices[d]` is how much of operand dim d one index takes; `window[d]` is where that
    slice lies in the other tensor (gather's result, scatter's updates), if it appears there.
    """

    slices: tuple[int, ...]
    window: dict[int, int]
    chosen: tuple[int, ...]  # operand dim of each index column
    batching: dict[int, int]  # operand dim -> index dim
    index_rank: int  # without the column dim

    def rest(self, rank: int) -> list[int]:
        """Dims of the other tensor that come from the index, in order."""
        inside = set(self.window.values())
        return [d for d in range(rank) if d not in inside]


_GATHER = (
    "offset_dims", "collapsed_slice_dims", "start_index_map", "operand_batching_dims", "start_indices_batching_dims",
)  # fmt: skip
_SCATTER = (
    "update_window_dims", "inserted_window_dims", "scatter_dims_to_operand_dims", "operand_batching_dims",
    "scatter_indices_batching_dims",
)  # fmt: skip


def gather_window(call: OpCall) -> Window:
    offsets, collapsed, chosen, batching, index_batching = map(call.integers, _GATHER)
    gone = {*collapsed, *batching}
    kept = [d for d in range(call.operands[0].rank) if d not in gone]
    window = dict(zip(kept, sorted(offsets), strict=True))
    pairs = dict(zip(batching, index_batching, strict=True))
    return Window(call.integers("slice_sizes"), window, chosen, pairs, call.operands[1].rank - 1)


def scatter_window(call: OpCall) -> Window:
    offsets, inserted, chosen, batching, index_batching = map(call.integers, _SCATTER)
    gone = {*inserted, *batching}
    kept = [d for d in range(call.operands[0].rank) if d not in gone]
    window = dict(zip(kept, sorted(offsets), strict=True))
    updates = call.operands[2].shape
    slices = tuple(updates[window[d]] if d in window else 1 for d in range(call.operands[0].rank))
    pairs = dict(zip(batching, index_batching, strict=True))
    return Window(slices, window, chosen, pairs, call.operands[1].rank - 1)


@rule_for("gather")
def gather(call: OpCall) -> Rule:
    require(call.attrs["mode"] in _MODES and call.operands[1].dtype in INTEGERS)
    factors = Factors()
    window = gather_window(call)
    index = factors.like(call.operands[1].shape[:-1])
    looked_up: Reduction = "sum" if call.operands[0].dtype in NUMBERS else ""
    operand, result = _operand_dims(factors, call, window, index, call.results[0].shape, looked_up)
    columns = factors.whole(call.operands[1].shape[-1])
    return factors.rule(
        [operand, (*index, columns)], [result], call.linear if _fills_zero(call) else ()
    )


def _fills_zero(call: OpCall) -> bool:
    """Whether an id out of range yields something that adds up to itself over shards."""
    given = call.attrs.get("fill_value")
    fill = nan if given is None else number(given)
    return call.attrs["mode"] != "fill_or_drop" or (fill is not None and (fill == 0 or isnan(fill)))


@rule_for("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-max", "scatter-min")
def scatter(call: OpCall) -> Rule:
    """Index dims of a sum are reduced: the first shard keeps the operand, the others start from 0.
    For max and min all keep it. Setting and multiplying have no such reduction: whole."""
    require(call.attrs["mode"] in _MODES and call.operands[1].dtype in INTEGERS)
    require("update" not in call.attrs)
    factors = Factors()
    window = scatter_window(call)
    reduction = _SCATTERED.get(call.kind, "")
    if call.operands[0].dtype not in NUMBERS:
        reduction = ""
    batched = set(window.batching.values())
    index = tuple(
        factors.new(size)
        if d in batched
        else factors.new(size, reduction)
        if reduction
        else factors.whole(size)
        for d, size in enumerate(call.operands[1].shape[:-1])
    )
    operand, updates = _operand_dims(
        factors, call, window, index, call.operands[2].shape, "parallel"
    )
    columns = factors.whole(call.operands[1].shape[-1])
    return factors.rule([operand, (*index, columns), updates], [operand], call.linear)


def _operand_dims(
    factors: Factors,
    call: OpCall,
    window: Window,
    index: Sequence[Dim],
    other: tuple[int, ...],
    looked_up: str,
) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Dims of the operand, and of the tensor that index dims and windows make up."""
    dims: list[Dim] = []
    others: dict[int, Dim] = dict(zip(window.rest(len(other)), index, strict=True))
    for d, size in enumerate(call.operands[0].shape):
        full = window.slices[d] == size
        if d in window.batching:
            dims.append(index[window.batching[d]])
        elif d in window.window and full:
            dims.append(factors.new(size))
            others[window.window[d]] = dims[-1]
        else:
            chosen = window.slices[d] == 1 and window.chosen.count(d) == 1
            dims.append(_looked_up(factors, size, looked_up if chosen else ""))
            if d in window.window:
                others[window.window[d]] = factors.whole(window.slices[d])
    return tuple(dims), tuple(others[d] for d in range(len(other)))


def _looked_up(factors: Factors, size: int, how: str) -> Dim:
    if how == "parallel":
        return factors.new(size)
    return factors.new(size, "sum") if how == "sum" else factors.whole(size)
