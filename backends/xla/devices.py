"""Devices as a plan numbers them, whose process they are, and layouts as jax writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from ...ir.errors import LoweringError
from ...ir.mesh import Mesh
from ...ir.plan import Plan
from ...ir.sharding import Sharding
from ...ir.units import counted


def used_devices(plan: Plan, devices: Sequence[Any] | None, count: int, where: str) -> list[Any]:
    """The first `count` devices, in the plan's order.

    Raises:
        LoweringError: there are fewer.
    """
    found = list(devices if devices is not None else jax.devices())
    if len(found) < count:
        raise LoweringError(
            f"the plan needs {counted(count, 'device')}, this process has {len(found)}.",
            where=where,
            origin=f"cluster {plan.cluster.name}",
            fix=_more_devices(count, found),
        )
    return in_place(found[:count])


def device_mesh(mesh: Mesh, devices: Sequence[Any]) -> DeviceMesh:
    """A plan's mesh over devices in its order."""
    return DeviceMesh(np.array(devices).reshape(mesh.shape), mesh.names)


def in_place(devices: Sequence[Any]) -> list[Any]:
    """Chips of a TPU slice in the order in which plans number them: the last dimension first.

    The runtime lists them host by host, 2x2 chips each; the axes of a plan's mesh are rows of
    the slice. Other devices stay as they are listed.
    """
    if any(getattr(device, "platform", "") != "tpu" for device in devices):
        return list(devices)
    return sorted(
        devices, key=lambda d: (getattr(d, "slice_index", None) or 0, *d.coords, d.core_on_chip)
    )


def _more_devices(needed: int, found: list[Any]) -> str:
    if found and found[0].platform == "cpu":
        return (
            f"mw.emulate({needed}) before jax is first used (--emulate on the command line),"
            f" or a plan for {counted(len(found), 'device')}"
        )
    return f"run where {counted(needed, 'device')} can be seen, or plan for {counted(len(found), 'device')}"


def processes_of(mesh: DeviceMesh) -> set[int]:
    return {device.process_index for device in mesh.devices.flat}


def is_mine(mesh: DeviceMesh) -> bool:
    """Whether this process has a device of it."""
    return jax.process_index() in processes_of(mesh)


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A leaf on a mesh; where that lies on several processes, each has the whole leaf and puts its part.

    Raises:
        LoweringError: the leaf lies on devices of other processes, another way.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.sharding.device_set == sharding.device_set:
            return leaf
        raise LoweringError(
            f"an array of shape {leaf.shape} lies on other devices than the step reads it on.",
            where=f"{len(leaf.sharding.device_set)} devices of several processes",
            fix="what the step returned, or the same NumPy arrays in every process",
        )
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    return jax.make_array_from_callback(
        host.shape, sharding, lambda index: host[index], dtype=host.dtype
    )


def nowhere(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    """An array of which this process has no part."""
    return jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=dtype)


def partition_spec(layout: Sharding) -> PartitionSpec:
    """A layout without owed sums as JAX writes it."""
    return PartitionSpec(*(_entry(axes) for axes in layout.dims))


def crossing_spec(layout: Sharding) -> PartitionSpec:
    """As `partition_spec`; sums owed are a dim in front."""
    if not layout.partial:
        return partition_spec(layout)
    return PartitionSpec(tuple(sorted(layout.partial)), *partition_spec(layout))


def named_sharding(mesh: DeviceMesh, layout: Sharding) -> NamedSharding:
    """A layout as values have it that cross from program to program."""
    return NamedSharding(mesh, crossing_spec(layout))


def _entry(axes: tuple[str, ...]) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def options_for(mesh: DeviceMesh, plan: Plan) -> dict[str, str | bool] | None:
    """Options of XLA's for a program of a plan.

    On GPUs its latency-hiding scheduler is off by default, on TPUs always on (jax 0.10.2).

    On CPUs XLA drops barriers before it looks for equal ops: what a plan recomputes would then
    be found computed already, and be kept after all. Barriers that are still there it cannot emit in loops over
    less than a kilobyte, which it would make functions of: the process aborts (jax 0.10.2)."""
    if on_cpus(mesh):
        return {"xla_disable_hlo_passes": "cse_barrier_expander,small-while-loop-hoisting"}
    if plan.overlap and mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm"):
        return {"xla_gpu_enable_latency_hiding_scheduler": True}
    return None


def on_cpus(mesh: DeviceMesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def platform_of(mesh: DeviceMesh) -> str:
    """The kind of devices of a mesh, as clusters call it."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"
