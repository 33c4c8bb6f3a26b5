"""Sorting and selecting along one dim; the others are independent."""

from __future__ import annotations

from .factors import Factors, OpCall, rule_for
from .rule import Rule


@rule_for("sort")
def sort(call: OpCall) -> Rule:
    axis = call.integer("dimension")
    factors = Factors()
    dims = tuple(
        factors.whole(size) if d == axis else factors.new(size)
        for d, size in enumerate(call.operands[0].shape)
    )
    return factors.rule([dims] * len(call.operands), [dims] * len(call.results))


@rule_for("top_k", "approx_top_k")
def top_k(call: OpCall) -> Rule:
    rank = call.operands[0].rank
    name = "axis" if call.kind == "top_k" else "reduction_dimension"
    axis = call.integer(name) % rank if name in call.attrs else rank - 1
    factors = Factors()
    operand = tuple(
        factors.whole(size) if d == axis else factors.new(size)
        for d, size in enumerate(call.operands[0].shape)
    )
    kept = factors.whole(call.results[0].shape[axis])
    result = tuple(kept if d == axis else dim for d, dim in enumerate(operand))
    return factors.rule([operand], [result, result])
