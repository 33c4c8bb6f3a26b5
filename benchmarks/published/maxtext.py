"""MaxText's published runs on TPU slices."""

from __future__ import annotations

from meshwright import pricing
from meshwright.ir.cluster import Cluster
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row

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
