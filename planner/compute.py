"""Seconds of one op on one device: a roofline.

    seconds = launch + max(FLOP / achieved FLOP/s, bytes moved / memory bandwidth)

Elementwise chains are taken as fused: they move only what enters and leaves the
chain. Source of the model: Williams, Waterman & Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ..ir.cluster import Device
from ..ir.graph import Op, TensorType
from ..ir.rule import Rule
from ..ir.rules import rule_of

# Ops that start a kernel of their own and read and write memory. Everything
# else is fused into its neighbours.
KERNELS = frozenset({
    "dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "sort", "top_k",
    "cumsum", "reduce_window_max", "reduce_window_sum", "select_and_scatter_add", "concatenate",
    "random_bits", "threefry2x32", "dynamic_update_slice", "while", "cond",
})  # fmt: skip
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated"})
FREE = frozenset(
    {"copy", "optimization_barrier", "reshape", "squeeze", "broadcast_in_dim"}
)  # no kernel
# Arithmetic per element of a fused op, in simple operations; one where not listed.
# Measured on one x86 core with XLA's vectorised expansions: exp and tanh take 10 to
# 20 times a multiplication, division and roots about 4 times.
WEIGHTS = {
    **dict.fromkeys(
        ("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos", "erf", "pow"),
        16.0,
    ),
    **dict.fromkeys(("div", "sqrt", "rsqrt", "cbrt", "rem"), 4.0),
}


def flop(op: Op, rule: Rule, types: Mapping[int, TensorType]) -> float:
    """Floating-point operations of one op on whole tensors.

    A contraction does one multiplication and one addition per combination of
    its factors; a convolution per output element and kernel element. Others: one
    per result element.
    """
    if op.kind == "dot_general" and not rule.opaque:
        return 2.0 * prod(factor.size for factor in rule.factors)
    if op.kind == "conv_general_dilated":
        return 2.0 * _convolution_terms(op, types)
    return float(sum(types[v].size for v in op.outputs))


def _convolution_terms(op: Op, types: Mapping[int, TensorType]) -> float:
    """Output elements times kernel elements per output feature, less what dilation skips."""
    kernel, result = types[op.inputs[1]], types[op.outputs[0]]
    numbers = dict(op.attrs)["dimension_numbers"]
    out_feature = kernel.shape[numbers[1][0]]  # type: ignore[index]
    dilation = dict(op.attrs).get("lhs_dilation") or ()
    holes = prod(d for d in dilation if isinstance(d, int))  # type: ignore[union-attr]
    return result.size * kernel.size / out_feature / holes


@dataclass(frozen=True, slots=True)
class Ways:
    """Into how many parts each operand, each result and the work is cut; one entry per choice."""

    operands: list[np.ndarray]
    results: list[np.ndarray]
    work: np.ndarray


@dataclass(frozen=True, slots=True)
class Stored:
    """Values that are written to memory; those of them that end a fused kernel."""

    values: frozenset[int]
    ends: frozenset[int]


def op_seconds(
    op: Op,
    rule: Rule,
    types: Mapping[int, TensorType],
    device: Device,
    ways: Ways,
    stored: Stored,
) -> np.ndarray | float:
    """Seconds on one device for every choice.

    A kernel reads all operands and writes all results. A fused op does its
    arithmetic and writes only results that are stored; it is launched where it ends.
    """
    kernel = op.kind in KERNELS
    written = [v in stored.values for v in op.outputs]
    if op.kind in FREE:
        return 0.0
    if not (kernel or any(written)):
        return arithmetic_seconds(op, types, device, ways)
    moved = sum(
        types[v].nbytes / w
        for v, w, kept in zip(op.outputs, ways.results, written, strict=True)
        if kept
    )
    if kernel:
        moved = moved + sum(
            types[v].nbytes / w for v, w in zip(op.inputs, ways.operands, strict=True)
        )
    seconds = moved / device.memory_bandwidth
    if op.kind in CONTRACTIONS:
        work = flop(op, rule, types) / ways.work
        seconds = np.maximum(seconds, work / _peak(device, types[op.inputs[0]].dtype))
    elif not kernel:
        seconds = np.maximum(seconds, arithmetic_seconds(op, types, device, ways))
    launched = kernel or not stored.ends.isdisjoint(op.outputs)
    return device.launch * launched + seconds


def arithmetic_seconds(
    op: Op, types: Mapping[int, TensorType], device: Device, ways: Ways
) -> np.ndarray | float:
    """Seconds of a fused op's arithmetic: elements of its largest side times its weight."""
    sides = [
        (types[v].size, w)
        for v, w in zip((*op.inputs, *op.outputs), (*ways.operands, *ways.results), strict=True)
    ]
    size, cut = max(sides, key=lambda side: side[0])
    return size * WEIGHTS.get(op.kind, 1.0) / cut / device.vector_flops


def contraction_seconds(op: Op, types: Mapping[int, TensorType], device: Device) -> float:
    """Seconds of a contraction on one device at full rate; 0 for any other op."""
    if op.kind not in CONTRACTIONS:
        return 0.0
    return flop(op, rule_of(op, types), types) / _peak(device, types[op.inputs[0]].dtype)


def _peak(device: Device, dtype: str) -> float:
    """Achieved FLOP/s of large products in this element type."""
    peaks = device.peak_flops
    best = peaks.get(dtype) or peaks.get(
        {"f32": "tf32", "f16": "bf16", "bf16": "f16"}.get(dtype, "")
    )
    return (best or min(peaks.values())) * device.efficiency
