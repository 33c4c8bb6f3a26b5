"""SimuMax's measured runs on one host of B200s."""

from __future__ import annotations

from dataclasses import replace

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row

SIMUMAX = {
    "llama3-70b": "llama3-70b", "llama3-405b": "llama3-405b",
    "deepseekv2": "deepseek-v2", "deepseekv3": "deepseek-v3",
}  # fmt: skip


def simumax(row: Row) -> Case | None:
    """SimuMax on one B200 host: ZeRO-1, sequence parallel, context parallelism by all-to-all
    (docs/b200/b200_real_repro_guide.md, section 7). Its llama3-405b has 16 key-value heads
    (SimuMax @4dcaae513b, configs/models/llama3-405b_padding_128.json), Meta's has 8; its deepseekv3
    has one dense layer (docs/b200/b200_release_v1.2_summary.json, notes), DeepSeek's three."""
    if row["model"] not in SIMUMAX:
        return None
    shape = pricing.shape_of(SIMUMAX[row["model"]], int(row["seq"]), int(row["layers"]))
    if row["model"] == "llama3-405b":
        shape = replace(shape, kv_heads=16)
    if shape.experts:
        shape = replace(shape, experts=replace(shape.experts, dense=1))
    tp, pp, dp, cp = int(row["tp"]), int(row["pp"]), int(row["dp"]), int(row["cp"])
    parallelism = Parallelism(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=int(row["ep"]),
        zero=1,
        sequence_parallel=tp > 1,
        cp_kind="a2a",
    )
    return Case(
        row, Cluster.parse("b200x8"), shape, [parallelism],
        [int(row["mbs"])], [pricing.Setting("none")],
        int(row["gbs"]), float(row["iter_s"]), float(row["mem_gib"]),
    )  # fmt: skip
