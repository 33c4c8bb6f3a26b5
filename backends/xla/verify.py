"""Compare a sharded step's results with the unsharded step's, output by output.

How far may they be apart? Sums taken in another order differ by a few units in
the last place, and a step may magnify that: Adam divides a gradient by its own
size, so the sign of a gradient that is all rounding decides a whole update. So
the unsharded step says itself how much rounding moves each output: it is run a
second time with its floating-point inputs moved by one unit in the last place
of the precision it computes in. An output may differ by the `TOLERANCE` of that precision,
relative to its largest value, or by `MARGIN` times that movement where it is more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.errors import VerificationError
from ...ir.graph import Graph

# Relative to each output's own largest value; measured over the zoo with a margin of four.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}
MARGIN = 4.0  # a sharded sum rounds some times where the unsharded one rounds once
_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True)
class Reference:
    """What the unsharded step returns, and what it returns when its inputs are rounded otherwise."""

    results: Any
    moved: Any
    tolerance: float  # of the precision that the step computes in


def reference(step: Callable[..., Any], graph: Graph, leaves: Sequence[Any]) -> Reference:
    """Run the unsharded step twice.

    Args:
        step: the compiled unsharded step on flat leaves.
        graph: tells the precision of its products.
        leaves: its inputs; they are not given up.
    """
    dtype = precision(graph)
    unit, rng = float(jnp.finfo(dtype).eps), np.random.default_rng(0)
    moved = step(*(_moved(leaf, unit, rng) for leaf in leaves))
    return Reference(step(*leaves), moved, TOLERANCE[dtype])


def precision(graph: Graph) -> str:
    """The coarsest precision that a product is computed in."""
    dtypes = {
        graph.types[value].dtype
        for visit in graph.visits
        if visit.op.kind in ("dot_general", "conv_general_dilated")
        for value in visit.op.inputs
    }
    known = [_NAMES[d] for d in dtypes if d in _NAMES]
    return max(known, key=lambda name: TOLERANCE[name], default="float32")


def _moved(leaf: Any, unit: float, rng: np.random.Generator) -> Any:
    """Each number a random one unit in the last place up or down."""
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    host = np.asarray(leaf)
    signs = rng.integers(0, 2, host.shape) * 2.0 - 1.0
    return jnp.asarray((host.astype(np.float64) * (1 + unit * signs)).astype(host.dtype))


def verify_outputs(truth: Reference, found: Any, names: Sequence[str]) -> None:
    """Raise VerificationError naming the first output that differs beyond its tolerance.

    Args:
        truth: what the unsharded step gave.
        found: what the sharded step gave.
        names: of the outputs, in flat order.
    """
    wanted, moves = jax.tree.leaves(truth.results), jax.tree.leaves(truth.moved)
    for position, (want, have, move) in enumerate(
        zip(wanted, jax.tree.leaves(found), moves, strict=True)
    ):
        error, allowed = difference(want, have)
        if allowed:
            allowed = max(allowed, truth.tolerance, MARGIN * difference(want, move)[0])
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
