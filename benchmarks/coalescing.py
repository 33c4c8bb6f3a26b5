"""Many small all-reduces on emulated CPU devices: each by itself, in XLA's one op of many operands, and end to end.

    python benchmarks/coalescing.py

Where `SMALL` of `ir/passes/coalesce.py` comes from. Milliseconds are the least of 40 calls.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

DEVICES, VALUES, CALLS = 8, 32, 40
KIB = (0.25, 1, 4, 16, 64, 128, 256, 512)


def each(*values: jax.Array) -> list[jax.Array]:
    return [lax.psum(2 * value, "x") + 1 for value in values]


def end_to_end(*values: jax.Array) -> list[jax.Array]:
    total = lax.psum(jnp.concatenate([2 * value for value in values]), "x")
    return [part + 1 for part in jnp.split(total, len(values))]


# XLA's CPU backend joins what `each` has, unless it is told not to.
WAYS: dict[str, tuple[Callable[..., Any], dict[str, str] | None]] = {
    "each": (each, {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}),
    "one op": (each, None),
    "end to end": (end_to_end, None),
}


def compiled(way: str, values: list[jax.Array]) -> Any:
    body, options = WAYS[way]
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(sharded, compiler_options=options).lower(*values).compile()


def seconds(program: Any, values: list[jax.Array]) -> float:
    start = perf_counter()
    jax.block_until_ready(program(*values))
    return perf_counter() - start


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    for kib in KIB:
        values = [jnp.ones(int(256 * kib))] * VALUES
        programs = {way: compiled(way, values) for way in WAYS}
        placed = jax.device_put(values, next(iter(programs.values())).input_shardings[0][0])
        runs = [{w: seconds(p, placed) for w, p in programs.items()} for _ in range(CALLS)]
        told = ", ".join(f"{way} {1e3 * min(run[way] for run in runs):.1f} ms" for way in WAYS)
        print(f"{VALUES} x {kib:g} KiB on {DEVICES} devices: {told}", flush=True)


if __name__ == "__main__":
    main()
