"""A step taken apart into its layers is still the user's step, and looks like one written layer by layer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.replay import Walk
from meshwright.backends.xla.unstack import Unstacked, capture_unstacked
from meshwright.ir.analysis.batch import batch_dims
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.passes.microbatch import TimeAxis, time_axis
from meshwright.ir.verify import verify
from meshwright.models import build

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def run(apart: Unstacked, *args):
    """The user's result, made by the graph in pieces."""
    captured = apart.captured
    walk = jax.jit(Walk(captured.graph, captured.binding.ops, captured.binding.arrays))
    results = walk(*apart.apart(jax.tree.leaves(args)))
    return jax.tree.unflatten(apart.stacked.binding.out_tree, apart.together(results))


def same(step, *args, tolerance=1e-6, **options) -> Unstacked:
    """Check one step against itself in pieces: everything that it returns."""
    apart = capture_unstacked(step, *args, options=options)
    verify(apart.captured.graph)
    want, have = jax.jit(step)(*args), run(apart, *args)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), have, want)
    return apart


def loops(apart: Unstacked) -> list[int]:
    return [visit.op.trips for visit in apart.captured.graph.visits if visit.op.kind == "scan"]


def shapes(apart: Unstacked, name: str) -> list[tuple[int, ...]]:
    graph = apart.captured.graph
    return [graph.types[v].shape for p, v in enumerate(graph.inputs) if name in graph.input_name(p)]


# ---------------------------------------------------------------- the zoo


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["gpt-tiny-scan", "llama-tiny-scan"])
def test_models_of_the_zoo_train_alike(name, optimizer, remat):
    """Both clip by the global norm, which sums over the layers; under SGD the state is the gradient."""
    example = build(name, optimizer=optimizer, dtype="f32", remat=remat, layers=3, batch=4)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    tolerance = 2e-5 if optimizer == "adamw" else 1e-6  # Adam divides by the root of tiny squares
    apart = same(example.step, state, batch, tolerance=tolerance)
    assert loops(apart) == []
    assert apart.notes == ()


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_model_folds_as_small_as_an_unrolled_one(name, remat):
    scanned, twin = build(f"{name}-scan", layers=8, remat=remat), build(name, layers=8, remat=remat)
    apart = capture_unstacked(scanned.step, scanned.state, scanned.batch)
    found = fold(apart.captured.graph)
    wanted = fold(capture(twin.step, twin.state, twin.batch).graph)
    assert len(found.small.ops) < 1.1 * len(wanted.small.ops)
    assert len(found.blocks) <= len(wanted.blocks)
    assert len(found.small.inputs) <= len(wanted.small.inputs)
    assert {tag.replace("'", "") for tag in found.small.input_tags} >= {
        tag.replace("'", "") for tag in wanted.small.input_tags if "*" in tag
    }


def test_the_small_graph_does_not_grow_with_the_scan():
    sizes = []
    for layers in (6, 12):
        example = build("llama-tiny-scan", layers=layers)
        graph = capture_unstacked(example.step, example.state, example.batch).captured.graph
        sizes.append(len([op for op in fold(graph).small.ops if op.kind == "dot_general"]))
    assert sizes[0] == sizes[1]


def test_recomputation_is_as_in_the_unrolled_model():
    def barriers(name):
        example = build(name, layers=4, remat=True)
        graph = capture_unstacked(example.step, example.state, example.batch).captured.graph
        return sum(op.kind == "optimization_barrier" for op in graph.ops)

    assert barriers("gpt-tiny-scan") == barriers("gpt-tiny") == 4


def test_the_time_axis_donations_and_state_are_those_of_layers():
    example = build("gpt-tiny-scan", layers=4)
    apart = capture_unstacked(
        example.step, example.state, example.batch, options={"donate_argnums": 0}
    )
    graph = apart.captured.graph
    assert isinstance(time_axis(graph, batch_dims(graph)), TimeAxis)
    leaves = len(jax.tree.leaves(example.state)) + 3 * 12 * (4 - 1)  # parameters and two moments
    assert len(graph.state) == len(graph.donated) == leaves
    assert all(
        graph.types[graph.inputs[i]] == graph.types[graph.outputs[o]] for i, o in graph.state
    )


# ---------------------------------------------------------------- kinds of loops


def layer(x, w):
    return jnp.tanh(x @ w)


def descend(loss):
    """Plain gradient descent on every leaf, so that new state and gradient say the same."""

    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return step


@pytest.mark.parametrize(
    "options", [{}, {"unroll": 2}, {"reverse": True}, {"reverse": True, "unroll": 4}]
)
def test_loops_in_both_directions_and_partly_unrolled(options):
    def loss(params, x):
        return (
            jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["w"], **options)[0] ** 2
        ).mean()

    apart = same(descend(loss), {"w": array(4, 8, 8)}, array(6, 8))
    assert loops(apart) == [] and shapes(apart, "w") == [(8, 8)] * 4


def test_names_read_like_a_list_of_layers():
    def loss(params, x):
        return jax.lax.scan(lambda x, p: (layer(x, p["w"]) + p["b"], None), x, params["layers"])[
            0
        ].mean()

    params = {"head": array(8), "layers": {"w": array(2, 8, 8), "b": array(2, 8)}}
    apart = same(descend(lambda p, x: loss(p, x) + (p["head"] ** 2).sum()), params, array(6, 8))
    graph = apart.captured.graph
    assert graph.input_names == (
        "params['head']", "params['layers'][0]['b']", "params['layers'][1]['b']",
        "params['layers'][0]['w']", "params['layers'][1]['w']", "x",
    )  # fmt: skip
    assert graph.output_names[2] == "result[0]['layers'][1]['b']"


def test_an_auxiliary_loss_of_every_layer():
    def loss(w, x):
        def body(carry, w):
            x, aux = carry
            y = layer(x, w)
            return (y, aux + (y**2).mean()), jnp.abs(y).max()

        (x, aux), peaks = jax.lax.scan(body, (x, 0.0), w)
        return x.mean() + 0.1 * aux + 0.01 * peaks.sum()

    assert loops(same(descend(loss), array(5, 8, 8), array(6, 8))) == []


def test_two_stacks_of_different_depth():
    def loss(params, x):
        for part in ("encoder", "decoder"):
            x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params[part])
        return x.mean()

    params = {"encoder": array(3, 8, 8), "decoder": array(5, 8, 8)}
    apart = same(descend(loss), params, array(6, 8))
    assert loops(apart) == []
    assert (len(shapes(apart, "encoder")), len(shapes(apart, "decoder"))) == (3, 5)


def test_two_scans_over_one_stack():
    def loss(w, x):
        for _ in range(2):
            x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)
        return x.mean()

    assert loops(same(descend(loss), array(3, 8, 8), array(6, 8))) == []


def test_layers_within_layers():
    def loss(params, x):
        def outer(x, p):
            x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])
            return x + p["b"], None

        return jax.lax.scan(outer, x, params)[0].mean()

    apart = same(descend(loss), {"w": array(2, 3, 8, 8), "b": array(2, 8)}, array(6, 8))
    assert loops(apart) == []
    assert "params[1]['w'][2]" in apart.captured.graph.input_names


@pytest.mark.parametrize("held", [False, True])
def test_recomputation_survives_whatever_the_user_said_of_it(held):
    def loss(w, x):
        body = jax.checkpoint(lambda x, w: (layer(x, w), None), prevent_cse=held)
        return jax.lax.scan(body, x, w)[0].mean()

    apart = same(descend(loss), array(3, 8, 8), array(6, 8))
    assert sum(op.kind == "optimization_barrier" for op in apart.captured.graph.ops) == 3


def test_one_layer_is_a_stack_too():
    def loss(w, x):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].mean()

    assert loops(same(descend(loss), array(1, 8, 8), array(6, 8))) == []


def test_layers_along_another_dim_of_the_parameters():
    def loss(w, x):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, jnp.moveaxis(w, 1, 0))[0].mean()

    apart = same(descend(loss), array(8, 3, 8), array(6, 8))
    assert loops(apart) == [] and shapes(apart, "params") == [(8, 8)] * 3


def test_microbatches_stay_a_loop_around_the_layers():
    def step(w, x_MBD):
        loss = lambda w, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].mean()  # noqa: E731

        def microbatch(total, x):
            value, grad = jax.value_and_grad(loss)(w, x)
            return total + grad, value

        total, values = jax.lax.scan(microbatch, jnp.zeros_like(w), x_MBD)
        return w - 0.1 * total, values

    apart = same(step, array(3, 8, 8), array(4, 6, 8))
    assert loops(apart) == [4] and shapes(apart, "w") == [(8, 8)] * 3


def test_a_loop_over_time_is_none_over_layers():
    def loss(w, x_BTD):
        def cell(h, x):
            return jnp.tanh(h @ w + x), h

        return jax.lax.scan(cell, jnp.zeros((6, 8)), x_BTD.swapaxes(0, 1))[1].mean()

    apart = same(descend(loss), array(8, 8), array(6, 5, 8))
    assert set(loops(apart)) == {5} and shapes(apart, "params") == [(8, 8)]


def test_a_table_by_position_is_no_stack_of_layers():
    def loss(table_TD, x_BTD):
        step = lambda h, row: (jnp.tanh(h + row[0] + row[1]), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((6, 8)), (table_TD, x_BTD.swapaxes(0, 1)))[0].mean()

    apart = same(descend(loss), array(5, 8), array(6, 5, 8))
    assert set(loops(apart)) == {5} and "stays a loop" in apart.notes[0]


def test_layers_made_by_a_reshape_stay_a_loop_and_are_named():
    def loss(w, x):
        pairs = w.reshape(2, 2, 8, 8)
        return jax.lax.scan(lambda x, w: (layer(layer(x, w[0]), w[1]), None), x, pairs)[0].mean()

    apart = same(descend(loss), array(4, 8, 8), array(6, 8))
    assert (
        set(loops(apart)) == {2}
        and "stays a loop: no dim of the state alone is its 2 rows" in apart.notes[0]
    )


def test_flags_tables_and_random_keys_go_with_their_layers():
    flags, table = np.array([True, False, True]), np.ones((3, 8), np.float32)

    def step(w, keys, x):
        def body(x, layers):
            w, key, flag, row = layers
            kept = layer(x, w) * jax.random.bernoulli(key, 0.5, x.shape)
            return jax.lax.cond(flag, lambda: kept, lambda: 2 * x) + row, None

        loss = lambda w: jax.lax.scan(body, x, (w, keys, flags, table))[0].mean()  # noqa: E731
        value, grad = jax.value_and_grad(loss)(w)
        return w - grad, value

    apart = same(step, array(3, 8, 8), jax.random.split(jax.random.key(1), 3), array(6, 8))
    assert loops(apart) == [] and len(shapes(apart, "keys")) == 3


# ---------------------------------------------------------------- the optimizer, and what needs all layers


def scanned_loss(params, x):
    return jax.lax.scan(lambda x, p: (layer(x, p["w"]) + p["b"], None), x, params)[0].mean()


OPTIMIZERS = {
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.01), optax.adam(1e-2)),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lamb": lambda: optax.lamb(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_update_layer_by_layer(name):
    optimizer = OPTIMIZERS[name]()

    def step(state, x):
        params, moments = state
        value, grads = jax.value_and_grad(scanned_loss)(params, x)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), {
            "loss": value,
            "norm": optax.global_norm(grads),
        }

    params = {"w": array(4, 8, 8), "b": array(4, 8)}
    apart = same(step, (params, optimizer.init(params)), array(6, 8), tolerance=2e-5)
    assert loops(apart) == [] or name in ("adafactor", "muon")


def test_updates_that_need_a_sum_over_all_layers_wait_for_it():
    def step(params, x):
        value, grads = jax.value_and_grad(lambda p, x: sum(scanned_loss(p[k], x) for k in p))(
            params, x
        )
        total = {k: grads[k]["w"].sum() for k in grads}
        scaled = {
            k: jax.tree.map(lambda g: g * total["long"] * total["short"], grads[k]) for k in grads
        }
        return jax.tree.map(jnp.subtract, params, scaled), value

    params = {k: {"w": array(n, 8, 8), "b": array(n, 8)} for k, n in (("long", 5), ("short", 2))}
    assert loops(same(step, params, array(6, 8), tolerance=1e-5)) == []


def test_an_op_on_all_layers_at_once_is_named():
    def step(w, x):
        value, grad = jax.value_and_grad(
            lambda w, x: scanned_loss({"w": w, "b": jnp.zeros((4, 8))}, x)
        )(w, x)
        return w - jnp.cumsum(grad, axis=0), value

    apart = same(step, array(4, 8, 8), array(6, 8))
    assert [note.partition(" at ")[0] for note in apart.notes] == ["cumsum"]
    assert shapes(apart, "w") == [(8, 8)] * 4


REDUCTIONS = {
    "sum": lambda w: w.sum(), "max": lambda w: w.max(), "min over layers": lambda w: w.min(axis=0),
    "mean per layer": lambda w: w.mean(axis=(1, 2)), "any": lambda w: (w > 1).any(), "all": lambda w: (w > -9).all(),
    "flat norm": lambda w: jnp.linalg.norm(w.ravel()), "product of two": lambda w: jnp.einsum("ldf,lde->fe", w, w),
    "gram": lambda w: jnp.einsum("ldf,mdf->lm", w, w), "one layer": lambda w: w[1].sum(), "some": lambda w: w[1:3] * 2,
    "largest": lambda w: w.argmax(), "swapped": lambda w: w.swapaxes(0, 2), "sorted": lambda w: jnp.sort(w, axis=0),
    "looked up": lambda w: w[jnp.array([2, 0])],
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_metrics_of_a_stack(name):
    def step(w, x):
        new, value = descend(lambda w, x: scanned_loss({"w": w, "b": jnp.zeros((4, 8))}, x))(w, x)
        return new, value, REDUCTIONS[name](w)

    assert loops(same(step, array(4, 8, 8), array(6, 8), tolerance=1e-5)) == []


# ---------------------------------------------------------------- any scan


BODIES = [
    lambda x, p: (layer(x, p["w"]), x.sum()),
    lambda x, p: (x + p["b"] * jnp.sin(x), p["w"].sum(axis=0)),
    lambda x, p: (x * 0.5 + layer(x, p["w"].T), p["b"]),
    lambda x, p: (jax.nn.relu(x @ p["w"] - p["b"]), jnp.float32(1.0)),
    jax.checkpoint(lambda x, p: (layer(x, p["w"]) * p["b"], (x**2).mean())),
]


@settings(max_examples=12)
@given(
    bodies=st.lists(st.sampled_from(range(len(BODIES))), min_size=1, max_size=2),
    layers=st.integers(1, 5), unroll=st.integers(1, 3), reverse=st.booleans(), tied=st.booleans(),
)  # fmt: skip
def test_random_scans_equal_themselves_in_pieces(bodies, layers, unroll, reverse, tied):
    def loss(params, x):
        extra = 0.0
        for number, body in enumerate(bodies):
            stack = params[0 if tied else number]
            x, rows = jax.lax.scan(BODIES[body], x, stack, reverse=reverse, unroll=unroll)
            extra = extra + (rows**2).mean()
        return (x**2).mean() + 0.1 * extra

    params = [{"w": 0.3 * array(layers, 8, 8), "b": array(layers, 8)} for _ in bodies]
    assert loops(same(descend(loss), params, array(4, 8), tolerance=1e-5)) == []


def test_arguments_in_pieces_have_their_own_tree():
    apart = same(descend(scanned_loss), {"w": array(2, 8, 8), "b": array(2, 8)}, array(6, 8))
    args = jax.tree.unflatten(apart.captured.binding.in_tree, range(len(apart.inputs)))
    assert args == (({"b": (0, 1), "w": (2, 3)}, 4), {})
    assert [aval.shape for aval in apart.captured.binding.in_avals] == [
        (8,),
        (8,),
        (8, 8),
        (8, 8),
        (6, 8),
    ]


def test_a_step_without_layers_is_left_alone():
    apart = same(descend(lambda w, x: layer(x, w).mean()), array(8, 8), array(6, 8))
    assert apart.captured.graph == apart.stacked.graph
