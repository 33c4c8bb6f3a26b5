"""Identities over several values."""

from __future__ import annotations

from .factors import Factors, OpCall, require, rule_for
from .rule import Rule


@rule_for("optimization_barrier", "device_put")
def identity(call: OpCall) -> Rule:
    """Each operand passes through. A move to a device the user named is not ours to cut."""
    devices = call.attrs.get("devices", ())
    require(devices == () or (isinstance(devices, tuple) and set(devices) == {None}))
    factors = Factors()
    dims = [factors.like(kind.shape) for kind in call.operands]
    return factors.rule(dims, dims, call.linear)
