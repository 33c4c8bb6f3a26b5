"""Arrays without elements and sums over nothing: planned and run like anything else, and nothing travels for them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import meshwright as mw


def step(w: Any, none: Any, x: Any) -> Any:
    def loss(w: Any) -> Any:
        h = jnp.concatenate([jnp.tanh(x @ w["a"]), none @ w["a"]])  # no rows more
        h = h + x[:, :0] @ w["z"]  # a product that sums over nothing
        taken = jnp.take(w["a"], jnp.zeros((0,), jnp.int32), axis=0)
        h = h.at[jnp.zeros((0,), jnp.int32)].add(taken @ w["a"])
        return jnp.mean(h**2) + none.reshape(0, 8, 8).sum() + jnp.sum(none[:, :, None] * 2)

    value, grads = jax.value_and_grad(loss)(w)
    told = {
        "loss": value, "none": none + 1, "sorted": jnp.sort(none, 1), "running": jnp.cumsum(none, 0),
        "bits": jax.random.bits(jax.random.key(0), (0, 4)), "any": jnp.any(none > 0), "sums": none.sum(0),
    }  # fmt: skip
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), told


def test_empty_arrays_are_no_trouble():
    draw = np.random.default_rng(0)
    w = {"a": draw.normal(size=(64, 64)).astype(np.float32) / 8, "z": np.zeros((0, 64), np.float32)}
    none, x = np.zeros((0, 64), np.float32), draw.normal(size=(1024, 64)).astype(np.float32)
    run = mw.parallelize(step, cluster="8xcpu", mesh=(8,), verify=True)
    got, plan = run(w, none, x), run.plan(w, none, x)
    assert not plan.opaque and all(c.nbytes for c in plan.collectives)
    for g, wanted in zip(
        jax.tree.leaves(got), jax.tree.leaves(jax.jit(step)(w, none, x)), strict=True
    ):
        np.testing.assert_allclose(g, wanted, rtol=1e-5, atol=1e-6)
    moved = [
        line
        for line in run.lower(w, none, x).hlo().splitlines()
        if "all-" in line or "reduce-scatter" in line
    ]
    assert not any("[0," in line or ",0]" in line for line in moved)
