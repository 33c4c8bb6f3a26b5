"""Compare a sharded step's results with the unsharded step's, output by output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.errors import VerificationError

# Sums in another order differ by a few units in the last place per term. Relative
# to each output's own largest value; measured over the zoo with a margin of four.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}


def verify_outputs(expected: Any, found: Any, names: Sequence[str]) -> None:
    """Raise VerificationError naming the first output that differs beyond its tolerance."""
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    for position, (want, have) in enumerate(pairs):
        error, allowed = difference(want, have)
        if not error <= allowed:
            raise VerificationError(
                "the sharded step differs from the unsharded one: "
                f"{error:.3g} of the largest value, {allowed:.3g} allowed.",
                where=f"output `{names[position] if position < len(names) else position}`",
                fix="report this plan; until it is mended run with another mesh, or without meshwright",
            )


def difference(want: Any, have: Any) -> tuple[float, float]:
    """(largest difference relative to the largest expected value, tolerance for this dtype)."""
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        want, have = jax.random.key_data(want), jax.random.key_data(have)
    want, have = np.asarray(want), np.asarray(have)
    if want.shape != have.shape:
        return float("inf"), 0.0
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        return float(np.any(want != have)), 0.0
    w, h = want.astype(np.float64), have.astype(np.float64)
    scale = max(float(np.max(np.abs(w), initial=0.0)), 1e-6)
    return float(np.max(np.abs(w - h), initial=0.0)) / scale, TOLERANCE.get(str(want.dtype), 1e-3)
