"""Which branch of a choice does most work: the one that a plan counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ..graph import Op, Region, TensorType
from ..ops import CONTRACTIONS
from ..rules import rule_of

INTENSITY = (
    100.0  # operations in the time that an element takes to memory: 1 TFLOP/s per 10 G elements/s
)


def dearest(branches: Sequence[Region], types: Mapping[int, TensorType]) -> int:
    """The number of the branch with most operations and elements made; the first of equals."""
    return max(range(len(branches)), key=lambda number: _work(branches[number].ops, types))


def _work(ops: Sequence[Op], types: Mapping[int, TensorType]) -> float:
    return sum(_of(op, types) for op in ops)


def _of(op: Op, types: Mapping[int, TensorType]) -> float:
    if op.regions:
        return sum(op.runs(n) * _work(region.ops, types) for n, region in enumerate(op.regions))
    made = INTENSITY * sum(types[v].size for v in op.outputs)
    if op.kind not in CONTRACTIONS:
        return made
    return made + 2.0 * prod(factor.size for factor in rule_of(op, types).factors)
