"""What tests of whole training steps share: small parameters, and a comparison with the library's own jit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

import meshwright as mw

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def weights(*sizes: int) -> list[jax.Array]:
    return [normal(i, a, b) / a**0.5 for i, (a, b) in enumerate(itertools.pairwise(sizes))]


def mlp(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]


def trains_alike(
    step: Callable[..., Any],
    start: Callable[[], Any],
    call: Callable[..., tuple[Any, Any]],
    plain: Any = None,
) -> None:
    """Two steps with ours, the first one verified, and two with the library's own jit, agree in all they return.

    `call(step, state, i)` makes step i: the next state, and all that is compared.
    """
    seen = []
    for run in (mw.parallelize(step, cluster="8xcpu", verify=True), plain or step):
        state, told = start(), []
        for i in range(2):
            state, out = call(run, state, i)
            told += arrays(out)
        seen.append(told)
    ours, theirs = seen
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert_allclose(a, b, rtol=2e-4, atol=2e-5)
