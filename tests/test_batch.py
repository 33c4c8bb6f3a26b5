"""Which inputs are the batch follows from dataflow; what is told is held against the graph."""

import jax
import jax.numpy as jnp
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.batch import batch_dims, infer_batch
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.analysis.roles import roles
from meshwright.ir.analysis.told import tell_batch
from meshwright.ir.errors import MeshwrightError, PlanError
from meshwright.ir.graph import Graph
from meshwright.ir.text import parse, show
from meshwright.told import parse_batch_args

B, T, F, H, O = 16, 12, 4, 8, 6  # batch, time, features, hidden, outputs


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
W = {"a": f32(F, H), "b": f32(H, F)}
TEXT = {"e": f32(50, F), "p": f32(T, F), **W}
CELL = {"x": f32(F, H), "h": f32(H, H), "o": f32(H, O)}


def net(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


def attention(h):
    return jax.nn.softmax(h @ h.swapaxes(-1, -2)) @ h


def descend(loss):
    def step(w, *args):
        value, grads = jax.value_and_grad(loss)(w, *args)
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value

    return step


def dropped(w, x, key):
    return jnp.mean(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), net(w, x), 0) ** 2)


def dropped_apart(w, x, keys):
    return jnp.mean(jax.vmap(lambda x, key: dropped(w, x, key))(x, keys))


def weighted(w, x, y, classes):
    picked = jnp.take_along_axis(jax.nn.log_softmax(net(w, x)), y[:, None], 1)[:, 0]
    return -jnp.mean(classes[y] * picked)


def looked_up(w, x, table, other):
    return jnp.mean(net(w, table[x] + other[x]) ** 2)


def text(w, x, *positions):
    return jnp.mean(net(w, attention(w["e"][x] + w["p"][sum(positions)])) ** 2)


def rnn(w, x, y):
    def cell(h, x):
        h = jnp.tanh(x @ w["x"] + h @ w["h"])
        return h, h @ w["o"]

    return jnp.mean((jax.lax.scan(cell, jnp.zeros((x.shape[1], H)), x)[1] - y) ** 2)


def frozen(w, x, fixed):
    for weight in fixed:
        x = jax.nn.relu(x @ weight + (x @ w["a"]) @ w["b"])
    return jnp.mean(x**2)


def image(w, x):
    y = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(y.mean((1, 2)) ** 2)


def one_by_one(w, x, y):
    return jnp.mean(jax.lax.map(lambda xy: jnp.sum((net(w, xy[0]) - xy[1]) ** 2), (x, y)))


KINDS = {
    "a raw key": (dropped, (W, f32(B, F), KEY), {1: 0}),
    "a raw key beside two examples": (dropped, (W, f32(2, F), KEY), {1: 0}),
    "a key per example": (dropped_apart, (W, f32(B, F), jax.ShapeDtypeStruct((B, 2), jnp.uint32)), {1: 0, 2: 0}),
    "class weights": (weighted, (W, f32(B, F), ints(B), f32(F)), {1: 0, 2: 0}),
    "lookup tables": (looked_up, (W, ints(B), f32(100, F), f32(100, F)), {1: 0}),
    "positions": (text, (TEXT, ints(B, T), ints(T), ints(T), ints(T)), {1: 0}),
    "features first": (lambda w, x: jnp.mean((w["a"].T @ x) ** 2), (W, f32(F, B)), {1: 1}),
    "time first": (rnn, (CELL, f32(T, B, F), f32(T, B, O)), {1: 1, 2: 1}),
    "time first, as long as the batch": (rnn, (CELL, f32(B, B, F), f32(B, B, O)), {1: 1, 2: 1}),
    "time first, one label each": (lambda w, x, y: rnn(w, x, y[None]), (CELL, f32(T, B, F), f32(B, O)), {1: 1, 2: 0}),
    "positions first": (lambda w, x: jnp.mean(net(w, attention(w["e"][x.T]))), (TEXT, ints(T, B)), {1: 1}),
    "frozen weights": (frozen, ({"a": f32(H, 2), "b": f32(2, H)}, f32(B, H), [f32(H, H)] * 3), {1: 0}),
    "an image as high as the batch": (image, (f32(3, 3, F, H), f32(B, B, B, F)), {1: 0}),
    "a loop over examples": (one_by_one, (W, f32(B, F), f32(B, F)), {1: 0, 2: 0}),
    "one text": (lambda w, x: text(w, x, jnp.arange(T)), (TEXT, ints(1, T)), {1: 1}),
    "one layer": (lambda w, x, y: jnp.mean((x @ w - y) ** 2), (f32(F, O), f32(B, F), f32(B, O)), {1: 0, 2: 0}),
    "two losses": (lambda w, x, z: jnp.mean(net(w, x)) - jnp.mean(net(w, z)), (W, f32(B, F), f32(B, F)), {1: 0, 2: 0}),
}  # fmt: skip


def by_argument(step, args) -> dict[int, int]:
    """Argument -> batch dim; every argument of these steps but the first is one array or a list."""
    graph = capture(step, *args).graph
    starts = [len(jax.tree.leaves(args[:i])) for i in range(len(args))]
    return {max(i for i, s in enumerate(starts) if s <= p): d for p, d in batch_dims(graph).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_is_what_gradients_sum_over(kind):
    loss, args, wanted = KINDS[kind]
    assert by_argument(descend(loss), args) == wanted


def test_hyperparameters_as_arrays_are_not_the_batch():
    def step(w, x, rates, decays, scales):
        grads = jax.grad(lambda w: jnp.mean(net(w, x) ** 2))(w)
        return jax.tree.map(lambda p, g: p - rates[0] * g * scales[1] - decays[1] * p, w, grads)

    assert by_argument(step, (W, f32(B, F), f32(2), f32(2), f32(2))) == {1: 0}


def test_two_rates_that_are_added_up_are_not_the_batch():
    """Nor where an op needs the whole batch: a sum over rates keeps nothing, one over examples a width."""

    def step(w, rates, x):
        grads = jax.grad(lambda w: jnp.mean(jnp.sort(net(w, x), 0) ** 2))(w)
        return jax.tree.map(lambda p, g: p - rates.sum() * g, w, grads)

    assert by_argument(step, (W, f32(2), f32(B, F))) == {2: 0}


def test_a_hidden_state_that_is_carried_on_does_not_hide_the_batch():
    def step(state, x, y):
        w, start = state

        def loss(w):
            def cell(h, x):
                h = jnp.tanh(x @ w["x"] + h @ w["h"])
                return h, h @ w["o"]

            end, out = jax.lax.scan(cell, start, x)
            return jnp.mean((out - y) ** 2), end

        (value, end), grads = jax.value_and_grad(loss, has_aux=True)(w)
        return (jax.tree.map(lambda p, g: p - g, w, grads), end), value

    args = ((CELL, f32(B, H)), f32(T, B, F), f32(T, B, O))
    assert by_argument(step, args) == {1: 1, 2: 1}


def test_microbatches_stacked_in_front_are_not_the_batch_their_examples_are():
    def step(w, x):
        def one(total, part):
            value, grads = jax.value_and_grad(lambda w: jnp.mean(net(w, part) ** 2))(w)
            return jax.tree.map(jnp.add, total, grads), value

        grads, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, w), x)
        return jax.tree.map(lambda p, g: p - g, w, grads), values.mean()

    assert by_argument(step, (W, f32(4, B, F))) == {1: 1}


def test_what_cannot_be_told_apart_is_said():
    graph = capture(descend(lambda w, x: jnp.mean(net(w, w["e"][x]) ** 2)), TEXT, ints(B, T)).graph
    found = infer_batch(graph)
    assert (found.dims, found.doubt) == (((4, 0),), "args[0] dim 1 (12)")
    assert infer_batch(capture(descend(text), TEXT, ints(B, T), ints(T)).graph).doubt == ""


# ---------------------------------------------------------------- told


def mean_of_squares(w, x, y):
    return jnp.mean((net(w, x) - y) ** 2)


def told(dims: dict[int, int]) -> Graph:
    def step(w, x, y):
        return descend(mean_of_squares)(w, x, y)

    return tell_batch(capture(step, W, f32(B, F), f32(B, F)).graph, dims)


def test_what_is_told_holds_in_every_form_of_the_graph():
    graph = told({2: 0})
    assert batch_dims(graph) == {2: 0}
    assert {p for p, role in roles(graph).items() if role == "batch"} == {2}
    assert batch_dims(fold(graph).small) == batch_dims(fold(graph).whole) == {2: 0}
    assert parse(show(graph)) == graph
    assert batch_dims(told({2: -2, 3: 0})) == {2: 0, 3: 0}


@pytest.mark.parametrize(
    ("dims", "what"),
    [
        ({2: 2}, r"x has no dim 2: it is f32\[16, 4\]"),
        ({2: 0, 3: 1}, "two sizes: dim 0 of x is 16, dim 1 of y is 4"),
        ({2: 1}, "dim 1 of x cannot be the batch: the step contracts it with a parameter"),
        ({}, "names no array"),
    ],
)
def test_what_is_told_wrongly_is_refused_by_name(dims, what):
    with pytest.raises(PlanError, match=what):
        told(dims)


# ---------------------------------------------------------------- told at the front door


def train(w, batch, key):
    def loss(w):
        out = net(w, batch["x"])
        keep = jax.random.bernoulli(key, 0.5, out.shape)
        return jnp.mean((jnp.where(keep, out, 0) - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(w)
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value


def arguments():
    key = jax.random.key(0)
    w = {name: jax.random.normal(key, kind.shape) for name, kind in W.items()}
    x = jax.random.normal(key, (B, F))
    return w, {"x": x, "y": x + 1}, jax.random.PRNGKey(5)


@pytest.mark.parametrize("told", [None, 1, "batch", {"batch": 0}, {-2: {"x": 0, "y": 0}}])
def test_a_step_with_a_raw_key_runs_in_microbatches(told):
    args = arguments()
    step = mw.parallelize(train, cluster="8xcpu", microbatches=4, time_limit=4, batch_argnums=told)
    for want, found in zip(
        jax.tree.leaves(train(*args)), jax.tree.leaves(step(*args)), strict=True
    ):
        assert jnp.allclose(want, found, atol=1e-5)
    batch = step.plan(*args).batch
    assert [(each.name, each.dim) for each in batch.inputs] == [
        ("batch['x']", 0),
        ("batch['y']", 0),
    ]
    assert (batch.examples, batch.evidence == "told") == (B, told is not None)


@pytest.mark.parametrize(
    ("told", "what"),
    [
        (3, "no argument 3: they are w, batch, key"),
        ("bach", "no array argument `bach`"),
        ({"batch": {"z": 0}}, r"no array `batch\['z'\]`"),
        ({"batch": "x"}, "'x' is no dim"),
        ((1, 2), "two sizes: dim 0 of batch"),
        (1.5, "batch_argnums cannot be 1.5"),
        ({"batch": {"x": 1, "y": None}}, "the step contracts it with a parameter"),
    ],
)
def test_arguments_told_wrongly_are_refused_by_name(told, what):
    with pytest.raises(MeshwrightError, match=what):
        mw.plan(train, *arguments(), cluster="8xcpu", batch_argnums=told)


def test_arguments_as_the_command_line_tells_them():
    assert parse_batch_args("1, 2") == {1: 0, 2: 0}
    assert parse_batch_args("x=1,mask=-1") == {"x": 1, "mask": -1}
    with pytest.raises(MeshwrightError, match="names no arguments"):
        parse_batch_args("x=")
