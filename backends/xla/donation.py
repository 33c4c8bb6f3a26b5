"""Arrays that are given up and given again in the same call: XLA would write over what it still reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...ir.errors import UsageError
from .calls import Call
from .stacked import StackedArray


def check_given_twice(call: Call, donated: frozenset[int], thorough: bool = True) -> None:
    """Raise where a donated leaf is the same array as another one, or shares its buffer.

    Buffers of arrays that lie on several devices are asked for with `thorough`: that takes longer than other steps do.
    """
    twice = given_twice(call.leaves, donated, None if thorough else 1)
    if twice is not None:
        one, other = (call.names[p] for p in twice)
        raise UsageError(
            f"`{one}` and `{other}` are the same array, and it is donated: it would be written over while it is read.",
            where=f"step `{call.step.name}`",
            fix=f"give a copy for one of them, `{other}=jnp.copy(...)`, or do not donate it"
            if other.isidentifier()
            else "give a copy for one of them, jnp.copy(...), or do not donate it",
        )


def given_twice(
    leaves: Sequence[Any], donated: frozenset[int], most: int | None = 0
) -> tuple[int, int] | None:
    """Positions of two leaves that are one array, of which one is donated.

    Buffers are compared of arrays on at most `most` devices; None: on any number.
    """
    if not donated or (most == 0 and len(set(map(id, leaves))) == len(leaves)):
        return None
    seen: dict[Any, int] = {}
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            continue
        parts = leaf.pieces.values() if isinstance(leaf, StackedArray) else [leaf]
        for key in [("object", id(leaf)), *(key for part in parts for key in _buffers(part, most))]:
            other = seen.setdefault(key, position)
            if other != position and not donated.isdisjoint((other, position)):
                return other, position
    return None


def _buffers(leaf: jax.Array, most: int | None) -> list[tuple[str, int]]:
    """Where its first shard lies, if it is here."""
    many = len(leaf.sharding.device_set)
    if (most is not None and many > most) or leaf.is_deleted() or not leaf.size:
        return []
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or not leaf.is_fully_addressable:
        return []
    part = leaf if many == 1 else leaf.addressable_shards[0].data
    return [("buffer", part.unsafe_buffer_pointer())]
