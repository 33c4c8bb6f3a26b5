"""Measure this process's devices: what the planner's roofline needs, nothing more.

All devices run at once, since emulated CPU devices share cores and a rate
measured on one of them alone would be a multiple of what each gets in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...ir.cluster.cluster import Cluster
from .devices import on_cpus

SIDE = 384  # of the square products per device
STREAM = 4 << 20  # elements of the memory test per device
SMALL, LARGE = 1 << 10, 1 << 20  # float32 elements of the two all-reduces per device
PRODUCTS = 4  # between two collectives: about what a layer does
REPEATS = 7


@dataclass(frozen=True)
class Measured:
    """Rates per device with all devices busy: FLOP/s by dtype, bytes/s, seconds.

    `bandwidth` and `latency` are those of the line `latency * rounds + traffic /
    bandwidth` that the planner prices collectives with (see planner.cost.collectives).
    """

    flops: dict[str, float]
    memory_bandwidth: float
    elementwise: float
    launch: float
    latency: float
    bandwidth: float


def measure(devices: list[Any] | None = None) -> Measured:
    """Run a few seconds of products, copies and all-reduces on the devices."""
    found = devices or jax.devices()
    mesh = Mesh(np.array(found), ("d",))
    launch = launch_seconds(mesh)
    latency, bandwidth = _all_reduce(mesh)
    return Measured(
        flops={
            name: _product(mesh, dtype)
            for name, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16))
        },
        memory_bandwidth=_stream(mesh),
        elementwise=elementwise_rate(mesh),
        launch=launch,
        latency=latency,
        bandwidth=bandwidth,
    )


def measured_cluster(devices: list[Any] | None = None) -> Cluster:
    """`Cluster.local()` with the figures that `measure` found, marked as measured."""
    cluster, found = Cluster.local(), measure(devices)
    name, tier = cluster.groups[0].device, cluster.fabric[0].tier
    figures = {
        f"devices.{name}.memory_bandwidth": found.memory_bandwidth,
        f"devices.{name}.elementwise_flops": found.elementwise,
        f"devices.{name}.launch": found.launch,
        f"devices.{name}.efficiency": 1.0,
        f"fabric.{tier}.latency": found.latency,
        f"fabric.{tier}.bandwidth": found.bandwidth,
        **{f"devices.{name}.peak_flops.{dtype}": rate for dtype, rate in found.flops.items()},
    }
    for path, figure in figures.items():
        cluster = cluster.with_(path, figure, "measured")
    return cluster


def seconds_of(step: Callable[..., Any], *args: Any) -> float:
    """Median wall time of a compiled step, first call left out."""
    jax.block_until_ready(step(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step(*args))
        times.append(time.perf_counter() - start)
    return median(times)


def everywhere(mesh: Mesh, body: Callable[..., Any], operands: int = 1) -> Callable[..., Any]:
    """The body on every device's part of its operands, compiled."""
    spec = PartitionSpec("d")
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spec,) * operands, out_specs=spec, check_vma=False)
    )


def ones(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    full = (shape[0] * mesh.size, *shape[1:])
    return jax.device_put(jnp.ones(full, dtype), NamedSharding(mesh, PartitionSpec("d")))


def noise(mesh: Mesh, shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    """Normal numbers, other ones for each seed."""
    full = (shape[0] * mesh.size, *shape[1:])
    return jax.device_put(
        jax.random.normal(jax.random.key(seed), full, dtype),
        NamedSharding(mesh, PartitionSpec("d")),
    )


def per_turn(run: Callable[[int], float], few: int, many: int) -> float:
    """Seconds of one turn of a loop, from the seconds of a short and a long one.

    What a call costs once falls out: the copy of an operand that is not donated, and new pages for
    the result. A loop so quick that noise exceeds its turns counts with the call.
    """
    short, long = run(few), run(many)
    return (long - short) / (many - few) if long > short else long / many


def loop(body: Callable[[Any], Any], times: int) -> Callable[[Any], Any]:
    return lambda x: lax.fori_loop(0, times, lambda _, y: body(y), x)


def _product(mesh: Mesh, dtype: Any) -> float:
    times = 8
    step = everywhere(mesh, loop(lambda x: (x @ x) * jnp.asarray(1e-3, dtype), times))
    return times * 2.0 * SIDE**3 / seconds_of(step, ones(mesh, (SIDE, SIDE), dtype))


def _stream(mesh: Mesh) -> float:
    times = 4
    step = everywhere(mesh, loop(lambda x: lax.optimization_barrier(x * 1.0001 + 1.0), times))
    return times * 2.0 * 4 * STREAM / seconds_of(step, ones(mesh, (STREAM,)))


def elementwise_rate(mesh: Mesh) -> float:
    """Simple operations per second: exponentials that stay in the cache, at their weight of 16.

    On an accelerator they stay in registers: one kernel takes many of each element.
    """
    times, size = 64, 1 << 14
    if on_cpus(mesh):
        step = everywhere(mesh, loop(lambda x: jnp.exp(x * -0.5), times))
    else:
        size = 1 << 24
        step = everywhere(mesh, _chain(lambda x: jnp.exp(x * -0.5), times))
    return times * 17.0 * size / seconds_of(step, ones(mesh, (size,)))


def launch_seconds(mesh: Mesh) -> float:
    """Seconds of one small kernel inside a program."""
    x, times = ones(mesh, (8, 8)), 200

    def turn(x: Any) -> Any:
        return lax.optimization_barrier(x @ x)

    if on_cpus(mesh):
        return seconds_of(everywhere(mesh, loop(turn, times)), x) / times
    return per_turn(lambda n: seconds_of(everywhere(mesh, _chain(turn, n)), x), times, 3 * times)


def _chain(body: Callable[[Any], Any], times: int) -> Callable[[Any], Any]:
    """The body so many times in a row, without a loop's own kernels."""

    def run(x: Any) -> Any:
        for _ in range(times):
            x = body(x)
        return x

    return run


def _all_reduce(mesh: Mesh) -> tuple[float, float]:
    """(latency, bandwidth) of the planner's line through a small and a large all-reduce.

    Each follows products, as in a step, and their own time is taken off: a
    collective waits for the last device, which costs more than its messages do.
    """
    n = mesh.size
    if n == 1:
        return 1e-6, 1e9
    alone = _between_products(mesh, 0)
    small, large = (_between_products(mesh, size) - alone for size in (SMALL, LARGE))
    traffic = 2 * (n - 1) / n * 4 * (LARGE - SMALL)
    rounds = (1 if on_cpus(mesh) else 2) * int(np.ceil(np.log2(n)))
    return max(small, 1e-7) / rounds, traffic / max(large - small, 1e-9)


def _between_products(mesh: Mesh, size: int) -> float:
    """Seconds of some products and one all-reduce of `size` numbers after them, if any."""
    times, n = 10, mesh.size

    def body(x: Any, y: Any) -> Any:
        def turn(_: Any, state: Any) -> Any:
            x, y = state
            for _ in range(PRODUCTS):
                x = (x @ x) * 1e-3
            if size:
                x, y = lax.optimization_barrier((x, y))
                y = lax.psum(y, "d") / n
                x, y = lax.optimization_barrier((x, y))
            return x, y

        return lax.fori_loop(0, times, turn, (x, y))

    spec = PartitionSpec("d")
    step = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)
    )
    return seconds_of(step, ones(mesh, (SIDE, SIDE)), ones(mesh, (max(size, 8),))) / times
