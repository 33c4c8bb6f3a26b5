"""Small all-reduces that are ready together become one.

    %5: f32[8] @ [-] = all_reduce %1 (axes=('x',), reduction='sum') in update
    %6: f32[8] @ [-] = sub %3 %5                                    in update
    %7: f32[4] @ [-] = all_reduce %2 (axes=('x',), reduction='sum') in update

    %5: f32[8] @ [-], %7: f32[4] @ [-] = all_reduce %1 %2 (axes=('x',), reduction='sum') in update
    %6: f32[8] @ [-] = sub %3 %5                                    in update

A collective may run anywhere between the op that makes its operand and the first that reads its result. Those of equal
axes, reduction, element type and phase whose ranges have a place in common, within one region, are ready together; they
run at the latest such place, before the first reader of any. So nothing waits for a value that is made after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..local.program import LocalOp, LocalProgram
from .contract import Pass

# Bytes of a device's operand up to which it joins others. A backend lays operands end to end: two copies, and memory
# for one more of each, against one meeting of devices less. 32 all-reduces on 8 emulated devices, each by itself (or in
# XLA's one op of 32 operands, which is as slow) and end to end: 4.6 and 1.0 ms of 256 B, 7.1 and 2.1 of 16 KiB, 9.5 and
# 6.3 of 64 KiB, 58 and 191 of 512 KiB (`benchmarks/coalescing.py`, 2 cores, jax 0.10.2). With 64 KiB as the limit the
# update of a stage of gpt-tiny took 14 % more memory; with 16 KiB it takes what it took. Not measured on GPUs.
SMALL = 2**14


class Coalesce(Pass):
    """One all-reduce for several of the same kind."""

    name = "coalesce"

    def run(self, program: LocalProgram) -> LocalProgram:
        return replace(program, ops=_coalesced(program, program.ops))


def _coalesced(program: LocalProgram, ops: Sequence[LocalOp]) -> tuple[LocalOp, ...]:
    """Ops of one region, and of those inside it. Kind by kind, so that ops of the kind at hand are the only ones to
    move: none reads another's result, which owes nothing over their axes."""
    found = tuple(
        replace(op, regions=tuple(replace(r, ops=_coalesced(program, r.ops)) for r in op.regions))
        for op in ops
    )
    for kind in dict.fromkeys(_kind(program, op) for op in found):
        if kind is not None:
            found = _joined(found, [op for op in found if _kind(program, op) == kind])
    return found


def _kind(program: LocalProgram, op: LocalOp) -> tuple[object, ...] | None:
    """What ops that become one have in common; None for ops that stay as they are."""
    if op.kind != "all_reduce" or len(op.inputs) != 1:
        return None
    operand = program.local(op.inputs[0])
    if operand.nbytes > SMALL:
        return None
    return op.attrs, operand.dtype, op.phase, op.count


def _joined(ops: Sequence[LocalOp], alike: Sequence[LocalOp]) -> tuple[LocalOp, ...]:
    """The ops with those of `alike` that are ready together as one op, in front of the first reader."""
    made = {v: i for i, op in enumerate(ops) for v in op.outputs}
    reader = {v: i for i, op in reversed([*enumerate(ops)]) for v in reads(op)}
    waiting = sorted(alike, key=lambda op: _first(op, reader, len(ops)))
    gone, put = set[int](), dict[int, LocalOp]()
    while waiting:
        place = _first(waiting[0], reader, len(ops))
        ready, late = list[LocalOp](), list[LocalOp]()
        for op in waiting:
            (ready if made.get(op.inputs[0], -1) < place else late).append(op)
        if len(ready) > 1:
            gone.update(op.outputs[0] for op in ready)
            put[place] = one_of(ready)
        waiting = late
    found = list[LocalOp]()
    for i, op in enumerate(ops):
        found += [put[i]] if i in put else []
        found += [op] if gone.isdisjoint(op.outputs) else []
    return (*found, *([put[len(ops)]] if len(ops) in put else []))


def _first(op: LocalOp, reader: dict[int, int], end: int) -> int:
    """Where the result is first read, or the end."""
    return reader.get(op.outputs[0], end)


def reads(op: LocalOp) -> set[int]:
    """Values that must be there before an op: its operands, and of those around it what its regions read."""
    inside = (v for region in op.regions for each in region.ops for v in reads(each))
    return {*op.inputs, *inside, *(v for region in op.regions for v in region.outputs)}


def one_of(ops: Sequence[LocalOp]) -> LocalOp:
    """In the order of their first readers, named after the first."""
    first, more = ops[0], f" and {len(ops) - 1} more"
    return replace(
        first,
        inputs=tuple(v for op in ops for v in op.inputs),
        outputs=tuple(v for op in ops for v in op.outputs),
        where="",
        tag="",
        source=first.source and first.source + more,
        reader=(first.reader or first.tag) + more,
    )
