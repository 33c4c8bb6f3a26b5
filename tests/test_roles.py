"""Roles and phases follow from dataflow alone; hand-labelled examples say which."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.batch import batch_dims
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.analysis.roles import phases, roles
from meshwright.ir.graph import Graph
from meshwright.models import build

WIDTHS = {"a": (4, 8), "b": (8, 4)}


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


WEIGHTS = {name: f32(*shape) for name, shape in WIDTHS.items()}
X = f32(16, 4)


def loss(w, x):
    hidden = jnp.tanh(x @ w["a"])  # forward
    return jnp.mean((hidden @ w["b"]) ** 2)


def descend(w, grads, rate=0.1):
    return jax.tree.map(lambda p, g: p - rate * g, w, grads)


def spelled(graph: Graph) -> list[tuple[str, str]]:
    """(phase, op) in walk order, without what is neither forward nor backward."""
    found = phases(graph, batch_dims(graph))
    return [(found[v.index], v.op.kind) for v in graph.visits]


def order(graph: Graph, *wanted: str) -> list[str]:
    """The phases of the given kinds of op, in program order."""
    return [phase for phase, kind in spelled(graph) if kind in wanted]


def named_roles(graph: Graph) -> dict[str, str]:
    return {graph.input_name(p): role for p, role in roles(graph).items()}


def products(*phase_counts: tuple[str, int]) -> list[str]:
    return [phase for phase, count in phase_counts for _ in range(count)]


# ---------------------------------------------------------------- phases


def test_backward_starts_at_the_cotangent_of_the_loss():
    def step(w, x):
        value, grads = jax.value_and_grad(loss)(w, x)
        return descend(w, grads), value

    graph = capture(step, WEIGHTS, X).graph
    assert order(graph, "dot_general") == products(("forward", 2), ("backward", 3))
    assert order(graph, "tanh", "reduce_sum", "integer_pow") == ["forward"] * 3
    assert ("backward", "broadcast_in_dim") in spelled(graph)  # the loss's own cotangent
    assert order(graph, "transpose") == ["update"] * 2  # of gradients that have left the batch


def test_a_loss_that_is_not_returned_divides_the_step_as_well():
    graph = capture(lambda w, x: descend(w, jax.grad(loss)(w, x)), WEIGHTS, X).graph
    found = spelled(graph)
    seed = found.index(("backward", "broadcast_in_dim"))
    assert {phase for phase, _ in found[:seed]} == {"forward", "prepare"}
    assert order(graph, "dot_general") == products(("forward", 2), ("backward", 3))


def test_recomputed_ops_are_backward():
    def step(w, x):
        value, grads = jax.value_and_grad(jax.checkpoint(loss))(w, x)
        return descend(w, grads), value

    graph = capture(step, WEIGHTS, X).graph
    assert order(graph, "tanh") == ["forward", "backward"]
    assert order(graph, "optimization_barrier") == ["backward"]


def test_two_losses_have_two_backward_passes():
    def step(actor, critic, x):
        one, critic_grads = jax.value_and_grad(loss)(critic, x)
        two, actor_grads = jax.value_and_grad(loss)(actor, x)
        return descend(actor, actor_grads), descend(critic, critic_grads), one + two

    graph = capture(step, WEIGHTS, WEIGHTS, X).graph
    expected = products(("forward", 2), ("backward", 3), ("forward", 2), ("backward", 3))
    assert order(graph, "dot_general") == expected


def test_a_step_skipped_for_a_loss_that_is_not_finite_has_both_passes():
    def step(w, x):
        value, grads = jax.value_and_grad(lambda w: loss(w, x * w["scale"]))(w)
        good = jnp.isfinite(value)
        return jax.tree.map(lambda p, g: jnp.where(good, p - g, p), w, grads), value

    graph = capture(step, {**WEIGHTS, "scale": f32()}, X).graph
    assert order(graph, "dot_general") == products(("forward", 2), ("backward", 4))
    assert order(graph, "integer_pow") == ["forward"]


def test_metrics_after_the_gradients_are_not_backward():
    def step(w, x):
        grads = jax.grad(loss)(w, x)
        return descend(w, grads), jnp.abs(x).mean()

    graph = capture(step, WEIGHTS, X).graph
    assert order(graph, "abs") == ["forward"]


def test_clipping_and_moments_are_update():
    def step(w, moments, x):
        value, grads = jax.value_and_grad(loss)(w, x)
        norm = jnp.sqrt(sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(grads)))
        moments = jax.tree.map(lambda m, g: 0.9 * m + g / norm, moments, grads)
        return descend(w, moments), moments, value

    graph = capture(step, WEIGHTS, WEIGHTS, X).graph
    assert set(order(graph, "abs", "sqrt")) == {"update"}
    assert set(order(graph, "sub")[-2:]) == {"update"}


def test_casts_of_parameters_are_prepare():
    def step(w, x):
        def low(w):
            return loss(jax.tree.map(lambda p: p.astype(jnp.bfloat16), w), x.astype(jnp.bfloat16))

        value, grads = jax.value_and_grad(low)(w)
        return descend(w, grads), value

    found = order(capture(step, WEIGHTS, X).graph, "convert_element_type")
    assert found[:3] == ["prepare", "prepare", "forward"]
    assert found[-2:] == ["update", "update"]


def test_dropout_masks_belong_to_their_first_reader():
    def step(state, x):
        w, key = state
        key, now = jax.random.split(key)

        def dropped(w):
            keep = jax.random.bernoulli(now, 0.5, (16, 8))
            return jnp.mean((jnp.where(keep, jnp.tanh(x @ w["a"]), 0) @ w["b"]) ** 2)

        value, grads = jax.value_and_grad(dropped)(w)
        return (descend(w, grads), key), value

    key = jax.eval_shape(lambda: jax.random.key(0))
    graph = capture(step, (WEIGHTS, key), X).graph
    assert order(graph, "random_bits") == ["forward"]
    assert order(graph, "random_split") == ["prepare"]
    assert named_roles(graph)["state[1]"] == "other state"


def test_ops_of_a_loop_have_its_phase():
    def step(w, x):
        def deep(w):
            y, _ = jax.lax.scan(lambda h, p: (jnp.tanh(h @ p), None), x, w)
            return jnp.mean(y**2)

        value, grad = jax.value_and_grad(deep)(w)
        return w - grad, value

    graph = capture(step, f32(3, 4, 4), X).graph
    assert order(graph, "scan") == ["forward", "backward"]
    assert order(graph, "dot_general") == products(("forward", 1), ("backward", 2))


def test_a_loop_with_both_passes_is_looked_at_by_itself():
    def step(w, x):
        def one(total, part):
            value, grads = jax.value_and_grad(loss)(w, part)
            return jax.tree.map(jnp.add, total, grads), value

        zeros = jax.tree.map(jnp.zeros_like, w)
        grads, values = jax.lax.scan(one, zeros, x.reshape(4, 4, 4))
        return descend(w, grads), values.mean()

    graph = capture(step, WEIGHTS, X).graph
    assert order(graph, "scan") == ["backward"]
    assert order(graph, "dot_general") == products(("forward", 2), ("backward", 3))
    assert order(graph, "add") == ["update", "update"]
    assert order(graph, "reshape") == ["forward"]


def test_a_batch_merged_with_another_dim_is_found_again():
    def step(w, x):
        def flat(w):
            rows = jnp.tanh(x.reshape(48, 4) @ w["a"])  # [16, 3, 4] -> [48, 4]
            return jnp.mean((rows.reshape(16, 3, 8) + w["p"]) ** 2)

        value, grads = jax.value_and_grad(flat)(w)
        return descend(w, grads), value

    graph = capture(step, {"a": f32(4, 8), "p": f32(3, 8)}, f32(16, 3, 4)).graph
    assert order(graph, "dot_general") == ["forward", "backward"]
    assert order(graph, "sub")[-2:] == ["update", "update"]


# ---------------------------------------------------------------- roles


def test_roles_by_dataflow():
    def step(state, rate, x):
        w, moments, count = state
        value, grads = jax.value_and_grad(loss)(w, x)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
        return (descend(w, moments, rate / count), moments, count + 1), value

    found = named_roles(capture(step, (WEIGHTS, WEIGHTS, f32()), f32(), X).graph)
    assert found == {
        "state[0]['a']": "parameter",
        "state[0]['b']": "parameter",
        "state[1]['a']": "optimizer",
        "state[1]['b']": "optimizer",
        "state[2]": "optimizer",
        "rate": "constant",
        "x": "batch",
    }


def test_running_statistics_are_other_state():
    def step(state, x):
        w, mean = state
        value, grads = jax.value_and_grad(loss)(w, x - x.mean(0))
        return (descend(w, grads), 0.9 * mean + 0.1 * x.mean(0)), value

    assert named_roles(capture(step, (WEIGHTS, f32(4)), X).graph)["state[1]"] == "other state"


# ---------------------------------------------------------------- the zoo


@pytest.fixture(scope="module")
def zoo() -> dict[str, Graph]:
    examples = {
        "gpt": build("gpt-tiny", layers=6),
        "gpt remat": build("gpt-tiny", layers=6, remat=True),
        "gpt scan": build("gpt-tiny-scan", remat=True),
        "llama": build("llama-tiny", layers=5),
        "mixtral": build("mixtral-tiny"),
        "wrn": build("wrn-tiny"),
        "dlrm": build("dlrm-tiny"),
    }
    return {k: capture(e.step, e.state, e.batch).graph for k, e in examples.items()}


@pytest.mark.parametrize(
    "name", ["gpt", "gpt remat", "gpt scan", "llama", "mixtral", "wrn", "dlrm"]
)
def test_forward_ends_before_backward_starts(zoo, name):
    graph = zoo[name]
    found = phases(graph, batch_dims(graph))
    top = [found[visit.index] for visit in graph.visits if not visit.parents]
    last_forward = len(top) - 1 - top[::-1].index("forward")
    assert last_forward < top.index("backward")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("gpt", {"parameter": 76, "optimizer": 154, "batch": 2}),
        ("gpt scan", {"parameter": 16, "optimizer": 34, "batch": 2}),
        ("wrn", {"parameter": 29, "optimizer": 29, "other state": 18, "batch": 2}),
        ("dlrm", {"parameter": 25, "batch": 3}),
    ],
)
def test_roles_in_the_zoo(zoo, name, counts):
    assert Counter(roles(zoo[name]).values()) == counts


@pytest.mark.parametrize("name", ["gpt", "wrn", "dlrm"])
def test_every_product_with_a_parameter_has_its_gradient_in_backward(zoo, name):
    graph = zoo[name]
    found = phases(graph, batch_dims(graph))
    heavy = [
        (found[v.index], v.op)
        for v in graph.visits
        if v.op.kind in ("dot_general", "conv_general_dilated")
    ]
    assert {phase for phase, _ in heavy} == {"forward", "backward"}
    assert len(heavy) > sum(phase == "forward" for phase, _ in heavy) * 2


@pytest.mark.parametrize("name", ["gpt", "gpt remat", "llama", "mixtral"])
def test_folding_keeps_phases_and_roles(zoo, name):
    folded = fold(zoo[name])

    def by_tag(graph: Graph):
        found = phases(graph, batch_dims(graph))
        ops = {v.op.tag: found[v.index] for v in graph.visits}
        return ops, {graph.input_tags[p]: role for p, role in roles(graph).items()}

    assert by_tag(folded.small) == by_tag(folded.whole)
