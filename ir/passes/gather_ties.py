"""Which gathers wait for which value of their pass: each for the one that its first reader takes beside it.

    forward    %w' = all_gather %w      %a = dot %x %w'       the gather waits for %x
    backward   %w'' = all_gather %w     %d = dot %g %w''      and this one for %g

Untied, XLA sees one gather computed twice and keeps the first for the backward pass, or makes all at the start of
the step, as they need nothing else: a plan that gathers in each pass would hold every weight whole at once. What the
forward pass made and both gather is the same.

This is for devices where nothing is sent beside compute (CPUs): elsewhere a gather that waits for its own reader could
not begin before that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..graph import Op
from ..program import Program

LONGEST = 4  # unary ops between a copy and who reads it with something else


@dataclass(frozen=True, slots=True)
class Tie:
    """Of an op or loop: what it reads that was there before its pass, and the value that gathers of that wait for."""

    given: tuple[int, ...]
    beside: int


def ties(program: Program) -> dict[int, Tie]:
    """By the first result of the op. Given are weights, and to the backward pass what the forward pass made."""
    graph, found = program.graph, dict[int, Tie]()
    passes = list(zip(graph.ops, program.phases, strict=True))
    forward, backward = (
        [op for op, phase in passes if phase == name] for name in ("forward", "backward")
    )
    given = {*graph.inputs, *graph.constant_ids}
    given.update(v for op, phase in passes if phase == "prepare" for v in op.outputs)
    _look(forward, set(given), set(), found)
    given.update(v for op in forward for v in op.outputs)
    _look(backward, given, set(), found)
    return found


def _look(ops: Sequence[Op], given: set[int], known: set[int], found: dict[int, Tie]) -> None:
    """`given` learns copies of it; `known` is there besides, as what a loop carries on."""
    readers: dict[int, Op] = {}
    for op in reversed(ops):
        readers.update(dict.fromkeys(op.inputs, op))
    sources = {op.outputs[0]: op.inputs[0] for op in ops if op.kind == "copy"}
    for op in ops:
        for region in op.regions:
            consts, carry = op.loop_inputs
            carried = {*region.inputs[consts : consts + carry]}
            _look(region.ops, {*region.inputs} - carried, carried, found)
        if not given.isdisjoint(op.inputs):
            if op.kind == "copy":
                given.update(op.outputs)
            beside = (v if v in known else sources.get(v, v) for v in _beside(op, readers, given))
            first = next((v for v in beside if v in known), None)
            if first is not None:
                found[op.outputs[0]] = Tie(tuple(v for v in op.inputs if v in given), first)
        known.update(op.outputs)


def _beside(op: Op, readers: Mapping[int, Op], given: Collection[int]) -> list[int]:
    """What the op, or the first reader of its result, takes beside what is given."""
    for _ in range(LONGEST):
        others = [v for v in op.inputs if v not in given]
        if others or op.outputs[0] not in readers:
            return others
        op = readers[op.outputs[0]]
    return []
