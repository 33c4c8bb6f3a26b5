"""Identities over several values."""

from __future__ import annotations

from .factors import Factors, OpCall, rule_for
from .rule import Rule


@rule_for("optimization_barrier")
def identity(call: OpCall) -> Rule:
    """Each operand passes through."""
    factors = Factors()
    dims = [factors.like(kind.shape) for kind in call.operands]
    return factors.rule(dims, dims, call.linear)
