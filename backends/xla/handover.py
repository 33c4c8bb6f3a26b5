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
from .devices import is_mine, processes_of
from .dtypes import jax_dtype

ENDS = "ends"  # the only axis of both stages' devices side by side


@dataclass(frozen=True)
class Route:
    """One array: its shape as a whole, how it lies on the sender, and how it shall lie on the receiver."""

    shape: tuple[int, ...]
    dtype: str  # of our element types
    leaves: NamedSharding
    arrives: NamedSharding

    @cached_property
    def travels(self) -> PartitionSpec:
        """As the receiver wants it if both have the same mesh, else whole."""
        there = self.arrives
        return (
            there.spec
            if self.leaves.mesh.shape_tuple == there.mesh.shape_tuple
            else PartitionSpec()
        )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of a shard on its way; a scalar travels as a vector."""
        return NamedSharding(self.leaves.mesh, self.travels).shard_shape(self.shape) or (1,)


@dataclass(frozen=True)
class Handover:
    """Arrays from one stage to another; every process with a device of either calls it.

    `handover(arrays) -> (arrays there, token)`: a process without a device of the sender gives None, one
    without a device of the receiver gets None. The token is ready when this process has done its part.
    """

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

    @property
    def mine(self) -> bool:
        return is_mine(self.sender) or is_mine(self.receiver)

    def __call__(self, arrays: Sequence[Any] | None) -> tuple[list[Any] | None, Any]:
        if not self.joint:
            found = jax.device_put(list(arrays or ()), [route.arrives for route in self.routes])
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
        layouts = [NamedSharding(self.sender, route.travels) for route in self.routes]
        return jax.jit(
            lambda arrays: [a.reshape(a.shape or (1,)) for a in arrays], out_shardings=layouts
        )

    @cached_property
    def _arrive(self) -> Any:
        """On the receiver: laid out as it is wanted; each device has what it needs for that."""
        shapes, layouts = (
            [route.shape for route in self.routes],
            [route.arrives for route in self.routes],
        )
        shaped = lambda arrays: [a.reshape(s) for a, s in zip(arrays, shapes, strict=True)]  # noqa: E731
        return jax.jit(shaped, out_shardings=layouts)

    @cached_property
    def _side_by_side(self) -> DeviceMesh:
        return DeviceMesh(
            np.array([*self.sender.devices.flat, *self.receiver.devices.flat]), (ENDS,)
        )

    def _beside(self, route: Route, array: Any) -> Any:
        """The shards of both stages as one array: the sender's values, zeros of the receiver."""
        ours = [] if array is None else [shard.data for shard in array.addressable_shards]
        shape = (self._side_by_side.size * route.local_shape[0], *route.local_shape[1:])
        layout = NamedSharding(self._side_by_side, PartitionSpec(ENDS))
        parts = [*ours, *self._zeros[route.local_shape, jax_dtype(route.dtype)]]
        return jax.make_array_from_single_device_arrays(shape, layout, parts)

    @cached_property
    def _zeros(self) -> dict[Any, list[Any]]:
        here = [d for d in self.receiver.devices.flat if d.process_index == jax.process_index()]
        kinds = {(route.local_shape, jax_dtype(route.dtype)) for route in self.routes}
        return {
            kind: [jax.device_put(np.zeros(*kind), device) for device in here] for kind in kinds
        }

    def _there(self, route: Route, array: Any) -> Any:
        """The receiver's shards of what both have, as an array of its own."""
        devices = set(self.receiver.devices.flat)
        shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
        layout = NamedSharding(self.receiver, route.travels)
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
