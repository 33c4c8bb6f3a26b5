"""One training step with everything needed to plan it, trace it or run it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

PyTree = Any
Step = Callable[[PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Example:
    """A single-device training step and the shapes of its arguments.

    `step(state, batch)` is a pure function, not jitted. `state` and `batch`
    hold `jax.ShapeDtypeStruct`s; `init(key)` and `make_batch(rng)` make real
    arrays of the same shapes, which is the only time that memory is used.
    """

    name: str
    step: Step
    state: PyTree
    batch: PyTree
    init: Callable[[jax.Array], PyTree]
    make_batch: Callable[[np.random.Generator], PyTree]
    description: str
    params: int  # trainable numbers, not bytes


def abstract(init: Callable[[jax.Array], PyTree]) -> PyTree:
    """The shapes that `init(key)` would return; nothing is materialised."""
    return jax.eval_shape(init, jax.random.key(0))


def count(params: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
