"""The dim rule of every op: `rule_of(op, types)`.

One file per family; each registers its kinds. An unknown kind, or a known one
with parameters its family does not cover, gets an opaque all-whole rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod

from ..attrs import Attr
from ..graph import Op, TensorType
from . import (
    composite,
    contraction,
    elementwise,
    indexing,
    linalg,
    misc,
    random,
    reduction,
    shape,
    sort,
    user_kernel,
)
from .factors import NUMBERS, OWING, WRITERS, Dims, OpCall, Unusual, opaque_rule
from .rule import Rule

__all__ = ["rule_of", "vocabulary"]

_FAMILIES = (
    composite,
    contraction,
    elementwise,
    indexing,
    linalg,
    misc,
    random,
    reduction,
    shape,
    sort,
    user_kernel,
)


def rule_of(op: Op, types: Mapping[int, TensorType]) -> Rule:
    """The op's rule; never an error. Ops with regions (loops, branches) are opaque."""
    operands = tuple(types[value] for value in op.inputs)
    results = tuple(types[value] for value in op.outputs)
    if op.regions:
        return opaque_rule(operands, results)
    return _rule(op.kind, op.attrs, operands, results)


def vocabulary() -> frozenset[str]:
    """The kinds that have a rule."""
    return frozenset(WRITERS)


@lru_cache(maxsize=1 << 16)
def _rule(
    kind: str,
    attrs: tuple[tuple[str, Attr], ...],
    operands: tuple[TensorType, ...],
    results: tuple[TensorType, ...],
) -> Rule:
    call = OpCall(kind, dict(attrs), operands, results)
    try:
        rule = _written(call)
    except (Unusual, LookupError):  # LookupError: an attr or a dim this jax does not have
        return opaque_rule(operands, results)
    return replace(rule, linear=_float_only(rule, call))


def _written(call: OpCall) -> Rule:
    if call.kind not in WRITERS:
        raise Unusual
    rule = WRITERS[call.kind](call)
    if not (_fits(rule, rule.operands, call.operands) and _fits(rule, rule.results, call.results)):
        raise Unusual
    sums = any(factor.reduction == "sum" for factor in rule.factors)
    if sums and any(kind.dtype not in NUMBERS for kind in call.results):
        raise Unusual
    return rule


def _fits(rule: Rule, dims: tuple[Dims, ...], kinds: tuple[TensorType, ...]) -> bool:
    """Whether the factors of every dim multiply to its size."""
    return len(dims) == len(kinds) and all(
        tuple(prod(rule.factors[f].size for f in dim) for dim in tensor) == kind.shape
        for tensor, kind in zip(dims, kinds, strict=True)
    )


def _float_only(rule: Rule, call: OpCall) -> tuple[tuple[int, ...], ...]:
    """Sums are owed by floats only, of two bytes or more: drop alternatives that touch anything else."""
    if any(kind.dtype not in OWING for kind in call.results):
        return ()
    return tuple(
        operands
        for operands in rule.linear
        if operands and all(call.operands[o].dtype in OWING for o in operands)
    )
