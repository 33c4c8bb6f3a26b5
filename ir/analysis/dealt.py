"""What the dims of one value are on other values: its dims followed through ops, forwards and backwards.

    scores [B, N, T, S] -> transpose -> reshape [T, B·N, S]      the dims of scores, moved, joined, split

Dims of another value are told as parts of the first one's. A part is a piece of one of its dims,
so that a dim that a reshape splits is told in several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..graph import Op, TensorType
from ..rules import rule_of
from ..rules.rule import Rule

OTHER = -1  # a part of a dim that is none of the value's that is followed
Part = tuple[
    int, int, int
]  # (dim of the followed value, how many parts it was cut into before this one, size)
Parts = tuple[tuple[Part, ...], ...]  # parts of every dim, major to minor


def whole(kind: TensorType) -> Parts:
    """The value that is followed, told by itself."""
    return tuple(((d, 1, size),) if size > 1 else () for d, size in enumerate(kind.shape))


def complete(parts: Parts, kind: TensorType) -> frozenset[int]:
    """The dims of the followed value (of this type) of which no piece is missing."""
    sizes = defaultdict[int, int](lambda: 1)
    for d, _, size in {part for dim in parts for part in dim}:
        sizes[d] *= size
    return frozenset(d for d, size in sizes.items() if d != OTHER and size == kind.shape[d])


def through(
    op: Op, rule: Rule, types: Mapping[int, TensorType], known: Mapping[int, Parts]
) -> tuple[Parts, ...]:
    """The parts of all operands and results of an op, told by those of them that are known."""
    sides = list(zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True))
    factors: dict[int, tuple[Part, ...]] = {}
    for value, dims in sides:
        for parts, dim in zip(known.get(value, ()), dims, strict=False):
            dealt = deal(parts, [rule.factors[f].size for f in dim])
            for factor, found in zip(dim, dealt, strict=False):
                if factor not in factors or all(part[0] == OTHER for part in factors[factor]):
                    factors[factor] = found
    return tuple(
        tuple(
            tuple(part for f in dim for part in factors.get(f, ((OTHER, 1, rule.factors[f].size),)))
            for dim in dims
        )
        for _, dims in sides
    )  # fmt: skip


def spread(
    ops: Sequence[Op], types: Mapping[int, TensorType], known: Mapping[int, Parts]
) -> dict[int, Parts]:
    """Parts of all values that ops read and make, as far as some tell them, forwards and backwards."""
    found = dict(known)
    while True:
        before = dict(found)
        for op in (*ops, *reversed(ops)):
            for value, parts in followed(op, types, found).items():
                if _told(parts) > _told(found.get(value, ())):
                    found[value] = parts
        if found == before:
            return found


def _told(parts: Parts) -> int:
    return sum(part[0] != OTHER for dim in parts for part in dim)


def deal(parts: Sequence[Part], sizes: Sequence[int]) -> list[tuple[Part, ...]]:
    """Parts of a dim dealt out to factors of these sizes, split where they must be; [] where they do not fit."""
    left, dealt = list(parts), list[tuple[Part, ...]]()
    for size in sizes:
        taken: list[Part] = []
        while size > 1:
            if not left:
                return []
            dim, before, length = left.pop(0)
            if length > size:
                if length % size:
                    return []
                left.insert(0, (dim, before * size, length // size))
                length = size
            elif size % length:
                return []
            taken.append((dim, before, length))
            size //= length
        dealt.append(tuple(taken))
    return dealt if not left else []


def followed(
    op: Op, types: Mapping[int, TensorType], known: Mapping[int, Parts]
) -> dict[int, Parts]:
    """Parts of each side of an op without regions; nothing where no rule describes it."""
    if op.kind == "optimization_barrier":
        found: dict[int, Parts] = {}
        for source, result in zip(op.inputs, op.outputs, strict=True):
            for one, other in ((source, result), (result, source)):
                if one in known:
                    found[other] = known[one]
        return found
    rule = rule_of(op, types)
    if rule.opaque:
        return {}
    return dict(zip((*op.inputs, *op.outputs), through(op, rule, types, known), strict=True))
