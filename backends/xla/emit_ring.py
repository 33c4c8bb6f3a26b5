"""Run attention whose keys go round a ring of devices on this shard's part (see `ir/composites/ring.py`).

    step 0   own rows with own keys                   send keys on
    step s   own rows with those s places before      send them on
             blocks come together by their maxima and sums; gradients of keys travel with them

A pass works out the maximum and the sums of each row, of all keys together (`ir/composites/online.py`): results come
with them, or in a second pass, which is given both. What is sent on does not wait for what is worked on, so both may
run at once; gradients of keys are sent in 32 bits, as each device adds to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.composites.free_dims import Dims, place_of
from ...ir.composites.online import Online, online_body
from ...ir.composites.ring import Ring, first_reads, given, ring_of
from ...ir.graph import Op
from ...ir.rules.rule import Rule
from .dtypes import jax_dtype
from .emit_composite import CompositeBody, Halves, Loop, body_for, widened
from .shard import Arrays, ShardPart, ShardWindow

UNROLLED = 8  # steps of a ring, at most, that a compiler sees side by side
Emitted = Callable[[Op, Sequence[Any]], Sequence[Any]]


def run_ring(
    op: Op, bound: Callable[[Op], Any], operands: Arrays, rule: Rule, cuts: Mapping[int, ShardPart],
    axes: tuple[str, ...],
) -> list[jax.Array]:  # fmt: skip
    """As `run_composite`, with rows and keys both cut over `axes`."""
    body = body_for(op)
    rows, keys = dict(op.attrs)["ring"], len(body.sizes)
    assert isinstance(rows, int)
    free = body.cuts(rule, cuts)
    ring = ring_of(op, free[rows].ways)
    held = lax.optimization_barrier(tuple(operands))
    sums = _sums_given(op, body, held)
    halves = None if ring.partners is None else Halves(axes, ring.partners)
    if halves is not None:
        held = [
            halves.there(a, _dealt_at(dims, rows, keys))
            for a, dims in zip(held, body.operands, strict=True)
        ]
        sums = [
            halves.there(a, place_of(dims, rows))
            for a, dims in zip(sums, _passes(body)[-1].told, strict=False)
        ]
    index, others = free.pop(rows).index, free
    around = _Around(body, ring, bound, others, rows, index, axes)
    results = around.run(held, first_reads(op), sums)
    if halves is None:
        return results
    return [
        halves.back(a, _dealt_at(dims, rows, keys))
        for a, dims in zip(results, body.results, strict=True)
    ]


def _sums_given(op: Op, body: CompositeBody, operands: Arrays) -> list[Any]:
    """Maxima and sums of all keys that gradients are given, and what their result and its gradient come to; nothing
    where they are not."""
    if not (many := given(op)):
        return []
    *kept, result = operands[-many - 1 :]
    found, delta = [array.astype(widened(array.dtype)) for array in kept], op.integers("delta")
    if delta:
        at, power = delta
        both = [(operands[at], body.operands[at]), (result, body.operands[-1])]
        *told, wanted = _passes(body)[-1].told
        total = spread(found[-1], told[-1], wanted, _local_sizes(found[-1], told[-1]))
        found.append(_row_by_row(both, wanted) * total**power)
    return found


def _row_by_row(both: Sequence[tuple[Any, Dims]], wanted: Dims) -> Any:
    """Two arrays multiplied, summed over the one dim that is none of the free ones."""
    whole = [
        tuple(dim or ((-1,) if n > 1 else ()) for n, dim in zip(a.shape, dims, strict=True))
        for a, dims in both
    ]
    (one, dims), (other, _) = both
    sizes = _local_sizes(one, whole[0])
    there = spread(other, whole[1], whole[0], sizes)
    at = whole[0].index((-1,))
    total = (one.astype(widened(one.dtype)) * there.astype(widened(other.dtype))).sum(at)
    return spread(total, (*dims[:at], *dims[at + 1 :]), wanted, sizes)


def _local_sizes(array: Any, dims: Dims) -> dict[int, int]:
    """Of dims that are not joined with others."""
    return {dim[0]: n for n, dim in zip(array.shape, dims, strict=True) if len(dim) == 1}


def spread(array: Any, dims: Dims, wanted: Dims, sizes: Mapping[int, int]) -> Any:
    """An array, laid out to meet another that has all its dims."""
    flat = [d for dim in dims for d in dim]
    order = [d for dim in wanted for d in dim if d in flat]
    moved = array.reshape([sizes[d] for d in flat]).transpose([flat.index(d) for d in order])
    return moved.reshape([prod(sizes[d] for d in dim if d in flat) for dim in wanted])


def _dealt_at(dims: Dims, rows: int, keys: int) -> int | None:
    """The dim of which devices exchange halves."""
    at = place_of(dims, rows)
    return place_of(dims, keys) if at is None else at


class RingBody(CompositeBody):
    """A body that gives maxima and sums of a block of keys, or is given those of all keys."""

    def __init__(self, body: CompositeBody, online: Online, first: bool):
        self.__dict__.update(body.__dict__)
        self.online, self.first = online, first
        self.statistics = online.statistics
        self.told = told = tuple(self._dims(v) for v in self.statistics)
        closings = self.graph.outputs[: len(self.graph.outputs) - body.kept]
        with_results = not first or online.passes == 1
        self.made = (
            *(self.statistics if first else ()),
            *(closings if with_results else ()),
        )
        results = body.results[: len(closings)]
        self.results = (*(told if first else ()), *(results if with_results else ()))
        self.lowers = first and online.maximum is not None
        self.operands = body.operands if first else (*body.operands, *told)

    def _dims(self, value: int) -> Dims:
        return tuple(tuple(d for d, _, _ in dim if d >= 0) for dim in self.parts[value])

    def run(self, operands: Sequence[Any], emitted: Emitted) -> list[jax.Array]:
        """In a first pass sums count as 1 for those who read them, and no maximum is below all numbers."""
        many = len(self.graph.inputs)
        values = self.given(operands[:many])
        known = dict(zip(self.statistics, operands[many:], strict=not self.first))
        kept: dict[int, Any] = {}
        for op in self.graph.ops:
            if op.outputs[0] in known:
                kind = self.graph.types[op.outputs[0]]
                values[op.outputs[0]] = known[op.outputs[0]].astype(jax_dtype(kind.dtype))
                continue
            results = emitted(op, [values[v] for v in op.inputs])
            values |= dict(zip(op.outputs, results, strict=True))
            if op.outputs[0] in self.statistics:
                value = op.outputs[0]
                kept[value], values[value] = self._seen(value, results[0])
        return [kept[v] if v in kept else values[v] for v in self.made]

    def _seen(self, value: int, array: Any) -> tuple[Any, Any]:
        """What is kept of a maximum or a sum, and what readers take for it."""
        if value in self.online.sums:
            return array, jnp.ones_like(array)
        floor = jnp.maximum(array, jnp.finfo(array.dtype).min)
        return floor, floor


@lru_cache(maxsize=256)
def _passes(body: CompositeBody) -> tuple[RingBody, ...]:
    online = online_body(body.graph, body.dims, body.parts, body.kept)
    assert online is not None
    return tuple(RingBody(body, online, number == 0) for number in range(online.passes))


@dataclass(frozen=True)
class _Around:
    """One run of a composite on the `index`-th device of a ring; `cuts` of all free dims but the rows."""

    body: CompositeBody
    ring: Ring
    bound: Callable[[Op], Any]
    cuts: Mapping[int, ShardPart]
    rows: int
    index: Any
    axes: tuple[str, ...]

    def run(
        self, operands: Sequence[Any], reads: Collection[int], sums: Sequence[Any]
    ) -> list[jax.Array]:
        """This device's results.

        Args:
            reads: the operands that a first pass reads.
            sums: maxima and sums of all keys, if they are given.
        """
        first, *others = _passes(self.body)
        made = sums or self._settled(first, self._round(first, operands, reads))
        for other in others:  # a barrier, or XLA would keep all keys of the first pass
            held = lax.optimization_barrier((*operands, *made))
            made = self._round(other, held, range(len(operands)))
        types = self.body.graph.types
        many = len(self.body.results) - self.body.kept
        made = [*made[len(made) - many :], *made[: self.body.kept]]
        results = zip(self.body.graph.outputs, made, strict=True)
        return [array.astype(jax_dtype(types[v].dtype)) for v, array in results]

    # ------------------------------------------------------------ steps

    def _round(self, done: RingBody, operands: Sequence[Any], sent: Collection[int]) -> list[Any]:
        """What a pass makes of all keys."""
        going = [k for k, dims in enumerate(done.operands) if k in sent and self._goes(dims)]
        back = [k for k, dims in enumerate(done.results) if self._goes(dims)]
        ways, last = self.ring.ways, self.ring.steps - 1
        onward = [(i, (i + 1) % ways) for i in range(ways)]

        def step(number: Any, moving: Sequence[Any], state: list[Any]) -> list[Any]:
            here = list(operands)
            for k, array in zip(going, moving, strict=True):
                here[k] = array
            return self._step(done, (self.index - number) % ways, here, state)

        def turn(carry: tuple[list[Any], list[Any]], number: Any) -> tuple[Any, None]:
            moving, state = carry
            sent_on = [lax.ppermute(array, self.axes, onward) for array in moving]
            return (sent_on, self._sent(step(number, moving, state), back, onward)), None

        moving, state = [operands[k] for k in going], self._start(done, operands)
        if last:
            numbers = jnp.arange(last, dtype=jnp.int32)
            (moving, state), _ = lax.scan(
                turn, (moving, state), numbers, unroll=min(last, UNROLLED)
            )
        state = step(last, moving, state)
        home = [(i, (i - last) % ways) for i in range(ways)]
        return self._sent(state, back, home) if last else state

    def _sent(
        self, state: list[Any], which: Collection[int], ways: list[tuple[int, int]]
    ) -> list[Any]:
        return [lax.ppermute(a, self.axes, ways) if k in which else a for k, a in enumerate(state)]

    def _goes(self, dims: Dims) -> bool:
        return self._at(dims)[0] is None and self._at(dims)[1] is not None

    def _at(self, dims: Dims) -> tuple[int | None, int | None]:
        """Where rows and keys are."""
        return place_of(dims, self.rows), place_of(dims, self._keys)

    @property
    def _keys(self) -> int:
        return len(self.body.sizes)

    @cached_property
    def _sizes(self) -> dict[int, int]:
        """Of free dims and keys, in one piece."""
        many = {d: cut.ways for d, cut in self.cuts.items()}
        pieces = dict.fromkeys((self.rows, self._keys), self.ring.ways * self.ring.pieces)
        return {d: n // {**many, **pieces}.get(d, 1) for d, n in enumerate(self.body.dims)}

    # ------------------------------------------------------------ one step

    def _step(
        self, done: RingBody, owner: Any, operands: Sequence[Any], state: list[Any]
    ) -> list[Any]:
        """Own pieces of rows with the pieces of keys of one device."""
        pieces, meets = self.ring.pieces, jnp.asarray(self.ring.meets)
        mine, theirs = self._numbers(self.index), self._numbers(owner)

        def pair(state: list[Any], number: Any) -> tuple[list[Any], None]:
            row, key = number // pieces, number % pieces
            at = _Piece(row, key, mine[row], theirs[key])
            add = partial(self._added, done, at, operands)
            if self.ring.always:
                return add(state), None
            return lax.cond(meets[at.rows, at.keys], add, lambda state: state, state), None

        return lax.scan(pair, state, jnp.arange(pieces * pieces, dtype=jnp.int32))[0]

    def _numbers(self, device: Any) -> Any:
        """Which pieces of all a device has."""
        if self.ring.partners is None:
            return jnp.stack([jnp.asarray(device, jnp.int32)])
        return jnp.stack(Halves(self.axes, self.ring.partners).numbers(device)).astype(jnp.int32)

    def _added(
        self, done: RingBody, at: _Piece, operands: Sequence[Any], state: list[Any]
    ) -> list[Any]:
        """A state with one more piece of keys for one of rows."""
        starts = [self._starts(dims, at) for dims in done.results]
        made = self._block(done, at, operands)
        old = [
            lax.dynamic_slice(a, start, new.shape)
            for a, start, new in zip(state, starts, made, strict=True)
        ]
        new = self._joined(done, old, [a.astype(o.dtype) for a, o in zip(made, old, strict=True)])
        return [
            lax.dynamic_update_slice(a, part, start)
            for a, part, start in zip(state, new, starts, strict=True)
        ]

    def _block(self, done: RingBody, at: _Piece, operands: Sequence[Any]) -> list[jax.Array]:
        sizes, given = self._sizes, []
        for array, dims in zip(operands, done.operands, strict=True):
            shape = list(array.shape)
            for d, place in zip((self.rows, self._keys), self._at(dims), strict=True):
                if place is not None:
                    shape[place] = sizes[d]
            given.append(lax.dynamic_slice(array, self._starts(dims, at), shape))
        windows = {
            d: ShardWindow(number * sizes[d], sizes[d])
            for d, number in ((self.rows, at.rows), (self._keys, at.keys))
        }
        many = self.ring.ways * self.ring.pieces
        todo = done.to_cut({**self.cuts, self.rows: ShardPart(0, many)}, keys=many)
        return Loop(done, self.bound, {**self.cuts, **windows}, todo)(given)

    def _starts(self, dims: Dims, at: _Piece) -> list[Any]:
        """Where pieces begin in what is here: keys of those who have rows as well are whole."""
        rows, keys = self._at(dims)
        first: list[Any] = [0] * len(dims)
        if rows is not None:
            first[rows] = at.row * self._sizes[self.rows]
        if keys is not None:
            first[keys] = (at.key if rows is None else at.keys) * self._sizes[self._keys]
        return first

    # ------------------------------------------------------------ blocks come together

    def _start(self, done: RingBody, operands: Sequence[Any]) -> list[Any]:
        """Before the first block."""
        here = _Piece(0, 0, 0, 0)
        shapes = jax.eval_shape(lambda given: self._block(done, here, given), list(operands))
        found = []
        for k, (shape, dims) in enumerate(zip(shapes, done.results, strict=True)):
            whole, kind = list(shape.shape), widened(shape.dtype)
            rows, keys = self._at(dims)
            if rows is not None:
                whole[rows] *= self.ring.pieces
            if keys is not None:
                whole[keys] *= self.ring.pieces * (1 if rows is None else self.ring.ways)
            lowest = done.lowers and k == 0
            found.append(jnp.full(whole, jnp.finfo(kind).min if lowest else 0, kind))
        return found

    def _joined(self, done: RingBody, old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
        if not done.lowers:
            return [a + b for a, b in zip(old, new, strict=True)]
        power = jnp.exp2 if done.online.base2 else jnp.exp
        top, dims = jnp.maximum(old[0], new[0]), done.results[0]
        less = old[0] - top, new[0] - top
        found = [top]
        for k in range(1, len(old)):
            by = dict(done.online.degrees[done.made[k]]).get(done.made[0], 0)
            one, other = (
                a * power(by * self._spread(low, dims, done.results[k])) if by else a
                for a, low in zip((old[k], new[k]), less, strict=True)
            )
            found.append(one + other)
        return found

    def _settled(self, done: RingBody, made: list[Any]) -> list[Any]:
        """Sums and results as those of all keys, whatever sums before them had been taken for."""
        found, places = list[Any](), {v: k for k, v in enumerate(done.made)}
        for k, value in enumerate(done.made):
            array = made[k]
            for by, times in done.online.degrees.get(value, ()):
                if by in done.online.sums:
                    at = places[by]
                    total = self._spread(found[at], done.results[at], done.results[k])
                    array = array * total**times
            found.append(array)
        return found

    def _spread(self, array: Any, dims: Dims, wanted: Dims) -> Any:
        return spread(array, dims, wanted, {**self._sizes, self.rows: self._rows_in(array, dims)})

    def _rows_in(self, array: Any, dims: Dims) -> int:
        others = prod(self._sizes[d] for dim in dims for d in dim if d != self.rows)
        return array.size // others


@dataclass(frozen=True)
class _Piece:
    """The `row`-th piece of rows and the `key`-th of keys that are here, which are `rows` and `keys` of all."""

    row: Any
    key: Any
    rows: Any
    keys: Any
