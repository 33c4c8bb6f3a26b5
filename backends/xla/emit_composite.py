"""Run a composite (attention, its gradients) on this shard's part: its body, block by block.

    for block of queries:  scores = q[block] · kᵀ;  ...;  o[block] = weights · v

Scores exist for one block at a time. A block is a part of a free dim, like the part that a device has, so the body
is run by the same emitters as any op; results that are summed over the dim are added up from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.composites import body_of
from ...ir.dealt import OTHER, Parts, followed, through
from ...ir.graph import Attr, Graph, Op
from ...ir.rule import Rule
from ...ir.rules import rule_of
from .emit import emit
from .shard import Arrays, Cut

BLOCK = 1 << 20  # elements of scores that exist at a time, at most where dims can be cut so far
Dims = tuple[tuple[int, ...], ...]  # by dim of an array, the free dims that it is made of


def run_composite(
    op: Op, bound: Callable[[Op], Any], operands: Arrays, rule: Rule, cuts: Mapping[int, Cut]
) -> list[jax.Array]:
    """This shard's results, or its contribution to those that are summed over what is cut.

    Args:
        bound: gives the jax primitive and the parameters of an op of the body.
        operands: local parts, cut as the rule and `cuts` say.
        cuts: by factor of the rule; the free dims of the composite are its first factors.
    """
    held = lax.optimization_barrier(tuple(operands))
    body = _Body.of(op.attr("body"), op.attr("sizes"), op.attr("operands"), op.attr("results"))
    free = {d: cuts[f] for d, f in enumerate(_factors(rule, body.sizes)) if f is not None and f in cuts}
    return _blocks(body, bound, free, body.to_cut(free), list(held))


def _factors(rule: Rule, sizes: Sequence[int]) -> list[int | None]:
    """The factor of each free dim; a size of 1 has none."""
    numbers = iter(range(len(rule.factors)))
    return [next(numbers) if size > 1 else None for size in sizes]


class _Body:
    """A composite's graph, with the dims of its values as free dims."""

    def __init__(self, text: str, sizes: tuple[int, ...], operands: tuple[Dims, ...], results: tuple[Dims, ...]):
        self.graph, self.sizes, self.operands, self.results = body_of(text), sizes, operands, results
        self.parts = _parts(self.graph, sizes, operands)
        self.most = max(
            (kind.size for kind in self.graph.types.values() if kind.is_float), default=0
        )  # scores, on whole arrays

    @classmethod
    def of(cls, *attrs: Attr) -> _Body:
        return _made(*attrs)

    def to_cut(self, cuts: Mapping[int, Cut]) -> list[tuple[int, int]]:
        """Free dims and the number of blocks of each, so that scores are small; batch and heads come first, as
        they need no sums. The batch is left alone where microbatches cut it over time."""
        left = self.most // prod(cut.ways for cut in cuts.values())
        lacking = {d: sum(all(d not in dim for dim in dims) for dims in self.operands) for d in range(len(self.sizes))}
        found = []
        for d in sorted(lacking, key=lambda d: (lacking[d], d)):
            here = self.sizes[d] // (cuts[d].ways if d in cuts else 1)
            wanted = -(-left // BLOCK)
            if wanted <= 1 or (d in cuts and cuts[d].moment is not None):
                continue
            blocks = next((n for n in range(wanted, here) if here % n == 0), here)
            if blocks > 1:
                found.append((d, blocks))
                left //= blocks
        return found


@lru_cache(maxsize=256)
def _made(text: str, sizes: tuple[int, ...], operands: tuple[Dims, ...], results: tuple[Dims, ...]) -> _Body:
    return _Body(text, sizes, operands, results)


def _parts(graph: Graph, sizes: Sequence[int], operands: Sequence[Dims]) -> dict[int, Parts]:
    """Dims of all values of a body as free dims, told by its operands, forwards and backwards."""
    known: dict[int, Parts] = {
        v: tuple(tuple((d, 1, sizes[d]) for d in dim) if dim else ((OTHER, 1, size),) if size > 1 else ()
                 for dim, size in zip(dims, graph.types[v].shape, strict=True))
        for v, dims in zip(graph.inputs, operands, strict=True)
    }  # fmt: skip
    while True:
        before = dict(known)
        for op in (*graph.ops, *reversed(graph.ops)):
            for value, parts in followed(op, graph.types, known).items():
                if _told(parts) > _told(known.get(value, ())):
                    known[value] = parts
        if known == before:
            return known


def _told(parts: Parts) -> int:
    return sum(part[0] != OTHER for dim in parts for part in dim)


def _blocks(
    body: _Body, bound: Callable[[Op], Any], cuts: Mapping[int, Cut], todo: Sequence[tuple[int, int]], operands: list[Any]
) -> list[jax.Array]:
    """The body with the dims left to cut taken block by block, one loop in another."""
    if not todo:
        return _run(body, bound, cuts, operands)
    (dim, many), *rest = todo
    before = cuts.get(dim, Cut(0, 1))

    def one(sums: list[Any], number: Any) -> tuple[list[Any], list[Any]]:
        parts = [_part(a, dims, dim, number, many) for a, dims in zip(operands, body.operands, strict=True)]
        cut = Cut(before.index * many + number, before.ways * many)
        results = _blocks(body, bound, {**cuts, dim: cut}, rest, parts)
        added = [r for r, at in zip(results, places, strict=True) if at is None]
        return [s + a.astype(s.dtype) for s, a in zip(sums, added, strict=True)], [
            r for r, at in zip(results, places, strict=True) if at is not None
        ]

    places = [next((k for k, d in enumerate(dims) if dim in d), None) for dims in body.results]
    shapes = jax.eval_shape(
        lambda: _blocks(body, bound, {**cuts, dim: Cut(0, before.ways * many)}, rest,
                        [_part(a, dims, dim, 0, many) for a, dims in zip(operands, body.operands, strict=True)])
    )  # fmt: skip
    zeros = [jnp.zeros(s.shape, _wide(s.dtype)) for s, at in zip(shapes, places, strict=True) if at is None]
    sums, pieces = lax.scan(one, zeros, jnp.arange(many, dtype=jnp.int32))
    sums, pieces = iter(sums), iter(pieces)
    return [
        next(sums).astype(s.dtype) if at is None else _joined(next(pieces), at)
        for s, at in zip(shapes, places, strict=True)
    ]


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _part(array: Any, dims: Dims, dim: int, number: Any, many: int) -> Any:
    """A block of an operand; all of it where it has not the dim."""
    at = next((k for k, d in enumerate(dims) if dim in d), None)
    if at is None:
        return array
    size = array.shape[at] // many
    return lax.dynamic_slice_in_dim(array, number * size, size, at)


def _joined(pieces: jax.Array, at: int) -> jax.Array:
    """Blocks stacked in front, side by side in their dim."""
    moved = jnp.moveaxis(pieces, 0, at)
    shape = moved.shape
    return moved.reshape(*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])


def _run(
    body: _Body, bound: Callable[[Op], Any], cuts: Mapping[int, Cut], operands: Sequence[Any]
) -> list[jax.Array]:
    """The body on one block of this shard's part."""
    from .spmd import jax_dtype

    graph = body.graph
    values: dict[int, Any] = dict(zip(graph.inputs, operands, strict=True))
    values |= {c.value: jnp.asarray(c.data, jax_dtype(graph.types[c.value].dtype)) for c in graph.constants}
    for op in graph.ops:
        rule = rule_of(op, graph.types)
        results = emit(op, bound(op), [values[v] for v in op.inputs], rule, _of_op(body, op, rule, cuts))
        values |= dict(zip(op.outputs, results, strict=True))
    return [values[v] for v in graph.outputs]


def _of_op(body: _Body, op: Op, rule: Rule, cuts: Mapping[int, Cut]) -> dict[int, Cut]:
    """Which part of the op's factors is here."""
    found: dict[int, Cut] = {}
    known = through(op, rule, body.graph.types, body.parts)
    for parts, dims in zip(known, (*rule.operands, *rule.results), strict=True):
        for told, dim in zip(parts, dims, strict=True):
            if told and dim and told[0][0] in cuts and told[0][1] == 1:
                found[dim[0]] = cuts[told[0][0]]
    return found
