"""Attention whose keys go round a ring of devices, on one device's part (see `ir/composites/ring.py`).

    step 0   own rows with own keys
    step s   own rows with those s places before; what was had goes on to the next device

A pass works out the maximum and the sums of each row, of all keys together (`ir/composites/online.py`): results come
with them, or in a second pass, which is given both. Gradients of keys travel with them, in 32 bits, as each device adds
to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from ...ir.composites.free_dims import Dims, place_of
from ...ir.composites.online import Online, online_body
from ...ir.composites.ring import first_reads, given, ring_of
from ...ir.graph import Op
from .collectives import Axes, Communicator, Pairs
from .emit import emitter
from .emit_composite import BLOCK, Body, Cuts, Halves, widened
from .shard import Part, View

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]


class RingAttention:
    """Runs one on the part that is here, with rows and keys both cut over `axes`; made once for each microbatch."""

    def __init__(self, op: Op, view: View, axes: Axes, communicator: Communicator):
        self.op, self.body, self.axes, self.communicator = op, Body(op), axes, communicator
        self.rows, self.keys = op.integer("ring"), len(self.body.sizes)
        self.cuts = self.body.cuts(view)
        self.ring = ring_of(op, self.cuts[self.rows].ways)
        self.index = self.cuts.pop(self.rows).index
        pairs = self.ring.partners
        self.halves = None if pairs is None else Halves(communicator, axes, pairs)
        online = online_body(self.body.graph, self.body.dims, self.body.parts, self.body.kept)
        assert online is not None
        self.passes = [_Pass(self.body, online, number == 0) for number in range(online.passes)]
        self._runs: dict[object, Run] = {}

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        body, halves, held = self.body, self.halves, list(operands)
        sums = self._sums_given(held)
        if halves is not None:
            held = [
                halves.there(x, self._dealt_at(dims))
                for x, dims in zip(held, body.operands, strict=True)
            ]
            told = self.passes[-1].told
            sums = [
                halves.there(x, place_of(dims, self.rows))
                for x, dims in zip(sums, told, strict=False)
            ]
        first, *others = self.passes
        made = sums or self._settled(first, self._round(first, held, first_reads(self.op)))
        for other in others:
            made = self._round(other, [*held, *made], range(len(held)))
        many = len(body.results) - body.kept
        made = [*made[len(made) - many :], *made[: body.kept]]
        found = [x.to(body.dtype(v)) for x, v in zip(made, body.graph.outputs, strict=True)]
        if halves is None:
            return found
        return [
            halves.back(x, self._dealt_at(dims))
            for x, dims in zip(found, body.results, strict=True)
        ]

    def _dealt_at(self, dims: Dims) -> int | None:
        """The dim of which devices exchange halves."""
        at = place_of(dims, self.rows)
        return place_of(dims, self.keys) if at is None else at

    def _sums_given(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Maxima and sums of all keys that gradients are given, and what their result and its gradient come to; nothing
        where they are not."""
        if not (many := given(self.op)):
            return []
        *kept, result = operands[-many - 1 :]
        found, delta = [x.to(widened(x.dtype)) for x in kept], self.op.integers("delta")
        if delta:
            at, power = delta
            both = [(operands[at], self.body.operands[at]), (result, self.body.operands[-1])]
            *told, wanted = self.passes[-1].told
            total = spread(found[-1], told[-1], wanted, _local_sizes(found[-1], told[-1]))
            found.append(_row_by_row(both, wanted) * total**power)
        return found

    # ------------------------------------------------------------ steps

    def _round(
        self, done: _Pass, operands: Sequence[Tensor], sent: Collection[int]
    ) -> list[Tensor]:
        """What a pass makes of all keys."""
        going = [k for k, dims in enumerate(done.operands) if k in sent and self._goes(dims)]
        back = [k for k, dims in enumerate(done.results) if self._goes(dims)]
        ways, last = self.ring.ways, self.ring.steps - 1
        onward = [(i, (i + 1) % ways) for i in range(ways)]
        here, state = list(operands), list[Tensor]()
        for number in range(self.ring.steps):
            if number:
                for k in going:
                    here[k] = self.communicator.permute(here[k], onward, self.axes)
                state = self._sent(state, back, onward)
            state = self._step(done, (self.index - number) % ways, here, state)
        home = [(i, (i - last) % ways) for i in range(ways)]
        return self._sent(state, back, home) if last else state

    def _sent(self, state: list[Tensor], which: Collection[int], pairs: Pairs) -> list[Tensor]:
        return [
            self.communicator.permute(x, pairs, self.axes) if k in which else x
            for k, x in enumerate(state)
        ]

    def _goes(self, dims: Dims) -> bool:
        return place_of(dims, self.rows) is None and place_of(dims, self.keys) is not None

    @cached_property
    def _many(self) -> int:
        """Pieces of all rows, and of all keys."""
        return self.ring.ways * self.ring.pieces

    @cached_property
    def _sizes(self) -> dict[int, int]:
        """Of free dims and keys, in one piece."""
        many = {d: cut.all_ways for d, cut in self.cuts.items()}
        many |= dict.fromkeys((self.rows, self.keys), self._many)
        return {d: n // many.get(d, 1) for d, n in enumerate(self.body.dims)}

    # ------------------------------------------------------------ one step

    def _step(
        self, done: _Pass, owner: int, operands: Sequence[Tensor], state: list[Tensor]
    ) -> list[Tensor]:
        """Own pieces of rows with the pieces of keys of one device."""
        mine, theirs = self._numbers(self.index), self._numbers(owner)
        for row, rows in enumerate(mine):
            for key, keys in enumerate(theirs):
                if self.ring.meets[rows][keys] or not state:
                    state = self._with(done, _Piece(row, key, rows, keys), operands, state)
        return state

    def _numbers(self, device: int) -> tuple[int, ...]:
        """Which pieces of all a device has."""
        return (device,) if self.halves is None else self.halves.numbers(device)

    def _with(
        self,
        done: _Pass,
        at: _Piece,
        operands: Sequence[Tensor],
        state: list[Tensor],
    ) -> list[Tensor]:
        """A state with one more piece of keys for one of rows; the first piece begins it."""
        given_ = [self._piece(x, dims, at) for x, dims in zip(operands, done.operands, strict=True)]
        cuts = {
            **self.cuts,
            self.rows: Part(at.rows, self._many),
            self.keys: Part(at.keys, self._many),
        }
        outer = {d: cut for d, cut in cuts.items() if d != self.keys}
        blocks = done.blocks(outer, done.most, BLOCK, self._many)
        made = done.by_blocks(given_, cuts, blocks, lambda cuts: self._run(done, cuts))
        if not state:
            state = self._start(done, made)
        old = [self._piece(x, dims, at) for x, dims in zip(state, done.results, strict=True)]
        new = self._joined(done, old, [x.to(o.dtype) for x, o in zip(made, old, strict=True)])
        for part, x in zip(old, new, strict=True):
            part.copy_(x)
        return state

    def _piece(self, x: Tensor, dims: Dims, at: _Piece) -> Tensor:
        """A view of one; of who has rows keys are whole."""
        by_rows, by_keys = place_of(dims, self.rows), place_of(dims, self.keys)
        if by_rows is not None:
            x = x.narrow(by_rows, at.row * self._sizes[self.rows], self._sizes[self.rows])
        if by_keys is not None:
            number = at.key if by_rows is None else at.keys
            x = x.narrow(by_keys, number * self._sizes[self.keys], self._sizes[self.keys])
        return x

    def _run(self, done: _Pass, cuts: Cuts) -> Run:
        key = done.first, tuple(sorted(cuts.items(), key=lambda each: each[0]))
        if key not in self._runs:
            self._runs[key] = done.run(cuts)
        return self._runs[key]

    # ------------------------------------------------------------ blocks come together

    def _start(self, done: _Pass, made: Sequence[Tensor]) -> list[Tensor]:
        """Before the first block, whose results are given."""
        found = []
        for k, (x, dims) in enumerate(zip(made, done.results, strict=True)):
            shape, dtype = list(x.shape), widened(x.dtype)
            by_rows, by_keys = place_of(dims, self.rows), place_of(dims, self.keys)
            if by_rows is not None:
                shape[by_rows] *= self.ring.pieces
            if by_keys is not None:
                shape[by_keys] *= self.ring.pieces * (1 if by_rows is None else self.ring.ways)
            lowest = done.lowers and k == 0
            found.append(torch.full(shape, torch.finfo(dtype).min if lowest else 0, dtype=dtype))
        return found

    def _joined(self, done: _Pass, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        if not done.lowers:
            return [a + b for a, b in zip(old, new, strict=True)]
        power = torch.exp2 if done.online.base2 else torch.exp
        top, dims = torch.maximum(old[0], new[0]), done.results[0]
        less = old[0] - top, new[0] - top
        found = [top]
        for k in range(1, len(old)):
            by = dict(done.online.degrees[done.made[k]]).get(done.made[0], 0)
            one, other = (
                x * power(by * self._spread(low, dims, done.results[k])) if by else x
                for x, low in zip((old[k], new[k]), less, strict=True)
            )
            found.append(one + other)
        return found

    def _settled(self, done: _Pass, made: list[Tensor]) -> list[Tensor]:
        """Sums and results as those of all keys, whatever sums before them had been taken for."""
        found, places = list[Tensor](), {v: k for k, v in enumerate(done.made)}
        for k, value in enumerate(done.made):
            x = made[k]
            for by, times in done.online.degrees.get(value, ()):
                if by in done.online.sums:
                    at = places[by]
                    x = x * self._spread(found[at], done.results[at], done.results[k]) ** times
            found.append(x)
        return found

    def _spread(self, x: Tensor, dims: Dims, wanted: Dims) -> Tensor:
        others = prod(self._sizes[d] for dim in dims for d in dim if d != self.rows)
        return spread(x, dims, wanted, {**self._sizes, self.rows: x.numel() // others})


@dataclass(frozen=True)
class _Piece:
    """The `row`-th piece of rows and the `key`-th of keys that are here, which are `rows` and `keys` of all."""

    row: int
    key: int
    rows: int
    keys: int


class _Pass(Body):
    """A body that gives maxima and sums of a block of keys, or is given those of all keys."""

    def __init__(self, body: Body, online: Online, first: bool):
        self.__dict__.update(copy(body).__dict__)
        self.online, self.first = online, first
        self.told = told = tuple(self._dims_of(v) for v in online.statistics)
        closings = self.graph.outputs[: len(self.graph.outputs) - body.kept]
        with_results = not first or online.passes == 1
        self.made = (*(online.statistics if first else ()), *(closings if with_results else ()))
        results = body.results[: len(closings)]
        self.results = (*(told if first else ()), *(results if with_results else ()))
        self.lowers = first and online.maximum is not None
        self.operands = body.operands if first else (*body.operands, *told)

    def _dims_of(self, value: int) -> Dims:
        return tuple(tuple(d for d, _, _ in dim if d >= 0) for dim in self.parts[value])

    def run(self, cuts: Cuts) -> Run:
        """In a first pass sums count as 1 for those who read them, and no maximum is below all numbers."""
        graph, numbers, many = self.graph, self.numbers, len(self.graph.inputs)
        statistics, steps = self.online.statistics, list[tuple[Op, Run]]()
        for op in graph.ops:
            rule, here = self.rule_and_cuts(op, cuts)
            steps.append((op, emitter(op, View(rule, here, tuple(map(self.dtype, op.outputs))))))

        def run(operands: Sequence[Tensor]) -> list[Tensor]:
            values = numbers | dict(zip(graph.inputs, operands[:many], strict=True))
            known = {} if self.first else dict(zip(statistics, operands[many:], strict=True))
            kept: dict[int, Tensor] = {}
            for op, call in steps:
                value = op.outputs[0]
                if value in known:
                    values[value] = known[value].to(self.dtype(value))
                    continue
                values.update(zip(op.outputs, call([values[v] for v in op.inputs]), strict=True))
                if value in statistics:
                    kept[value], values[value] = self._seen(value, values[value])
            return [kept[v] if v in kept else values[v] for v in self.made]

        return run

    def _seen(self, value: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of a maximum or a sum, and what readers take for it."""
        if value in self.online.sums:
            return x, torch.ones_like(x)
        floor = x.clamp(min=torch.finfo(x.dtype).min)
        return floor, floor


def _row_by_row(both: Sequence[tuple[Tensor, Dims]], wanted: Dims) -> Tensor:
    """Two arrays multiplied, summed over the one dim that is none of the free ones."""
    whole = [
        tuple(dim or ((-1,) if n > 1 else ()) for n, dim in zip(x.shape, dims, strict=True))
        for x, dims in both
    ]
    (one, dims), (other, _) = both
    sizes = _local_sizes(one, whole[0])
    there = spread(other, whole[1], whole[0], sizes)
    at = whole[0].index((-1,))
    total = (one.to(widened(one.dtype)) * there.to(widened(other.dtype))).sum(at)
    return spread(total, (*dims[:at], *dims[at + 1 :]), wanted, sizes)


def _local_sizes(x: Tensor, dims: Dims) -> dict[int, int]:
    """Of dims that are not joined with others."""
    return {dim[0]: n for n, dim in zip(x.shape, dims, strict=True) if len(dim) == 1}


def spread(x: Tensor, dims: Dims, wanted: Dims, sizes: Mapping[int, int]) -> Tensor:
    """An array, laid out to meet another that has all its dims."""
    flat = [d for dim in dims for d in dim]
    order = [d for dim in wanted for d in dim if d in flat]
    moved = x.reshape([sizes[d] for d in flat]).permute([flat.index(d) for d in order])
    return moved.reshape([prod(sizes[d] for d in dim if d in flat) for dim in wanted])
