"""A captured step is the user's step: same results, same names, nothing lost in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.backends.xla.capture import Captured, capture
from meshwright.backends.xla.replay import replay
from meshwright.ir.errors import CaptureError, MismatchError
from meshwright.ir.fingerprint import fingerprint
from meshwright.models import build


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def kinds(captured: Captured) -> list[str]:
    return [visit.op.kind for visit in captured.graph.visits]


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def descend(w, x):
    value, grad = jax.value_and_grad(loss)(w, x)
    return w - 0.1 * grad, value


# ---------------------------------------------------------------- replay is the step


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt-tiny", {"layers": 1}),
        ("gpt-tiny", {"layers": 1, "remat": True}),
        ("gpt-tiny-scan", {"remat": True}),
        ("llama-tiny-scan", {"optimizer": "sgd"}),
        ("mixtral-tiny", {"layers": 1}),
        ("vit-tiny", {"layers": 1}),
        ("wrn-tiny", {}),
        ("dlrm-tiny", {}),
    ],
)
def test_replay_gives_the_bits_of_the_step(name, options):
    example = build(name, **options)
    again = replay(capture(example.step, example.state, example.batch))
    # One program: XLA need not optimize two copies of it, and little of one.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    both = jax.jit(lambda *args: (example.step(*args), again(*args)), compiler_options=quick)
    want, have = both(example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0)))
    jax.tree.map(np.testing.assert_array_equal, want, have)


def test_keywords_static_arguments_and_auxiliary_results_replay():
    def step(w, x, *, power, bias, flip=False):
        y = (x @ w + bias["b"]) ** power
        return {"w": w + y.mean(), "aux": (y, None, -y if flip else y)}

    w, x, bias = jnp.eye(4), jnp.ones((8, 4)), {"b": jnp.arange(4.0)}
    options = {"static_argnames": ("power", "flip")}
    captured = capture(step, w, x, power=3, bias=bias, flip=True, **options)
    assert captured.graph.input_names == ("w", "x", "bias['b']")
    jax.tree.map(
        np.testing.assert_array_equal,
        step(w, x, power=3, bias=bias, flip=True),
        replay(captured)(w, x, bias=bias),
    )


def test_donated_arguments_are_given_up():
    captured = capture(descend, f32(4, 4), f32(8, 4), donate_argnums=0)
    assert captured.graph.donated == {0}
    w = jnp.eye(4)
    replay(captured)(w, jnp.ones((8, 4)))
    assert w.is_deleted()


def test_a_jitted_step_keeps_its_own_static_and_donated_arguments():
    step = jax.jit(lambda w, n, x: w + n * x.mean(), static_argnums=1, donate_argnums=0)
    captured = capture(step, f32(4, 4), 3, f32(8, 4))
    assert captured.graph.donated == {0}
    assert [t.shape for t in map(captured.graph.types.get, captured.graph.inputs)] == [
        (4, 4),
        (8, 4),
    ]


def test_other_arguments_than_those_captured_are_refused():
    again = replay(capture(descend, f32(4, 4), f32(8, 4)))
    with pytest.raises(MismatchError, match="another structure"):
        again({"w": jnp.eye(4)}, jnp.ones((8, 4)))


# ---------------------------------------------------------------- what the graph holds


def test_calls_are_inlined_and_identities_go():
    def step(x):
        return jax.jit(jax.nn.relu)(jax.lax.stop_gradient(jnp.array(x, copy=True)))

    assert kinds(capture(step, f32(4))) == ["max"]


def test_dead_code_goes_in_loops_too():
    def step(x):
        unread = jnp.sin(x)

        def body(carry, row):
            a, b = carry
            return (a + row, b * unread.sum()), (row * 2, row * 3)

        (a, _), (doubles, _) = jax.lax.scan(body, (x[0], 1.0), x)
        return a, doubles

    graph = capture(step, f32(3, 4)).graph
    [scan] = [op for op in graph.ops if op.kind == "scan"]
    assert (scan.attr("num_carry"), len(scan.outputs), len(scan.inputs)) == (1, 2, 2)
    assert sorted(op.kind for op in scan.regions[0].ops) == ["add", "mul"]


def test_recomputation_is_held_back_by_a_barrier():
    def step(w, x):
        return w - jax.grad(jax.checkpoint(loss))(w, x)

    assert kinds(capture(step, f32(4, 4), f32(8, 4))).count("optimization_barrier") == 1


def test_constants_are_kept_once_arrays_by_digest():
    table = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    captured = capture(lambda x: x * 2.0 + table + (x * 2.0 - table.copy()), f32(3, 4))
    assert sorted(str(c.data)[:7] for c in captured.graph.constants) == ["2.0", "sha256:"]
    [array] = captured.binding.arrays.values()
    np.testing.assert_array_equal(array, table)


def test_ops_know_the_line_of_the_user():
    def step(x):
        y = jnp.where(x > 0, x, 0.0)
        return jax.nn.logsumexp(y)

    first = step.__code__.co_firstlineno
    wheres = {visit.op.where for visit in capture(step, f32(4)).graph.visits}
    assert wheres == {f"test_capture.py:{first + 1}", f"test_capture.py:{first + 2}"}


def test_abstract_and_concrete_arguments_give_one_fingerprint():
    abstract = capture(descend, f32(4, 4), f32(8, 4)).graph
    concrete = capture(descend, jnp.eye(4), np.ones((8, 4), np.float32)).graph
    other = capture(descend, f32(4, 4), f32(16, 4)).graph
    assert fingerprint(abstract) == fingerprint(concrete) != fingerprint(other)


# ---------------------------------------------------------------- state


def carried(step, *args, **kwargs) -> dict[str, str]:
    graph = capture(step, *args, **kwargs).graph
    return {graph.input_name(i): graph.output_name(o) for i, o in graph.state}


def test_whole_arguments_are_carried_wherever_the_result_holds_them():
    def step(params, moments, x):
        grads = jax.grad(lambda p: loss(p["w"], x))(params)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
        params = jax.tree.map(lambda p, m: p - m, params, moments)
        return 1.0, {"moments": moments, "params": params}

    trees = {"w": f32(4, 4)}
    assert carried(step, trees, trees, f32(8, 4)) == {
        "params['w']": "result[1]['params']['w']",
        "moments['w']": "result[1]['moments']['w']",
    }


def test_parts_of_an_argument_may_be_carried_apart():
    def step(state, x):
        return descend(state[0], x)[0], state[1] + 1, loss(state[0], x)

    found = carried(step, (f32(4, 4), jax.ShapeDtypeStruct((), "int32")), f32(8, 4))
    assert found == {"state[0]": "result[0]", "state[1]": "result[1]"}


def test_a_learning_rate_is_not_carried_to_a_loss():
    def step(w, rate, x):
        value, grad = jax.value_and_grad(loss)(w, x)
        return w - rate * grad, value

    assert carried(step, f32(4, 4), f32(), f32(8, 4)) == {"w": "result[0]"}


def test_images_are_not_carried_to_their_reconstruction():
    step = lambda w, x: (descend(w, x)[0], x @ w)  # noqa: E731
    assert carried(step, f32(4, 4), f32(8, 4)) == {"w": "result[0]"}


def test_a_split_random_key_is_carried():
    def step(w, key):
        key, now = jax.random.split(key)
        return w + jax.random.normal(now, w.shape), key

    key = jax.eval_shape(lambda: jax.random.key(0))
    assert carried(step, f32(4, 4), key) == {"w": "result[0]", "key": "result[1]"}


# ---------------------------------------------------------------- what is refused, by name


def refusal(step, *args, **options) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(step, *args, **options)
    return str(caught.value)


def test_python_control_flow_on_values_is_refused_with_its_line():
    def step(x):
        if x.sum() > 0:
            return x
        return -x

    text = refusal(step, f32(4))
    assert "decides in Python" in text
    assert f"test_capture.py:{step.__code__.co_firstlineno + 1}" in text
    assert "jnp.where or jax.lax.cond" in text


def test_values_handed_to_numpy_are_refused():
    assert "numpy" in refusal(lambda x: np.sin(x), f32(4))


@pytest.mark.parametrize("inside", [False, True])
def test_side_effects_are_refused_not_dropped(inside):
    def step(x):
        def show(carry, _):
            jax.debug.print("x = {}", carry)
            return carry, None

        return jax.lax.scan(show, x, None, length=2)[0] if inside else show(x, None)[0]

    text = refusal(step, f32(4))
    assert "side effect" in text
    assert f"test_capture.py:{step.__code__.co_firstlineno + 2}" in text


def test_a_placement_of_the_users_own_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    step = lambda x: jax.lax.with_sharding_constraint(x, here)  # noqa: E731
    assert "`sharding_constraint`" in refusal(step, f32(4))


def test_a_result_that_the_user_places_is_refused():
    axis = jax.sharding.AxisType.Explicit
    there = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(axis,))
    rows = jax.sharding.NamedSharding(there, jax.sharding.PartitionSpec("x"))
    step = lambda x: jax.lax.broadcast_in_dim(x.sum(), (4,), (), out_sharding=rows)  # noqa: E731
    assert "`broadcast_in_dim(sharding=...)`" in refusal(step, f32(4))


def test_a_leaf_that_is_no_array_is_refused_by_its_path():
    text = refusal(lambda batch: batch["x"], {"x": f32(4), "name": "train"})
    assert "'train' is a str, not an array." in text
    assert "batch['name']" in text


def test_a_static_argument_must_be_hashable():
    text = refusal(lambda x, sizes: x * sizes[0], f32(4), [1, 2], static_argnames="sizes")
    assert "list, which cannot be hashed" in text
    assert "`sizes`" in text
