"""MaxText's published runs on TPU slices.

Figures and scripts changed at different times, so every set takes the scripts and the
`base.yml` of the commit that published its figures (AI-Hypercomputer/maxtext):

    TPU v4    @2e8fcf312 (2023-09), MaxText/configs/{1,2,4,8}xv4-{128,384}.sh
    TPU v5e   @8832c042d (2023-11), MaxText/configs/largest_job/{16,32,64,128}b.sh
    TPU v5p   @76bd53b0f (2023-12), MaxText/configs/v5p/{32,...,1024}b.sh; the README of 2024-03 repeats them

`base.yml` was the same in all: heads of 256, a feed-forward of two products (relu), tied
embeddings, a vocabulary of 32768. Inside a slice parameters are sharded (FSDP), across slices gradients are
summed over the data-centre network. MaxText's own decoder adds attention and
feed-forward of the same input; here they follow each other.

The tiering page (docs/reference/models/tiering.md @e591f30cb) links to the settings of its rows.
Where those keep some products in host memory ("custom", `*_offload`), we price that blocks are redone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import AttentionKind
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row

OVERLAP = frozenset(
    {"parameters", "gradients", "tensor"}
)  # LIBTPU_INIT_ARGS of v5e and v5p: async collectives
GATHERS = frozenset({"parameters"})  # those of v4: --xla_enable_async_all_gather alone


@dataclass(frozen=True)
class Script:
    """What a script states: `per_device` sequences per chip, `causal` where MaxText counts half of attention."""

    shape: pricing.Shape
    per_device: int
    recompute: tuple[str, ...]
    tp: int = 1
    attention: AttentionKind = "fused"
    causal: bool = False
    overlap: frozenset[str] = OVERLAP


def scaled(scale: int) -> pricing.Shape:
    """`global_parameter_scale`, a power of 2: pyconfig.py, get_individual_scales, @04262f3cf."""
    base, left = divmod(scale.bit_length() - 1, 3)
    heads, width = 2 ** (base + (left > 0)), 2 ** (base + (left > 1))
    return pricing.Shape(
        "gpt", 16 * 2**base, 2560 * width, 8 * heads, 8 * heads, 8192 * heads, 32768, 2048, 256
    )


def explicit(layers: int, hidden: int, heads: int) -> pricing.Shape:
    return pricing.Shape("gpt", layers, hidden, heads, heads, 4 * hidden, 32768, 1024, 256)


SCRIPTS = {
    ("TPU v4", "22B"): Script(
        explicit(48, 6144, 24), 16, ("blocks",), attention="plain", overlap=GATHERS
    ),
    ("TPU v4", "52B"): Script(
        explicit(32, 12288, 32), 10, ("blocks",), attention="plain", overlap=GATHERS
    ),
    ("TPU v5e", "16B"): Script(scaled(16), 6, ("blocks",)),
    ("TPU v5e", "32B"): Script(scaled(32), 4, ("blocks",)),
    ("TPU v5e", "64B"): Script(scaled(64), 2, ("blocks",)),
    ("TPU v5e", "128B"): Script(scaled(128), 1, ("blocks",), tp=16),
    ("TPU v5p", "32B"): Script(scaled(32), 8, ("dots",), tp=4, causal=True),
    ("TPU v5p", "64B"): Script(scaled(64), 4, ("dots",), tp=4, causal=True),
    ("TPU v5p", "128B"): Script(scaled(128), 2, ("dots",), tp=8, causal=True),
    ("TPU v5p", "256B"): Script(scaled(256), 2, ("dots",), tp=8, causal=True),
    ("TPU v5p", "512B"): Script(scaled(512), 2, ("blocks",), tp=16, causal=True),
    ("TPU v5p", "1024B"): Script(scaled(1024), 2, ("blocks",), tp=16, causal=True),
}


LLAMA2_70B = pricing.Shape(
    "llama", 80, 8192, 64, 8, 28672, 32000, 4096
)  # Touvron et al. 2023, arXiv 2307.09288
TIERING = {
    # benchmarks/maxtext_trillium_model_configs.py @92e59fdf5, llama2_70b_4096 and llama3_1_70b_8192
    ("TPU v6e", "Llama 2 70B"): Script(LLAMA2_70B, 4, ("blocks",)),
    ("TPU v6e", "Llama 3.1 70B"): Script(pricing.shape_of("llama3-70b"), 5, ("blocks",)),
    # AI-Hypercomputer/tpu-recipes @a9e092901, training/trillium/Llama3.1-8B-MaxText/v6e-256
    ("TPU v6e", "Llama 3.1 8B"): Script(pricing.shape_of("llama3-8b"), 4, ("blocks",)),
    # the same file @5e6a7caff, llama3_1_405b_8192_fsdp_dcn: two slices, sharded over both
    ("TPU v6e", "Llama 3.1 405B"): Script(pricing.shape_of("llama3-405b"), 1, ("blocks",), tp=4),
    # benchmarks/maxtext_v5p_model_configs.py @92e59fdf5: all products but two of the feed-forward are kept
    ("TPU v5p", "Llama 2 70B"): Script(LLAMA2_70B, 4, ("dots", "blocks")),
}


def maxtext(row: Row) -> Case | None:
    """MaxText on one or several slices. The 1160B model's sizes are not published: left out."""
    script = SCRIPTS.get((row["hw"], row["model"].split()[1]))
    if script is None:
        return None
    found = re.search(r"slice (\d+)x ", row["notes"])
    slices = int(found[1]) if found else 1
    inside = int(row["n_gpus"]) // slices // script.tp
    group = inside if slices > 1 else None
    return _case(
        row,
        script,
        slices,
        inside * slices,
        group,
        model_flop(script) / (float(row["tflops_gpu"]) * 1e12),
    )


def tiering(row: Row) -> Case | None:
    """MaxText's tiers of optimised models; Mixtral's are left out."""
    script = TIERING.get((row["hw"], row["model"]))
    if script is None:
        return None
    slices = 2 if "405B" in row["model"] else 1
    measured = script.per_device * script.shape.seq / float(row["tok_s_gpu"])
    return _case(row, script, slices, slices * int(row["n_gpus"]) // script.tp, None, measured)


def _case(
    row: Row, script: Script, slices: int, dp: int, group: int | None, measured: float
) -> Case:
    """One row; FSDP over `group` of `dp` ranks, `measured` seconds per step."""
    parallelism = Parallelism(
        tp=script.tp, dp=dp, zero=3, sequence_parallel=script.tp > 1, shard_group=group
    )
    chips = parallelism.devices
    return Case(
        row, _cluster(row["hw"], slices, chips // slices), script.shape, [parallelism], [script.per_device * script.tp],
        [pricing.Setting(r, script.attention, overlap=script.overlap) for r in script.recompute],
        script.per_device * chips, measured,
    )  # fmt: skip


def _cluster(hw: str, slices: int, chips: int) -> Cluster:
    family = hw.split()[1]
    size = chips * (2 if family in ("v4", "v5p") else 1)
    return Cluster.parse(f"{slices}x{family}-{size}@dcn" if slices > 1 else f"{family}-{size}")


def model_flop(script: Script) -> float:
    """FLOP per chip and step as MaxText counts them: 6 per weight and token, 12 s² per layer and head
    width, half of that since 2023-12 (train.py, calculate_training_tflops, @8832c042d, @76bd53b0f)."""
    shape = script.shape
    weights = shape.layers * shape.hidden * (2 * shape.ffn + 4 * shape.heads * shape.head_width)
    weights += shape.vocab * shape.hidden
    attention = (
        12
        * shape.layers
        * shape.heads
        * shape.head_width
        * shape.seq**2
        / (2 if script.causal else 1)
    )
    return script.per_device * (6 * weights * shape.seq + attention)
