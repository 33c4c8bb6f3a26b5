"""Compare a sharded step's results with the unsharded step's, output by output.

How far may they be apart? Sums taken in another order differ by a few units in
the last place, and a step may magnify that: Adam divides a gradient by its own
size, so the sign of a gradient that is all rounding decides a whole update. So
the unsharded step says itself how much rounding moves each output: it is run
again with its floating-point inputs moved by some units in the last place of the
precision it computes in. An output may differ by the `TOLERANCE` of that precision or
by `MARGIN` times that movement, whichever is more.

Both are relative to the output's largest value, and for updated state to its largest
*change*: a gradient that is wrong by a factor shows, however small the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.errors import VerificationError
from ...ir.graph import Graph
from .meetings import Meetings

# Relative to each output's own largest value; measured over the zoo with a margin of four.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}
MARGIN = 2.0
UNITS, RUNS = 4.0, 2  # how far inputs are moved, and how often: sharded sums round more often
_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True)
class Reference:
    """What the unsharded step returns, and what it returns when its inputs are rounded otherwise.

    `before[k]` is the state that output k updates; each run of `moved` started from that
    state too, its own rounding taken off.
    """

    results: Any
    moved: Sequence[Any]
    tolerance: float  # of the precision that the step computes in
    before: Mapping[int, Any] = field(default_factory=dict)


def reference(step: Callable[..., Any], graph: Graph, leaves: Sequence[Any]) -> Reference:
    """Run the unsharded step, and `RUNS` times more from inputs that are rounded otherwise.

    Args:
        step: the compiled unsharded step on flat leaves.
        graph: tells the precision of its products, and which outputs update which inputs.
        leaves: its inputs; they are not given up.
    """
    dtype = precision(graph)
    unit, rng = UNITS * float(jnp.finfo(dtype).eps), np.random.default_rng(0)
    # On the host: the sharded step that follows may be given the arrays themselves.
    before = {o: np.asarray(leaves[i]) for i, o in graph.state if _is_real(leaves[i])}
    runs = []
    for _ in range(RUNS):
        inputs = [_moved(leaf, unit, rng) for leaf in leaves]
        results = jax.tree.leaves(step(*inputs))
        for i, o in graph.state:
            if o in before:
                results[o] = _real(results[o]) - _real(inputs[i]) + _real(before[o])
        runs.append(results)
    return Reference(step(*leaves), runs, TOLERANCE[dtype], before)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _real(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


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
    if not _is_real(leaf):
        return leaf
    host = np.asarray(leaf)
    signs = rng.integers(0, 2, host.shape) * 2.0 - 1.0
    return jnp.asarray((host.astype(np.float64) * (1 + unit * signs)).astype(host.dtype))


def verify_together(truth: Reference, found: Any, names: Sequence[str], meetings: Meetings) -> None:
    """As `verify_outputs`, each process for its part; all raise where one does."""
    mine: VerificationError | None = None
    try:
        verify_outputs(truth, found, names)
    except VerificationError as error:
        mine = error
    failed = np.flatnonzero(meetings.gather("the comparison of results", np.array(mine is not None)))
    if mine is not None:
        raise mine
    if failed.size:
        raise VerificationError(
            "the sharded step differs from the unsharded one in the part of another process.",
            where=f"process {failed[0]}", fix="see what it says",
        )  # fmt: skip


def _advice(truth: Reference) -> str:
    mended = "report this plan; until it is mended run with another mesh, or without meshwright"
    if truth.tolerance <= TOLERANCE["float32"]:
        return mended
    return f"f32 or SGD, as Adam makes a whole update of a gradient that is all rounding; if they differ too, {mended}"


def verify_outputs(truth: Reference, found: Any, names: Sequence[str]) -> None:
    """Raise VerificationError naming the first output that differs beyond its tolerance.

    Args:
        truth: what the unsharded step gave.
        found: what the sharded step gave; of arrays of several processes this one's part is compared.
        names: of the outputs, in flat order.
    """
    wanted, runs = jax.tree.leaves(truth.results), [jax.tree.leaves(run) for run in truth.moved]
    for position, (want, have) in enumerate(zip(wanted, jax.tree.leaves(found), strict=True)):
        before = truth.before.get(position)
        error, allowed = difference(want, have, before)
        if allowed:
            moved = max((difference(want, run[position], before)[0] for run in runs), default=0.0)
            allowed = max(allowed, truth.tolerance, MARGIN * moved)
        if not error <= allowed:
            raise VerificationError(
                "the sharded step differs from the unsharded one: "
                f"{error:.3g} of the largest {'value' if before is None else 'change'}, {allowed:.3g} allowed.",
                where=f"output `{names[position] if position < len(names) else position}`",
                fix=_advice(truth),
            )


def _filled(have: jax.Array, want: np.ndarray) -> np.ndarray:
    """This process's part of an array, the rest as it should be."""
    if have.shape != want.shape:
        return np.empty(have.shape, have.dtype)
    full = want.copy()
    for shard in have.addressable_shards:
        full[shard.index] = shard.data
    return full


def difference(want: Any, have: Any, before: Any = None) -> tuple[float, float]:
    """(largest difference, tolerance of this dtype), relative to the largest expected value.

    With `before`, relative to the largest expected change; the tolerance then has room for
    the rounding of the sum `before + change`. Numbers that are not finite must be the same.
    """
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        want, have = jax.random.key_data(want), jax.random.key_data(have)
    want = np.asarray(want)
    have = np.asarray(have) if getattr(have, "is_fully_addressable", True) else _filled(have, want)
    if want.shape != have.shape:
        return float("inf"), 0.0
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        return float(np.any(want != have)), 0.0
    complex_ = jnp.issubdtype(want.dtype, jnp.complexfloating)
    wide = np.complex128 if complex_ else np.float64
    w, h = want.astype(wide), have.astype(wide)
    allowed = TOLERANCE.get(str(want.dtype), 1e-3)
    if not np.array_equal(w[~np.isfinite(w)], h[~np.isfinite(w)], equal_nan=True):
        return float("inf"), allowed
    finite = np.isfinite(w)
    largest = float(np.max(np.abs(w[finite]), initial=0.0))
    error = float(np.max(np.abs(w[finite] - h[finite]), initial=0.0))
    if not np.isfinite(error):
        return float("inf"), allowed
    if before is not None:
        change = np.abs(w - np.asarray(before).astype(wide))[finite]
        most, rounding = (
            float(np.max(change, initial=0.0)),
            2 * float(jnp.finfo(want.dtype).eps) * largest,
        )
        if most > rounding:
            return error / most, allowed + rounding / most
    return error / max(largest, 1e-6), allowed
