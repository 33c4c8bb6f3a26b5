"""Keys of random numbers are made before anything else.

A layer with dropout makes a key of its own, `fold_in(key, 7)` or `keys[7]`: the only ops in which it differs from other
layers. Made at the start of the step, they leave layers alike, which are then planned once (`blocks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..graph import Graph, Op, TensorType
from ..ops import KERNELS, RANDOM

_DRAWS = RANDOM & KERNELS  # of numbers; other random kinds turn keys
_WORDS = frozenset({"key", "s32", "u32", "s64", "u64"})
_MOST = 4096  # elements: keys of many layers, not counters of many numbers


def with_keys_first(graph: Graph) -> Graph:
    """The graph with what inputs alone make keys of at its start, in the same order."""
    keys = set(_made_for_draws(graph))
    known = {*graph.inputs, *graph.constant_ids}
    first: list[Op] = []
    for op in graph.ops:
        if keys.issuperset(op.outputs) and known.issuperset(op.inputs):
            known.update(op.outputs)
            first.append(op)
    if not first:
        return graph
    moved = {op.outputs for op in first}
    return replace(graph, ops=(*first, *(op for op in graph.ops if op.outputs not in moved)))


def _made_for_draws(graph: Graph) -> Iterator[int]:
    """Keys that numbers are drawn with, and whole numbers that such keys are made of."""
    wanted: set[int] = set()
    for op in reversed(graph.ops):
        makes = [v for v in op.outputs if v in wanted and _is_key(graph.types[v])]
        yield from makes
        if op.kind in _DRAWS or makes:
            wanted.update(op.inputs)


def _is_key(kind: TensorType) -> bool:
    return kind.dtype in _WORDS and kind.size <= _MOST
