"""Moves between layouts, run on local shards inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from ...ir.mesh import Mesh
from ...ir.sharding import Step

SETTLE = {"max": lax.pmax, "min": lax.pmin, "sum": lax.psum}


def shard_index(axes: Sequence[str], mesh: Mesh) -> jax.Array | int:
    """Which part this device holds of a dim cut over `axes`, major to minor."""
    index: jax.Array | int = 0
    for axis in axes:
        index = index * mesh.sizes[axis] + lax.axis_index(axis)
    return index


def take_part(x: jax.Array, dim: int, index: jax.Array | int, ways: int) -> jax.Array:
    """Part `index` of `ways` equal ones along a dim."""
    size = x.shape[dim] // ways
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)


def move(x: jax.Array, steps: Sequence[Step], mesh: Mesh) -> jax.Array:
    """Carry out a resharding (see `ir.sharding.reshard`) on the local shard."""
    for step in steps:
        match step.kind:
            case "slice":
                x = take_part(x, step.dim, shard_index(step.axes, mesh), mesh.ways(step.axes))
            case "reduce_scatter":
                x = lax.psum_scatter(x, step.axes, scatter_dimension=step.dim, tiled=True)
            case "all_reduce":
                x = lax.psum(x, step.axes)
            case "all_gather":
                x = lax.all_gather(x, step.axes, axis=step.dim, tiled=True)
            case "all_to_all":
                x = lax.all_to_all(
                    x, step.axes, split_axis=step.to, concat_axis=step.dim, tiled=True
                )
    return x


def settle(x: jax.Array, reduction: str, axes: tuple[str, ...]) -> jax.Array:
    """Combine what each shard found: max, min, and all/any of booleans."""
    if reduction in ("and", "or"):
        combined = {"and": lax.pmin, "or": lax.pmax}[reduction](x.astype("int32"), axes)
        return combined.astype(x.dtype)
    return SETTLE[reduction](x, axes)
