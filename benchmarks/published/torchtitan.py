"""torchtitan's published runs on Meta's H100s."""

from __future__ import annotations

from meshwright import pricing
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row, hosts, whole


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
