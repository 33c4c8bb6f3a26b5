"""Megatron-LM on A100s (SC'21, Korthikanti et al.) and Megatron-Core on H100s."""

from __future__ import annotations

from meshwright import pricing
from meshwright.planner.jobs.pinned import Parallelism

from .case import Case, Row, hosts, whole

DROPOUT = 0.1  # default of both rates in Megatron-LM @50a4b5fa02, megatron/arguments.py


def gpt_shape(row: Row, dropout: float = 0.0) -> pricing.Shape:
    hidden, heads = int(row["hidden"]), int(row["heads"])
    return pricing.Shape(
        "gpt", int(row["layers"]), hidden, heads, heads, 4 * hidden, int(row["vocab"]), int(row["seq"]),
        dropout,
    )  # fmt: skip


def chunks(layers: int, pp: int) -> list[int]:
    return [1] if pp == 1 else [v for v in range(1, layers // pp + 1) if layers % (pp * v) == 0]


def megatron(row: Row) -> Case | None:
    """Korthikanti Table 5, SC'21 Tables 1 and 2: A100, fp16, unfused attention, dropout, whose masks the
    former counts among activations. Products add up weight gradients themselves since 2022 only
    (NVIDIA/apex #1297), and SC'21's script does not ask for gradients in fp32 (NVIDIA/Megatron-LM
    @090e141cc4, examples/pretrain_gpt3_175B.sh).

    Searched over where not stated: microbatch (1, 2, 4, 8), vpp (divisors). ZeRO-3 there is
    DeepSpeed of 2021: nothing overlaps.
    """
    if not (row["tp"] and row["pp"]):
        return None
    shape, tp, pp, n = gpt_shape(row, DROPOUT), int(row["tp"]), int(row["pp"]), int(row["n_gpus"])
    zero, early = whole(row, "zero", 0), "SC21" in row["src"]
    if n % (tp * pp):
        return None
    dp = n // (tp * pp)
    sp = row["sp"] == "1"
    vpps = [int(row["vpp"])] if row["vpp"] else ([1] if "Korthikanti" in row["src"] else chunks(shape.layers, pp))
    return Case(
        row, hosts("a100", row, "hdr200"), shape,
        [Parallelism(tp=tp, pp=pp, vpp=v, dp=dp, zero=zero, sequence_parallel=sp) for v in vpps],
        [int(row["mbs"])] if row["mbs"] else [1, 2, 4, 8],
        [pricing.Setting(row["recompute"] or "full", False, reduce_in_fp32=not early, fused_accumulation=not early)],
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
