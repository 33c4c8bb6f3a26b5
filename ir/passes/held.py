"""What barriers hold back: values that exist per microbatch, and nothing else.

    %5 %6 = optimization_barrier %x %w      %x is of one microbatch, %w a weight
    %5 = optimization_barrier %x            readers of %6 read %w

`jax.checkpoint` puts everything that its backward pass reads behind one barrier: activations, the
cotangent, weights, masks. What the barrier is for, that nothing is computed again too early, the activations
see to alone. A weight behind it would be a value that is made for every microbatch and is the same in all, its copies
in both passes would have nothing to do with each other, and on a pipeline it would wait for others' gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ..graph import Graph, Op
from .microbatch import TimeAxis, time_axis

BARRIER = "optimization_barrier"


def hold_microbatches(graph: Graph, batch: Mapping[int, int]) -> Graph:
    """Let pass by the barriers outside loops what is the same for every microbatch; `batch` gives input
    position -> batch dim. A barrier that holds less than before has a tag that says what."""
    if not any(op.kind == BARRIER for op in graph.ops):
        return graph
    kept = _per_microbatch(graph, batch)
    names: dict[int, int] = {}
    ops: list[Op] = []
    for op in graph.ops:
        found = replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))
        if op.kind == BARRIER:
            names |= {r: v for v, r in zip(found.inputs, op.outputs, strict=True) if r not in kept}
            found = _holding(found, kept)
        ops += [found] if found.outputs else []
    return replace(graph, ops=tuple(ops), outputs=tuple(names.get(v, v) for v in graph.outputs))


def _per_microbatch(graph: Graph, batch: Mapping[int, int]) -> Collection[int]:
    """Values cut over time or, where nothing can be, those that the batch has any part in."""
    axis = time_axis(graph, batch)
    if isinstance(axis, TimeAxis):
        return axis.split.keys()
    found = {graph.inputs[p] for p in batch}
    for op in graph.ops:
        if op.kind == BARRIER:
            found.update(r for v, r in zip(op.inputs, op.outputs, strict=True) if v in found)
        elif not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return found


def _holding(op: Op, kept: Collection[int]) -> Op:
    pairs = [
        (v, r, k) for k, (v, r) in enumerate(zip(op.inputs, op.outputs, strict=True)) if r in kept
    ]
    if len(pairs) == len(op.outputs):
        return op
    tag = f"{op.tag}~holds{'.'.join(str(k) for _, _, k in pairs)}" if op.tag else ""
    return replace(
        op, inputs=tuple(v for v, _, _ in pairs), outputs=tuple(r for _, r, _ in pairs), tag=tag
    )
