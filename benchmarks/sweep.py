"""Is the chosen plan as fast as the best layout anyone would write, and do predictions rank layouts? On emulated CPUs.

    python benchmarks/sweep.py [--profile cpu8_epyc.json] [--rounds 9] [--models llama-tiny ...] [-o FILE]

Five steps of the zoo on eight emulated devices, each as planned (with a profile of this machine), as a user would
shard it by hand with `jax.jit` and `in_shardings` (data parallel, FSDP, tensor parallel, DP x TP, FSDP x TP), and as
our own programs of layouts given as degrees (data, tensor, sequence and context parallelism, ZeRO 0, 1 and 3,
recomputation, two microbatches) or, where parameters have no letters to read degrees by, of plans on each mesh under
less and less memory. All programs take turns in a new order each round, so that other work on the machine hits all
alike. Judged by the clock's median and least seconds and by the processor's: `ratio`, the plan's over the best of the
others'; `rank_correlation` (Spearman), between predicted and measured seconds of all programs of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.stats import spearmanr

from meshwright.emulation import emulate

DEVICES = 8
emulate(DEVICES)

from meshwright import api  # noqa: E402
from meshwright.backends.xla.capture import Captured, capture  # noqa: E402
from meshwright.backends.xla.lower import lower  # noqa: E402
from meshwright.calibration import calibrate  # noqa: E402
from meshwright.ir.analysis.blocks import fold  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.ir.fingerprint import fingerprint  # noqa: E402
from meshwright.ir.plan import Plan  # noqa: E402
from meshwright.models import Example, build  # noqa: E402
from meshwright.planner.jobs.fixed import fixed_plan  # noqa: E402
from meshwright.planner.jobs.pinned import Parallelism  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "gpt-tiny": {"batch": 128, "seq": 64, "dtype": "f32"},
    "llama-tiny": {"batch": 64, "seq": 128, "dtype": "f32"},
    "mixtral-tiny": {"batch": 64, "seq": 64, "dtype": "f32"},
    "deepseek-tiny": {"batch": 64, "seq": 64, "dtype": "f32"},
    "vit-tiny": {"batch": 256, "dtype": "f32"},
}
LETTERED = (
    "gpt-tiny",
    "llama-tiny",
    "mixtral-tiny",
    "deepseek-tiny",
)  # whose parameters' names say what their dims are
LAYOUTS = {
    "dp8": Parallelism(dp=8), "dp8 zero1": Parallelism(dp=8, zero=1), "dp8 zero3": Parallelism(dp=8, zero=3),
    "tp8": Parallelism(tp=8), "tp8 sp": Parallelism(tp=8, sequence_parallel=True),
    "dp4 tp2": Parallelism(dp=4, tp=2), "dp4 tp2 sp zero3": Parallelism(dp=4, tp=2, zero=3, sequence_parallel=True),
    "dp2 tp4": Parallelism(dp=2, tp=4), "dp2 tp4 sp zero1": Parallelism(dp=2, tp=4, zero=1, sequence_parallel=True),
    "dp4 cp2": Parallelism(dp=4, cp=2), "dp2 cp4 zero3": Parallelism(dp=2, cp=4, zero=3), "cp8": Parallelism(cp=8),
    "dp2 tp2 cp2": Parallelism(dp=2, tp=2, cp=2),
}  # fmt: skip
PARTS = {
    "dp8 two": ("dp8", "none", 2),
    "dp8 full": ("dp8", "full", 1),
    "dp4 tp2 full": ("dp4 tp2", "full", 1),
}
KINDS = ("median", "least", "busy")  # of seconds
WARM = 2  # runs before the first that counts: compilation, then the memory that later runs reuse
# Megatron's cut of each weight, by the zoo's names: pattern -> dim cut by tensor parallelism.
TENSOR_DIMS = (
    (r"qkv_D3NH", 2), (r"qkv_bias_3NH", 1), (r"out_NHD", 0), (r"up_DF|gate_DF", 1), (r"up_bias_F", 0),
    (r"down_FD", 0), (r"query_DNH|key_DKH|value_DKH", 1), (r"unembed_DV", 1), (r"token_VD|embed_VD", 0),
    (r"(query|key|value)'\]\['kernel", 1), (r"(query|key|value)'\]\['bias", 0), (r"attention'\]\['out'\]\['kernel", 0),
    (r"up'\]\['kernel", 1), (r"up'\]\['bias", 0), (r"down'\]\['kernel", 0),
)  # fmt: skip


Row = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """One way to run the step; `predicted` seconds where it is one of ours."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    predicted: float | None = None


def hand_written(devices: int) -> dict[str, tuple[int, int, bool]]:
    """name -> (data ways, tensor ways, whether parameters are also cut over data)."""
    found = {"DP": (devices, 1, False), "FSDP": (devices, 1, True), "TP": (1, devices, False)}
    for tensor in (2, 4):
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


def given(name: str, captured: Captured, cluster: Cluster) -> Iterator[tuple[str, Plan]]:
    """Our own plans of layouts that are given: as degrees, or searched under less and less memory."""
    if name not in LETTERED:
        yield from squeezed(captured, cluster, name)
        return
    folded, mark = fold(captured.graph), fingerprint(captured.graph)
    asked = {label: (label, "none", 1) for label in LAYOUTS} | PARTS
    for label, (layout, recompute, microbatches) in asked.items():
        yield label, fixed_plan(
            folded, cluster, LAYOUTS[layout], recompute=recompute, microbatches=microbatches, name=label,  # type: ignore[arg-type]
            fingerprint=mark,
        )  # fmt: skip


def squeezed(captured: Captured, cluster: Cluster, name: str) -> Iterator[tuple[str, Plan]]:
    """The best plan on each mesh, and the best ones in three quarters and half of its memory."""
    for mesh in ((8,), (4, 2), (2, 2, 2)):
        peak = None
        for share in (1.0, 0.85, 0.7, 0.55, 0.4):
            request = Request(
                mesh=mesh, memory=None if peak is None else share * peak, microbatches=1
            )
            try:
                plan = api.plan_captured(captured, cluster, request, name)
            except MeshwrightError:  # nothing fits
                break
            peak = peak or plan.estimate.peak_bytes
            yield f"{'x'.join(map(str, mesh))} in {share:.0%}", plan


def programs_of(name: str, example: Example, cluster: Cluster) -> tuple[dict[str, Program], Plan]:
    """By label; the plan's own is `meshwright`."""
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    plan = api.plan_captured(captured, cluster, Request(), name)
    plans = {"meshwright": plan, **dict(given(name, captured, cluster))}
    found = {
        label: Program(api.RunningStep(lower(each, captured)), each.estimate.step_seconds)
        for label, each in plans.items()
    }
    for label, (data, tensor, fsdp) in hand_written(DEVICES).items():
        by = by_hand(example.step, example.state, example.batch, data, tensor, fsdp)
        found[f"by hand {label}"] = Program(by)
    return found, plan


def measure(programs: dict[str, Program], example: Example, rounds: int) -> dict[str, Row]:
    """Of each program the seconds of a step, the programs taking turns: the clock's median and least, and the
    median of the processor's over the cores (`busy`), which other work on the machine disturbs less."""
    batch, cores = example.make_batch(np.random.default_rng(0)), len(os.sched_getaffinity(0))
    states = {}
    for name, program in programs.items():
        state = example.init(jax.random.key(0))
        for _ in range(WARM):
            state, _ = jax.block_until_ready(program.run(state, batch))
        states[name] = state
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(programs)):  # what ran before leaves its mark on caches
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(2):
                states[name], _ = programs[name].run(states[name], batch)
            jax.block_until_ready(states[name])
            spent = (time.process_time() - busy) / cores
            times[name].append(((time.perf_counter() - start) / 2, spent / 2))
    return {name: _summed_up(found) for name, found in times.items()}


def _summed_up(found: list[tuple[float, float]]) -> Row:
    wall, busy = zip(*found, strict=True)
    return {"median": median(wall), "least": min(wall), "busy": median(busy)}


def compare(name: str, rounds: int, cluster: Cluster) -> Row:
    example, before = build(name, **MODELS[name]), os.getloadavg()[0]
    programs, plan = programs_of(name, example, cluster)
    seconds = measure(programs, example, rounds)
    predicted = {label: each.predicted for label, each in programs.items() if each.predicted}
    return {
        "model": name, **MODELS[name], "mesh": str(plan.mesh), "gap": plan.proof.gap, "rounds": rounds,
        "load": [before, os.getloadavg()[0]], "predicted": predicted, "seconds": seconds,
        "judged": {kind: judged(predicted, seconds, kind) for kind in KINDS},
    }  # fmt: skip


def judged(predicted: dict[str, float], seconds: dict[str, Row], kind: str) -> Row:
    """The plan against the best of the others, and predictions against what was measured, by one kind of seconds."""
    found = {label: row[kind] for label, row in seconds.items()}
    best = min((label for label in found if label != "meshwright"), key=lambda each: found[each])
    ranks: Any = spearmanr(list(predicted.values()), [found[label] for label in predicted])
    return {
        "best": best, "ratio": found["meshwright"] / found[best], "rank_correlation": float(ranks.statistic),
    }  # fmt: skip


def told(row: Row) -> str:
    lines = [f"{row['model']}: the plan has {row['mesh']}, load {row['load']}"]
    for kind, found in row["judged"].items():
        against = f"{found['ratio']:.3f} of the best ({found['best']})"
        lines.append(f"  {kind}: {against}, rank correlation {found['rank_correlation']:.3f}")
    for label, found in sorted(row["seconds"].items(), key=lambda item: item[1]["busy"]):
        guess = row["predicted"].get(label)
        each = ", ".join(f"{kind} {found[kind] * 1e3:.1f}" for kind in KINDS)
        lines.append(f"    {label:20} {each}{f'; predicted {guess * 1e3:.1f}' if guess else ''} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path, help="of this machine; measured first if not given")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    cluster = Cluster.parse(f"{DEVICES}xcpu").with_profile(options.profile or calibrate())
    rows = []
    for name in options.models:
        rows.append(compare(name, options.rounds, cluster))
        print(told(rows[-1]), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
