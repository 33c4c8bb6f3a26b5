"""What the time axis finds, and what it refuses by name."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.batch import batch_dims
from meshwright.ir.mesh import Mesh
from meshwright.ir.passes.microbatch import Refusal, TimeAxis, time_axis, time_groups
from meshwright.models import build
from meshwright.planner.request import Request


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


def normalised(w, x):
    y = x @ w
    return jnp.mean((y - y.mean(0)) ** 2)


def contrasted(w, x):
    y = x @ w
    return jnp.mean(jax.nn.log_softmax(y @ y.T))


def balanced(w, x):
    share = jax.nn.softmax(x @ w)
    return jnp.sum(share.mean(0) * jax.nn.one_hot(share.argmax(-1), 4).mean(0))


def looped(w, x):
    return jax.lax.scan(lambda total, row: (total + jnp.sum((row @ w) ** 2), None), 0.0, x)[0]


REFUSED = {
    normalised: "takes a mean over the whole batch at test_microbatch.py",
    balanced: "takes a mean over the whole batch at test_microbatch.py",
    contrasted: "compares examples of the batch with each other",
    looped: "a loop runs over the examples",
    lambda w, x: jnp.mean((x @ w) / jnp.max(x @ w)): "takes a maximum over the whole batch",
    lambda w, x: jnp.mean(jnp.sort(x @ w, 0)[:4]): "sort needs all examples of the batch together",
    lambda w, x: jnp.mean((x @ w)[jnp.array([3, 1])]): "picks examples of the batch by index",
    lambda w, x: jnp.mean(
        (x @ w)[0] ** 2
    ): "some examples of the batch by their places, as x[0] or x[1:] do (slice)",
    lambda w, x: jnp.mean(
        jnp.tanh(jnp.concatenate([x, x]) @ w)
    ): "puts arrays of the batch one behind the other",
}


@pytest.mark.parametrize("loss", REFUSED)
def test_what_needs_the_whole_batch_is_refused_in_the_users_words(loss):
    found = axis_of(descend(loss), f32(4, 4), f32(8, 4))
    assert isinstance(found, Refusal)
    assert REFUSED[loss] in found.reason
    assert "test_microbatch.py" in found.where
    assert found.fix.startswith("microbatches=1 without a pipeline")


METRICS = {
    "deviation": lambda h: h.std(), "one example": lambda h: h[0], "largest": lambda h: jax.lax.top_k(h[:, 0], 2)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_needs_the_whole_batch_is_to_be_computed_outside(name):
    """The advice is for the result that it is; of maxima and means microbatches have parts."""

    def step(w, x, metric):
        found, grads = jax.value_and_grad(lambda w: (jnp.mean((x @ w) ** 2), x @ w), has_aux=True)(
            w
        )
        return w - grads, {"loss": found[0], "seen": metric(found[1])}

    found = axis_of(partial(step, metric=METRICS[name]), f32(4, 4), f32(8, 4))
    assert isinstance(found, Refusal)
    assert "or return a row for each example instead of `result[1]['seen']`" in found.fix
    assert "test_microbatch.py" in found.where
    for whole in (jnp.max, jnp.mean, lambda h: (h**2).sum(1)):
        assert isinstance(axis_of(partial(step, metric=whole), f32(4, 4), f32(8, 4)), TimeAxis)


def test_a_step_without_a_batch_is_refused():
    assert isinstance(axis_of(lambda w: w * 2, f32(4, 4)), Refusal)


def test_a_loop_may_carry_the_batch_and_add_up_gradients():
    def loss(w, x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)
        return jnp.mean(y**2)

    found = axis_of(descend(loss), f32(4, 4), f32(8, 4))
    assert isinstance(found, TimeAxis)


def test_every_shard_holds_its_part_of_every_microbatch():
    """Groups times microbatches deal out the batch; each possible cut has whole groups."""
    assert time_groups(8, Mesh.of(x=2), 2) == 2
    assert time_groups(16, Mesh.of(x=8), 2) == 8
    assert time_groups(16, Mesh.of(x=8), 4) == 1  # 8 ways of 4 microbatches do not divide 16
    assert time_groups(12, Mesh.of(x=3, y=2), 2) == 6
    assert time_groups(1536, Mesh.of(x=64, y=2, z=8), 12) == 128


def test_experts_balanced_over_sequences_have_a_time_axis():
    """Trainers' balance losses are sums over sequences; over the batch they would be no sum."""
    for name in ("mixtral-tiny", "mixtral-tiny-scan", "deepseek-tiny"):
        example = build(name)
        assert isinstance(axis_of(example.step, example.state, example.batch), TimeAxis)


@pytest.mark.parametrize("none", [0.0, 1.0])
def test_a_loop_adds_losses_of_its_layers_to_what_layers_without_one_leave(none):
    """`sum(losses)` begins at zero, and so do layers without a loss of their own: from one on it is no sum."""

    def loss(w, x):
        def layer(carried, w):
            h, total = carried
            h = jnp.tanh(h @ w)
            other = jnp.float32(none) + jnp.float32(0)
            return (h, total + (other + sum([jnp.mean(jnp.sum(h**2, -1))]))), None

        (h, total), _ = jax.lax.scan(layer, (x, 0.0), w)
        return jnp.mean(h**2) + total

    found = axis_of(descend(loss), f32(3, 4, 4), f32(8, 4))
    assert isinstance(found, Refusal if none else TimeAxis), found


def grouped(params, x, gain):
    """Gains and scores are normalised within groups of four neighbours (GRPO)."""

    def within(values):
        each = values.reshape(-1, 4)
        return ((each - each.mean(1, keepdims=True)) / (each.std(1, keepdims=True) + 1e-4)).ravel()

    def loss(params):
        hidden = x
        for w in params:
            hidden = jnp.tanh(hidden @ w)
        return jnp.mean(within(hidden.mean(-1)) * within(gain))

    value, gradients = jax.value_and_grad(loss)(params)
    return [w - 0.1 * g for w, g in zip(params, gradients, strict=True)], value


@pytest.mark.parametrize("cut", [{"mesh": (8,), "microbatches": 2}, {"pp": 2, "microbatches": 4}])
def test_groups_of_examples_stay_together(cut):
    draw = np.random.default_rng(0)
    params, x, gain = (
        [draw.normal(size=(16, 16)).astype(np.float32) / 4 for _ in range(3)],
        draw.normal(size=(16, 16)).astype(np.float32),
        draw.normal(size=16).astype(np.float32),
    )
    ours = mw.parallelize(grouped, cluster="8xcpu", time_limit=20, **cut)(params, x, gain)
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(jax.jit(grouped)(params, x, gain)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(mw.MeshwrightError, match="16, taken in 4 groups, cannot be cut into 8"):
        mw.plan(grouped, params, x, gain, cluster="8xcpu", request=Request(microbatches=8))
