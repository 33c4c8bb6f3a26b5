"""The few places where jax 0.10, 0.11 and 0.12 differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def bind(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> list[jax.Array]:
    """Apply a primitive found in a jaxpr. Its parameters there aren't always those of `bind`."""
    found = primitive.get_bind_params(params)
    functions, given = found if isinstance(found, tuple) else ((), found)
    made = primitive.bind(*functions, *operands, **given)
    return list(made) if primitive.multiple_results else [made]


def is_vacant(sharding: Any) -> bool:
    """Whether a sharding says nothing: it belongs to the empty mesh."""
    return getattr(getattr(sharding, "mesh", None), "empty", False)
