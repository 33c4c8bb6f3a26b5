"""What a call of a decorated step costs beyond the call of the jitted function inside it.

    python benchmarks/overhead.py [-o FILE]

The step has a state of many leaves and takes about 10 ms on one device, so that jax's own dispatch
is the same on both sides. Calls alternate; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

LEAVES, SIDE, ROUNDS = 100, 480, 300


def step(state: Any, batch: Any) -> Any:
    x = batch
    for weight in state["big"]:
        x = jnp.tanh(x @ weight)
    return {"big": state["big"], "small": [leaf + 1.0 for leaf in state["small"]]}, {
        "loss": x.sum()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    import meshwright as mw

    weights = [jnp.eye(SIDE) for _ in range(12)]
    state = {"big": weights, "small": [jnp.zeros(16) for _ in range(LEAVES)]}
    batch = jnp.ones((SIDE, SIDE))
    ours, bare = mw.parallelize(step), jax.jit(step)
    times: dict[str, list[float]] = {"meshwright": [], "jit": []}
    for call in (ours, bare):
        jax.block_until_ready(call(state, batch))
    for _ in range(ROUNDS):
        for name, call in (("meshwright", ours), ("jit", bare)):
            start = time.perf_counter()
            jax.block_until_ready(call(state, batch))
            times[name].append(time.perf_counter() - start)
    dispatch: dict[str, float] = {}
    for name, call in (("meshwright", ours), ("jit", bare)):
        spent = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            out = call(state, batch)
            spent.append(time.perf_counter() - start)
            jax.block_until_ready(out)
        dispatch[name] = median(spent)
    medians = {name: median(spent) for name, spent in times.items()}
    result = {
        "leaves": LEAVES + 13, "step_seconds": medians, "ratio": medians["meshwright"] / medians["jit"],
        "dispatch_seconds": dispatch,
        "overhead_of_10_ms": (dispatch["meshwright"] - dispatch["jit"]) / 10e-3,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
