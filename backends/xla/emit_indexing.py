"""Look-ups and updates whose ids choose places along a cut dim: this shard's part of them.

XLA makes a slice of the operand of a look-up or update with one id. It joins that slice with the one by which
the shard took its part of a larger array, and takes ids outside the part for places in the larger one (CPU
and GPU, jax 0.10 to 0.12). So one id never leaves the shard's part here: it is brought inside, and what
it would have changed keeps its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.rules.rule import Dim
from .compat import bind
from .shard import Arrays, Local, Params


def gather(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    """Answer the ids in this shard's part of a cut looked-up dim, and 0 for the others.

    What the user's mode says of ids outside the whole table is kept: clipped ids are
    clipped to the whole table, filled ones are filled by the first shard.
    """
    table, ids = operands
    dims = local.rule.operands[0]
    chosen = params["dimension_numbers"].start_index_map
    batching = params["dimension_numbers"].operand_batching_dims
    masked = {c: f for c, d in enumerate(chosen) if (f := _reduced(local, dims[d])) is not None}
    sizes = tuple(
        size if d in batching or local.cut(dim) is None or _reduced(local, dim) is not None
        else local.size(dim)
        for d, (size, dim) in enumerate(zip(params["slice_sizes"], dims, strict=True))
    )  # fmt: skip
    if not masked:
        return bind(primitive, operands, {**params, "slice_sizes": sizes})
    limits = [local.whole_size(dims[d]) - params["slice_sizes"][d] for d in chosen]
    fills = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    ids = _signed(ids if fills else _clip(ids, limits))
    known = _between(ids, dict(enumerate(limits)))
    ids = _shifted(local, ids, masked)
    here = _between(ids, {c: local.size(dims[chosen[c]]) - 1 for c in masked}) & known
    [found] = bind(
        primitive,
        [table, ids],
        {
            **params,
            "slice_sizes": sizes,
            "mode": lax.GatherScatterMode.CLIP,
            "fill_value": None,
            "indices_are_sorted": False,
            "unique_indices": False,
        },
    )
    kept = _aligned(here, found, params["dimension_numbers"].offset_dims)
    missing = jnp.zeros_like(found)
    if fills:
        fill = jnp.asarray(params["fill_value"], found.dtype)
        unknown = _aligned(~known, found, params["dimension_numbers"].offset_dims)
        missing = jnp.where(unknown & local.is_first(list(masked.values())), fill, missing)
    return [jnp.where(kept, found, missing)]


def scatter(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    """Where the index is cut, the first shard counts the operand and the others start from 0;
    where a chosen dim is cut, ids outside this shard's part are dropped."""
    target, ids, updates = operands
    dims, _, update_dims = local.rule.operands
    if added := [f for f in local.cuts if local.rule.factors[f].reduction == "sum"]:
        target = jnp.where(local.is_first(added), target, jnp.zeros_like(target))
    chosen = params["dimension_numbers"].scatter_dims_to_operand_dims
    cut = {c: f for c, d in enumerate(chosen) if (f := local.cut(dims[d])) is not None}
    masked = {c: f for c, f in cut.items() if not any(f in dim for dim in update_dims)}
    if cut and params["mode"] == lax.GatherScatterMode.CLIP:
        ids = _clip(ids, [local.whole_size(dims[d]) - _taken(local, params, d) for d in chosen])
    if masked:
        ids = _shifted(local, _signed(ids), masked)
        params = {**params, "mode": lax.GatherScatterMode.FILL_OR_DROP}
    if cut and prod(ids.shape[:-1]) == 1:
        tops = {c: local.size(dims[chosen[c]]) - 1 if c in masked else 0 for c in cut}
        ids, updates = _inside(tops, primitive.name, params, (target, ids, updates))
    return bind(primitive, [target, ids, updates], params)


def _inside(
    tops: Mapping[int, int], kind: str, params: Params, operands: Arrays
) -> tuple[jax.Array, jax.Array]:
    """Ids and updates of the same effect, the named columns of ids brought into 0..top."""
    target, ids, updates = operands
    ids = _signed(ids)
    here = _aligned(_between(ids, tops), updates, params["dimension_numbers"].update_window_dims)
    columns = (ids[..., c] for c in range(ids.shape[-1]))
    brought = [
        jnp.clip(column, 0, tops[c]) if c in tops else column for c, column in enumerate(columns)
    ]
    ids = jnp.stack(brought, axis=-1)
    neutral = {"scatter-add": -0.0, "scatter-sub": 0, "scatter-mul": 1}
    if kind in neutral:
        kept = jnp.full_like(updates, neutral[kind])
    else:
        kept = _found(params["dimension_numbers"], target, ids, updates)
    return ids, jnp.where(here, updates, kept)


def _found(
    numbers: lax.ScatterDimensionNumbers, target: jax.Array, ids: jax.Array, updates: jax.Array
) -> jax.Array:
    """What stands where a scatter would put these updates."""
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = iter(sorted(numbers.update_window_dims))
    sizes = tuple(1 if d in gone else updates.shape[next(window)] for d in range(target.ndim))
    reading = lax.GatherDimensionNumbers(
        offset_dims=tuple(numbers.update_window_dims),
        collapsed_slice_dims=tuple(numbers.inserted_window_dims),
        start_index_map=tuple(numbers.scatter_dims_to_operand_dims),
        operand_batching_dims=tuple(numbers.operand_batching_dims),
        start_indices_batching_dims=tuple(numbers.scatter_indices_batching_dims),
    )
    return lax.gather(target, ids, reading, sizes, mode="clip")


def _taken(local: Local, params: Params, d: int) -> int:
    """How much of operand dim d one update covers."""
    numbers = params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    if d in gone:
        return 1
    kept = [k for k in range(len(local.rule.operands[0])) if k not in gone]
    place = sorted(numbers.update_window_dims)[kept.index(d)]
    return local.whole_size(local.rule.operands[2][place])


def _reduced(local: Local, dim: Dim) -> int | None:
    """The factor of this dim that is cut and summed over, if one is."""
    factor = local.cut(dim)
    return factor if factor is not None and local.rule.factors[factor].reduction == "sum" else None


def _signed(ids: jax.Array) -> jax.Array:
    return ids if ids.dtype.itemsize == 8 else ids.astype(jnp.int32)


def _clip(ids: jax.Array, limits: Sequence[int]) -> jax.Array:
    """Each column of ids into 0..limit."""
    top = int(jnp.iinfo(ids.dtype).max)
    bounds = jnp.asarray([min(limit, top) for limit in limits], ids.dtype)
    return jnp.clip(ids, jnp.zeros_like(bounds), bounds)


def _between(ids: jax.Array, limits: Mapping[int, int]) -> jax.Array:
    """Whether the named columns are all within 0..limit."""
    return reduce(and_, ((ids[..., c] >= 0) & (ids[..., c] <= top) for c, top in limits.items()))


def _shifted(local: Local, ids: jax.Array, masked: Mapping[int, int]) -> jax.Array:
    """Ids counted from the start of this shard's part."""
    columns = range(ids.shape[-1])
    offsets = [jnp.asarray(local.offset(masked[c]) if c in masked else 0) for c in columns]
    return ids - jnp.stack(offsets).astype(ids.dtype)


def _aligned(mask: jax.Array, found: jax.Array, window: Sequence[int]) -> jax.Array:
    """A mask over index dims, repeated over the dims that slices fill."""
    return lax.broadcast_in_dim(
        mask, found.shape, [d for d in range(found.ndim) if d not in set(window)]
    )
