"""Partial results made one, over devices, microbatches or stages: sums, extremes, all and any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# One part after another; NaN stays.
JOIN: dict[str, Callable[[Any, Any], Any]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
}


def start(reduction: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """What `JOIN` begins with. Totals of short floats are kept in float32."""
    floats = jnp.issubdtype(shape.dtype, jnp.floating)
    dtype = jnp.promote_types(shape.dtype, jnp.float32) if floats else shape.dtype
    if reduction == "sum" or dtype == jnp.bool_:
        return jnp.full(shape.shape, reduction in ("and", "min"), dtype)
    lowest, highest = (
        (-jnp.inf, jnp.inf) if floats else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
    )
    return jnp.full(shape.shape, lowest if reduction == "max" else highest, dtype)


def settle(x: jax.Array, reduction: str, axes: str | Sequence[str]) -> jax.Array:
    """Combine what each device found in one collective of as many bytes as `x` has; in none where that is 0."""
    if not x.size:
        return x
    if reduction == "sum":
        return lax.psum(x, axes)
    if reduction in ("and", "or"):
        combined = {"and": lax.pmin, "or": lax.pmax}[reduction](x.astype("int8"), axes)
        return combined.astype(x.dtype)
    extreme = {"max": lax.pmax, "min": lax.pmin}[reduction]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return extreme(x, axes)
    return _floats(extreme(_ranks(x, reduction), axes), x.dtype)


def _ranks(x: jax.Array, reduction: str) -> jax.Array:
    """Integers in the order of these floats, NaN beyond the end that is looked for.

    Collectives drop NaN where an ordinary maximum keeps it (`lax.pmax` on CPUs, jax 0.10). Floats
    of one sign are in the order of their bits; those of negative ones run backwards (IEEE 754, 5.10).
    """
    whole = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    ends = jnp.iinfo(whole)
    ranks = _turned(lax.bitcast_convert_type(x, whole))
    return jnp.where(jnp.isnan(x), ends.max if reduction == "max" else ends.min, ranks)


def _floats(ranks: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(_turned(ranks), dtype)


def _turned(bits: jax.Array) -> jax.Array:
    """Negative numbers in the opposite order; its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
