"""Results that are whole on one stage, made whole on all devices, so that every process can read them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from .devices import is_mine

ALL = "all"  # the only axis of all stages' devices


@dataclass(frozen=True)
class Everywhere:
    """`everywhere(results) -> ({position: whole result}, token)`; every process calls it.

    A sum over all devices, to which the first device of each result's stage gives the result and the
    others zeros. Meant for losses and other metrics, which are small.
    """

    sources: Mapping[int, int]  # position of a result -> its stage
    kinds: Mapping[int, tuple[tuple[int, ...], Any]]  # position -> shape, dtype
    meshes: Sequence[DeviceMesh]

    def __call__(self, results: Sequence[Any]) -> tuple[dict[int, Any], Any]:
        mixed = [self._beside(position, results[position]) for position in self.sources]
        found = dict(zip(self.sources, self._sum(mixed), strict=True))
        return found, list(found.values())

    @cached_property
    def layout(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec())

    @cached_property
    def _mesh(self) -> DeviceMesh:
        devices = dict.fromkeys(device for mesh in self.meshes for device in mesh.devices.flat)
        return DeviceMesh(np.array(list(devices)), (ALL,))

    def _beside(self, position: int, result: Any) -> Any:
        """One slice for each device: the result where its stage is, zeros elsewhere."""
        (shape, dtype), mesh = self.kinds[position], self.meshes[self.sources[position]]
        parts = (
            [shard.data for shard in _slices(mesh)(result).addressable_shards]
            if is_mine(mesh)
            else []
        )
        there = set(mesh.devices.flat)
        others = [
            d
            for d in self._mesh.devices.flat
            if d.process_index == jax.process_index() and d not in there
        ]
        parts += [jax.device_put(np.zeros((1, *shape), dtype), device) for device in others]
        layout = NamedSharding(self._mesh, PartitionSpec(ALL))
        return jax.make_array_from_single_device_arrays(
            (self._mesh.size, *shape), layout, parts, dtype=dtype
        )

    @cached_property
    def _sum(self) -> Any:
        order = list(self._mesh.devices.flat)
        first = [order.index(self.meshes[stage].devices.flat[0]) for stage in self.sources.values()]

        def one(array: Any, source: int) -> Any:
            wide = array[0].astype(jnp.int32) if array.dtype == bool else array[0]
            given = jnp.where(lax.axis_index(ALL) == source, wide, jnp.zeros_like(wide))
            return lax.psum(given, ALL).astype(array.dtype)

        def local(arrays: list[Any]) -> list[Any]:
            return [one(array, source) for array, source in zip(arrays, first, strict=True)]

        spec = PartitionSpec(ALL)
        return jax.jit(
            jax.shard_map(
                local, mesh=self._mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
            )
        )


@functools.cache
def _slices(mesh: DeviceMesh) -> Any:
    """A whole array as a slice for each device of its mesh."""
    one = jax.shard_map(
        lambda x: x[None], mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )  # fmt: skip
    return jax.jit(one)
