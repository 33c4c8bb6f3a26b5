"""Is any plan slower than naive data parallelism? Predicted, and measured on emulated CPU devices.

    python benchmarks/naive_data_parallel.py gpt-tiny wrn-tiny train.py:make [--limit 1.1] [-o FILE]

Naive is what a user writes without a planner: `jax.jit` of the same step, every batch input cut over
all devices in its batch dim, everything else whole on each. Its predicted seconds are those of the same
layout as our own decisions. One line per step:

    wrn-tiny  predicted 8.1 of 9.0 ms = 0.90 of naive, measured 61.2 of 64.0 ms = 0.96 (processor 0.95); mesh 8

Both programs start from inputs that lie as they want them and take turns in a new order each round; medians
are compared, of the clock and of the processor's seconds, which other work on the machine disturbs less.
With `--limit` the exit code is 1 if a step is measured slower than that share of naive by clock and processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.emulation import emulate

DEVICES = 8
emulate(DEVICES)

from meshwright import api  # noqa: E402
from meshwright.backends.xla.capture import Captured  # noqa: E402
from meshwright.backends.xla.lower import lower  # noqa: E402
from meshwright.ir.analysis.batch import batch_dims  # noqa: E402
from meshwright.ir.analysis.blocks import fold  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError, PlanError  # noqa: E402
from meshwright.ir.fingerprint import fingerprint  # noqa: E402
from meshwright.ir.plan import Plan  # noqa: E402
from meshwright.planner.jobs.fixed import fixed_plan  # noqa: E402
from meshwright.planner.jobs.pinned import Parallelism  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402
from meshwright.recipe import Made, make  # noqa: E402

ZOO: dict[str, dict[str, Any]] = {
    "gpt-tiny": {"batch": 64, "dtype": "f32"},
    "llama-tiny": {"batch": 64, "seq": 128, "dtype": "f32"},
    "vit-tiny": {"batch": 128, "dtype": "f32"},
    "wrn-tiny": {"batch": 64, "dtype": "f32"},
    "mixtral-tiny": {"batch": 32, "dtype": "f32"},
    "dlrm-tiny": {"batch": 1024},
}
WARM = 2  # runs before the first that counts

Program = Callable[[], Any]  # one step from fresh inputs; returns a call to be timed


@dataclass(frozen=True)
class Row:
    """Seconds of one step, `naive_` those of naive data parallelism; `plan` says what ours is.

    Measured ones are medians, None where nothing was run; `busy` is the processor's seconds per core.
    """

    name: str
    plan: str
    predicted: float
    naive_predicted: float
    measured: float | None = None
    naive_measured: float | None = None
    busy: float | None = None
    naive_busy: float | None = None
    gap: float = 0.0

    def text(self) -> str:
        line = f"{self.name}  predicted {_of(self.predicted, self.naive_predicted)} of naive"
        if self.measured and self.naive_measured and self.busy and self.naive_busy:
            line += f", measured {_of(self.measured, self.naive_measured)}"
            line += f" (processor {self.busy / self.naive_busy:.2f})"
        return f"{line}; {self.plan}"

    def over(self, limit: float) -> bool:
        """Whether it was measured slower than this share of naive, by clock and by processor."""
        if not (self.measured and self.naive_measured and self.busy and self.naive_busy):
            return False
        return min(self.measured / self.naive_measured, self.busy / self.naive_busy) > limit


def _of(ours: float, naive: float) -> str:
    return f"{ours * 1e3:.3g} of {naive * 1e3:.3g} ms = {ours / naive:.2f}"


# ---------------------------------------------------------------- the two programs


def ours(plan: Plan, captured: Captured, leaves: Sequence[Any]) -> Program:
    lowered = lower(plan, captured)
    _ = lowered.compiled

    def fresh() -> Any:
        placed = jax.block_until_ready(placed_anew(leaves, lowered.input_shardings))
        return lambda: lowered.compiled(*placed)

    return fresh


def naive(
    step: Callable[..., Any], args: tuple[Any, ...], batch: dict[int, int], leaves: Sequence[Any]
) -> Program:
    """`jax.jit` of the step, or the step itself where it is jitted, with the batch cut."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    layouts = [NamedSharding(mesh, _spec(batch.get(position))) for position in range(len(leaves))]
    program = step if hasattr(step, "lower") else jax.jit(step)
    tree = jax.tree.structure(args)

    def fresh() -> Any:
        placed = jax.tree.unflatten(tree, jax.block_until_ready(placed_anew(leaves, layouts)))
        return lambda: program(*placed)

    return fresh


def _spec(dim: int | None) -> PartitionSpec:
    return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, "data")


def placed_anew(leaves: Sequence[Any], layouts: Sequence[Any]) -> list[Any]:
    """Copies, as a step may donate what it is given."""
    return jax.device_put(list(leaves), list(layouts), may_alias=False)


def real_arguments(made: Made, rng: np.random.Generator) -> tuple[Any, ...]:
    """The step's arguments as arrays; where it has shapes alone, small numbers of no meaning."""
    if made.example is not None:
        return made.example.init(jax.random.key(0)), made.example.make_batch(rng)
    return jax.tree.map(lambda leaf: _real(leaf, rng), made.args)


def _real(leaf: Any, rng: np.random.Generator) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape) if leaf.shape else jax.random.key(0)
    if np.issubdtype(leaf.dtype, np.integer) or leaf.dtype == bool:
        return jax.numpy.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)
    return jax.numpy.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)


# ---------------------------------------------------------------- one step


def predicted_naive(captured: Captured, cluster: Cluster, name: str) -> float:
    """Seconds of data parallelism over all devices by the planner's own prices."""
    folded, mark = fold(captured.graph), fingerprint(captured.graph)
    found = fixed_plan(folded, cluster, Parallelism(dp=cluster.size), name=name, fingerprint=mark)
    return found.estimate.step_seconds


def divides(captured: Captured, batch: dict[int, int]) -> bool:
    types = [captured.graph.types[v] for v in captured.graph.inputs]
    return bool(batch) and all(types[p].shape[dim] % DEVICES == 0 for p, dim in batch.items())


def compared(made: Made, cluster: Cluster, request: Request, rounds: int) -> Row:
    """Plan, price and, with rounds, run one step both ways.

    Raises:
        MeshwrightError: it cannot be planned or lowered, or its batch does not divide over the devices.
    """
    captured = api.Options().capture(made.step, made.args, {})
    batch = batch_dims(captured.graph)
    if not divides(captured, batch):
        raise PlanError(
            f"{made.name} has no batch that divides over {DEVICES} devices.",
            fix="another batch size",
        )
    plan = api.plan_captured(captured, cluster, request, made.name)
    row = Row(
        made.name, f"{plan.mesh}, microbatches {plan.microbatches}, recompute {plan.recompute}",
        plan.estimate.step_seconds, predicted_naive(captured, cluster, made.name), gap=plan.proof.gap or 0.0,
    )  # fmt: skip
    if not rounds:
        return row
    args = real_arguments(made, np.random.default_rng(0))
    leaves = jax.tree.leaves(args)
    times = measured([ours(plan, captured, leaves), naive(made.step, args, batch, leaves)], rounds)
    (wall, busy), (naive_wall, naive_busy) = times
    return replace(row, measured=wall, naive_measured=naive_wall, busy=busy, naive_busy=naive_busy)


def measured(programs: Sequence[Program], rounds: int) -> list[tuple[float, float]]:
    """Median seconds, by the clock and by the processor, of programs that take turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in programs]
    rng = np.random.default_rng(0)
    for number in range(WARM + rounds):
        for i in rng.permutation(len(programs)):
            call = programs[i]()
            start, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            found = time.perf_counter() - start, time.process_time() - busy
            if number >= WARM:
                times[i].append(found)
    return [(median(w for w, _ in found), median(b for _, b in found)) for found in times]


def made_of(name: str) -> Made:
    return make({"model": name, **ZOO.get(name, {})})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "steps", nargs="*", default=list(ZOO), help="models of the zoo, or FILE.py:FUNCTION"
    )
    parser.add_argument("--rounds", type=int, default=9, help="runs of each; 0: only predict")
    parser.add_argument(
        "--cluster",
        default=f"{DEVICES}xcpu",
        help="of 8 devices; another than CPUs with --rounds 0",
    )
    parser.add_argument("--profile", type=Path, help="this machine's, from `meshwright calibrate`")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds of search")
    parser.add_argument(
        "--limit", type=float, help="exit with 1 where a step is slower than this share of naive"
    )
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    cluster = Cluster.parse(options.cluster)
    if options.profile:
        cluster = cluster.with_profile(options.profile)
    rows: list[Row] = []
    for name in options.steps:
        try:
            row = compared(
                made_of(name), cluster, Request(time_limit=options.time_limit), options.rounds
            )
        except MeshwrightError as error:
            print(f"{name}  refused: {error.what}", flush=True)
            continue
        rows.append(row)
        print(row.text(), flush=True)
        if options.output:
            options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.limit and any(row.over(options.limit) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
