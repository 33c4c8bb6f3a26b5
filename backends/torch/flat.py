"""Ops of the update on many small arrays, run as one on all of them end to end.

    %10 = mul %0 %1;  %11 = add %10 %2;  %20 = mul %5 %1;  %21 = add %20 %7

    (%10 %20) = mul (%0 %5) %1;  (%11 %21) = add (%10 %20) (%2 %7)

An optimizer does the same to every parameter, element by element. To call an op costs as much as to work on tens of
thousands of elements, and most parameters (biases, norms) are smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import prod

import torch

from ...ir.local.program import LocalOp, LocalProgram
from .emit_elementwise import ELEMENTWISE

Tensor = torch.Tensor
Column = tuple[int, ...]  # values of ops that are one, in the order of these
# Elements up to which an array joins others. An op takes 4 us to call and 0.1 ns for an element in the caches; an
# operand that comes from elsewhere is copied once, in 0.2 ns (gpt-tiny, 2 cores of an EPYC, torch 2.13), so up to 2**14
# pays. But the copies are beside what they are of, which no plan counts: of biases and norms they are next to nothing.
SMALL = 2**10
_BROADCAST = "broadcast_in_dim"
_JOINED = (frozenset(ELEMENTWISE) | {_BROADCAST}) - {"bitcast_convert_type"}


@dataclass(frozen=True)
class Together:
    """Ops that are one.

    Attributes:
        columns: of each operand the ops' values, or the one scalar that all of them read.
        flat: which of the columns another of these makes.
        split: results are read one by one as well.
        last: what lies end to end and is read here for the last time.
    """

    ops: tuple[LocalOp, ...]
    columns: tuple[Column | int, ...]
    flat: frozenset[Column]
    shapes: tuple[tuple[int, ...], ...]
    split: bool
    last: frozenset[Column] = frozenset()

    @property
    def results(self) -> Column:
        return tuple(op.outputs[0] for op in self.ops)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Values that are read one by one."""
        found = list[int]()
        for column in self.columns:
            found += [column] if isinstance(column, int) else column * (column not in self.flat)
        return tuple(found)

    @property
    def outputs(self) -> Column:
        return self.results if self.split else ()

    def run(
        self, call: Callable[[Sequence[Tensor]], Sequence[Tensor]], operands: Sequence[Tensor],
        flats: dict[Column, Tensor],
    ) -> list[Tensor]:  # fmt: skip
        """Results one by one, if they are split.

        Args:
            call: one of the ops.
            operands: those of `inputs`.
            flats: what lies end to end so far; learns the results.
        """
        sizes = [prod(shape) for shape in self.shapes]
        given, rest = list[Tensor](), iter(operands)
        for column in self.columns:
            if isinstance(column, int):
                given.append(next(rest))
                continue
            parts = [] if column in self.flat else [next(rest) for _ in column]
            if column not in flats:
                flats[column] = torch.cat([part.flatten() for part in parts])
            given.append(flats[column])
        if self.ops[0].kind == _BROADCAST:
            found = given[0].expand(sum(sizes))
        else:
            [found] = call(given)
        flats[self.results] = found
        for column in self.last:
            del flats[column]
        if not self.split:
            return []
        parts = zip(found.split(sizes), self.shapes, strict=True)
        return [part.view(shape) for part, shape in parts]


def flattened(
    program: LocalProgram, ops: Sequence[LocalOp], read: Callable[[LocalOp], Sequence[int]], kept: set[int]
) -> list[LocalOp | Together]:  # fmt: skip
    """The ops in an order in which those that do the same to small arrays are one.

    Args:
        read: the values that an op reads, those around it that its regions read too.
        kept: values that are read behind the ops.
    """
    groups = [group for group in _groups(program, ops, read) if len(group) > 1]
    if not groups:
        return list(ops)
    columns = [_columns(program, [ops[n] for n in group]) for group in groups]
    made = {tuple(ops[n].outputs[0] for n in group) for group in groups}
    joined = {n for group in groups for n in group}
    single = {v for n, op in enumerate(ops) if n not in joined for v in read(op)} | kept
    for each in columns:
        single.update(v for c in each if not isinstance(c, int) and c not in made for v in c)
        single.update(c for c in each if isinstance(c, int))
    found: list[tuple[tuple[int, ...], LocalOp | Together]] = [
        ((n,), op) for n, op in enumerate(ops) if n not in joined
    ]
    for group, each in zip(groups, columns, strict=True):
        members = tuple(ops[n] for n in group)
        results = tuple(op.outputs[0] for op in members)
        flat = frozenset(c for c in each if not isinstance(c, int) and c in made)
        shapes = tuple(program.local(v).shape for v in results)
        split = not single.isdisjoint(results)
        found.append((group, Together(members, each, flat, shapes, split)))
    return _released(_ordered(ops, found, read))


def _released(entries: list[LocalOp | Together]) -> list[LocalOp | Together]:
    """With the last reader of all that lies end to end."""
    known, found = set[Column](), list[LocalOp | Together]()
    for each in reversed(entries):
        if isinstance(each, Together):
            used = {each.results, *(c for c in each.columns if not isinstance(c, int))}
            each = replace(each, last=frozenset(used - known))
            known |= used
        found.append(each)
    return found[::-1]


def _groups(
    program: LocalProgram, ops: Sequence[LocalOp], read: Callable[[LocalOp], Sequence[int]]
) -> list[tuple[int, ...]]:
    """Numbers of ops that do the same, and whose results ops that do the same read, in the order of those.

    None reads what another of them leads to: each op that may join others is one level above all that it follows from.
    """
    joins = [_joins(program, op) for op in ops]
    level = defaultdict[int, int](int)
    for op, each in zip(ops, joins, strict=True):
        below = max((level[v] for v in read(op)), default=0)
        level.update((v, below + each) for v in op.outputs)
    readers = defaultdict[int, list[tuple[int, int, int]]](list)  # lane, kind, operand
    known: dict[object, int] = {}
    alike = defaultdict[int, list[tuple[int, int]]](list)
    for number, op in reversed([*enumerate(ops)]):
        if not joins[number]:
            continue
        [value] = op.outputs
        uses = readers[value]
        lane = min((use[0] for use in uses), default=number)
        same = level[value], _kind(program, op), frozenset(use[1:] for use in uses)
        kind = known.setdefault(same, len(known))
        alike[kind].append((lane, number))
        for place, operand in enumerate(op.inputs):
            readers[operand].append((lane, kind, place))
    return [tuple(number for _, number in sorted(group)) for group in alike.values()]


def _joins(program: LocalProgram, op: LocalOp) -> bool:
    if op.phase != "update" or op.kind not in _JOINED or len(op.outputs) != 1:
        return False
    shape = program.local(op.outputs[0]).shape
    shapes = [program.local(v).shape for v in op.inputs]
    if not shape or not 0 < prod(shape) <= SMALL:
        return False
    if op.kind == _BROADCAST:
        return shapes == [()]
    return shape in shapes and all(each in ((), shape) for each in shapes)


def _kind(program: LocalProgram, op: LocalOp) -> object:
    """What ops that become one have in common."""
    scalars = tuple(v if not program.local(v).shape else None for v in op.inputs)
    dtypes = tuple(program.local(v).dtype for v in (*op.inputs, *op.outputs))
    return op.kind, () if op.kind == _BROADCAST else op.attrs, scalars, dtypes


def _columns(program: LocalProgram, ops: Sequence[LocalOp]) -> tuple[Column | int, ...]:
    return tuple(
        column[0] if not program.local(column[0]).shape else column
        for column in zip(*(op.inputs for op in ops), strict=True)
    )


def _ordered(
    ops: Sequence[LocalOp], found: Sequence[tuple[tuple[int, ...], LocalOp | Together]],
    read: Callable[[LocalOp], Sequence[int]],
) -> list[LocalOp | Together]:  # fmt: skip
    """By their places, each behind all that it reads."""
    place = {n: k for k, (numbers, _) in enumerate(found) for n in numbers}
    maker = {v: place[n] for n, op in enumerate(ops) for v in op.outputs}
    waits = [
        {maker[v] for n in numbers for v in read(ops[n]) if v in maker} for numbers, _ in found
    ]
    readers = defaultdict[int, list[int]](list)
    for k, before in enumerate(waits):
        for each in before:
            readers[each].append(k)
    ready = [(max(found[k][0]), k) for k, before in enumerate(waits) if not before]
    heapify(ready)
    ordered = list[LocalOp | Together]()
    while ready:
        _, k = heappop(ready)
        ordered.append(found[k][1])
        for reader in readers[k]:
            waits[reader].discard(k)
            if not waits[reader]:
                heappush(ready, (max(found[reader][0]), reader))
    assert len(ordered) == len(found)
    return ordered
