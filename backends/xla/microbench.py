"""Measure the devices of this process for a profile: products, memory, launches, collectives.

All devices work at once, since emulated CPU devices share cores and a rate measured on one of
them alone would be a multiple of what each gets in a step. Times are medians.

CPUs and accelerators get sizes of their own: what fills a core is a launch and nothing else on a
GPU. On accelerators products stand side by side in one program, each with operands of its own,
since every turn of a loop would launch kernels for its counter and its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...ir.profile import CollectivePoint, CopyPoint, MeasuredKind, ProductPoint
from .devices import on_cpus
from .measure import everywhere, noise, ones, per_turn, seconds_of

SENT = tuple(1 << p for p in range(8, 21, 2))  # float32 elements of the larger local side


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device.

    shapes   products (m, n, k) of each dtype: square, tall and skinny
    copies   float32 elements of one buffer
    apart    elements between two uses of one buffer, so that no cache has it any more
    """

    shapes: tuple[tuple[int, int, int], ...]
    copies: tuple[int, ...]
    apart: int


CPU = Sizes(
    shapes=((128, 128, 128), (256, 256, 256), (384, 384, 384), (512, 512, 512), (1024, 256, 256), (256, 1024, 256),
            (256, 256, 1024), (64, 512, 512)),
    copies=tuple(1 << p for p in range(12, 22)),
    apart=1 << 23,
)  # fmt: skip
# Products as layers of 768 to 14336 have them: forward, backward, gradients of weights, logits.
# Below 16 MiB a copy is its loop's own kernels; below 30 us a product waits for the host.
ACCELERATOR = Sizes(
    shapes=((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 2304, 768),
            (8192, 768, 3072), (768, 3072, 8192), (16384, 2048, 2048), (16384, 8192, 2048), (2048, 8192, 16384),
            (4096, 14336, 4096), (4096, 4096, 14336), (8192, 50304, 768)),
    copies=tuple(part << p for p in range(20, 26) for part in (2, 3)),
    apart=1 << 28,
)  # fmt: skip


def sizes_for(mesh: Mesh) -> Sizes:
    return CPU if on_cpus(mesh) else ACCELERATOR


def layouts(count: int) -> Iterator[tuple[int, int]]:
    """(size, stride) of the groups that a mesh over `count` devices can form."""
    size = 2
    while size <= count:
        stride = 1
        while size * stride <= count:
            if count % (size * stride) == 0:
                yield size, stride
            stride *= 2
        size *= 2


def products(mesh: Mesh, tell: Callable[[str], None], f32: str = "f32") -> list[ProductPoint]:
    """Products of f32 at XLA's default precision, which a device has under the name `f32`, and of bf16."""
    seconds = _in_a_loop if on_cpus(mesh) else _side_by_side
    found = []
    for name, dtype in ((f32, jnp.float32), ("bf16", jnp.bfloat16)):
        for m, n, k in sizes_for(mesh).shapes:
            tell(f"product {name} {m}x{n}x{k}")
            found.append(
                ProductPoint(dtype=name, m=m, n=n, k=k, seconds=seconds(mesh, (m, n, k), dtype))
            )
    return found


def _in_a_loop(mesh: Mesh, shape: tuple[int, int, int], dtype: Any) -> float:
    m, n, k = shape
    times = max(1, min(64, 2 * 10**8 // (2 * m * n * k)))
    left, right = ones(mesh, (m, k), dtype), ones(mesh, (k, n), dtype)
    return seconds_of(everywhere(mesh, _chained(times, dtype), 2), left, right) / times


def _chained(times: int, dtype: Any) -> Callable[[Any, Any], Any]:
    """The same product over and over, each waiting for the one before."""

    def body(left: Any, right: Any) -> Any:
        def turn(_: Any, state: Any) -> Any:
            left, _ = state
            result = left @ right
            nudge = (result[0, 0] * jnp.asarray(0, dtype)).astype(dtype)
            return lax.optimization_barrier((left + nudge, result))

        first = jnp.zeros((left.shape[0], right.shape[1]), dtype)
        return lax.fori_loop(0, times, turn, (left, first))[1]

    return body


def _side_by_side(mesh: Mesh, shape: tuple[int, int, int], dtype: Any) -> float:
    """Products of noise with noise: multiplying ones takes less power, and goes faster for it."""
    m, n, k = shape
    few = max(2, min(24, 2 * 10**11 // (2 * m * n * k)))
    lefts = [noise(mesh, (m, k), dtype, seed) for seed in range(3 * few)]
    rights = [noise(mesh, (k, n), dtype, seed) for seed in range(3 * few)]

    def run(times: int) -> float:
        def body(*operands: Any) -> list[Any]:
            return [
                left @ right for left, right in zip(operands[:times], operands[times:], strict=True)
            ]

        return seconds_of(everywhere(mesh, body, 2 * times), *lefts[:times], *rights[:times])

    return per_turn(run, few, 3 * few)


def copies(mesh: Mesh, tell: Callable[[str], None]) -> list[CopyPoint]:
    """Kernels that read one buffer and write another, each the next of many: as a step meets them."""
    sizes, found = sizes_for(mesh), []
    for size in sizes.copies:
        tell(f"copy of {4 * size} bytes")
        rows = max(2, sizes.apart // size)
        source, target = ones(mesh, (rows, size)), ones(mesh, (rows, size))
        run = partial(_copied, mesh, rows, source, target)
        found.append(CopyPoint(nbytes=8.0 * size, seconds=per_turn(run, rows, 5 * rows)))
    return found


def _copied(mesh: Mesh, rows: int, source: Any, target: Any, times: int) -> float:
    """Seconds in which every device goes through so many rows, in one program."""

    def body(source: Any, target: Any) -> Any:
        def turn(i: Any, target: Any) -> Any:
            row = lax.dynamic_index_in_dim(source, i % rows, keepdims=False)
            return lax.dynamic_update_index_in_dim(target, row * 1.0001 + 1.0, i % rows, 0)

        return lax.fori_loop(0, times, turn, target)

    return seconds_of(everywhere(mesh, body, 2), source, target)


def collectives(devices: list[Any], tell: Callable[[str], None]) -> list[CollectivePoint]:
    found = []
    count = len(devices)
    for size, stride in layouts(count):
        mesh = Mesh(
            np.array(devices).reshape(count // (size * stride), size, stride), ("a", "g", "b")
        )
        for kind, body in _BODIES.items():
            tell(f"{kind} over {size} devices, stride {stride}")
            for sent in SENT:
                found.append(_collective(mesh, kind, body, size, stride, sent))
    return found


def _collective(
    mesh: Mesh, kind: MeasuredKind, body: Any, size: int, stride: int, sent: int
) -> CollectivePoint:
    times = max(2, min(32, (1 << 19) // sent))
    local = sent // size if kind == "all_gather" else sent

    def repeated(x: Any) -> Any:
        return lax.fori_loop(0, times, lambda _, y: lax.optimization_barrier(body(y, size)), x)

    spec = PartitionSpec(("a", "g", "b"))
    step = jax.jit(
        jax.shard_map(repeated, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    x = jax.device_put(jnp.ones((local * mesh.size,)), NamedSharding(mesh, spec))
    return CollectivePoint(
        kind=kind, size=size, stride=stride, nbytes=4.0 * sent, seconds=seconds_of(step, x) / times,
    )  # fmt: skip


_BODIES: dict[MeasuredKind, Callable[[Any, int], Any]] = {
    "all_reduce": lambda x, n: lax.psum(x, "g") / n,
    "all_gather": lambda x, n: lax.optimization_barrier(lax.all_gather(x, "g", tiled=True))[
        : x.shape[0]
    ],
    "reduce_scatter": lambda x, n: jnp.tile(
        lax.optimization_barrier(lax.psum_scatter(x, "g", tiled=True)) / n, n
    ),
    "all_to_all": lambda x, n: lax.all_to_all(x.reshape(n, -1), "g", 0, 0, tiled=True).reshape(-1),
}
