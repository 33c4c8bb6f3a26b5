"""One op without one of its dims: what it does to a single piece of a stack.

    reduce_sum [12, 8, 4] over dims 0, 2   for one of the 12   reduce_sum [8, 4] over dim 1
    dot_general [12, 8, 4] [12, 4, 2]      batched in dim 0    dot_general [8, 4] [4, 2]

A dim is known by its factor in the op's rule. Only parameters change; None says that this
op cannot lose a dim that way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...ir.graph import Op
from ...ir.ops import ELEMENTWISE
from ...ir.rules.rule import Rule

Params = dict[str, Any]
Places = tuple[int | None, ...]  # per tensor, where the dim lies


def places(rule: Rule, factor: int) -> tuple[Places, Places] | None:
    """Where a factor lies in operands and results; None if it shares a dim or lies there twice."""
    found = [
        [d for d, dim in enumerate(dims) if factor in dim]
        for dims in (*rule.operands, *rule.results)
    ]
    alone = all(
        dims[d] == (factor,)
        for dims, at in zip((*rule.operands, *rule.results), found, strict=True)
        for d in at
    )
    if not alone or any(len(at) > 1 for at in found):
        return None
    each = tuple(at[0] if at else None for at in found)
    return each[: len(rule.operands)], each[len(rule.operands) :]


def narrowed(
    op: Op, params: Params, ranks: tuple[int, ...], operands: Places, results: Places
) -> Params | None:
    """The parameters of `op` on operands (of these ranks) and results that have lost these dims."""
    if op.kind in ELEMENTWISE:
        whole = all(rank == 0 for rank, at in zip(ranks, operands, strict=True) if at is None)
        return params if whole else None
    writer = _WRITERS.get(op.kind)
    return writer(params, operands, results) if writer else None


def _shifted(name: str) -> Callable[[Params, Places, Places], Params | None]:
    """Parameters that number dims, one or several: those above the lost one move down."""

    def write(params: Params, operands: Places, results: Places) -> Params | None:
        lost = operands[0]
        if lost is None or any(at != lost for at in operands):
            return None
        dims = params[name]
        if isinstance(dims, int):
            return {**params, name: dims - (dims > lost)} if dims != lost else None
        return {**params, name: _without(dims, lost)}

    return write


def _without(dims: tuple[int, ...], lost: int) -> tuple[int, ...]:
    return tuple(d - (d > lost) for d in dims if d != lost)


def _drop(items: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    return (*items[:at], *items[at + 1 :])


def _broadcast_in_dim(params: Params, operands: Places, results: Places) -> Params | None:
    lost, made = operands[0], results[0]
    if made is None:
        return None
    dims = params["broadcast_dimensions"]
    kept = dims if lost is None else _drop(dims, lost)
    return {
        **params,
        "shape": _drop(params["shape"], made),
        "broadcast_dimensions": _without(kept, made),
    }


def _reshape(params: Params, operands: Places, results: Places) -> Params | None:
    made = results[0]
    if made is None or params["dimensions"] is not None:
        return None
    return {**params, "new_sizes": _drop(params["new_sizes"], made)}


def _transpose(params: Params, operands: Places, results: Places) -> Params | None:
    lost = operands[0]
    return (
        None if lost is None else {**params, "permutation": _without(params["permutation"], lost)}
    )


def _slice(params: Params, operands: Places, results: Places) -> Params | None:
    lost = operands[0]
    if lost is None:
        return None
    names = ("start_indices", "limit_indices", "strides")
    return {**params, **{n: _drop(params[n], lost) for n in names if params[n] is not None}}


def _pad(params: Params, operands: Places, results: Places) -> Params | None:
    lost = operands[0]
    return (
        None
        if lost is None
        else {**params, "padding_config": _drop(params["padding_config"], lost)}
    )


def _dot_general(params: Params, operands: Places, results: Places) -> Params | None:
    """A dim of both operands is a batched or a summed pair, a dim of one is free."""
    (summed, batch), at = params["dimension_numbers"], operands
    sides = ((summed[0], batch[0], at[0]), (summed[1], batch[1], at[1]))
    (sum_l, batch_l), (sum_r, batch_r) = (_side(*side) for side in sides)
    return {**params, "dimension_numbers": ((sum_l, sum_r), (batch_l, batch_r))}


def _side(summed: Any, batch: Any, lost: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if lost is None:
        return tuple(summed), tuple(batch)
    return _without(tuple(summed), lost), _without(tuple(batch), lost)


_WRITERS: Mapping[str, Callable[[Params, Places, Places], Params | None]] = {
    **{
        f"reduce_{name}": _shifted("axes")
        for name in ("sum", "max", "min", "and", "or", "prod", "xor")
    },
    **{name: _shifted("axes") for name in ("argmax", "argmin")},
    **{
        name: _shifted("axis")
        for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "split")
    },
    "squeeze": _shifted("dimensions"),
    "rev": _shifted("dimensions"),
    "sort": _shifted("dimension"),
    "concatenate": _shifted("dimension"),
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "pad": _pad,
    "dot_general": _dot_general,
}
