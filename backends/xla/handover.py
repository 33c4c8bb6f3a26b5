"""How values get from the devices of one stage to those of another.

Within one process jax copies them. Between processes, both stages run one small program together: device
i of the sender permutes its shards to device i of the receiver. Stages with other meshes than each other
hand over whole values, of which each device of the receiver keeps its part.

What it costs: the permutation has an operand and a result on both sides, so the receiver keeps a block of
zeros as large as what it is sent, and the sender gets one for a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from ...ir.errors import LoweringError
from ..runtime.programs import Route
from .devices import crossing_spec, is_mine, named_sharding, processes_of
from .dtypes import jax_dtype

ENDS = "ends"  # the only axis of both stages' devices side by side


@dataclass(frozen=True)
class Handover:
    """Arrays from one stage to another: a `Transfer` of the runtime."""

    routes: Sequence[Route]
    sender: DeviceMesh
    receiver: DeviceMesh

    def __post_init__(self) -> None:
        here, there = set(self.sender.devices.flat), set(self.receiver.devices.flat)
        if self.joint and here != there and here & there:
            raise LoweringError(
                f"stages on {len(here)} and {len(there)} devices share some, over several processes.",
                where="pipeline", fix="stages of one rank with meshes of one size",
            )  # fmt: skip
        if self.joint and any(route.dtype == "key" for route in self.routes):
            raise LoweringError(
                "a random key cannot go from the process of one stage to that of another.",
                where="pipeline", fix="give the step its key as data: jax.random.key_data(key), wrapped within",
            )  # fmt: skip

    @property
    def joint(self) -> bool:
        """Whether several processes take part."""
        return len(processes_of(self.sender) | processes_of(self.receiver)) > 1

    def _travels(self, route: Route) -> PartitionSpec:
        """As the receiver wants it if both have the same mesh, else whole."""
        same = self.sender.shape_tuple == self.receiver.shape_tuple
        return crossing_spec(route.arrives) if same else PartitionSpec()

    def _local_shape(self, route: Route) -> tuple[int, ...]:
        """Of a shard on its way; a scalar travels as a vector."""
        return NamedSharding(self.sender, self._travels(route)).shard_shape(route.shape) or (1,)

    @cached_property
    def _goals(self) -> list[NamedSharding]:
        return [named_sharding(self.receiver, route.arrives) for route in self.routes]

    def __call__(self, arrays: Sequence[Any] | None) -> tuple[list[Any] | None, Any]:
        if not self.joint:
            found = jax.device_put(list(arrays or ()), self._goals)
            return found, found
        if set(self.sender.devices.flat) == set(self.receiver.devices.flat):
            found = self._arrive(arrays)
            return found, found
        mixed = [
            self._beside(*pair) for pair in zip(self.routes, self._leaving(arrays), strict=True)
        ]
        moved, token = self._permute(mixed)
        if not is_mine(self.receiver):
            return None, token
        there = [self._there(route, array) for route, array in zip(self.routes, moved, strict=True)]
        return self._arrive(there), token

    def _leaving(self, arrays: Sequence[Any] | None) -> list[Any]:
        return self._leave(list(arrays)) if arrays is not None else [None] * len(self.routes)

    @cached_property
    def _leave(self) -> Any:
        """On the sender: laid out for the way."""
        layouts = [NamedSharding(self.sender, self._travels(route)) for route in self.routes]
        return jax.jit(
            lambda arrays: [a.reshape(a.shape or (1,)) for a in arrays], out_shardings=layouts
        )

    @cached_property
    def _arrive(self) -> Any:
        """On the receiver: laid out as it is wanted; each device has what it needs for that."""
        shapes = [route.shape for route in self.routes]
        shaped = lambda arrays: [a.reshape(s) for a, s in zip(arrays, shapes, strict=True)]  # noqa: E731
        return jax.jit(shaped, out_shardings=self._goals)

    @cached_property
    def _side_by_side(self) -> DeviceMesh:
        return DeviceMesh(
            np.array([*self.sender.devices.flat, *self.receiver.devices.flat]), (ENDS,)
        )

    def _beside(self, route: Route, array: Any) -> Any:
        """The shards of both stages as one array: the sender's values, zeros of the receiver."""
        ours = [] if array is None else [shard.data for shard in array.addressable_shards]
        local = self._local_shape(route)
        shape = (self._side_by_side.size * local[0], *local[1:])
        layout = NamedSharding(self._side_by_side, PartitionSpec(ENDS))
        parts = [*ours, *self._zeros[local, jax_dtype(route.dtype)]]
        return jax.make_array_from_single_device_arrays(shape, layout, parts)

    @cached_property
    def _zeros(self) -> dict[Any, list[Any]]:
        here = [d for d in self.receiver.devices.flat if d.process_index == jax.process_index()]
        kinds = {(self._local_shape(route), jax_dtype(route.dtype)) for route in self.routes}
        return {
            kind: [jax.device_put(np.zeros(*kind), device) for device in here] for kind in kinds
        }

    def _there(self, route: Route, array: Any) -> Any:
        """The receiver's shards of what both have, as an array of its own."""
        devices = set(self.receiver.devices.flat)
        shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
        layout = NamedSharding(self.receiver, self._travels(route))
        return jax.make_array_from_single_device_arrays(route.shape or (1,), layout, shards)

    @cached_property
    def _permute(self) -> Any:
        """Shards go from the sender's devices to the receiver's, as often as it takes to reach all."""
        n, m = self.sender.size, self.receiver.size
        rounds = [[(i, n + k + i) for i in range(min(n, m - k))] for k in range(0, m, n)]

        def one(array: Any) -> Any:
            moved, here = lax.ppermute(array, ENDS, rounds[0]), lax.axis_index(ENDS)
            for k, pairs in enumerate(rounds[1:], start=1):
                moved = jnp.where(here >= n + k * n, lax.ppermute(array, ENDS, pairs), moved)
            return moved

        def local(arrays: list[Any]) -> Any:
            return [one(array) for array in arrays], jnp.zeros(1, jnp.int32)

        spec = PartitionSpec(ENDS)
        body = jax.shard_map(
            local, mesh=self._side_by_side, in_specs=spec, out_specs=spec, check_vma=False
        )
        return jax.jit(body)
