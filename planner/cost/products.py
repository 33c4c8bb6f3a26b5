"""What share of its peak a device reaches on a matrix product, by shape.

    share = efficiency * TYPICAL * tiles * waves * k / (k + DEPTH)

`tiles` is the useful part of the tiles a result is cut into, `waves` of the rounds in which
all multiprocessors work on one tile each. Form: NVIDIA, "Matrix multiplication background
user's guide" (tile and wave quantization). Constants: fitted to 183 products measured on an
A100 PCIe (SimuMax @4dcaae513b, configs/system/a100_pcie.json): mean error 3.7 %, worst decile
10 %; the same constants miss 514 products measured on a B200 by 9.7 % on average.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...ir.cluster.cluster import Device
from ...ir.execution_model import ExecutionModel
from ...ir.graph import Op, TensorType

TILE = (128, 256)
DEPTH = 200.0  # terms of a sum after which half of the tile's start-up is paid off
WAVE = 0.1  # waves that start-up and tail cost
# Share of the best product's rate that a usual large one reaches: 0.776 / 0.811 on the A100 PCIe.
TYPICAL = 0.957
ENDLESS = 1e12  # products in a batch that keeps all multiprocessors busy


def product_share(
    m: np.ndarray | float,
    n: np.ndarray | float,
    k: np.ndarray | float,
    batch: np.ndarray | float,
    device: Device,
) -> np.ndarray | float:
    """Share of the device's peak on `batch` products [m, k] x [k, n], each an array or a number."""
    return device.efficiency * shape_share(m, n, k, batch, device.units)


def shape_share(
    m: np.ndarray | float,
    n: np.ndarray | float,
    k: np.ndarray | float,
    batch: np.ndarray | float,
    units: int | None,
) -> np.ndarray | float:
    """The part of it that is the shape's: what a device of so many multiprocessors makes of the best rate.

    All of it on a device without matrix tiles of its own (`units` unknown, such as a CPU).
    """
    if units is None:
        return 1.0
    rows, columns = np.ceil(np.divide(m, TILE[0])), np.ceil(np.divide(n, TILE[1]))
    useful = np.divide(m, rows * TILE[0]) * np.divide(n, columns * TILE[1])
    waves = rows * columns * batch / units
    filled = np.sqrt(waves / np.ceil(waves) * waves / (waves + WAVE))
    return TYPICAL * useful * filled * np.divide(k, np.add(k, DEPTH))


def multiplied_as(
    op: Op, types: Mapping[int, TensorType], device: Device, model: ExecutionModel
) -> str:
    """The element type in which a contraction's operands are multiplied.

    One that names an algorithm says it: bf16_bf16_f32 is bf16. Where the backend multiplies f32 in tf32, it does on
    devices that have that, unless a higher precision is asked for.
    """
    dtype, asked = types[op.inputs[0]].dtype, op.attr("precision") if op.has("precision") else None
    if isinstance(asked, str) and "_" in asked:
        named = asked.partition("_")[0]
        return named if named in ("bf16", "f16", "tf32", "f32") else dtype
    levels = {*asked} if isinstance(asked, tuple) else {asked}
    default = dtype == "f32" and model.f32_as_tf32 and levels.isdisjoint({"high", "highest"})
    return "tf32" if default and "tf32" in device.peak_flops else dtype


def peak_of(device: Device, dtype: str) -> float:
    """FLOP/s of the datasheet in this element type, or in the nearest one that it states."""
    peaks = device.peak_flops
    best = peaks.get(dtype) or peaks.get(
        {"f32": "tf32", "f16": "bf16", "bf16": "f16"}.get(dtype, "")
    )
    return best or min(peaks.values())
