"""llm-foundry's published throughputs of MPT on A100s and H100s.

mosaicml/llm-foundry @8c8dd48f72, scripts/train/benchmarking: README.md (rows), submit_benchmarks.py (settings):
FSDP, mixed precision `PURE` (parameters and reductions in bf16), fused attention, bf16 layer norms. Every row
states devices, sequence length, microbatch, accumulation and whether blocks are recomputed.
"""

from __future__ import annotations

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row
from .megatron import gpt_shape

DEVICES = {"A100-40GB SXM": "a100-40", "A100-80GB SXM": "a100", "H100-80GB SXM": "h100"}
FABRICS = {
    "A100-40GB SXM": "roce200",
    "A100-80GB SXM": "roce200",
    "H100-80GB SXM": "ib400",
}  # A100: 1600 Gb/s per host


def mpt(row: Row) -> Case | None:
    """MPT under FSDP. Between H100 hosts 8 x 400 Gb/s are taken, which the rows do not state."""
    device, n = DEVICES[row["hw"]], int(row["n_gpus"])
    cluster = f"{device}x{n}" if n <= 8 else f"{n // 8}x{device}x8@{FABRICS[row['hw']]}"
    shape = gpt_shape(row)
    setting = pricing.Setting(
        row["recompute"], "fused", "fp8" if "fp8" in row["dtype"] else "bf16",
        frozenset({"parameters", "gradients"}), reduce_in_fp32=False,
    )  # fmt: skip
    tokens = int(row["gbs"]) * shape.seq
    return Case(
        row, Cluster.parse(cluster), shape, [Parallelism(dp=n, zero=int(row["zero"]))], [int(row["mbs"])], [setting],
        int(row["gbs"]), tokens / (float(row["tok_s_gpu"]) * n),
    )  # fmt: skip
