"""The free dims of a composite: in which dims of its arrays they are, and which of them are taken block by block."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from ..attrs import integer_rows
from ..errors import GraphError
from ..graph import Op

Dims = tuple[tuple[int, ...], ...]  # by dim of an array, the free dims that it is made of

BLOCK = 1 << 20  # elements of scores that exist at a time, at most where dims can be cut so far


def dims_of(op: Op, sides: str) -> tuple[Dims, ...]:
    """Of a composite's "operands" or "results".

    Raises:
        GraphError: the attribute says something else.
    """
    found = [integer_rows(each) for each in op.items(sides)]
    told = tuple(each for each in found if each is not None)
    if len(told) < len(found):
        raise GraphError(
            f"attribute `{sides}` of `{op.kind}` does not say dims.", where=op.where or None
        )
    return told


def place_of(dims: Dims, dim: int | None) -> int | None:
    """The dim of an array that a free dim is in."""
    return next((k for k, d in enumerate(dims) if dim in d), None)


def blocks_of(
    sizes: Sequence[int], operands: Sequence[Dims], ways: Mapping[int, int], most: int, block: int,
    whole: Collection[int | None] = (), runs: Mapping[int, int] | None = None,
) -> list[tuple[int, int]]:  # fmt: skip
    """Free dims and the number of blocks of each, so that of `most` elements no more than `block` exist at a time,
    where dims can be cut so far. Those come first that most operands have, as they need no sums.

    Args:
        ways: into how many parts dims are cut already.
        whole: dims that are left alone.
        runs: into how many parts a dim is cut besides, as its turn comes.
    """
    left = most // prod(ways.values())
    lacking = {
        d: sum(all(d not in dim for dim in dims) for dims in operands) for d in range(len(sizes))
    }
    found: list[tuple[int, int]] = []
    for d in sorted(lacking, key=lambda d: (lacking[d], d)):
        here = sizes[d] // ways.get(d, 1)
        if runs and d in runs:
            here, left = here // runs[d], left // runs[d]
        wanted = -(-left // block)
        if wanted <= 1 or d in whole:
            continue
        many = next((n for n in range(wanted, here) if here % n == 0), here)
        if many > 1:
            found.append((d, many))
            left //= many
    return found
