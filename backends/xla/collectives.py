"""Moves between layouts, run on local shards inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
from jax import lax

from ...ir.local.program import LocalOp
from ...ir.mesh import Mesh
from ...ir.sharding import ReshardStep
from .joins import settle


def shard_index(axes: Sequence[str], mesh: Mesh) -> jax.Array | int:
    """Which part this device holds of a dim cut over `axes`, major to minor."""
    index: jax.Array | int = 0
    for axis in axes:
        index = index * mesh.sizes[axis] + lax.axis_index(axis)
    return index


def run_on_shards(
    op: LocalOp, operands: Sequence[jax.Array], mesh: Mesh, microbatches: int, moment: Any
) -> list[jax.Array]:
    """What is no op of the graph: collectives, slices, and cuts of the batch over time. Several operands travel end to
    end, as one array: devices meet once for it, and once for each operand of an op of XLA's that has several."""
    if len(operands) == 1:
        return [_run_on_shard(op, operands[0], mesh, microbatches, moment)]
    line = jax.numpy.concatenate([x.reshape(-1) for x in operands])
    ends = list(accumulate(x.size for x in operands))
    parts = jax.numpy.split(_run_on_shard(op, line, mesh, microbatches, moment), ends[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, operands, strict=True)]


def _run_on_shard(
    op: LocalOp, x: jax.Array, mesh: Mesh, microbatches: int, moment: Any
) -> jax.Array:
    match op.kind:
        case "all_reduce" if op.text("reduction") != "sum":
            return settle(x, op.text("reduction"), op.axes)
        case "all_reduce":
            return move(x, [ReshardStep("all_reduce", op.axes)], mesh)
        case "all_to_all":
            return move(
                x, [ReshardStep("all_to_all", op.axes, op.integer("dim"), op.integer("to"))], mesh
            )
        case "all_gather" | "reduce_scatter" as kind:
            return move(x, [ReshardStep(kind, op.axes, op.integer("dim"))], mesh)
        case "local_slice":
            return move(x, [ReshardStep("slice", op.axes, op.integer("dim"))], mesh)
        case "keep_first":
            return jax.numpy.where(shard_index(op.axes, mesh) == 0, x, jax.numpy.zeros_like(x))
        case "take_microbatch":
            return take_microbatch(x, op.integer("dim"), moment, microbatches, op.integer("groups"))
        case _:
            assert op.kind == "join_microbatches"
            return join_microbatches(x, op.integer("dim"), op.integer("groups"))


def take_part(x: jax.Array, dim: int, index: jax.Array | int, ways: int) -> jax.Array:
    """Part `index` of `ways` equal ones along a dim."""
    size = x.shape[dim] // ways
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)


def take_microbatch(
    x: jax.Array, dim: int, moment: jax.Array, count: int, groups: int
) -> jax.Array:
    """The rows of one microbatch, in order: its part of each of `groups` runs of neighbours."""
    dealt = (groups, count, x.shape[dim] // (groups * count))
    view = x.reshape(*x.shape[:dim], *dealt, *x.shape[dim + 1 :])
    part = lax.dynamic_index_in_dim(view, moment, dim + 1, keepdims=False)
    return part.reshape(*x.shape[:dim], dealt[0] * dealt[2], *x.shape[dim + 1 :])


def join_microbatches(pieces: jax.Array, dim: int, groups: int) -> jax.Array:
    """The inverse: `pieces` has the microbatches stacked in front."""
    count, size = pieces.shape[0], pieces.shape[dim + 1]
    shape = pieces.shape[1:]
    view = pieces.reshape(count, *shape[:dim], groups, size // groups, *shape[dim + 1 :])
    moved = jax.numpy.moveaxis(view, 0, dim + 1)
    return moved.reshape(*shape[:dim], count * size, *shape[dim + 1 :])


def move(x: jax.Array, steps: Sequence[ReshardStep], mesh: Mesh) -> jax.Array:
    """Carry out a resharding (see `ir.sharding.reshard`) on the local shard. Keys travel as their words."""
    if steps and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = move(jax.random.key_data(x), steps, mesh)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    for step in steps if x.size else ():
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
    return x if x.size else jax.numpy.zeros(_moved_shape(x.shape, steps, mesh), x.dtype)


def _moved_shape(
    shape: tuple[int, ...], steps: Sequence[ReshardStep], mesh: Mesh
) -> tuple[int, ...]:
    """Of a local shard after a resharding."""
    sizes = list(shape)
    for step in steps:
        ways = mesh.ways(step.axes)
        if step.kind in ("slice", "reduce_scatter"):
            sizes[step.dim] //= ways
        elif step.kind in ("all_gather", "all_to_all"):
            sizes[step.dim] *= ways
        if step.kind == "all_to_all":
            sizes[step.to] //= ways
    return tuple(sizes)
