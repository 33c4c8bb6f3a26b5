"""A local program run by torch for one rank.

Ops are looked up once, when the step is made; each run walks the list. A value is let go after its last reader. What
travels is in the program as ops of its own (`ir/passes/localize.py`), so nothing is decided here. A collective begins
at its place, the same on all ranks, and is waited for in front of the first op that reads what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.graph import Constant
from ...ir.local.program import (
    BARRIER,
    COLLECTIVES,
    MICROBATCHES,
    ON_SHARDS,
    LocalOp,
    LocalProgram,
    LocalRegion,
)
from ...ir.ops import COMPOSITES
from .collectives import Axes, Communicator, Pairs, Shards, part_of, places_of
from .dtypes import torch_dtype
from .emit import emitter
from .emit_composite import Composite
from .emit_reductions import highest, lowest
from .emit_ring import RingAttention
from .flat import Together, flattened
from .shard import Part, View

Tensor = torch.Tensor
Values = dict[int, Tensor]
Run = Callable[[Sequence[Tensor], Values], Sequence[Tensor]]
Flats = dict[tuple[int, ...], Tensor]  # what lies end to end
Call = Callable[[Sequence[Tensor], Values, Flats], Any]

JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "max": torch.maximum, "min": torch.minimum, "and": torch.logical_and, "or": torch.logical_or,
}  # fmt: skip


class LocalStep:
    """Callable on one rank's shards of the program's inputs; returns those of its outputs.

    Args:
        arrays: constants of the program that are arrays.
        rank: of the mesh, the last axis counted fastest.
        communicator: how ranks meet; none is needed on one device.
        moment: the microbatch, of a program that runs in one.
        groups: of neighbours that the batch is dealt out from, where the program does not say it.

    Raises:
        LoweringError: torch has no such op or element type.
    """

    def __init__(
        self, program: LocalProgram, arrays: Mapping[int, Tensor], rank: int = 0,
        communicator: Communicator | None = None, moment: int | None = None, groups: int | None = None,
    ):  # fmt: skip
        self.program, self.mesh = program, program.mesh
        self.place = places_of(program.mesh)[rank]
        self.groups = groups or next(
            (op.integer("groups") for op in program.ops if op.kind == MICROBATCHES), 1
        )
        self.shards = Shards(self.mesh, self.place, program.microbatches, communicator or _Alone())
        self.constants = {c.value: self._constant(c, arrays) for c in program.constants}
        self._whole = self._block(program.ops, program.outputs, moment)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = self.constants | dict(zip(self.program.inputs, inputs, strict=True))
        with torch.no_grad():
            return tuple(self._whole(values))

    def _constant(self, constant: Constant, arrays: Mapping[int, Tensor]) -> Tensor:
        if constant.value in arrays:
            return arrays[constant.value]
        return torch.tensor(
            constant.data, dtype=torch_dtype(self.program.local(constant.value).dtype)
        )

    # ------------------------------------------------------------ ops, looked up

    def _block(
        self, ops: Sequence[LocalOp], outputs: Sequence[int], moment: int | None, outer: frozenset[int] = frozenset()
    ) -> Callable[[Values], list[Tensor]]:  # fmt: skip
        """Runs some ops on known values, of which it lets go those of its own that nobody reads any more."""
        kept = {*outputs, *outer, *self.constants}
        entries = flattened(self.program, ops, _read, kept)
        last: dict[int, int] = {}
        for number, each in enumerate(entries):
            last |= dict.fromkeys((*_read(each), *each.outputs), number)
        due, steps = _due(entries), []
        for number, each in enumerate(entries):
            gone = tuple(v for v, end in last.items() if end == number and v not in kept)
            begins = isinstance(each, LocalOp) and each.kind in COLLECTIVES
            steps.append(
                (self._call(each, moment), each.inputs, each.outputs, gone, due[number], begins)
            )

        def run(values: Values) -> list[Tensor]:
            coming = dict[tuple[int, ...], Callable[[], Sequence[Tensor]]]()
            flats: Flats = {}
            for call, inputs, results, gone, waits, begins in steps:
                for made in waits:
                    values.update(zip(made, coming.pop(made)(), strict=True))
                found = call([values[v] for v in inputs], values, flats)
                if begins:
                    coming[results] = found
                else:
                    values.update(zip(results, found, strict=True))
                for value in gone:
                    values.pop(value, None)
            for made in due[len(steps)]:
                values.update(zip(made, coming.pop(made)(), strict=True))
            return [values[v] for v in outputs]

        return run

    def _call(self, each: LocalOp | Together, moment: int | None) -> Call:
        if isinstance(each, Together):
            one = self._run_of(each.ops[0], moment)
            return lambda operands, values, flats: each.run(
                lambda given: one(given, values), operands, flats
            )
        if each.kind in COLLECTIVES:  # what it gives is waited for where it is read first
            return lambda operands, values, flats: self.shards.start(each, operands)
        run = self._run_of(each, moment)
        return lambda operands, values, flats: run(operands, values)

    def _run_of(self, op: LocalOp, moment: int | None) -> Run:
        match op.kind:
            case kind if kind in ON_SHARDS:
                return lambda operands, _: self.shards.run(op, operands, moment)
            case kind if kind == BARRIER:
                return lambda operands, _: operands
            case "microbatches":
                return self._microbatches(op)
            case "scan":
                return self._scan(op, moment)
            case "while":
                return self._while(op, moment)
            case "cond":
                return self._cond(op, moment)
            case "scaled":
                divide = op.text("by") == "div"
                return lambda operands, _: [_scaled(operands[0], operands[1], divide)]
            case "estimated":
                return lambda operands, _: [operands[0] * op.integer("microbatches")]
            case "averaged":
                return lambda operands, _: [operands[0] / op.integer("microbatches")]
        dtypes = tuple(torch_dtype(self.program.local(v).dtype) for v in op.outputs)
        view = View(self.program.rule(op), self._cuts(op, moment), dtypes)
        run = self._composite(op, view) if op.kind in COMPOSITES else emitter(op.whole, view)
        return lambda operands, _: run(operands)

    def _composite(self, op: LocalOp, view: View) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        joint, communicator = dict(op.joint), self.shards.communicator
        if ring := joint.get("ring"):
            return RingAttention(op.whole, view, ring, communicator)
        return Composite(op.whole, view, joint, communicator)

    def _cuts(self, op: LocalOp, moment: int | None) -> dict[int, Part]:
        """Which part of each factor is here; factors that lie whole are left out."""
        found: dict[int, Part] = {}
        for each in op.cuts:
            index, ways = part_of(each.axes, self.place, self.mesh), self.mesh.ways(each.axes)
            if each.time:
                assert moment is not None
                found[each.factor] = Part(
                    index, ways, moment, self.program.microbatches, self.groups
                )
            elif ways > 1:
                found[each.factor] = Part(index, ways)
        return found

    # ------------------------------------------------------------ regions

    def _region(
        self, region: LocalRegion, moment: int | None
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """One that reads its inputs and constants alone."""
        block = self._block(region.ops, region.outputs, moment)
        return lambda given: block(self.constants | dict(zip(region.inputs, given, strict=True)))

    def _microbatches(self, op: LocalOp) -> Run:
        [region], joins = op.regions, [str(join) for join in op.items("joins")]
        outside = frozenset(_read_inside(op))
        blocks = [
            self._block(region.ops, region.outputs, moment, outside)
            for moment in range(self.program.microbatches)
        ]
        kinds = [self.program.local(v) for v in region.outputs[: len(joins)]]
        dtypes = [torch_dtype(kind.dtype) for kind in kinds]

        def run(_: Sequence[Tensor], known: Values) -> list[Tensor]:
            totals = [
                start(join, kind.shape, dtype)
                for join, kind, dtype in zip(joins, kinds, dtypes, strict=True)
            ]
            stacks: list[list[Tensor]] = [[] for _ in region.outputs[len(joins) :]]
            for block in blocks:
                found = block({v: known[v] for v in outside} | self.constants)
                for stack in reversed(stacks):
                    stack.append(found.pop())
                for number in reversed(range(len(joins))):  # each part is let go once it is in
                    totals[number] = added(joins[number], totals[number], found.pop())
            narrow = [total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True)]
            return [*narrow, *map(torch.stack, stacks)]

        return run

    def _scan(self, op: LocalOp, moment: int | None) -> Run:
        [body], consts, carry = op.regions, op.integer("num_consts"), op.integer("num_carry")
        region, turns = self._region(body, moment), range(op.integer("length"))
        order = turns[::-1] if op.flag("reverse") else turns
        kinds = [self.program.local(v) for v in op.outputs[carry:]]

        def run(operands: Sequence[Tensor], _: Values) -> list[Tensor]:
            fixed, state, rows = (
                operands[:consts],
                list(operands[consts : consts + carry]),
                operands[consts + carry :],
            )
            pieces: dict[int, list[Tensor]] = {}
            for turn in order:
                found = region([*fixed, *state, *(x[turn] for x in rows)])
                state, pieces[turn] = found[:carry], found[carry:]
            stacks = [
                torch.stack([pieces[turn][k] for turn in turns]) if turns
                else torch.empty(kind.shape, dtype=torch_dtype(kind.dtype))
                for k, kind in enumerate(kinds)
            ]  # fmt: skip
            return [*state, *stacks]

        return run

    def _while(self, op: LocalOp, moment: int | None) -> Run:
        whether, turn = (self._region(region, moment) for region in op.regions)
        consts = op.integer("num_consts")

        def run(operands: Sequence[Tensor], _: Values) -> list[Tensor]:
            fixed, state = operands[:consts], list(operands[consts:])
            while bool(whether([*fixed, *state])[0]):
                state = turn([*fixed, *state])
            return state

        return run

    def _cond(self, op: LocalOp, moment: int | None) -> Run:
        branches = [self._region(region, moment) for region in op.regions]

        def run(operands: Sequence[Tensor], _: Values) -> list[Tensor]:
            return branches[min(max(int(operands[0]), 0), len(branches) - 1)](operands)

        return run


def _due(entries: Sequence[LocalOp | Together]) -> list[list[tuple[int, ...]]]:
    """In front of each, and at the end, the results of collectives to be waited for, in the order of these."""
    reader = {v: n for n, each in reversed([*enumerate(entries)]) for v in _read(each)}
    due: list[list[tuple[int, ...]]] = [[] for _ in range(len(entries) + 1)]
    for each in entries:
        if isinstance(each, LocalOp) and each.kind in COLLECTIVES:
            due[min(reader.get(v, len(entries)) for v in each.outputs)].append(each.outputs)
    return due


def _read(each: LocalOp | Together) -> tuple[int, ...]:
    return (*each.inputs, *(_read_inside(each) if isinstance(each, LocalOp) else ()))


def axes_met(program: LocalProgram) -> list[Axes]:
    """The axes along which a program's ranks meet, in the order of its ops."""
    return list(dict.fromkeys(op.axes for op in program.walk() if op.kind in COLLECTIVES))


@dataclass(frozen=True)
class _Alone:
    """One rank has nobody to meet."""

    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        return x

    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]:
        return [x]

    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor:
        return parts[0]

    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return list(parts)

    def permute(self, x: Tensor, pairs: Pairs, axes: Axes) -> Tensor:
        return x


def _read_inside(op: LocalOp) -> list[int]:
    """What the body of `microbatches` reads from outside; other regions read their own inputs alone."""
    if op.kind != MICROBATCHES:
        return []
    [region] = op.regions
    made = {v for each in region.ops for v in each.outputs}
    read = (*(v for each in region.ops for v in each.inputs), *region.outputs)
    return list(dict.fromkeys(v for v in read if v not in made))


def start(reduction: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `JOIN` begins with. Totals of short floats are kept in float32."""
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    if reduction == "sum":
        return torch.zeros(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.full(shape, reduction in ("and", "min"), dtype=dtype)
    return torch.full(shape, lowest(dtype) if reduction == "max" else highest(dtype), dtype=dtype)


def added(join: str, total: Tensor, part: Tensor) -> Tensor:
    """A total of microbatches so far, which is written over where it can be, and the part of one more."""
    if join == "sum":
        return total.add_(part)
    return JOIN[join](total, part.to(total.dtype))


def _scaled(total: Tensor, number: Tensor, divide: bool) -> Tensor:
    """A total times a number, or divided by it; of short floats in float32."""
    wide = torch.promote_types(total.dtype, torch.float32)
    found = total.to(wide) / number.to(wide) if divide else total.to(wide) * number.to(wide)
    return found.to(total.dtype)
