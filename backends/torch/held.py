"""The part of a leaf of the state that a rank holds, or is to hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.graph import TensorType
from ...ir.mesh import Mesh
from ...ir.sharding import Sharding
from .collectives import part_of, places_of
from .dtypes import torch_dtype

Name = tuple[str, ...]  # of a leaf in a checkpoint, from the outermost key inward


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a leaf: `tensor`, which begins at `offsets` of a whole of this `shape`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor


def whole(tensor: torch.Tensor) -> Shard:
    """A leaf that lies here whole."""
    return Shard(tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def place(kind: TensorType) -> Shard:
    """A place for a leaf that is to lie here whole."""
    return whole(torch.empty(kind.shape, dtype=torch_dtype(kind.dtype)))


def held(tensor: torch.Tensor, layout: Sharding, mesh: Mesh, rank: int) -> Shard:
    """What a rank of a mesh holds of a leaf that lies so."""
    at = places_of(mesh)[rank]
    dims = [*zip(tensor.shape, layout.dims, strict=True)]
    return Shard(
        tuple(size * mesh.ways(axes) for size, axes in dims),
        tuple(size * part_of(axes, at, mesh) for size, axes in dims),
        tensor,
    )


def room(kind: TensorType, layout: Sharding, mesh: Mesh, rank: int) -> Shard:
    """A place for what a rank of a mesh is to hold."""
    shape = layout.local_shape(kind.shape, mesh)
    return held(torch.empty(shape, dtype=torch_dtype(kind.dtype)), layout, mesh, rank)
