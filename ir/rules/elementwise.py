"""Ops that work element by element, with scalar and size-1 operands broadcast."""

from __future__ import annotations

from ..ops import ELEMENTWISE
from .factors import Dims, Factors, OpCall, require, rule_for
from .rule import Rule


@rule_for(*ELEMENTWISE)
def elementwise(call: OpCall) -> Rule:
    factors = Factors()
    shape = call.results[0].shape
    dims = factors.like(shape)
    operands = [broadcast_dims(dims, kind.shape, shape) for kind in call.operands]
    require(all(result.shape == shape for result in call.results))
    return factors.rule(operands, [dims] * len(call.results), call.linear)


@rule_for("bitcast_convert_type")
def bitcast(call: OpCall) -> Rule:
    """Between types of equal width; otherwise a trailing dim comes or goes."""
    operand, result = call.operands[0].shape, call.results[0].shape
    common = min(len(operand), len(result))
    require(operand[:common] == result[:common])
    factors = Factors()
    shared = factors.like(operand[:common])
    tails = [factors.wholes(shape[common:]) for shape in (operand, result)]
    return factors.rule([shared + tails[0]], [shared + tails[1]])


def broadcast_dims(dims: Dims, shape: tuple[int, ...], to: tuple[int, ...]) -> Dims:
    """Dims of an operand that is a scalar or has size 1 where it is repeated."""
    if not shape:
        return ()
    require(len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True)))
    return tuple(
        dim if size == full else () for dim, size, full in zip(dims, shape, to, strict=True)
    )
