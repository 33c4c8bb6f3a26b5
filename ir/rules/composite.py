"""Composites: ops that stand for a graph, and say themselves what may be cut (see `ir/composites/attention_op.py`)."""

from __future__ import annotations

from dataclasses import replace

from ..composites.bodies import LOSS
from ..composites.evenly import divides, is_uneven
from ..ops import COMPOSITES
from .factors import Dims, Factors, OpCall, Reduction, attr_tuple, integers, rule_for
from .rule import Dim, Joint, Rule


@rule_for(*COMPOSITES)
def composite(call: OpCall) -> Rule:
    """Attrs `operands` and `results` tell each dim as numbers of free dims, of these `sizes`; other dims are whole.
    So is one of keys, which is numbered after those where blocks of it are told apart.

    q [b, h, t, -] k [b, h, s, -] v [b, h, s, -] -> o [b, h, t, -]
    q, k, v, do -> dq [b, h, t, -] dk [b, h, s, -] dv     t is summed over where a gradient has none of it
    hidden [b, t, -] weight [-, v] labels [b, t] -> loss [b, t]    what is made of all classes is made of them inside
    """
    sizes = call.integers("sizes")
    sides = (*attr_tuple(call.attrs["operands"]), *attr_tuple(call.attrs["results"]))
    told = [tuple(map(integers, attr_tuple(dims))) for dims in sides]
    results = told[len(call.operands) :]
    summed = {
        f for f in range(len(sizes)) if any(all(f not in dim for dim in dims) for dims in results)
    }
    inside = call.attrs.get("vocabulary") if call.kind == LOSS else None
    how: list[Reduction] = [
        "inside" if f == inside else "sum" if f in summed else "" for f in range(len(sizes))
    ]
    factors = Factors()
    free = [factors.new(size, reduction) for size, reduction in zip(sizes, how, strict=True)]
    named = [*free, factors.whole(call.integer("keys"))] if "ring" in call.attrs else free
    kinds = (*call.operands, *call.results)
    dims = [_dims(factors, named, dims, kind.shape) for dims, kind in zip(told, kinds, strict=True)]
    many = len(call.operands)
    linear = tuple(map(integers, attr_tuple(call.attrs["linear"])))
    rule = factors.rule(dims[:many], dims[many:], linear)
    return replace(rule, joints=(*_even(call, rule, free), *_ring(call, rule, named)))


def _even(call: OpCall, rule: Rule, free: list[Dim]) -> tuple[Joint, ...]:
    """Rows whose keys are more for some than for others may be dealt out in halves."""
    if not is_uneven(call.attrs) or "round" in call.attrs:
        return ()
    (rows,) = free[call.integer("rows")]
    size = rule.factors[rows].size
    return (Joint("even", (rows,), size // 2),) if size % 2 == 0 else ()


def _ring(call: OpCall, rule: Rule, named: list[Dim]) -> tuple[Joint, ...]:
    """Rows may be cut together with keys, which then go round the devices."""
    if "ring" not in call.attrs:
        return ()
    (rows,), (keys,) = named[call.integer("ring")], named[-1]
    return (Joint("ring", (rows, keys), divides(call.attrs, rule.factors[rows].size)),)


def _dims(
    factors: Factors, named: list[Dim], told: tuple[tuple[int, ...], ...], shape: tuple[int, ...]
) -> Dims:
    return tuple(
        tuple(f for n in dim for f in named[n])
        if dim and max(dim) < len(named)
        else factors.whole(size)
        for dim, size in zip(told, shape, strict=True)
    )
