"""Compare a sharded step's results with the unsharded step's, output by output.

How far may they be apart? What rounding makes of the unsharded step is measured (`rounding.py`), number by number,
and an output is judged by three laws. For updated state, what counts is its *change*: a gradient that is wrong by a
factor shows, however small the step; for other outputs it is the value.

    open       a number that magnified rounding moves by as much as the step changes it: nobody can say what it should
               be. Under Adam in bf16, one in ten, of the smallest gradients.
    together   the others may differ, as a root of summed squares, by `TOLERANCE` of that of the output's whole change,
               or by `MARGIN` times what rounding moves them, whichever is more.
    each       no number is farther off than `MARGIN` times the farthest that rounding moved it (an open one: any in
               its output) and `TOLERANCE` of the largest change; but for one, and one in 10,000; one in 1,000 where
               the step chooses by real numbers: no few runs turn all the choices that rounding may turn.

Moments of Adam are the gradient and its square, which rounding moves little: there a forgotten average, a microbatch
left out or a sum not taken shows, where the updated parameters hide it.
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
from ...ir.ops import CONTRACTIONS
from ...ir.rules.user_kernel import KIND as USER_KERNEL
from ..runtime.rendezvous import Rendezvous
from .by_microbatch import ByMicrobatch
from .capture import Captured
from .rounding import Noise, chooses, distance, measure, wide

# Of an output's change or value; measured over the zoo with a margin of four.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}
MARGIN = 3.0  # times the rounding that was measured; gpt-tiny in bf16 is off by 1.0 of it at most
STRAY = 1e-4  # share of an output's numbers that may be off by more than was measured: few runs miss some
STRAY_CHOOSING = 1e-3  # of mixtral-tiny in bf16 on 8 devices 2e-4 are
_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True)
class Reference:
    """What the unsharded step returns, how far rounding moves it, and the state `before[k]` that output k updates."""

    results: Any
    noise: Mapping[int, Noise]
    tolerance: float  # of the precision that the step computes in
    before: Mapping[int, Any] = field(default_factory=dict)
    kernels: tuple[
        str, ...
    ] = ()  # of the user's own, where they are called: each is cut as it declares
    stray: float = STRAY


def reference(step: Callable[..., Any], captured: Captured, leaves: Sequence[Any]) -> Reference:
    """Run the unsharded step, and measure what rounding makes of it.

    Args:
        step: the compiled unsharded step on flat leaves, or that one microbatch by microbatch.
        captured: the same step as a graph, which is run for the noise alone.
        leaves: its inputs; they are not given up.
    """
    graph = captured.graph
    # On the host: the sharded step that follows may be given the arrays themselves.
    real = [jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating) for leaf in leaves]
    before = {o: np.asarray(leaves[i]) for i, o in graph.state if real[i]}
    noise = measure(captured, leaves, step.moved if isinstance(step, ByMicrobatch) else None)
    declared = [visit.op.where for visit in graph.visits if visit.op.kind == USER_KERNEL]
    kernels = tuple(dict.fromkeys(declared))
    stray = STRAY_CHOOSING if chooses(graph) else STRAY
    return Reference(step(*leaves), noise, TOLERANCE[precision(graph)], before, kernels, stray)


def precision(graph: Graph) -> str:
    """The coarsest precision that a product, or a kernel of the user's, is computed in."""
    dtypes = {
        graph.types[value].dtype
        for visit in graph.visits
        if visit.op.kind in CONTRACTIONS or visit.op.kind == USER_KERNEL
        for value in visit.op.inputs
    }
    known = [_NAMES[d] for d in dtypes if d in _NAMES]
    return max(known, key=lambda name: TOLERANCE[name], default="float32")


def verify_together(
    truth: Reference, found: Any, names: Sequence[str], rendezvous: Rendezvous
) -> None:
    """As `verify_outputs`, each process for its part; all raise where one does."""
    mine: VerificationError | None = None
    try:
        verify_outputs(truth, found, names)
    except VerificationError as error:
        mine = error
    failed = np.flatnonzero(
        rendezvous.gather("the comparison of results", np.array(mine is not None))
    )
    if mine is not None:
        raise mine
    if failed.size:
        raise VerificationError(
            "the sharded step differs from the unsharded one in the part of another process.",
            where=f"process {failed[0]}", fix="see what it says",
        )  # fmt: skip


def verify_outputs(truth: Reference, found: Any, names: Sequence[str]) -> None:
    """Raise VerificationError naming the first output that breaks a law.

    Args:
        truth: what the unsharded step gave.
        found: what the sharded step gave; of arrays of several processes this one's part is compared.
        names: of the outputs, in flat order.
    """
    wanted = jax.tree.leaves(truth.results)
    for position, (want, have) in enumerate(zip(wanted, jax.tree.leaves(found), strict=True)):
        wrong = _wrong(truth, position, want, have)
        if wrong:
            raise VerificationError(
                f"the sharded step differs from the unsharded one: {wrong}.",
                where=f"output `{names[position] if position < len(names) else position}`",
                fix=f"see whether the kernel declared at {truth.kernels[0]} gives on a part of each name in its `cut` "
                "that part of the result: sizes and random numbers inside it are those of the part"
                if truth.kernels
                else "report this plan; until it is mended run with another mesh, or without meshwright",
            )


def _wrong(truth: Reference, position: int, want: Any, have: Any) -> str:
    """What is wrong with one output, "" where nothing is."""
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        want, have = jax.random.key_data(want), jax.random.key_data(have)
    want = np.asarray(want)
    have = np.asarray(have) if getattr(have, "is_fully_addressable", True) else _filled(have, want)
    if want.shape != have.shape:
        return f"its shape is {have.shape}, not {want.shape}"
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        count = int(np.sum(want != have))
        return f"{count} of {want.size} numbers are others" if count else ""
    tolerance = max(truth.tolerance, TOLERANCE.get(str(want.dtype), 1e-3))
    noise = truth.noise.get(position) or Noise(np.zeros(want.shape), np.zeros(want.shape))
    before = truth.before.get(position)
    return _judged(wide(want), wide(have), noise, before, tolerance, truth.stray)


def _judged(
    want: np.ndarray, have: np.ndarray, noise: Noise, before: Any, tolerance: float, stray: float
) -> str:
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], have[~finite], equal_nan=True):
        return "its numbers are infinite, or none, at other places"
    apart = distance(have, want)[finite]
    size, what = np.abs(want)[finite], "value"
    near, far = noise.near[finite], noise.far[finite]
    if before is not None:
        # The sum `before + change` is rounded to its own precision, which may be most of the change.
        rounding = 2 * float(jnp.finfo(before.dtype).eps) * size
        change = np.abs(want - wide(before))[finite]
        if _norm(change) > _norm(rounding):
            size, what, apart = change, "change", np.maximum(apart - rounding, 0.0)
    opened = (far >= size) & (far > 0)
    whole, off = _norm(size), _norm(apart[~opened])
    allowed = max(tolerance * whole, MARGIN * _norm(near[~opened]))
    if not off <= allowed:
        share = (off / whole, allowed / whole) if whole else (np.inf, 0.0)
        return f"{share[0]:.3g} of its {what}, {share[1]:.3g} allowed"
    room = MARGIN * np.where(opened, np.max(far, initial=0.0), far) + tolerance * np.max(
        size, initial=0.0
    )
    many = int(np.sum(~(apart <= room)))
    if many > 1 + stray * want.size:
        return f"{many} of its {want.size} numbers are farther off than rounding moves them"
    return ""


def _norm(numbers: np.ndarray) -> float:
    """Root of summed squares."""
    return float(np.linalg.norm(numbers))


def _filled(have: jax.Array, want: np.ndarray) -> np.ndarray:
    """This process's part of an array, the rest as it should be."""
    if have.shape != want.shape:
        return np.empty(have.shape, have.dtype)
    full = want.copy()
    for shard in have.addressable_shards:
        full[shard.index] = shard.data
    return full
