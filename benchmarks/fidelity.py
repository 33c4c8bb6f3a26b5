"""Predicted against published training runs.

    python benchmarks/fidelity.py ../shared/data/measurements/published_training_runs.csv [--set NAME] [-o FILE]

Every row is priced through the graph of the zoo's model of that shape. No constant is fitted
to a row: they come from `ir/hardware.yaml`. What a row does not state is searched over, as its
set says, and the fastest choice that fits is taken.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")

from meshwright import pricing  # noqa: E402
from meshwright.ir.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.planner.jobs.pinned import Parallelism  # noqa: E402

Row = dict[str, str]


@dataclass
class Case:
    """One row as a job; fields with several options were not stated and are searched over."""

    row: Row
    cluster: Cluster
    shape: pricing.Shape
    parallelisms: list[Parallelism]
    microbatches: list[int]
    settings: list[pricing.Setting]
    batch: int
    measured: float  # seconds per step
    memory: float | None = None  # GiB
    note: str = ""


@dataclass
class Result:
    id: str
    model: str
    measured: float
    predicted: float
    error: float
    memory: float | None
    predicted_memory: float
    memory_error: float | None
    chosen: str
    seconds: dict[str, float]


def whole(row: Row, name: str, default: int | None = None) -> int | None:
    return int(float(row[name])) if row[name] else default


def hosts(device: str, row: Row, fabric: str) -> Cluster:
    n, per = int(row["n_gpus"]), 8
    return Cluster.parse(f"{device}x{n}" if n <= per else f"{n // per}x{device}x{per}@{fabric}")


def gpt_shape(row: Row) -> pricing.Shape:
    hidden, heads = int(row["hidden"]), int(row["heads"])
    return pricing.Shape(
        "gpt", int(row["layers"]), hidden, heads, heads, 4 * hidden, int(row["vocab"]), int(row["seq"])
    )


def chunks(layers: int, pp: int) -> list[int]:
    return [1] if pp == 1 else [v for v in range(1, layers // pp + 1) if layers % (pp * v) == 0]


def megatron(row: Row) -> Case | None:
    """Korthikanti Table 5, SC'21 Tables 1 and 2: A100, fp16, unfused attention.

    Searched over where not stated: microbatch (1, 2, 4, 8), vpp (divisors). ZeRO-3 there is
    DeepSpeed of 2021: nothing overlaps.
    """
    if not (row["tp"] and row["pp"]):
        return None
    shape, tp, pp, n = gpt_shape(row), int(row["tp"]), int(row["pp"]), int(row["n_gpus"])
    zero = whole(row, "zero", 0)
    if n % (tp * pp):
        return None
    dp = n // (tp * pp)
    sp = row["sp"] == "1"
    vpps = [int(row["vpp"])] if row["vpp"] else ([1] if "Korthikanti" in row["src"] else chunks(shape.layers, pp))
    return Case(
        row, hosts("a100", row, "hdr200"), shape,
        [Parallelism(tp=tp, pp=pp, vpp=v, dp=dp, zero=zero, sequence_parallel=sp) for v in vpps],
        [int(row["mbs"])] if row["mbs"] else [1, 2, 4, 8],
        [pricing.Setting(row["recompute"] or "full", False)],
        int(row["gbs"]), float(row["iter_s"]),
    )  # fmt: skip


def megatron_core(row: Row) -> Case | None:
    """Megatron-Core on H100: searched over recompute, microbatch (1, 2, 4), vpp."""
    if not row["tp"]:
        return None
    shape, tp, pp, n = gpt_shape(row), int(row["tp"]), int(row["pp"]), int(row["n_gpus"])
    dp = n // (tp * pp)
    flops = float(row["tflops_gpu"]) * 1e12 * n
    measured = model_flop(shape) * int(row["gbs"]) / flops
    overlap = frozenset({"gradients", "parameters", "tensor"})
    return Case(
        row, hosts("h100", row, "ib400"), shape,
        [Parallelism(tp=tp, pp=pp, vpp=v, dp=dp, zero=1, sequence_parallel=tp > 1) for v in chunks(shape.layers, pp)],
        [1, 2, 4], [pricing.Setting(r, overlap=overlap | {"stages"}) for r in ("none", "full")],
        int(row["gbs"]), measured,
    )  # fmt: skip


def model_flop(shape: pricing.Shape) -> float:
    """Model FLOP of one sequence, forward and backward: Narayanan et al. SC'21, eq. 3, without recompute."""
    s, h, layers = shape.seq, shape.hidden, shape.layers
    return 72 * s * layers * h * h * (1 + s / (6 * h) + shape.vocab / (12 * layers * h))


SIMUMAX = {"llama3-70b": "llama3-70b", "llama3-405b": "llama3-405b"}


def simumax(row: Row) -> Case | None:
    """SimuMax on one B200 host: ZeRO-1, sequence parallel. Its llama3-405b has 16 key-value heads
    (SimuMax @4dcaae513b, configs/models/llama3-405b_padding_128.json), Meta's has 8."""
    if row["model"] not in SIMUMAX or whole(row, "cp", 1) != 1:
        return None
    shape = pricing.shape_of(row["model"], int(row["seq"]), int(row["layers"]))
    if row["model"] == "llama3-405b":
        shape = replace(shape, kv_heads=16)
    tp, pp, dp = int(row["tp"]), int(row["pp"]), int(row["dp"])
    return Case(
        row, Cluster.parse("b200x8"), shape, [Parallelism(tp=tp, pp=pp, dp=dp, zero=1, sequence_parallel=tp > 1)],
        [int(row["mbs"])], [pricing.Setting("none")],
        int(row["gbs"]), float(row["iter_s"]), float(row["mem_gib"]),
    )  # fmt: skip


def torchtitan(row: Row) -> Case | None:
    """torchtitan on H100 of 96 GB and 500 W: FSDP gathers and reductions overlapped.

    That device is Meta's own: HBM2e at 2.4 TB/s (stated with the results), and at 500 of 700 W
    we take its products at sqrt(500 / 700) of the SXM's rate, its one factor.
    """
    model = "llama3-70b" if "70B" in row["model"] else "llama3-405b" if "405B" in row["model"] else "llama3-8b"
    if not row["gbs"] or int(row["pp"]) > 1 or whole(row, "cp", 1) != 1:
        return None
    shape = pricing.shape_of(model, int(row["seq"]))
    tp, dp, gbs = int(row["tp"]), int(row["dp"]), int(row["gbs"])
    overlap = {"parameters", "gradients"} | ({"tensor"} if "async" in row["notes"].lower() else set())
    recompute = "full" if row["recompute"] == "full" else "alternate"
    cluster = hosts("h100", row, "ib400").with_("device.memory_bandwidth", "2400 GB/s").with_("device.memory", "96 GB")
    cluster = cluster.with_("device.efficiency", cluster.device.efficiency * (500 / 700) ** 0.5)
    measured = gbs * shape.seq / (float(row["tok_s_gpu"]) * int(row["n_gpus"]))
    return Case(
        row, cluster, shape, [Parallelism(tp=tp, dp=dp, zero=3, sequence_parallel=tp > 1)],
        [gbs // dp], [pricing.Setting(recompute, True, "fp8" if "fp8" in row["dtype"] else "bf16", frozenset(overlap))],
        gbs, measured, float(row["mem_gib"]) if row["mem_gib"] else None,
    )  # fmt: skip


# MaxText's scripts at AI-Hypercomputer/maxtext, MaxText/configs/{v5e,v5p}/{32b,64b}.sh: sequences per device,
# rematerialisation, tensor parallelism. Scales 32 and 64 of base.yml: width 8192, 64 heads of 128, feed-forward 28672.
MAXTEXT = {
    ("TPU v5e", "MaxText 32B"): (32, 4, "blocks", 1), ("TPU v5e", "MaxText 64B"): (64, 2, "blocks", 1),
    ("TPU v5p", "MaxText 32B model"): (32, 7, "dots", 4), ("TPU v5p", "MaxText 64B model"): (64, 3, "dots", 4),
}  # fmt: skip


def maxtext(row: Row) -> Case | None:
    """MaxText on one TPU slice; sizes and settings from its scripts. Other sizes have more heads
    than width, and several slices hybrid sharding: neither can be given as numbers yet."""
    known = MAXTEXT.get((row["hw"], row["model"]))
    if known is None or "slice 1x" not in row["notes"]:
        return None
    layers, per_device, recompute, tp = known
    n = int(row["n_gpus"])
    shape = pricing.Shape("llama", layers, 8192, 64, 64, 28672, 32000, 2048)
    weights = layers * (4 * 8192 * 8192 + 3 * 8192 * 28672) + 32000 * 8192
    work = 6 * weights * per_device * 2048 + 12 * layers * 8192 * 2048**2 * per_device
    cluster = Cluster.parse("v5e-256" if "v5e" in row["hw"] else f"v5p-{2 * n}")
    overlap = frozenset({"parameters", "gradients", "tensor"})
    return Case(
        row, cluster, shape, [Parallelism(tp=tp, dp=n // tp, zero=3, sequence_parallel=tp > 1)],
        [per_device * tp], [pricing.Setting(recompute, overlap=overlap)], per_device * n,
        work / (float(row["tflops_gpu"]) * 1e12),
    )  # fmt: skip


SETS: dict[str, tuple[str, Callable[[Row], Case | None], float]] = {
    "korthikanti": ("Korthikanti 2205.05198 T5", megatron, 0.04),
    "sc21": ("Narayanan SC21", megatron, 0.06),
    "ptd-p": ("Narayanan SC21 T2", lambda row: megatron(row) if int(row["zero"]) == 0 else None, 0.06),
    "zero3": ("Narayanan SC21 T2", lambda row: megatron(row) if int(row["zero"]) == 3 else None, 1.0),
    "megatron-core": ("Megatron-Core r0.8 H100", megatron_core, 0.12),
    "simumax": ("SimuMax B200 real", simumax, 0.08),
    "torchtitan": ("torchtitan bench 2024-12", torchtitan, 0.15),
    "torchtitan-tp": ("torchtitan asyncTP 2025-06", torchtitan, 0.15),
    "maxtext": ("MaxText TPU", maxtext, 0.15),
    "allreduce": ("Korthikanti 2205.05198 text", megatron, 0.04),
}


def best(case: Case) -> Result:
    """The fastest of the choices that fit the device; if none does, the one that needs least."""
    cluster = case.cluster
    found: list[tuple[bool, float, float, Any]] = []
    problems = []
    for parallelism, microbatch, setting in product(case.parallelisms, case.microbatches, case.settings):
        try:
            priced = pricing.price_job(
                case.shape, parallelism, cluster, global_batch=case.batch, microbatch=microbatch, setting=setting
            )
        except MeshwrightError as error:
            problems.append(error.what)
            continue
        fits = priced.peak <= cluster.device.memory - cluster.device.reserve
        rank = (not fits, priced.step if fits else priced.peak)
        found.append((*rank, priced.peak, (priced, parallelism, microbatch, setting)))
    if not found:
        raise SystemExit(f"row {case.row['id']}: {problems[:2]}")
    _, _, peak, (priced, parallelism, microbatch, setting) = min(found, key=lambda f: f[:2])
    gib = peak / 2**30
    return Result(
        case.row["id"], case.row["model"], case.measured, priced.step, priced.step / case.measured - 1,
        case.memory, gib, gib / case.memory - 1 if case.memory else None,
        f"tp{parallelism.tp} pp{parallelism.pp}x{parallelism.vpp} dp{parallelism.dp} z{parallelism.zero}"
        f" mb{microbatch} {setting.recompute}", {k: round(v, 4) for k, v in priced.seconds.items()},
    )  # fmt: skip


def line(name: str, r: Result) -> str:
    memory = f"{r.predicted_memory:7.2f} GiB"
    if r.memory is not None and r.memory_error is not None:
        memory += f" of {r.memory:7.2f} {r.memory_error:+6.1%}"
    step = f"{r.measured:8.3f} {r.predicted:8.3f} s {r.error:+6.1%}"
    return f"{name:14} {r.id:>5} {r.model:12} {step}  {memory}  {r.chosen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--set", dest="sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = list(csv.DictReader(options.rows.open()))
    report: dict[str, Any] = {}
    for name in options.sets:
        source, read, bar = SETS[name]
        cases = [c for row in rows if row["src"] == source and (c := read(row))]
        results = []
        for case in cases:
            results.append(best(case))
            print(line(name, results[-1]), flush=True)
        mape = statistics.mean(abs(r.error) for r in results)
        held = [abs(r.memory_error) for r in results if r.memory_error is not None]
        memory = statistics.mean(held) if held else None
        end = f", memory {memory:.1%}" if memory else ""
        print(f"{name}: {len(results)} rows, MAPE {mape:.1%} (bar {bar:.0%}){end}")
        report[name] = {"bar": bar, "mape": mape, "memory_mape": memory, "rows": [asdict(r) for r in results]}
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
