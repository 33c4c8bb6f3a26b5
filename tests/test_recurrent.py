"""Networks that run along time: what a loop adds up over the batch is summed over devices once, after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.hlo import collectives
from meshwright.backends.xla.lower import lower
from meshwright.planner.request import Request

from .random_plans import random_plans

STEPS, BATCH, WIDTH = 12, 512, 16


def lstm(p, state, x):
    hidden, memory = state
    i, f, g, o = jnp.split(x @ p["wx"] + hidden @ p["wh"] + p["b"], 4, -1)
    memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(memory), memory


def gru(p, state, x):
    hidden, rest = state
    from_x, from_h = jnp.split(x @ p["wx"] + p["b"], 4, -1), jnp.split(hidden @ p["wh"], 4, -1)
    update, reset = jax.nn.sigmoid(from_x[0] + from_h[0]), jax.nn.sigmoid(from_x[1] + from_h[1])
    new = jnp.tanh(from_x[2] + reset * from_h[2])
    return update * hidden + (1 - update) * new, rest


def step_of(cell):
    """A train step over [batch, time, width]; the loss is added up along the loop."""

    def loss(p, x):
        def turn(carry, now):
            state, total = carry
            state = cell(p, state, now)
            return (state, total + jnp.mean((state[0] - now) ** 2)), None

        zeros = jnp.zeros((x.shape[0], WIDTH))
        (_, total), _ = jax.lax.scan(turn, ((zeros, zeros), 0.0), x.transpose(1, 0, 2))
        return total / x.shape[1]

    def step(p, x):
        value, gradient = jax.value_and_grad(loss)(p, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient), value

    return step


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = {"wx": (WIDTH, 4 * WIDTH), "wh": (WIDTH, 4 * WIDTH), "b": (4 * WIDTH,)}
    p = {
        name: 0.2 * jax.random.normal(key, size)
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    return p, jax.random.normal(keys[0], (BATCH, STEPS, WIDTH))


@pytest.mark.parametrize("cell", [lstm, gru])
def test_weights_of_a_recurrent_network_are_reduced_once(cell):
    args = arguments()
    captured, wanted = capture(step_of(cell), *args), jax.jit(step_of(cell))(*args)
    request = Request(mesh=(8,), recompute="none", microbatches=1, time_limit=20)
    plan = plan_captured(captured, "8xcpu", request, "recurrent")
    assert sum(c.count for c in plan.collectives) == len(args[0]) + 1  # and the loss
    assert {c.kind for c in plan.collectives} == {"all_reduce"}
    lowered = lower(plan, captured)
    compiled = collectives(lowered.hlo(), plan.mesh)
    assert compiled and all(found.count == 1 for found in compiled)  # none in a loop of 12 turns
    check(lowered, args, wanted)


def test_random_plans_of_a_recurrent_network_equal_one_device():
    args = arguments()
    captured, wanted = capture(step_of(lstm), *args), jax.jit(step_of(lstm))(*args)
    for microbatches in (1, 2):
        for plan in random_plans(captured, (2, 2, 2), 1, microbatches):
            check(lower(plan, captured), args, wanted)


def check(lowered, args, wanted):
    found = lowered.jitted(*map(np.asarray, jax.tree.leaves(args)))
    for one, other in zip(found, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)
