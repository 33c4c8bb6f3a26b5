"""A pipeline over several processes, again and again: does it ever hang, and how long does a step take?

    python benchmarks/pipeline_processes.py --runs 20
    python benchmarks/pipeline_processes.py --runs 20 --processes 4 --schedule gpipe
    python benchmarks/pipeline_processes.py --runs 20 --side-by-side     # without waiting: how it hangs

Each run starts the processes anew, on emulated CPU devices that share 8 among them. Every process compares
its part of the state after the last step with the unsharded steps' state.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

DEVICES, WIDTH, LAYERS, BATCH = 8, 32, 8, 32


def model():
    """A step of a few layers: (step, state, batch)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def step(state, batch):
        def loss(weights):
            hidden = batch["x"]
            for w in weights:
                hidden = jnp.tanh(hidden @ w)
            return jnp.mean((hidden - batch["y"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state)
        return [w - 0.5 * g for w, g in zip(state, gradients, strict=True)], {"loss": value}

    rng = np.random.default_rng(0)
    state = [rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for _ in range(LAYERS)]
    return step, state, {k: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for k in "xy"}


def work(plan: Path, steps: int, side_by_side: bool) -> None:
    """What one process does."""
    import jax
    import numpy as np

    import meshwright as mw
    from meshwright.processes import join, seat

    place = seat()
    assert place is not None
    mw.emulate(DEVICES // place.processes)
    join(place, DEVICES // place.processes)
    step, state, batch = model()
    running = mw.lower(mw.load_plan(plan), step, state, batch)
    running.lowered.rendezvous.in_turn = not side_by_side
    mine, truth, unsharded, begin = state, state, jax.jit(step), 0.0
    for number in range(steps):
        begin = time.perf_counter() if number == 1 else begin
        mine = running(mine, batch)[0]
        truth = unsharded(truth, batch)[0]
    jax.block_until_ready(mine)
    seconds = (time.perf_counter() - begin) / (steps - 1)
    for have, want in zip(mine, truth, strict=True):
        for shard in have.addressable_shards:
            np.testing.assert_allclose(
                shard.data, np.asarray(want)[shard.index], rtol=1e-4, atol=1e-6
            )
    print(f"{seconds * 1e3:.2f}", flush=True)


def planned(path: Path, ranks: int, schedule: str) -> None:
    import meshwright as mw

    mw.emulate(1)
    request = mw.Request(
        pp=ranks, schedule=schedule, microbatches=4, recompute="none", time_limit=20
    )
    mw.save_plan(mw.plan(*model(), cluster=f"{DEVICES}xcpu", request=request), path)


def run(plan: Path, processes: int, arguments: list[str], seconds: float) -> tuple[str, str]:
    """One run: how it ended, and what its processes say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    env["MESHWRIGHT_DEADLINE"] = str(seconds / 2)
    command = [sys.executable, __file__, "--work", str(plan), *arguments]
    started = [
        subprocess.Popen(
            command,
            env={**env, "JAX_PROCESS_ID": str(k)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for k in range(processes)
    ]
    said = []
    for process in started:
        try:
            said.append(process.communicate(timeout=seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate())
    codes = {process.returncode for process in started}
    errors = [line for _, err in said for line in err.splitlines() if "Error:" in line]
    if codes == {0}:
        return "right", f"{said[0][0].split()[-1]} ms a step"
    return "late" if any("waited" in line for line in errors) else "wrong", "; ".join(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--side-by-side", action="store_true", help="do not wait for one program before the next"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of one run at most")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.steps, given.side_by_side)
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        planned(plan, given.ranks, given.schedule)
        arguments = [
            "--steps",
            str(given.steps),
            *(["--side-by-side"] if given.side_by_side else []),
        ]
        ends: Counter[str] = Counter()
        for number in range(given.runs):
            end, said = run(plan, given.processes, arguments, given.seconds)
            ends[end] += 1
            print(f"run {number + 1:3d}  {end}  {said}", flush=True)
    print(
        f"{dict(ends)} of {given.runs} runs, {given.processes} processes, {given.ranks} ranks, {given.schedule}"
    )
    sys.exit(ends["right"] != given.runs)


if __name__ == "__main__":
    main()
