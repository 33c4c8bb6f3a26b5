"""Element types as torch names them."""

from __future__ import annotations

import torch

from ...ir.errors import LoweringError

_NAMES = {
    "bool": torch.bool, "s8": torch.int8, "u8": torch.uint8, "s16": torch.int16, "s32": torch.int32,
    "s64": torch.int64, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64,
    "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
_DTYPES = {dtype: name for name, dtype in _NAMES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of our element type names.

    Raises:
        LoweringError: torch has none, or hardly an operation for it (unsigned words, random keys).
    """
    if name not in _NAMES:
        raise LoweringError(
            f"torch has no operations on values of type `{name}`.",
            where="the step",
            fix="run it with --backend xla, or keep such values out of the step",
        )
    return _NAMES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Our name of a dtype."""
    return _DTYPES[dtype]
