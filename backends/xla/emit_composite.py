"""Run a composite (attention, cross-entropy, their gradients) on this shard's part: its body, block by block.

    for block of queries:  scores = q[block] · kᵀ;  ...;  o[block] = weights · v

Scores exist for one block at a time. A block is a part of a free dim, like the part that a device has, so the body
is run by the same emitters as any op; results that are summed over the dim are added up from block to block.

Where masks leave keys out (`ir/analysis/key_spans.py`), runs of queries see only the keys that they look at. Devices
that share the queries may exchange halves of them first, so that all have equal work (`ir/composites/evenly.py`); a
switch over which run a device has then picks its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.analysis.dealt import through
from ...ir.composites.attention_form import LSE
from ...ir.composites.bodies import body_of
from ...ir.composites.evenly import partners
from ...ir.composites.free_dims import BLOCK, Dims, blocks_of, place_of
from ...ir.composites.online import body_parts
from ...ir.graph import Op
from ...ir.rules import rule_of
from ...ir.rules.rule import Rule
from .attention_check import check_form
from .attention_kernels import attention_kernel
from .dtypes import jax_dtype
from .emit import emit
from .shard import Arrays, Part, ShardPart, ShardWindow

RUNS, SHORTEST = 8, 128  # of queries that see keys of their own: at most so many, none shorter
CHOICES = 8  # of keys for a run of which only the device knows which one it has, about


def run_composite(
    op: Op, bound: Callable[[Op], Any], operands: Arrays, rule: Rule, cuts: Mapping[int, ShardPart],
    even: tuple[str, ...] = (), platform: str = "cpu",
) -> list[jax.Array]:  # fmt: skip
    """This shard's results, or its contribution to those that are summed over what is cut.

    Args:
        bound: gives the jax primitive and the parameters of an op of the body.
        operands: local parts, cut as the rule and `cuts` say.
        cuts: by factor of the rule; the free dims of the composite are its first factors.
        even: axes over which devices exchange rows.
        platform: of the devices; a kernel of theirs runs what it can (`attention_kernels.py`).
    """
    held, body = held_operands(op, operands), body_for(op)
    free = body.cuts(rule, cuts)
    kernel = attention_kernel(op, platform, free, even)
    if kernel is not None:
        check_form(op, kernel.form, partial(_sampled, body, bound))
    if body.rows is None or body.rows not in free:
        runs = body.runs()
        whole = kernel or Loop(body, bound, free, body.to_cut(free, len(runs)), runs)
        return whole(list(held))
    halves = Halves(even, body.partners(free[body.rows].ways)) if even else None
    runs = body.runs_of_one(free[body.rows], halves)
    loop = Loop(body, bound, free, body.to_cut(free, len(runs)), runs)
    if kernel is not None:
        loop = kernel.of_runs(runs, free[body.rows].ways)
    if halves is None:
        return loop(list(held))
    places = [place_of(dims, body.rows) for dims in (*body.operands, *body.results)]
    given = [halves.there(a, at) for a, at in zip(held, places, strict=False)]
    return [halves.back(a, at) for a, at in zip(loop(given), places[len(held) :], strict=True)]


def _sampled(
    body: CompositeBody, bound: Callable[[Op], Any], cuts: Mapping[int, Part], operands: Arrays
) -> list[Any]:
    """The body on a small part of its free dims."""
    return Loop(body, bound, cuts, ())(operands)


def held_operands(op: Op, operands: Arrays) -> list[jax.Array]:
    """Operands behind a barrier; what a kernel alone reads of the forward pass stays out of it."""
    body = body_of(op.text("body"))
    read = {v for each in body.ops for v in each.inputs} | {*body.outputs}
    at = [k for k, v in enumerate(body.inputs) if v in read]
    behind = dict(zip(at, lax.optimization_barrier(tuple(operands[k] for k in at)), strict=True))
    return [behind.get(k, array) for k, array in enumerate(operands)]


def factors_of(rule: Rule, sizes: Sequence[int]) -> list[int | None]:
    """The factor of each free dim; a size of 1 has none."""
    numbers = iter(range(len(rule.factors)))
    return [next(numbers) if size > 1 else None for size in sizes]


@dataclass(frozen=True)
class Halves:
    """Devices along `axes` keep the first half of their rows and work on the second half of their partner's."""

    axes: tuple[str, ...]
    partners: tuple[int, ...]

    def numbers(self, index: Any) -> list[Any]:
        """Which of all halves a device then has."""
        return [2 * index, 2 * jnp.asarray(self.partners, jnp.int32)[index] + 1]

    def there(self, array: Any, at: int | None) -> Any:
        """An operand with rows along a dim, as this device works on it."""
        return self._exchanged(array, at, [(p, i) for i, p in enumerate(self.partners)])

    def back(self, array: Any, at: int | None) -> Any:
        """A result, as it lies outside."""
        return self._exchanged(array, at, [(i, p) for i, p in enumerate(self.partners)])

    def _exchanged(self, array: Any, at: int | None, pairs: list[tuple[int, int]]) -> Any:
        if at is None:
            return array
        first, second = jnp.split(array, 2, at)
        return jnp.concatenate([first, lax.ppermute(second, self.axes, pairs)], at)


@dataclass(frozen=True)
class RowBlock:
    """Rows of a device from its row `at` on, which are `rows` of all; they look at `keys[which]`."""

    at: Any
    rows: ShardWindow
    keys: tuple[ShardWindow, ...]
    which: Any = 0


class CompositeBody:
    """A composite's graph, with the dims of its values as free dims; keys are numbered after those."""

    ATTRS = (
        "body",
        "sizes",
        "operands",
        "results",
        "rows",
        "keys",
        "spans",
        "blocks",
        "kept",
        "vocabulary",
    )

    def __init__(
        self,
        body: str,
        sizes: tuple[int, ...],
        operands: tuple[Dims, ...],
        results: tuple[Dims, ...],
        rows: int | None = None,
        keys: int | None = None,
        spans: tuple[tuple[int, int], ...] = (),
        blocks: int = 1,
        kept: int = 0,
        vocabulary: int | None = None,
    ):
        self.graph, self.sizes = body_of(body), sizes
        self.operands, self.results = operands, results
        self.rows, self.spans, self.blocks, self.kept = rows, spans, blocks, kept
        self.vocabulary = vocabulary
        self.dims = sizes if keys is None else (*sizes, keys)
        self.parts = body_parts(self.graph, self.dims, operands)
        self.most = max(
            (kind.size for kind in self.graph.types.values() if kind.is_float), default=0
        )  # scores, on whole arrays

    def cuts(self, rule: Rule, cuts: Mapping[int, ShardPart]) -> dict[int, ShardPart]:
        """Of free dims, by factor of its rule."""
        found = enumerate(factors_of(rule, self.sizes))
        return {d: cuts[f] for d, f in found if f is not None and f in cuts}

    def run(
        self, operands: Sequence[Any], emitted: Callable[[Op, Sequence[Any]], Sequence[Any]]
    ) -> list[jax.Array]:
        """Its results, op by op."""
        values = self.given(operands)
        for op in self.graph.ops:
            results = emitted(op, [values[v] for v in op.inputs])
            values |= dict(zip(op.outputs, results, strict=True))
        return [values[v] for v in self.graph.outputs]

    def given(self, operands: Sequence[Any]) -> dict[int, Any]:
        """Values that are there before its ops."""
        types = self.graph.types
        numbers = {
            c.value: jnp.asarray(c.data, jax_dtype(types[c.value].dtype))
            for c in self.graph.constants
        }
        return numbers | dict(zip(self.graph.inputs, operands, strict=True))

    def runs(self) -> tuple[RowBlock, ...]:
        """Equal runs of rows, each with the keys that it looks at; none where all look at all."""
        if self.rows is None:
            return ()
        rows, blocks = self.sizes[self.rows], len(self.spans)
        able = [n for n in range(2, RUNS + 1) if blocks % n == 0 and rows // n >= SHORTEST]
        many = max(able, default=1)
        length = rows // many
        return tuple(
            RowBlock(run * length, ShardWindow(run * length, length), (self.keys_of(run, many),))
            for run in range(many if able else 0)
        )

    def runs_of_one(self, cut: ShardPart, halves: Halves | None) -> tuple[RowBlock, ...]:
        """The run of rows, or the two halves of runs, of one of the devices that share all rows."""
        assert self.rows is not None
        many = cut.ways * (2 if halves else 1)
        length = self.sizes[self.rows] // many
        numbers = [cut.index] if halves is None else halves.numbers(cut.index)
        wide = max(1, many // CHOICES)  # neighbours that look at the same keys
        keys = tuple(self.keys_of(g, many // wide) for g in range(many // wide))
        if many % wide:
            keys = tuple(self.keys_of(g, many) for g in range(many))
            wide = 1
        return tuple(
            RowBlock(place * length, ShardWindow(number * length, length), keys, number // wide)
            for place, number in enumerate(numbers)
        )

    def keys_of(self, run: int, many: int) -> ShardWindow:
        """The keys that one of so many equal runs of rows looks at."""
        blocks, wide = len(self.spans), self.dims[-1] // self.blocks
        spans = self.spans[run * blocks // many : -(-(run + 1) * blocks // many)]
        first, end = min(f for f, _ in spans) * wide, max(e for _, e in spans) * wide
        return ShardWindow(first, end - first)

    def partners(self, ways: int) -> tuple[int, ...]:
        return partners(self.spans, self.blocks, ways)

    def to_cut(
        self,
        cuts: Mapping[int, ShardPart],
        runs: int = 0,
        keys: int = 1,
        most: int = 0,
        block: int = 0,
    ) -> list[tuple[int, int]]:
        """Free dims and the number of blocks of each, so that scores are small; batch and heads come first, as
        they need no sums. The batch is left alone where microbatches cut it over time. Rows are cut into `runs`
        before, keys into so many. Of `most` scores a block has `block`, if this is said."""
        timed = [d for d, cut in cuts.items() if cut.moment is not None]
        return blocks_of(
            self.sizes, self.operands, {d: cut.ways for d, cut in cuts.items()},
            (most or self.most) // keys, block or BLOCK, (self.vocabulary, *timed),
            {self.rows: runs} if runs and self.rows is not None else None,
        )  # fmt: skip


def body_for(op: Op) -> CompositeBody:
    """The body of a composite; equal ones share it."""
    return _made(**{name: told for name, told in op.attrs if name in CompositeBody.ATTRS})


@lru_cache(maxsize=256)
def _made(**attrs: Any) -> CompositeBody:
    return CompositeBody(**attrs)


@dataclass(frozen=True)
class Loop:
    """The body with the free dims that are left to cut taken block by block, one loop in another, and in the
    innermost the runs of rows that look at keys of their own."""

    body: CompositeBody
    bound: Callable[[Op], Any]
    cuts: Mapping[int, Part]
    todo: Sequence[tuple[int, int]]  # free dim, blocks
    runs: Sequence[RowBlock] = ()

    def __call__(self, operands: Sequence[Any]) -> list[jax.Array]:
        if self.runs and (not self.todo or self.todo[0][0] == self.body.rows):
            return self._by_runs(operands)
        if not self.todo:
            return self._alone(operands)
        (dim, many), *_ = self.todo
        return self._one_by_one(dim, many, partial(self._block, operands))

    def _one_by_one(
        self, dim: int, many: int, block: Callable[[Any], Sequence[Any]]
    ) -> list[jax.Array]:
        """Results of blocks of a dim, side by side; what is summed over the dim is added up."""
        places = [place_of(dims, dim) for dims in self.body.results]
        shapes = jax.eval_shape(block, jax.ShapeDtypeStruct((), jnp.int32))
        zeros = [
            jnp.zeros(s.shape, widened(s.dtype))
            for s, at in zip(shapes, places, strict=True)
            if at is None
        ]

        def one(sums: list[Any], number: Any) -> tuple[list[Any], list[Any]]:
            results = block(number)
            added = [r for r, at in zip(results, places, strict=True) if at is None]
            kept = [r for r, at in zip(results, places, strict=True) if at is not None]
            return [s + a.astype(s.dtype) for s, a in zip(sums, added, strict=True)], kept

        sums, pieces = map(iter, lax.scan(one, zeros, jnp.arange(many, dtype=jnp.int32)))
        return [
            next(sums).astype(s.dtype) if at is None else _joined(next(pieces), at)
            for s, at in zip(shapes, places, strict=True)
        ]

    def _block(self, operands: Sequence[Any], number: Any) -> Sequence[jax.Array]:
        (dim, many), *rest = self.todo
        whole = self.body.dims[dim]
        cut = self.cuts.get(dim, ShardPart(0, 1)).within(number, many, whole)
        parts = [
            _part(a, place_of(dims, dim), number, many)
            for a, dims in zip(operands, self.body.operands, strict=True)
        ]
        return replace(self, cuts={**self.cuts, dim: cut}, todo=rest)(parts)

    def _by_runs(self, operands: Sequence[Any]) -> list[jax.Array]:
        """Run by run of rows, each with the keys that it looks at; what is summed over rows is added up."""
        assert self.body.rows is not None
        if len(self.runs[0].keys) > 1:
            return self._one_by_one(self.body.rows, len(self.runs), partial(self._dealt, operands))
        found = [self._one_run(run, operands) for run in self.runs]
        return [
            _added(pieces) if (at := place_of(dims, self.body.rows)) is None else jnp.concatenate(pieces, at)
            for pieces, dims in zip(zip(*found, strict=True), self.body.results, strict=True)
        ]  # fmt: skip

    def _dealt(self, operands: Sequence[Any], number: Any) -> list[Any]:
        """One of the runs, which a number in the program says."""
        first, which = (
            jnp.stack([jnp.asarray(of(run), jnp.int32) for run in self.runs])[number]
            for of in (lambda run: run.rows.first, lambda run: run.which)
        )
        length = self.runs[0].rows.length
        run = RowBlock(number * length, ShardWindow(first, length), self.runs[0].keys, which)
        return self._one_run(run, operands)

    def _one_run(self, run: RowBlock, operands: Sequence[Any]) -> list[Any]:
        """Results of a run; those by keys for all keys."""
        assert self.body.rows is not None
        here = {self.body.rows: ShardWindow(run.at, run.rows.length)}
        given = [
            _in_windows(a, dims, here) for a, dims in zip(operands, self.body.operands, strict=True)
        ]
        choices = [partial(self._with_keys, run.rows, keys) for keys in run.keys]
        if len(choices) == 1:
            return choices[0](given)
        return lax.switch(run.which, choices, given)

    def _with_keys(
        self, rows: ShardWindow, keys: ShardWindow, operands: Sequence[Any]
    ) -> list[Any]:
        assert self.body.rows is not None
        at = len(self.body.sizes)
        given = [
            _in_windows(a, dims, {at: keys})
            for a, dims in zip(operands, self.body.operands, strict=True)
        ]
        cuts = {**self.cuts, self.body.rows: rows, at: keys}
        results = Loop(self.body, self.bound, cuts, self.todo)(given)
        after = self.body.dims[-1] - keys.first - keys.length
        return [
            _padded(result, place_of(dims, at), keys.first, after)
            for result, dims in zip(results, self.body.results, strict=True)
        ]

    def _alone(self, operands: Sequence[Any]) -> list[jax.Array]:
        """The body on one block of this shard's part."""
        return self.body.run(operands, self.one_op)

    def one_op(self, op: Op, operands: Sequence[Any]) -> list[jax.Array]:
        if op.kind == LSE:
            return [log_of_sum(*operands)]
        rule = rule_of(op, self.body.graph.types)
        return emit(op, self.bound(op), operands, rule, self.cuts_of(op, rule))

    def cuts_of(self, op: Op, rule: Rule) -> dict[int, Part]:
        """Which part of the factors of an op is here."""
        found: dict[int, Part] = {}
        known = through(op, rule, self.body.graph.types, self.body.parts)
        for parts, dims in zip(known, (*rule.operands, *rule.results), strict=True):
            for told, dim in zip(parts, dims, strict=True):
                if told and dim and told[0][0] in self.cuts and told[0][1] == 1:
                    found[dim[0]] = self.cuts[told[0][0]]
        return found


def log_of_sum(total: Any, shift: Any = 0.0) -> jax.Array:
    """Of the exponentials of a row, from which `shift` was taken off before."""
    return jnp.log(total).astype(jnp.float32) + jnp.asarray(shift, jnp.float32)


def _part(array: Any, at: int | None, number: Any, many: int) -> Any:
    """A block of an operand; all of it where it has not the dim."""
    if at is None:
        return array
    size = array.shape[at] // many
    return lax.dynamic_slice_in_dim(array, number * size, size, at)


def _in_windows(array: Any, dims: Dims, windows: Mapping[int, ShardWindow]) -> Any:
    for dim, window in windows.items():
        if (at := place_of(dims, dim)) is not None:
            array = lax.dynamic_slice_in_dim(array, window.first, window.length, at)
    return array


def _padded(array: Any, at: int | None, before: int, after: int) -> Any:
    """With nothing on both sides of a dim."""
    if at is None:
        return array
    return jnp.pad(array, [(before, after) if d == at else (0, 0) for d in range(array.ndim)])


def _added(pieces: Sequence[Any]) -> jax.Array:
    kind = pieces[0].dtype
    wide = [piece.astype(widened(kind)) for piece in pieces]
    return reduce(jnp.add, wide).astype(kind)


def widened(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _joined(pieces: jax.Array, at: int) -> jax.Array:
    """Blocks stacked in front, side by side in their dim."""
    moved = jnp.moveaxis(pieces, 0, at)
    shape = moved.shape
    return moved.reshape(*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
