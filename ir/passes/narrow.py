"""One op without one of its dims: what it does to a single piece of a stack.

    reduce_sum [12, 8, 4] over dims 0, 2   for one of the 12   reduce_sum [8, 4] over dim 1
    dot_general [12, 8, 4] [12, 4, 2]      batched in dim 0    dot_general [8, 4] [4, 2]

A dim is known by its factor in the op's rule. Only attributes change; None says that this
op cannot lose a dim that way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from ..attrs import Attr
from ..graph import Op
from ..ops import ELEMENTWISE
from ..rules.rule import Rule

Attrs = tuple[tuple[str, Attr], ...]
Changes = dict[str, Attr]
T = TypeVar("T")
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


def narrowed(op: Op, ranks: tuple[int, ...], operands: Places, results: Places) -> Attrs | None:
    """The attributes of `op` on operands (of these ranks) and results that have lost these dims."""
    if op.kind in ELEMENTWISE:
        whole = all(rank == 0 for rank, at in zip(ranks, operands, strict=True) if at is None)
        return op.attrs if whole else None
    writer = _WRITERS.get(op.kind)
    changes = writer(op, operands, results) if writer else None
    if changes is None:
        return None
    return tuple((name, changes.get(name, value)) for name, value in op.attrs)


def _shifted(name: str) -> Callable[[Op, Places, Places], Changes | None]:
    """An attribute that numbers dims, one or several: those above the lost one move down."""

    def write(op: Op, operands: Places, results: Places) -> Changes | None:
        lost = operands[0]
        if lost is None or any(at != lost for at in operands):
            return None
        dims = op.attr(name)
        if isinstance(dims, int):
            return {name: dims - (dims > lost)} if dims != lost else None
        return {name: _without(op.integers(name), lost)}

    return write


def _without(dims: tuple[int, ...], lost: int) -> tuple[int, ...]:
    return tuple(d - (d > lost) for d in dims if d != lost)


def _drop(items: tuple[T, ...], at: int) -> tuple[T, ...]:
    return (*items[:at], *items[at + 1 :])


def _broadcast_in_dim(op: Op, operands: Places, results: Places) -> Changes | None:
    lost, made = operands[0], results[0]
    if made is None:
        return None
    dims = op.integers("broadcast_dimensions")
    kept = dims if lost is None else _drop(dims, lost)
    return {
        "shape": _drop(op.integers("shape"), made),
        "broadcast_dimensions": _without(kept, made),
    }


def _reshape(op: Op, operands: Places, results: Places) -> Changes | None:
    made = results[0]
    if made is None or op.has("dimensions"):
        return None
    return {"new_sizes": _drop(op.integers("new_sizes"), made)}


def _transpose(op: Op, operands: Places, results: Places) -> Changes | None:
    lost = operands[0]
    return None if lost is None else {"permutation": _without(op.integers("permutation"), lost)}


def _slice(op: Op, operands: Places, results: Places) -> Changes | None:
    lost = operands[0]
    if lost is None:
        return None
    names = ("start_indices", "limit_indices", "strides")
    return {n: _drop(op.integers(n), lost) for n in names if op.has(n)}


def _pad(op: Op, operands: Places, results: Places) -> Changes | None:
    lost = operands[0]
    return None if lost is None else {"padding_config": _drop(op.items("padding_config"), lost)}


def _dot_general(op: Op, operands: Places, results: Places) -> Changes | None:
    """A dim of both operands is a batched or a summed pair, a dim of one is free."""
    return {
        name: _without(op.integers(name), lost)
        for side, lost in zip(("lhs", "rhs"), operands, strict=True)
        if lost is not None
        for name in (f"{side}_contracting", f"{side}_batch")
    }


_WRITERS: Mapping[str, Callable[[Op, Places, Places], Changes | None]] = {
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
