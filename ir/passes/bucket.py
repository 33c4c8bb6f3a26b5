"""Collectives of gradients and of new parameters travel in buckets, each as soon as it is full.

    %5: f32[8] @ [-] = all_reduce %1 (axes=('x',), reduction='sum') in update
    %2: f32[4] @ [-] partial x = dot_general %0 %3                  in backward

    %2: f32[4] @ [-] partial x = dot_general %0 %3                  in backward
    %5: f32[8] @ [-], %6: f32[4] @ [-] = all_reduce %1 %2 (axes=('x',), reduction='sum') in update

Of collectives of the update that agree in kind, axes, dim and element type, those join whose operands are all made
before any result is read, in the order in which these are made, up to the size of a bucket; large ones stay alone. Each
stands behind the op that makes its last operand, so that a backend that does not wait for it computes meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..local.program import LocalOp, LocalProgram
from .coalesce import one_of, reads
from .contract import Pass

# Bytes of the larger sides of a bucket's members. PyTorch's DDP has the same: 25 MiB, and 1 MiB for the first, so that
# communication begins early (Li et al., VLDB 13(12), 2020, section 3.2.3; torch.nn.parallel.distributed).
FIRST, SIZE = 2**20, 25 * 2**20
# Bytes up to which a collective joins others. Operands are laid end to end, a copy that each by itself needs too, as a
# collective may write over what it is given. 16 all-reduces over gloo, each by itself and as one, on 4 ranks: 240 and
# 12 ms of 4 KiB, 126 and 16 of 256 KiB, 205 and 83 of 1 MiB, 203 and 654 of 4 MiB; on 2 ranks: 12 and 0.7, 30 and 8,
# 55 and 28, 78 and 276 (2 cores of an EPYC that others used too, torch 2.13). Not measured on GPUs.
LARGEST = 2**20
_KINDS = ("all_reduce", "reduce_scatter", "all_gather")


class Bucket(Pass):
    """Few collectives in place of many, of what is made one after another."""

    name = "bucket"

    def run(self, program: LocalProgram) -> LocalProgram:
        return replace(program, ops=_bucketed(program, program.ops))


@dataclass
class _Filling:
    """A bucket that is not closed yet: behind op `place`, in front of op `reader`."""

    place: int
    reader: int
    nbytes: int
    ops: list[LocalOp] = field(default_factory=list[LocalOp])


def _bucketed(program: LocalProgram, ops: Sequence[LocalOp]) -> tuple[LocalOp, ...]:
    """Ops of one region, and of those inside it."""
    ops = [
        replace(op, regions=tuple(replace(r, ops=_bucketed(program, r.ops)) for r in op.regions))
        for op in ops
    ]
    gone, behind = set[int](), dict[int, list[LocalOp]]()
    for bucket in _buckets(program, ops):
        gone.update(v for op in bucket.ops for v in op.outputs)
        joined = bucket.ops[0] if len(bucket.ops) == 1 else one_of(bucket.ops)
        behind.setdefault(bucket.place, []).append(joined)
    found = [*behind.get(-1, ())]
    for number, op in enumerate(ops):
        found += [op] if gone.isdisjoint(op.outputs) or not op.outputs else []
        found += behind.get(number, ())
    return tuple(found)


def _buckets(program: LocalProgram, ops: Sequence[LocalOp]) -> Iterator[_Filling]:
    made = {v: number for number, op in enumerate(ops) for v in op.outputs}
    reader = {v: number for number, op in reversed([*enumerate(ops)]) for v in reads(op)}
    candidates = [
        (max(made.get(v, -1) for v in op.inputs), op)
        for op in ops
        if op.kind in _KINDS and op.phase == "update"
    ]
    open_: dict[object, _Filling] = {}
    first = set[object]()
    for place, op in sorted(candidates, key=lambda each: each[0]):
        kind = (op.kind, op.attrs, program.local(op.inputs[0]).dtype, op.count)
        until = min(reader.get(v, len(ops)) for v in op.outputs)
        nbytes = sum(
            max(program.local(v).nbytes for v in pair)
            for pair in zip(op.inputs, op.outputs, strict=True)
        )
        if nbytes > LARGEST:
            yield _Filling(place, until, nbytes, [op])
            continue
        bucket = open_.get(kind)
        limit = SIZE if kind in first else FIRST
        if bucket is None or bucket.reader <= place or bucket.nbytes + nbytes > limit:
            if bucket is not None:
                first.add(kind)
                yield bucket
            bucket = open_[kind] = _Filling(place, until, 0)
        bucket.place, bucket.reader = place, min(bucket.reader, until)
        bucket.nbytes += nbytes
        bucket.ops.append(op)
    yield from open_.values()
