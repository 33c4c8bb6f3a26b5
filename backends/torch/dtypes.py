"""Element types as torch names them."""

from __future__ import annotations

from typing import Any

import numpy as np
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


def tensor_of(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor of its own; numpy knows bf16 and the short floats by the names that ml_dtypes gives them."""
    name = _OF_NUMPY.get(array.dtype.name)
    if name is None:
        return torch.from_numpy(np.array(array))
    words = np.array(array).view(f"int{8 * array.dtype.itemsize}")
    return torch.from_numpy(words).view(_NAMES[name])


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array, those types that numpy has not as the whole numbers of their bits."""
    if _DTYPES[tensor.dtype] in _OF_NUMPY.values():
        tensor = tensor.contiguous().view({1: torch.int8, 2: torch.int16}[tensor.element_size()])
    return tensor.numpy()


_OF_NUMPY = {"bfloat16": "bf16", "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2"}
