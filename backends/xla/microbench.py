"""Measure the devices of this process for a profile: products, memory, launches, collectives.

All devices work at once, since emulated CPU devices share cores and a rate measured on one of
them alone would be a multiple of what each gets in a step. Times are medians.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...ir.profile import CollectivePoint, CopyPoint, ProductPoint
from .measure import everywhere, ones, seconds_of

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# Square, tall and skinny products of each dtype; thrice the side is 27 times the work.
SHAPES = ((128, 128, 128), (256, 256, 256), (384, 384, 384), (512, 512, 512), (1024, 256, 256), (256, 1024, 256),
          (256, 256, 1024), (64, 512, 512))  # fmt: skip
COPIES = tuple(1 << p for p in range(12, 22))  # float32 elements
APART = 1 << 23  # elements between two uses of one buffer, so that no cache has it any more
SENT = tuple(1 << p for p in range(8, 21, 2))  # float32 elements of the larger local side


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


def products(mesh: Mesh, tell: Callable[[str], None]) -> list[ProductPoint]:
    found = []
    for name, dtype in DTYPES.items():
        for m, n, k in SHAPES:
            tell(f"product {name} {m}x{n}x{k}")
            times = max(1, min(64, 2 * 10**8 // (2 * m * n * k)))
            step = everywhere(mesh, _chained(times, dtype), 2)
            left, right = ones(mesh, (m, k), dtype), ones(mesh, (k, n), dtype)
            found.append(ProductPoint(dtype=name, m=m, n=n, k=k, seconds=seconds_of(step, left, right) / times))
    return found


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


def copies(mesh: Mesh, tell: Callable[[str], None]) -> list[CopyPoint]:
    """Kernels that read one buffer and write another, each the next of many: as a step meets them."""
    found = []
    for size in COPIES:
        tell(f"copy of {4 * size} bytes")
        rows = max(2, APART // size)

        def turn(i: Any, x: Any, rows: int = rows) -> Any:
            row = lax.dynamic_index_in_dim(x, i % rows, keepdims=False)
            return lax.dynamic_update_index_in_dim(x, row * 1.0001 + 1.0, (i + 1) % rows, 0)

        run = _turns(mesh, turn, ones(mesh, (rows, size)))
        found.append(CopyPoint(nbytes=8.0 * size, seconds=per_turn(run, rows, 5 * rows)))
    return found


def per_turn(run: Callable[[int], float], few: int, many: int) -> float:
    """Seconds of one turn of a loop, from the seconds of a short and a long one.

    What a call costs once falls out: the copy of an operand that is not donated, and new pages for
    the result. A loop so quick that noise exceeds its turns counts with the call.
    """
    short, long = run(few), run(many)
    return (long - short) / (many - few) if long > short else long / many


def _turns(mesh: Mesh, turn: Callable[[Any, Any], Any], x: Any) -> Callable[[int], float]:
    """Seconds of so many turns on every device, in one compiled program."""

    def body(times: Any, x: Any) -> Any:
        return lax.fori_loop(0, times, turn, x)

    spec = PartitionSpec("d")
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False))
    return lambda times: seconds_of(step, jnp.int32(times), x)


def collectives(devices: list[Any], tell: Callable[[str], None]) -> list[CollectivePoint]:
    found = []
    count = len(devices)
    for size, stride in layouts(count):
        mesh = Mesh(np.array(devices).reshape(count // (size * stride), size, stride), ("a", "g", "b"))
        for kind, body in _BODIES.items():
            tell(f"{kind} over {size} devices, stride {stride}")
            for sent in SENT:
                found.append(_collective(mesh, kind, body, size, stride, sent))
    return found


def _collective(mesh: Mesh, kind: str, body: Any, size: int, stride: int, sent: int) -> CollectivePoint:
    times = max(2, min(32, (1 << 19) // sent))
    local = sent // size if kind == "all_gather" else sent

    def repeated(x: Any) -> Any:
        return lax.fori_loop(0, times, lambda _, y: lax.optimization_barrier(body(y, size)), x)

    spec = PartitionSpec(("a", "g", "b"))
    step = jax.jit(jax.shard_map(repeated, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.device_put(jnp.ones((local * mesh.size,)), NamedSharding(mesh, spec))
    return CollectivePoint(
        kind=kind, size=size, stride=stride, nbytes=4.0 * sent, seconds=seconds_of(step, x) / times,  # type: ignore[arg-type]
    )  # fmt: skip


_BODIES: dict[str, Callable[[Any, int], Any]] = {
    "all_reduce": lambda x, n: lax.psum(x, "g") / n,
    "all_gather": lambda x, n: lax.optimization_barrier(lax.all_gather(x, "g", tiled=True))[: x.shape[0]],
    "reduce_scatter": lambda x, n: jnp.tile(lax.optimization_barrier(lax.psum_scatter(x, "g", tiled=True)) / n, n),
    "all_to_all": lambda x, n: lax.all_to_all(x.reshape(n, -1), "g", 0, 0, tiled=True).reshape(-1),
}
