"""How far rounding moves each number that a step returns: the unsharded step again, its sums rounded otherwise.

A sharded program takes sums in another order, and the compiler rounds at other places in it. A step may magnify
that: Adam divides a gradient by its own size, so rounding alone decides the sign of some updates. No tolerance
tells such a number from a wrong one, so the step itself is asked: each result of a sum (`SUMS`) is moved by up to some
units in the last place, at random, and what comes of it is measured output by output, number by number.

    units   what it tells
    0       where the others start from
    NEAR    how far a right program may be off; measured on gpt-tiny in bf16 it is off by half to all of that
    FAR     which numbers cannot be told: rounding moves them by as much as the step does

Where a step chooses by real numbers, as experts for tokens, rounding now and then turns a choice, and what hangs on it
moves at once. Few runs meet few of these, so there are more, and the farthest of them counts.

Random rounding as a measure of error: Parker, Monte Carlo Arithmetic (UCLA CSD-970002, 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.graph import Graph, Op
from ...ir.local.program import LocalOp
from ...ir.ops import CHOOSING, COMPOSITES, SUMMING
from .capture import Captured
from .replay import Walk

SUMS = SUMMING | COMPOSITES
NEAR, FAR = 2.0, 16.0  # units in the last place
NEAR_RUNS, FAR_RUNS = 4, 8  # one in 2^12 numbers that are rounding alone seems to stand still
CHOOSING_RUNS = 16  # near ones of a step that chooses
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


@dataclass(frozen=True)
class Noise:
    """How far rounding moves one output, number by number: the root mean square of near runs, or the farthest of them
    where the step chooses; and the farthest of all runs."""

    near: np.ndarray
    far: np.ndarray


def measure(
    captured: Captured, leaves: Sequence[Any], step: Callable[..., tuple[Any, ...]] | None = None
) -> dict[int, Noise]:
    """Noise of each output of real numbers, by position; the near runs, `FAR_RUNS` and the one they start from.

    `step(seed, units, *leaves)` is the one with its sums moved; None: the captured one, as it is.
    """
    graph, binding = captured.graph, captured.binding

    def captured_step(seed: jax.Array, units: jax.Array, *inputs: Any) -> tuple[Any, ...]:
        return _Moved(graph, binding.ops, binding.arrays, seed, units)(*inputs)

    run = jax.jit(step or captured_step)
    first = run(jnp.uint32(0), jnp.float32(0), *leaves)
    start = {o: wide(x) for o, x in enumerate(first) if jnp.issubdtype(x.dtype, jnp.inexact)}
    rare = chooses(graph)
    near_runs = CHOOSING_RUNS if rare else NEAR_RUNS
    near, far = ({o: np.zeros(x.shape) for o, x in start.items()} for _ in range(2))
    for number in range(near_runs + FAR_RUNS):
        units = NEAR if number < near_runs else FAR
        found = run(jnp.uint32(number + 1), jnp.float32(units), *leaves)
        for output, before in start.items():
            moved = distance(wide(found[output]), before)
            far[output] = np.maximum(far[output], moved)
            if units == NEAR:
                square = moved**2 / near_runs
                near[output] = np.maximum(near[output], moved**2) if rare else near[output] + square
    return {output: Noise(np.sqrt(near[output]), far[output]) for output in start}


def chooses(graph: Graph) -> bool:
    """Whether an op picks some of its numbers, and these are real."""
    picked = (visit.op.inputs[0] for visit in graph.visits if visit.op.kind in CHOOSING)
    return any(graph.types[value].is_float for value in picked)


def wide(array: Any) -> np.ndarray:
    """On the host, in double precision."""
    host = np.asarray(array)
    return host.astype(np.complex128 if np.iscomplexobj(host) else np.float64)


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far apart numbers are; 0 where both are the same infinity, or none is a number."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.where(same, 0.0, np.nan_to_num(apart, nan=np.inf, posinf=np.inf))


@dataclass(frozen=True, eq=False)
class _Moved(Walk):
    """The step, its sums moved; not those that are returned as they are, whose own rounding is allowed for."""

    seed: Any
    units: Any

    def op(self, op: Op, operands: Sequence[Any]) -> Sequence[Any]:
        return moved_sums(op, self.graph.outputs, super().op(op, operands), self.seed, self.units)


def moved_sums(
    op: Op | LocalOp, returned: Collection[int], results: Sequence[Any], seed: Any, units: Any
) -> Sequence[Any]:
    """An op's results, moved if they are sums that the step does not return as they are."""
    if op.kind not in SUMS or not set(op.outputs).isdisjoint(returned):
        return results
    return [_moved(result, seed, units) for result in results]


def _moved(array: Any, seed: Any, units: Any) -> Any:
    """Each number up to `units` in its last place up or down, by a hash of its bits and its position.

    What a backward pass computes again is moved as it was before.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, array.size).reshape(array.shape)
    mixed = bits ^ _mixed(place + seed * jnp.uint32(0x9E3779B9))
    share = (_mixed(mixed) >> 8).astype(jnp.promote_types(array.dtype, jnp.float32)) / 2.0**23 - 1
    scale = 1 + units * float(jnp.finfo(array.dtype).eps) * share
    return (array * scale).astype(array.dtype)


def _mixed(word: Any) -> Any:
    """Spread 32 bits: shifts and odd factors, each step reversible."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
