"""Is the chosen plan as fast as the best hand-written sharding? Measured on emulated CPU devices.

    python benchmarks/sweep.py [--devices 8] [--rounds 7] [--models gpt-bytes ...]

For each model the step is run as planned (with this machine's measured profile)
and as a user would shard it by hand with `jax.jit` and `in_shardings`: data
parallel, FSDP, tensor parallel, DP x TP and FSDP x TP. All programs take turns,
so that a drift of the machine's speed hits all alike; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODELS: dict[str, dict[str, Any]] = {
    "gpt-bytes": {"batch": 32},
    "llama-tiny": {"batch": 64, "seq": 128, "dtype": "f32"},
    "vit-tiny": {"batch": 256, "dtype": "f32"},
}
# Megatron's cut of each weight, by the zoo's names: pattern -> dim cut by tensor parallelism.
TENSOR_DIMS = (
    (r"qkv_D3NH", 2), (r"qkv_bias_3NH", 1), (r"out_NHD", 0), (r"up_DF|gate_DF", 1), (r"up_bias_F", 0),
    (r"down_FD", 0), (r"query_DNH|key_DKH|value_DKH", 1), (r"unembed_DV", 1), (r"token_VD|embed_VD", 0),
    (r"(query|key|value)'\]\['kernel", 1), (r"(query|key|value)'\]\['bias", 0), (r"attention'\]\['out'\]\['kernel", 0),
    (r"up'\]\['kernel", 1), (r"up'\]\['bias", 0), (r"down'\]\['kernel", 0),
)  # fmt: skip


def hand_written(devices: int) -> dict[str, tuple[int, int, bool]]:
    """name -> (data ways, tensor ways, whether parameters are also cut over data)."""
    found = {"DP": (devices, 1, False), "FSDP": (devices, 1, True), "TP": (1, devices, False)}
    for tensor in (2, 4):
        if devices % tensor == 0 and devices > tensor:
            found[f"DP{devices // tensor}xTP{tensor}"] = (devices // tensor, tensor, False)
            found[f"FSDP{devices // tensor}xTP{tensor}"] = (devices // tensor, tensor, True)
    return found


def state_spec(name: str, shape: tuple[int, ...], data: int, tensor: int, fsdp: bool) -> P:
    """Where one leaf of the state lies: a tensor dim by name, then FSDP on the largest dim left."""
    entries: list[str | None] = [None] * len(shape)
    for pattern, dim in TENSOR_DIMS:
        if (
            re.search(pattern, name)
            and dim < len(shape)
            and shape[dim] % tensor == 0
            and tensor > 1
        ):
            entries[dim] = "tensor"
            break
    free = [
        d for d in range(len(shape)) if entries[d] is None and shape[d] % data == 0 and shape[d] > 1
    ]
    if fsdp and free:
        entries[max(free, key=lambda d: shape[d])] = "data"
    return P(*entries)


def by_hand(step: Callable, state: Any, batch: Any, data: int, tensor: int, fsdp: bool) -> Callable:
    mesh = Mesh(np.array(jax.devices()[: data * tensor]).reshape(data, tensor), ("data", "tensor"))

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(
            mesh, state_spec(jax.tree_util.keystr(path), leaf.shape, data, tensor, fsdp)
        )

    states = jax.tree_util.tree_map_with_path(place, state)
    batches = jax.tree.map(lambda leaf: NamedSharding(mesh, P("data")), batch)
    program = jax.jit(
        step, in_shardings=(states, batches), out_shardings=(states, None), donate_argnums=0
    )
    return lambda s, b: program(s, b)


def measure(
    programs: dict[str, Callable], make: Callable[[], tuple[Any, Any]], rounds: int
) -> dict[str, float]:
    """Median seconds per step of each program, the programs taking turns."""
    states = {}
    for name, program in programs.items():
        state, batch = make()
        for _ in range(2):
            state, _ = jax.block_until_ready(program(state, batch))
        states[name] = state
    times: dict[str, list[float]] = {name: [] for name in programs}
    _, batch = make()
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(programs)):  # what ran before leaves its mark on caches
            program = programs[name]
            start = time.perf_counter()
            for _ in range(3):
                states[name], _ = program(states[name], batch)
            jax.block_until_ready(states[name])
            times[name].append((time.perf_counter() - start) / 3)
    return {name: median(found) for name, found in times.items()}


def compare(name: str, devices: int, rounds: int, cluster: Any) -> dict[str, Any]:
    from meshwright import api as mw
    from meshwright.models import build

    example = build(name, **MODELS.get(name, {}))

    def make() -> tuple[Any, Any]:
        return example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))

    plan = mw.plan(example.step, example.state, example.batch, cluster=cluster, donate_argnums=0)
    planned = mw.lower(plan, example.step, example.state, example.batch, donate_argnums=0)
    programs: dict[str, Callable] = {"meshwright": planned}
    for label, (data, tensor, fsdp) in hand_written(devices).items():
        programs[label] = by_hand(example.step, example.state, example.batch, data, tensor, fsdp)
    seconds = measure(programs, make, rounds)
    best = min(
        (label for label in seconds if label != "meshwright"), key=lambda label: seconds[label]
    )
    return {
        "model": name, "mesh": str(plan.mesh), "predicted": plan.estimate.step_seconds, "seconds": seconds,
        "best_by_hand": best, "ratio": seconds["meshwright"] / seconds[best], "gap": plan.proof.gap,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    from meshwright.backends.xla.measure import measured_cluster

    cluster = measured_cluster()
    print(cluster.describe())
    rows = []
    for name in options.models:
        row = compare(name, options.devices, options.rounds, cluster)
        rows.append(row)
        table = "  ".join(f"{label} {s * 1e3:.1f}" for label, s in row["seconds"].items())
        print(
            f"{name}: {row['ratio']:.3f} of the best by hand ({row['best_by_hand']}); {row['mesh']}"
        )
        print(f"    ms per step: {table}; predicted {row['predicted'] * 1e3:.1f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
