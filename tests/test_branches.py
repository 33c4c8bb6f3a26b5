"""Loops and branches of the user, `while`, `cond` and `switch`: planned inside, and equal to one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.replay import replay
from meshwright.ir.analysis.batch import infer_batch
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.text import parse, show
from meshwright.ir.verify import verify
from meshwright.planner.request import Request

from .random_plans import random_plans

S = jax.ShapeDtypeStruct
MESHES = ((8,), (2, 2, 2))
WIDE = 16


def normal(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape) / np.sqrt(shape[0])


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


def check_everywhere(step, *variants, meshes=MESHES, count=1, microbatches=1):
    """The captured step, and random plans of it on several meshes, give what jax gives for each of the arguments."""
    captured, wanted = capture(step, *variants[0]), [jax.jit(step)(*args) for args in variants]
    verify(captured.graph)
    assert show(parse(show(captured.graph))) == show(captured.graph)
    close(replay(captured)(*variants[0]), wanted[0])
    for mesh in meshes:
        for plan in random_plans(captured, mesh, count, microbatches):
            program = lower(plan, captured).jitted
            for args, expected in zip(variants, wanted, strict=True):
                found = program(*map(np.asarray, jax.tree.leaves(args)))
                close(jax.tree.unflatten(jax.tree.structure(expected), found), expected)
    return captured


# ---------------------------------------------------------------- optimizers


def params():
    return {"a": normal(WIDE, 2 * WIDE), "b": normal(2 * WIDE, WIDE, key=1)}


def loss(p, x):
    return jnp.mean((jax.nn.relu(x @ p["a"]) @ p["b"] - x) ** 2)


def training(optimizer, needs_loss=False):
    def step(p, state, x):
        value, gradient = jax.value_and_grad(loss)(p, x)
        extra = {"value": value} if needs_loss else {}
        updates, state = optimizer.update(gradient, state, p, **extra)
        return optax.apply_updates(p, updates), state, value

    return step


ADAM = optax.adamw(1e-2)
WRAPPED = {
    "MultiSteps": (optax.MultiSteps(ADAM, 2), False),
    "apply_if_finite": (optax.apply_if_finite(ADAM, 3), False),
    "reduce_on_plateau": (optax.chain(ADAM, optax.contrib.reduce_on_plateau(patience=1)), True),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_conditional_optimizer_is_laid_out_as_the_one_it_wraps(name):
    optimizer, needs_loss = WRAPPED[name]
    p = {"a": S((4096, 16384), jnp.float32), "b": S((16384, 4096), jnp.float32)}
    x = S((4096, 4096), jnp.float32)

    def planned(step, tx):
        return mw.plan(step, p, jax.eval_shape(tx.init, p), x, cluster="h100x8")

    plain, found = (
        planned(training(ADAM), ADAM),
        planned(training(optimizer, needs_loss), optimizer),
    )
    assert not found.opaque
    moments = [t for t in found.tensors if t.role == "optimizer" and len(t.shape) > 1]
    cut = {t.name: t.local_bytes / np.prod(t.shape) for t in moments}
    assert (
        len(cut) >= 4 and max(cut.values()) <= 4 / 8
    )  # moments (and accumulators): an eighth on each device
    each = 2 * 4096 * 16384 * 4 / 8  # of all parameters, on one device
    own = {"MultiSteps": 2, "apply_if_finite": 0, "reduce_on_plateau": 0}[
        name
    ]  # accumulators in and out
    assert found.estimate.peak_bytes <= plain.estimate.peak_bytes + own * each + 2**20
    assert found.estimate.step_seconds < 1.2 * plain.estimate.step_seconds


@pytest.mark.parametrize("name", WRAPPED)
def test_a_conditional_optimizer_trains_as_on_one_device(name):
    optimizer, needs_loss = WRAPPED[name]
    step, x = training(optimizer, needs_loss), normal(WIDE, WIDE, key=2)
    plain, sharded = (
        jax.jit(step),
        mw.parallelize(step, cluster="8xcpu", mesh=(2, 4), time_limit=20),
    )
    ours = wanted = (params(), optimizer.init(params()))
    for turn in range(4):
        batch = x * jnp.where(turn == 2, jnp.nan, 1.0) if name == "apply_if_finite" else x
        *wanted, value = plain(*wanted, batch)
        *ours, found = sharded(*ours, batch)
        close((ours, found), (wanted, value))


def test_random_plans_of_a_conditional_optimizer():
    optimizer = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2)
    args = params(), optimizer.init(params()), normal(WIDE, WIDE, key=2)
    captured = check_everywhere(training(optimizer), args, meshes=((2, 2, 2),), count=2)
    assert len(captured.graph.state) >= 6  # parameters, momentum, accumulated gradients


# ---------------------------------------------------------------- microbatches and pipelines


def layered(p, on, x):
    """Layers with a branch each, a branch before them and one around the loss."""
    h = lax.cond(on, lambda h: 2 * h, jnp.sin, x)
    for w in p:
        h = h + lax.cond(on, lambda h, w=w: jnp.tanh(h @ w["a"]) @ w["b"], lambda h: 0.5 * h, h)
    return lax.cond(on, lambda h: jnp.mean(h**2), lambda h: jnp.mean(jnp.abs(h)), h)


def layered_training(optimizer):
    def step(p, state, on, x):
        value, gradient = jax.value_and_grad(layered)(p, on, x)
        updates, state = optimizer.update(gradient, state, p)
        return optax.apply_updates(p, updates), state, value

    return step


PLAIN = optax.sgd(0.5)


@pytest.mark.parametrize(
    "optimizer", [PLAIN, optax.MultiSteps(PLAIN, 2), optax.apply_if_finite(PLAIN, 3)]
)
def test_branches_in_a_pipeline_and_in_its_optimizer(optimizer):
    p, x = (
        [{"a": normal(WIDE, WIDE, key=k), "b": normal(WIDE, WIDE, key=9 + k)} for k in range(2)],
        normal(8, WIDE),
    )
    step = layered_training(optimizer)
    sharded = mw.parallelize(step, cluster="4xcpu", pp=2, microbatches=2, time_limit=20)
    ours = wanted = (p, optimizer.init(p))
    for on in (True, False):
        *wanted, value = jax.jit(step)(*wanted, jnp.bool_(on), x)
        *ours, found = sharded(*ours, jnp.bool_(on), x)
        close((ours, found), (wanted, value))


@pytest.mark.parametrize(
    "optimizer", [PLAIN, optax.MultiSteps(PLAIN, 2), optax.apply_if_finite(PLAIN, 3)]
)
def test_the_batch_is_the_same_whatever_wraps_the_optimizer(optimizer):
    """Weights are as wide as they are long, so a dim of a branch's result is not told by its size."""
    p = [{"a": normal(WIDE, WIDE), "b": normal(WIDE, WIDE)}]
    args = p, optimizer.init(p), jnp.bool_(1), normal(8, WIDE)
    graph = capture(layered_training(optimizer), *args).graph
    assert dict(infer_batch(graph).dims) == {len(graph.inputs) - 1: 0}


@pytest.mark.parametrize(
    "other, multiple",
    [(jnp.zeros_like, True), (lambda g: 0.5 * g, True), (lambda g: g + 1.0, False)],
)
def test_a_total_that_scales_what_passes_a_branch_comes_late(other, multiple):
    """The derivative of a layer with a branch reads what the whole batch makes first; `g + 1` is no multiple of it."""

    @jax.custom_vjp
    def gate(on, h):
        return h

    def back(on, g):
        return None, lax.cond(on, lambda g: 2.0 * g, other, g)

    gate.defvjp(lambda on, h: (h, on), back)

    def objective(p, on, x):
        h = gate(on, x @ p["a"])
        weight = jax.nn.sigmoid(jnp.sum(x @ p["b"], -1))
        return jnp.sum(jnp.sum(h**2, -1) * weight) / lax.stop_gradient(jnp.sum(weight))

    p, x = {"a": normal(WIDE, WIDE), "b": normal(WIDE, WIDE, key=1)}, normal(8, WIDE, key=2)
    step = trained(objective)
    sharded = mw.parallelize(step, cluster="4xcpu", microbatches=2, time_limit=20)
    if not multiple:
        with pytest.raises(mw.MeshwrightError, match="microbatches are not possible"):
            sharded(p, jnp.bool_(1), x)
        return
    for on in (True, False):
        close(sharded(p, jnp.bool_(on), x), jax.jit(step)(p, jnp.bool_(on), x))


# ---------------------------------------------------------------- branches in the forward pass


def branching(p, which, x):
    """Three branches of unlike work; one leaves what it is given, one zeros."""
    hidden = lax.switch(
        which, [lambda h: jax.nn.relu(h @ p["a"]) @ p["b"], lambda h: h, jnp.zeros_like], x
    )
    return jnp.mean((hidden + x @ p["c"]) ** 2)


def trained(objective):
    def step(p, *rest):
        value, gradient = jax.value_and_grad(objective)(p, *rest)
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient), value

    return step


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_branches_with_gradients(microbatches):
    p, x = {**params(), "c": normal(WIDE, WIDE, key=3)}, normal(2 * WIDE, WIDE, key=2)
    every = [(p, jnp.int32(which), x) for which in range(3)]
    check_everywhere(
        trained(branching), *every, meshes=((2, 2, 2),), count=2, microbatches=microbatches
    )


def test_the_dearest_branch_is_counted_and_named():
    p = {**params(), "c": normal(WIDE, WIDE, key=3)}
    args = p, jnp.int32(0), normal(WIDE, WIDE, key=2)
    found = mw.plan(branching, *args, cluster="8xcpu", request=Request(time_limit=20))
    assert found.estimate.flop == 2 * (2 * WIDE * WIDE * 2 * WIDE + WIDE**3)
    assert any("cond" in note and "number 1 of 3" in note for note in found.notes)


def traces(p, x):
    """`jnp.diag` of matrices: jax has a branch for the inside of TPU kernels, which no program of ours is."""
    made = jax.vmap(lambda row: jnp.diag(jnp.outer(row @ p, row)))(x)
    return jnp.mean(made**2) + jnp.linalg.slogdet(p @ p.T + jnp.eye(len(p)))[1]


def by_device(p, x):
    return jnp.mean(lax.platform_dependent(x @ p, cpu=jnp.sin, default=jnp.tanh) ** 2)


@pytest.mark.parametrize("objective", [traces, by_device])
def test_branches_by_platform_are_no_branches(objective):
    args = normal(WIDE, WIDE), normal(2 * WIDE, WIDE, key=1)
    ours = mw.parallelize(trained(objective), cluster="8xcpu", time_limit=20)
    close(ours(*args), jax.jit(trained(objective))(*args))
    kinds = {op.kind for op in capture(trained(objective), *args).graph.ops}
    assert kinds & {"cond", "platform_index", "platform_dependent"} == (
        {"platform_index", "platform_dependent"} if objective is by_device else set()
    )
    plan = ours.plan(*args)
    assert any("its FLOP are not known" in note for note in plan.notes) == (objective is by_device)


def test_layers_with_branches_are_folded_as_layers():
    def deep(p, on, x):
        for w in p:
            x = lax.cond(on, lambda h, w=w: jnp.tanh(h @ w), lambda h: h, x)
        return jnp.mean(x**2)

    def args(depth, on):
        return (
            [normal(WIDE, WIDE, key=k) for k in range(depth)],
            jnp.bool_(on),
            normal(WIDE, WIDE, key=9),
        )

    small = fold(capture(trained(deep), *args(16, True)).graph).small
    assert {op.count for op in small.ops if op.kind == "cond"} == {
        1,
        13,
    }  # the first input has no gradient
    check_everywhere(trained(deep), args(8, True), args(8, False), meshes=((2, 4),))


def test_a_predicate_that_owes_a_sum_is_settled_first():
    def step(p, x):
        value, gradient = jax.value_and_grad(loss)(p, x)
        keep = jnp.all(jnp.isfinite(value)) & (value < 10)
        return lax.cond(
            keep, lambda: jax.tree.map(lambda w, g: w - g, p, gradient), lambda: p
        ), value

    x = normal(WIDE, WIDE, key=2)
    check_everywhere(step, (params(), x), (params(), x * jnp.nan))


# ---------------------------------------------------------------- while


def converge(w, x):
    """An inner training loop until converged."""

    def turn(state):
        k, w, _ = state
        gradient = x.T @ (x @ w - x)
        return k + 1, w - 0.02 * gradient, jnp.vdot(gradient, gradient)

    steps, w, left = lax.while_loop(
        lambda s: (s[0] < 60) & (s[2] > 3.0), turn, (0, w, jnp.float32(1e9))
    )
    return steps, w, left


def test_an_inner_training_loop_ends_where_it_does_on_one_device():
    args = normal(WIDE, WIDE), normal(2 * WIDE, WIDE, key=1)
    assert 2 < jax.jit(converge)(*args)[0] < 60
    check_everywhere(converge, args, count=2)


def test_a_step_that_is_one_loop_is_planned_and_says_what_it_assumes():
    found = mw.plan(converge, S((64, 64), jnp.float32), S((64, 64), jnp.float32), cluster="8xcpu")
    assert any("while" in note and "not known" in note for note in found.notes)
    assert not found.opaque


def test_loops_with_traced_bounds_and_loops_of_many_examples():
    def step(w, x, turns):
        many = jax.vmap(
            lambda row: lax.while_loop(lambda r: jnp.sum(r**2) > 1.0, lambda r: 0.7 * r, 9.0 * row)
        )(x)
        return lax.fori_loop(0, turns, lambda k, y: jnp.tanh(y @ w + k), many)

    check_everywhere(
        step, *((normal(WIDE, WIDE), normal(WIDE, WIDE, key=1), jnp.int32(n)) for n in (0, 3))
    )


def test_a_loop_around_branches_around_a_loop():
    def step(w, x):
        def turn(k, y):
            twice = lambda z: lax.fori_loop(0, k, lambda _, u: jnp.tanh(u @ w), z)  # noqa: E731
            return lax.cond(k % 2 == 0, twice, lambda z: z * 0.5, y)

        return lax.fori_loop(0, jnp.int32(x.shape[0] // 4), turn, x)

    check_everywhere(step, (normal(WIDE, WIDE), normal(WIDE, WIDE, key=1)), meshes=((2, 4),))


def test_a_scalar_of_every_layer_is_spread():
    """Layers spread a scalar each, the first of another op than the next: `apply_if_finite` over unlike leaves."""
    optimizer = optax.apply_if_finite(optax.sgd(0.1), 3)
    weights = {
        "layers": [{"w": jnp.eye(8), "b": jnp.zeros(8)} for _ in range(6)],
        "out": jnp.ones((8, 1)),
    }

    def step(p, state, x):
        def loss(p):
            h = x
            for layer in p["layers"]:
                h = h + jnp.tanh(h @ layer["w"] + layer["b"])
            return jnp.mean((h @ p["out"]) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    args = weights, optimizer.init(weights), normal(32, 8)
    ours = mw.parallelize(step, cluster="8xcpu", verify=True, mesh=(2, 4), time_limit=15)(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.jit(step)(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
