"""`jax.checkpoint` and loops inside layers, with microbatches and in pipelines, equal the step on one device.

Under plain SGD, so that what a parameter moved by is its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.batch import batch_dims
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.errors import GraphError
from meshwright.ir.graph import Graph, Op, TensorType
from meshwright.ir.passes.held import hold_microbatches
from meshwright.ir.passes.microbatch import TimeAxis, time_axis
from meshwright.ir.passes.recompute import POLICIES
from meshwright.ir.program import prepare
from meshwright.ir.verify import verify, verify_time

WIDTH, BATCH, LAYERS = 8, 8, 4
SAVED = jax.checkpoint_policies
POLICY = {
    "nothing": SAVED.nothing_saveable, "dots": SAVED.dots_saveable, "everything": SAVED.everything_saveable,
    "names": SAVED.save_only_these_names("h"),
}  # fmt: skip


def plain(w, x):
    return x + jnp.tanh(checkpoint_name(x @ w, "h"))


def masked(w, x):
    """With a mask drawn from a key, which is the same in every microbatch but for its rows."""
    kept = jax.random.bernoulli(jax.random.key(3), 0.7, x.shape)
    return x + jnp.where(kept, jnp.sin(x @ w), 0.0)


def looped(w, x):
    return lax.fori_loop(0, 3, lambda i, u: jnp.sin(u), x @ w)


def looped_products(w, x):
    return lax.scan(lambda u, i: (jnp.tanh(u @ w + i), None), x, jnp.arange(2.0))[0]


BODIES = {"plain": plain, "masked": masked, "looped": looped, "products": looped_products}


def held(body, how):
    if how == "none":
        return body
    if how == "nested":
        return jax.checkpoint(lambda w, x: jax.checkpoint(body)(w, body(w, x)))
    return jax.checkpoint(body, policy=POLICY.get(how))


def step_of(body: str, how: str, scanned: bool):
    layer = held(BODIES[body], how)

    def step(state, batch):
        def loss(w):
            x = batch["x"]
            if scanned:
                x = lax.scan(lambda x, w: (layer(w, x), None), x, w)[0]
            for k in range(0 if scanned else LAYERS):
                x = layer(w[k], x)
            return jnp.mean((x - batch["y"]) ** 2)

        value, slope = jax.value_and_grad(loss)(state["w"])
        return {"w": jax.tree.map(lambda w, g: w - 0.5 * g, state["w"], slope)}, {"loss": value}

    return step


def arguments(scanned: bool):
    draw = np.random.default_rng(0)
    weights = [
        jnp.asarray(draw.normal(size=(WIDTH, WIDTH)) / 3, jnp.float32) for _ in range(LAYERS)
    ]
    x, y = (jnp.asarray(draw.normal(size=(BATCH, WIDTH)), jnp.float32) for _ in range(2))
    return {"w": jnp.stack(weights) if scanned else weights}, {"x": x, "y": y}


def check(body: str, how: str, scanned: bool, cluster: str, **request) -> None:
    step, args = step_of(body, how, scanned), arguments(scanned)
    wanted = jax.jit(step)(*args)
    found = mw.parallelize(step, cluster=cluster, time_limit=5, **request)(*args)
    np.testing.assert_allclose(found[1]["loss"], wanted[1]["loss"], rtol=1e-5)
    for have, want, old in zip(*map(jax.tree.leaves, (found[0], wanted[0], args[0])), strict=True):
        assert np.linalg.norm(have - want) < 1e-4 * np.linalg.norm(want - old)


@pytest.mark.parametrize("how", ["layer", "nested", *POLICY])
def test_microbatches(how):
    check("masked" if how == "layer" else "plain", how, False, "2xcpu", microbatches=2, mesh=(2,))


@pytest.mark.parametrize(
    "body, how", [("plain", "layer"), ("masked", "names"), ("looped", "none"), ("products", "dots")]
)
def test_pipelines(body, how):
    check(body, how, False, "2xcpu", pp=2, microbatches=2)


@pytest.mark.parametrize(
    "body, how, microbatches", [("plain", "layer", 4), ("looped", "nothing", 1)]
)
def test_scanned_layers_of_pipelines(body, how, microbatches):
    check(body, how, True, "2xcpu", pp=2, microbatches=microbatches)


def test_a_loop_of_one_turn_in_a_pipeline():
    """Nothing is stacked over it, so it stays a loop, planned and run."""

    def step(weights, batch):
        def loss(weights):
            x = batch["x"]
            for w in weights:
                x = lax.fori_loop(0, 1, lambda _, u, w=w: jnp.sin(u @ w), x)
            return jnp.mean((x - batch["y"]) ** 2)

        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

    args = arguments(False)[0]["w"][:2], arguments(False)[1]
    found = mw.parallelize(step, cluster="2xcpu", pp=2, microbatches=1, time_limit=5)(*args)
    for have, want in zip(found, jax.jit(step)(*args), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def graph_of(body: str, how: str) -> Graph:
    return fold(capture(step_of(body, how, False), *arguments(False)).graph).whole


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "body, how", [("plain", "layer"), ("masked", "layer"), ("masked", "nested"), ("looped", "dots")]
)
def test_barriers_hold_what_exists_per_microbatch_and_nothing_else(body, how, policy):
    program = prepare(graph_of(body, how), policy)
    verify(program.graph)
    assert isinstance(program.time, TimeAxis)
    barriers = [op for op in program.graph.ops if op.kind == "optimization_barrier"]
    assert barriers and all(set(op.inputs) <= program.time.split.keys() for op in barriers)


def test_a_barrier_that_holds_nothing_of_a_microbatch_goes():
    kind = TensorType("f32", (4, 4))
    graph = Graph(
        dict.fromkeys(range(4), kind), (0, 1),
        (Op("optimization_barrier", (1,), (2,)), Op("add", (0, 2), (3,))), (3, 2), state=((1, 1),),
    )  # fmt: skip
    assert hold_microbatches(graph, {0: 0}).ops == (Op("add", (0, 1), (3,)),)
    assert hold_microbatches(graph, {0: 0}).outputs == (3, 1)


def test_a_barrier_that_mixes_is_named():
    graph = graph_of("plain", "layer")
    time = time_axis(graph, batch_dims(graph))
    assert isinstance(time, TimeAxis)
    with pytest.raises(GraphError, match="held-apart"):
        verify_time(graph, time)


def metrics_made_again(state, batch):
    """A loss that is computed again after the backward pass, and reads parameters there."""

    def loss(w):
        h = jnp.tanh(batch["x"] @ w["a"])
        return jnp.mean((h @ w["b"] - batch["y"]) ** 2)

    slope = jax.grad(loss)(state["w"])
    error = jnp.abs(jnp.tanh(batch["x"] @ state["w"]["a"]) @ state["w"]["b"] - batch["y"])
    near = jnp.mean(jnp.argmax(error, -1) == jnp.argmax(batch["y"], -1))
    return {"w": jax.tree.map(lambda w, g: w - 0.1 * g, state["w"], slope)}, {
        "loss": jnp.mean(error**2),
        "near": near,
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_copies_and_what_is_recomputed_stand_before_their_readers(policy):
    weights = {"a": jnp.ones((WIDTH, WIDTH)) / 4, "b": jnp.ones((WIDTH, WIDTH)) / 4}
    graph = capture(metrics_made_again, {"w": weights}, arguments(False)[1]).graph
    verify(prepare(fold(graph).small, policy).graph)
