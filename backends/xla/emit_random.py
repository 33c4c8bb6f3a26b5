"""Random bits of a shard: the numbers that one device would draw at the same places.

A threefry number is a hash of its key and of its place, counted in row-major order over what the key makes:

    bits[key, i, j] = threefry2x32(key, i * columns + j)

so a shard counts from where its part lies (jax's partitionable threefry, `jax_threefry_partitionable`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from ...ir.graph import Op
from .compat import bind
from .shard import Arrays, Local, Params

WORD = 1 << 32


def drawing(op: Op) -> AbstractContextManager[Any]:
    """As it was captured: which numbers threefry draws depends on a setting of jax's, by thread."""
    partitionable = op.flag("partitionable") if op.has("partitionable") else None
    return (
        nullcontext() if partitionable is None else jax.threefry_partitionable(bool(partitionable))
    )


def random_bits(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    if not _is_cut(local, operands[0]):
        return bind(primitive, operands, params)
    high, low = _hashed(local, operands[0])
    width = params["bit_width"]
    dtype = jnp.dtype(f"uint{width}")
    if width == 64:
        return [(high.astype(dtype) << jnp.asarray(32, dtype)) | low.astype(dtype)]
    return [(high ^ low).astype(dtype)]


def random_split(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    if not _is_cut(local, operands[0]):
        return bind(primitive, operands, params)
    words = jnp.stack(_hashed(local, operands[0]), axis=-1)
    return [jax.random.wrap_key_data(words, impl=jax.random.key_impl(operands[0]))]


def _is_cut(local: Local, keys: jax.Array) -> bool:
    """Whether this shard has a part of what each key makes."""
    return any(local.cut(dim) is not None for dim in local.rule.results[0][keys.ndim :])


def _hashed(local: Local, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words for each place of this shard's part, of each key."""
    data = jax.random.key_data(keys)
    shape = local.shape(local.rule.results[0])
    words = [lax.broadcast_in_dim(data[..., k], shape, range(keys.ndim)) for k in (0, 1)]
    counts = [jnp.broadcast_to(count, shape) for count in _places(local, keys.ndim)]
    high, low = threefry2x32_p.bind(*words, *counts)
    return high, low


def _places(local: Local, keys: int) -> tuple[jax.Array, jax.Array]:
    """High and low words of the places, in the shape that one key makes."""
    dims = local.rule.results[0][keys:]
    sizes = [local.whole_size(dim) for dim in dims]
    high = low = jnp.zeros(local.shape(dims), jnp.uint32)
    for d, dim in enumerate(dims):
        steps, stride = local.positions(dim), prod(sizes[d + 1 :])
        words = [lax.broadcast_in_dim(word, low.shape, [d]) for word in _times(steps, stride)]
        low = low + words[1]
        if prod(sizes) > WORD:
            high = high + words[0] + (low < words[1])
    return high, low


def _times(steps: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """The product in two words, by halves of words (Knuth, TAOCP 2, 4.3.1, algorithm M)."""
    half = jnp.uint32(16)
    mask = jnp.uint32(0xFFFF)
    top, bottom = divmod(stride % WORD, 1 << 16)
    left, right = steps >> half, steps & mask
    low = right * jnp.uint32(bottom)
    middle = left * jnp.uint32(bottom) + (low >> half)
    other = right * jnp.uint32(top) + (middle & mask)
    high = left * jnp.uint32(top) + (middle >> half) + (other >> half)
    return high + steps * jnp.uint32(stride // WORD), (other << half) | (low & mask)
