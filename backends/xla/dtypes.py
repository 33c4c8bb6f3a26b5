"""Element types as jax names them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def jax_dtype(name: str) -> Any:
    """The numpy dtype of one of our element type names."""
    long = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}
    if name == "bool":
        return jnp.dtype("bool")
    letters = name.rstrip("0123456789")
    if letters not in long:
        return jnp.dtype({"f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}.get(name, name))
    return jnp.dtype(long[letters] + name[len(letters) :])
