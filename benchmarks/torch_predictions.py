"""What plans for torch predict beside what its ranks do: memory, processor time and seconds of steps.

    python benchmarks/torch_predictions.py --ranks 1,2,4 -o benchmarks/results/torch_predictions.json

First this machine's figures, on one thread: products, memory, arithmetic and dispatch, in processor seconds, and gloo's
collectives between 2 and 4 ranks, the fastest of many. A plan is for devices that are as fast, or, where ranks are more
than processors, for their share of them. Then each model is planned freely and pinned to a layout, and run:

    memory    bytes of all storages that live at a time, of the fullest rank, against the plan's peak
    compute   processor seconds of a step of a rank, gloo's threads included, against the plan's seconds of
              computation; on one rank there is nothing else
    step      the fastest of some steps by the clock, against the plan's seconds; on a machine with other work this is
              above what the ranks alone would take
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from meshwright.api import plan_captured
from meshwright.backends.torch.collectives import ProcessGroups
from meshwright.backends.torch.lower import arrays_in, lower
from meshwright.backends.torch.ranks import Ranks
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.mesh import Axis, Mesh
from meshwright.ir.plan import Plan
from meshwright.planner.request import Request
from meshwright.recipe import Made, make
from meshwright.training import start
from meshwright.view.words import words

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute")
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)
STEPS = 8
# Pins of a request, by name; with one example there is no batch to cut.
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "free": {},
    "squeezed": {"memory": 0.7},  # of what the free plan takes
    "one example": {"batch": 1},
    "microbatches": {"microbatches": 4},
    "fused": {"attention": "fused", "loss": "fused"},
}


@dataclass
class Figures:
    """Of one processor of this machine: FLOP/s, bytes/s, and processor seconds of an op without work."""

    product: float
    memory: float
    arithmetic: float
    dispatch: float


@dataclass
class Point:
    """One model, layout and number of ranks; bytes, and seconds of a step."""

    model: str
    layout: str
    ranks: int
    plan: str
    peak: tuple[float, float]  # predicted, counted
    compute: tuple[float, float]  # predicted, processor seconds of a rank
    step: tuple[float, float]  # predicted, fastest by the clock
    steps: list[float] = field(default_factory=list)


def processor_seconds(call: Callable[[], Any], least: float = 0.2) -> float:
    """Of one call, the least of five rounds."""
    call()
    found, many = [], 1
    while len(found) < 5:
        begin = time.process_time()
        for _ in range(many):
            call()
        spent = time.process_time() - begin
        if spent < least / 5:
            many *= 2
            continue
        found.append(spent / many)
    return min(found)


def figures() -> Figures:
    torch.set_num_threads(1)
    with torch.no_grad():
        left, right, line = torch.randn(512, 64), torch.randn(64, 256), torch.randn(1 << 24)
        twin, one, short = torch.empty_like(line), torch.randn(1), torch.randn(1 << 13)
        product = (
            2 * 512 * 64 * 256 / processor_seconds(lambda: left @ right)
        )  # as tiny models have
        memory = 2 * line.nbytes / processor_seconds(lambda: twin.copy_(line))
        arithmetic = 16 * short.numel() / processor_seconds(short.exp)  # 16 simple operations each
        dispatch = processor_seconds(lambda: [one + one for _ in range(1000)]) / 1000
    return Figures(product, memory, arithmetic, dispatch)


# ---------------------------------------------------------------- collectives


def _meet(rank: int, ranks: int, place: str, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{place}", rank=rank, world_size=ranks)
    groups = ProcessGroups(Mesh((Axis("x", ranks),)), rank)
    groups.prepare([("x",)])
    rows = []
    for kind in KINDS:
        for size in SIZES:
            call = _call(groups, kind, size, ranks)
            seconds = []
            for _ in range(60 if size < 1 << 20 else 15):
                begin = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begin)
            rows.append([kind, ranks, size, min(seconds), sorted(seconds)[len(seconds) // 2]])
    if rank == 0:
        found.put(rows)
    dist.barrier()


def _call(groups: ProcessGroups, kind: str, size: int, ranks: int) -> Callable[[], Any]:
    """One collective of so many bytes on the larger side."""
    whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
    parts, axes = [part] * ranks, ("x",)
    ring = [(k, (k + 1) % ranks) for k in range(ranks)]
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: groups.all_reduce(whole, "sum", axes),
        "all_gather": lambda: groups.all_gather(part, axes),
        "reduce_scatter": lambda: groups.reduce_scatter(parts, axes),
        "all_to_all": lambda: groups.all_to_all(parts, axes),
        "permute": lambda: groups.permute(whole, ring, axes),
    }
    return calls[kind]


def collectives(ranks: int) -> list[list[Any]]:
    """Rows of kind, ranks, bytes, and the fastest and the median seconds."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, f"{folder}/ranks", found)
        processes = [context.Process(target=_meet, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        rows = found.get()
        for process in processes:
            process.join()
    return rows


# ---------------------------------------------------------------- plans


def cluster_of(ranks: int, seen: Figures) -> Cluster:
    """Devices that are processors of this machine, or shares of them."""
    share = min(1.0, len(os.sched_getaffinity(0)) / ranks)
    found = Cluster.parse(f"{ranks}xcpu")
    rates = {
        "peak_flops.f32": seen.product, "peak_flops.bf16": seen.product, "elementwise_flops": seen.arithmetic,
        "memory_bandwidth": seen.memory,
    }  # fmt: skip
    for name, rate in rates.items():
        found = found.with_(f"devices.cpu.{name}", rate * share)
    return found.with_("fabric.shared.bandwidth", 4e9 * share)


def measured(made: Made, captured: Any, name: str, layout: str, plan: Plan) -> Point:
    """A plan's predictions, and what its ranks do."""
    program, graph = lower(plan, captured.graph), captured.graph
    state, batches = start(made, None, 0)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((state, *next(batches)))]
    arrays = {value: np.asarray(array) for value, array in captured.binding.arrays.items()}
    with Ranks(program, arrays_in(program, graph, arrays), graph.state) as ranks:
        ranks.give(dict(enumerate(leaves)))
        ranks.step()
        before = _spent()
        seconds = [ranks.step() for _ in range(STEPS)]
        spent = (_spent() - before) / STEPS / plan.device_count
        counted = ranks.peak()
    guess = plan.estimate
    return Point(
        name, layout, plan.device_count, "; ".join(words(plan)), (guess.peak_bytes, counted),
        (guess.compute_seconds, spent), (guess.step_seconds, min(seconds)), seconds,
    )  # fmt: skip


def _spent() -> float:
    """Processor seconds of all ranks until now."""
    ticks = 0
    for process in active_children():
        words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(
    models: Sequence[str], counts: Sequence[int], seen: Figures, layouts: Sequence[str]
) -> Iterator[Point]:
    for name in models:
        made, captured = captured_of(name)
        alone = captured_of(name, batch=1) if "one example" in layouts else (made, captured)
        for ranks in counts:
            where, free = cluster_of(ranks, seen), 0.0
            for layout in layouts:
                pins = dict(LAYOUTS[layout])
                if ranks == 1 and layout == "squeezed":
                    continue
                step = alone if pins.pop("batch", None) else (made, captured)
                if "memory" in pins:
                    pins["memory"] *= free
                request = Request(backend="torch", **pins)
                plan = plan_captured(step[1], where, request, name)
                free = free or plan.estimate.peak_bytes
                yield measured(*step, name, layout, plan)


def captured_of(name: str, **recipe: int) -> tuple[Made, Any]:
    made = make({"model": name, **recipe})
    return made, made.capture(False)


def line(point: Point) -> str:
    peak, compute, step = (a / b - 1 for a, b in (point.peak, point.compute, point.step))
    name = f"{point.model:13} {point.ranks} ranks {point.layout:12}"
    return (
        f"{name} memory {point.peak[1] / 1e6:6.2f} MB {peak:+6.1%}  "
        f"compute {point.compute[1] * 1e3:6.1f} ms {compute:+5.0%}  "
        f"step {point.step[1] * 1e3:6.1f} ms {step:+5.0%}  {point.plan}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="gpt-tiny,llama-tiny,mixtral-tiny,vit-tiny")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    counts = [int(each) for each in given.ranks.split(",")]
    load, seen = os.getloadavg()[0], figures()
    rows = [row for ranks in counts if ranks > 1 for row in collectives(ranks)]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors",
        "torch": torch.__version__, "load": load, "figures": asdict(seen), "collectives": rows, "points": [],
    }  # fmt: skip
    for point in compare(given.models.split(","), counts, seen, given.layouts.split(",")):
        print(line(point), flush=True)
        found["points"].append(asdict(point) | {"load": os.getloadavg()[0]})
        if given.output is not None:
            given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
