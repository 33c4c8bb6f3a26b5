"""Steps written for one example under `vmap`: collectives over its axis, and linear algebra of each example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import meshwright as mw

S = jax.ShapeDtypeStruct


def centred(w: Any, x: Any, named: bool) -> Any:
    """A layer that takes the mean over the batch off, by name or by dim."""

    def loss(w: Any) -> Any:
        if named:
            one = lambda x: (h := x @ w["a"], jax.nn.relu(h - lax.pmean(h, "batch")) @ w["b"])[1]  # noqa: E731
            y = jax.vmap(one, axis_name="batch")(x)
        else:
            h = x @ w["a"]
            y = jax.nn.relu(h - h.mean(0)) @ w["b"]
        return jnp.mean((y - x) ** 2)

    return jax.tree.map(lambda w, g: w - 0.1 * g, w, jax.grad(loss)(w))


def test_a_mean_over_the_axis_of_a_map_is_planned_as_one_over_a_dim():
    w, x = (
        {"a": S((256, 1024), jnp.float32), "b": S((1024, 256), jnp.float32)},
        S((16384, 256), jnp.float32),
    )
    plans = [
        mw.plan(centred, w, x, named, cluster="h100x8", static_argnums=2) for named in (False, True)
    ]
    assert plans[0].estimate.step_seconds == plans[1].estimate.step_seconds
    assert plans[0].slots == plans[1].slots and not plans[1].opaque


def everything(w: Any, x: Any) -> Any:
    """Each collective over the axis of a map; a solve and an inverse of each group of rows."""

    def one(x: Any) -> Any:
        h = jnp.tanh(x @ w)
        near = (h - lax.pmean(h, "b")) / jnp.sqrt(lax.pmean(h * h, "b") + 1)
        far = lax.stop_gradient(lax.pmax(h, "b") - lax.pmin(h, "b"))
        return (
            near * far
            + lax.all_gather(h, "b").mean(0)
            + lax.psum(x, "b").sum() * lax.axis_index("b") * 1e-6
        )

    def loss(w: Any) -> Any:
        return jnp.mean(jax.vmap(one, axis_name="b")(x) ** 2)

    groups = x[:512].reshape(8, 64, 64)
    groups = groups @ groups.swapaxes(1, 2) / 64 + jnp.eye(64)
    told = {
        "solved": jnp.linalg.solve(groups, groups[..., :3]),
        "slope": jax.grad(lambda a: jnp.linalg.inv(a).sum())(groups),
        "factor": jnp.linalg.cholesky(groups),
        "spectrum": jnp.abs(jnp.fft.rfft(x)),
    }
    return w - 0.1 * jax.grad(loss)(w), told


def test_maps_and_decompositions_give_what_one_device_gives():
    draw = np.random.default_rng(0)
    w, x = (
        draw.normal(size=(64, 64)).astype(np.float32) / 8,
        draw.normal(size=(2048, 64)).astype(np.float32),
    )
    run = mw.parallelize(everything, cluster="8xcpu", mesh=(8,), microbatches=1)
    for got, wanted in zip(
        jax.tree.leaves(run(w, x)), jax.tree.leaves(jax.jit(everything)(w, x)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)
