"""torchtitan's published runs on Meta's H100s."""

from __future__ import annotations

import re
from typing import Any

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row, hosts, whole


def torchtitan(row: Row) -> Case | None:
    """torchtitan on H100 of 96 GB and 500 W: FSDP gathers and reductions overlapped.

    Facts: torchtitan @b5bcd76c66. Layers are compiled, the loss is not (parallelize_llama.py), or
    nothing is; with a pipeline parameters stay gathered (there: reshard_after_forward), so it is
    ZeRO-1 in what it moves and holds; a local batch is cut into as many microbatches as there are
    stages (config_manager.py, pipeline_parallel_microbatches); context parallelism gathers keys
    and values (there: context_parallel_rotate_method); tensorwise Float8 gathers in fp8
    (docs/float8.md), rowwise does not.
    """
    model = (
        "llama3-70b"
        if "70B" in row["model"]
        else "llama3-405b"
        if "405B" in row["model"]
        else "llama3-8b"
    )
    shape = pricing.shape_of(model, int(row["seq"]))
    tp, pp, cp, dp = int(row["tp"]), int(row["pp"]), whole(row, "cp", 1) or 1, int(row["dp"])
    local = re.search(r"local_bs=(\d+)", row["notes"])
    if not row["gbs"] and not local:
        return None
    gbs = int(row["gbs"]) if row["gbs"] else int(local[1]) * dp  # type: ignore[index]
    vpp = 2 if "Interleaved" in row["notes"] else 1
    microbatch = gbs // dp // (pp * vpp) if pp > 1 else gbs // dp
    measured = gbs * shape.seq / (float(row["tok_s_gpu"]) * int(row["n_gpus"]))
    return Case(
        row, meta(row), shape,
        [Parallelism(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, zero=1 if pp > 1 else 3, sequence_parallel=tp > 1)],
        [microbatch], [setting(row)], gbs, measured, float(row["mem_gib"]) if row["mem_gib"] else None,
    )  # fmt: skip


def setting(row: Row) -> pricing.Setting:
    overlap = {"parameters", "gradients"} | (
        {"tensor"} if "async" in row["notes"].lower() else set()
    )
    compiled = "compile" in row["notes"] or "2025" in row["src"]
    fp8 = "fp8" in row["dtype"]
    more: dict[str, Any] = {"gathers": "fp8" if fp8 and "rowwise" not in row["dtype"] else "bf16"}
    return pricing.Setting(
        "full" if row["recompute"] == "full" else "alternate", products="fp8" if fp8 else "bf16",
        overlap=frozenset(overlap), fusion="layers" if compiled else "none", **more,
    )  # fmt: skip


def meta(row: Row) -> Cluster:
    """Meta's own device: HBM2e at 2.4 TB/s (stated with the results), and at 500 of 700 W we take
    its products and attention at sqrt(500 / 700) of the SXM's rate, its one factor."""
    cluster = (
        hosts("h100", row, "ib400")
        .with_("device.memory_bandwidth", "2400 GB/s")
        .with_("device.memory", "96 GB")
    )
    device, power = cluster.device, (500 / 700) ** 0.5
    cluster = cluster.with_("device.efficiency", device.efficiency * power)
    return cluster.with_("device.attention_efficiency", device.attention_efficiency * power)
