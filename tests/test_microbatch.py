"""What the time axis finds, and what it refuses by name."""

import jax
import jax.numpy as jnp

from meshwright.backends.xla.capture import capture
from meshwright.ir.mesh import Mesh
from meshwright.ir.microbatch import Refusal, TimeAxis, batch_dims, time_axis, time_groups


def axis_of(step, *args) -> TimeAxis | Refusal:
    graph = capture(step, *args).graph
    return time_axis(graph, batch_dims(graph))


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def descend(loss):
    def step(w, batch):
        value, grad = jax.value_and_grad(loss)(w, batch)
        return w - 0.1 * grad, value

    return step


def test_a_mean_loss_has_a_time_axis():
    found = axis_of(descend(lambda w, x: jnp.mean((x @ w) ** 2)), f32(4, 4), f32(8, 4))
    assert isinstance(found, TimeAxis)
    assert found.batch == 8
    assert set(found.totals.values()) == {"sum"}


def test_batch_statistics_inside_the_model_are_refused_by_name():
    def loss(w, x):
        y = x @ w
        return jnp.mean((y - y.mean(0)) ** 2)

    found = axis_of(descend(loss), f32(4, 4), f32(8, 4))
    assert isinstance(found, Refusal)
    assert "whole batch" in found.reason
    assert "test_microbatch.py" in found.where


def test_a_step_without_a_batch_is_refused():
    assert isinstance(axis_of(lambda w: w * 2, f32(4, 4)), Refusal)


def test_a_loop_may_carry_the_batch_and_add_up_gradients():
    def loss(w, x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)
        return jnp.mean(y**2)

    found = axis_of(descend(loss), f32(4, 4), f32(8, 4))
    assert isinstance(found, TimeAxis)


def test_a_loop_over_the_batch_is_refused():
    def loss(w, x):
        def one(total, row):
            return total + jnp.sum((row @ w) ** 2), None

        return jax.lax.scan(one, 0.0, x)[0]

    assert isinstance(axis_of(descend(loss), f32(4, 4), f32(8, 4)), Refusal)


def test_every_shard_holds_its_part_of_every_microbatch():
    """Groups times microbatches deal out the batch; each possible cut has whole groups."""
    assert time_groups(8, Mesh.of(x=2), 2) == 2
    assert time_groups(16, Mesh.of(x=8), 2) == 8
    assert time_groups(16, Mesh.of(x=8), 4) == 1  # 8 ways of 4 microbatches do not divide 16
    assert time_groups(12, Mesh.of(x=3, y=2), 2) == 6
    assert time_groups(1536, Mesh.of(x=64, y=2, z=8), 12) == 128
