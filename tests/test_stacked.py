"""State that a step stacks for a scan comes back from a pipeline as it was given, and lies where its layers run."""

import copy
import io
import pickle
from functools import partial

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import meshwright as mw
from meshwright.backends.xla.stacked import StackedArray
from meshwright.ir.errors import UsageError

RNG = np.random.default_rng(0)
WIDTH = 32


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 6, jnp.float32)


def loss_of(params, batch):
    body = lambda x, p: (jnp.tanh(x @ p["w"]) + p["b"], None)  # noqa: E731
    x, _ = jax.lax.scan(body, batch["x"] @ params["first"], params["layers"])
    return jnp.mean((x @ params["last"] - batch["y"]) ** 2)


def sgd(params, batch):
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    norms = {"loss": loss, "norms": jnp.sqrt((grads["layers"]["w"] ** 2).sum((1, 2)))}
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), norms


def inputs(layers=4):
    layers = {"w": array(layers, WIDTH, WIDTH), "b": array(layers, WIDTH)}
    params = {"first": array(WIDTH, WIDTH), "layers": layers, "last": array(WIDTH, WIDTH)}
    return params, {"x": array(16, WIDTH), "y": array(16, WIDTH)}


def alike(found, wanted):
    """The same tree of the same shapes and types, and the same numbers."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(have, jax.Array)
        assert (have.shape, have.dtype, have.weak_type) == (want.shape, want.dtype, want.weak_type)
        np.testing.assert_allclose(np.asarray(have), np.asarray(want), rtol=1e-5, atol=1e-6)


def pipelined(step=sgd, pp=2, **options):
    return mw.parallelize(
        step, cluster=f"{options.pop('devices', 4)}xcpu", pp=pp, microbatches=4, **options
    )


@pytest.mark.parametrize(
    ("options", "layers"),
    [({"program": "single"}, 4), ({"program": "stages", "schedule": "1f1b"}, 4),
     ({"program": "stages", "pp": 3, "devices": 6}, 5), ({"program": "stages", "schedule": "interleaved"}, 4)],
    ids=["single", "1f1b", "unequal", "interleaved"],
)  # fmt: skip
def test_three_steps_give_what_plain_jax_gives(options, layers, monkeypatch):
    """And from step to step nothing is put together, nor moved: the pieces go back as they came."""
    (params, batch), plain = inputs(layers), jax.jit(sgd)
    step = pipelined(verify=True, donate_argnums=0, **options)
    given, before = jax.tree.map(jnp.copy, params), params
    with monkeypatch.context() as patch:
        patch.setattr(StackedArray, "_whole", lambda self: pytest.fail("a stack was put together"))
        for _ in range(3):
            before, (given, found), (params, wanted) = (
                given,
                step(given, batch),
                plain(params, batch),
            )
            alike(found, wanted)
    assert isinstance(given["layers"]["w"], StackedArray)
    assert before["layers"]["w"].is_deleted() and not given["layers"]["w"].is_deleted()
    alike(given, params)
    assert len(step._known) == 1


@pytest.fixture(scope="module")
def states():
    """The state after a step of a pipeline whose stages have all layers evenly, and plain jax's."""
    params, batch = inputs()
    return pipelined(program="single")(params, batch)[0], jax.jit(sgd)(params, batch)[0]


def saved(state):
    file = io.BytesIO()
    np.savez(file, **state["layers"])
    file.seek(0)
    return dict(np.load(file))


USES = {
    "sum": lambda s: jnp.sum(s["layers"]["w"]),
    "method": lambda s: s["layers"]["w"].mean(axis=0),
    "listed": lambda s: s["layers"]["w"].tolist(),
    "norm of all": optax.global_norm,
    "ema": lambda s: jax.tree.map(lambda p: 0.9 * p + 0.1 * jnp.ones_like(p), s),
    "added": lambda s: jax.tree.map(jnp.add, s, s)["layers"],
    "operators": lambda s: -s["layers"]["w"] @ np.eye(WIDTH) + 1 >= s["layers"]["w"],
    "numpy in front": lambda s: np.ones(WIDTH, np.float32) * s["layers"]["b"],
    "layer": lambda s: (s["layers"]["w"][1], s["layers"]["w"][-1], list(s["layers"]["b"])),
    "slices": lambda s: (s["layers"]["w"][1:, 0], s["layers"]["w"][..., 3], s["layers"]["w"][jnp.array([2, 0])]),
    "written": lambda s: s["layers"]["w"].at[0].set(0),
    "jitted": lambda s: jax.jit(loss_of)(s, {"x": np.ones((2, WIDTH)), "y": np.ones((2, WIDTH))}),
    "closed over": lambda s: jax.jit(lambda x: x * s["layers"]["w"])(2.0),
    "differentiated": lambda s: jax.grad(lambda w: (w**3).sum())(s["layers"]["w"]),
    "mapped": lambda s: jax.vmap(lambda p: p["w"].sum() + p["b"])(s["layers"]),
    "scanned": lambda s: jax.lax.scan(lambda c, w: (c + w, w.sum()), jnp.zeros((WIDTH, WIDTH)), s["layers"]["w"]),
    "optimizer": lambda s: optax.adam(0.1).init(s),
    "on the host": jax.device_get,
    "on one device": lambda s: jax.device_put(s, jax.devices()[0]),
    "pickled": lambda s: pickle.loads(pickle.dumps(jax.device_get(s))),
    "pickled as it is": lambda s: pickle.loads(pickle.dumps(s["layers"])),
    "copied": lambda s: copy.deepcopy(s["layers"]),
    "savez": saved,
    "to bytes": lambda s: serialization.from_bytes(s, serialization.to_bytes(s)),
    "waited for": jax.block_until_ready,
    "equinox": lambda s: equinox.partition(s, equinox.is_array)[0],
    "text": lambda s: repr(jnp.round(s["layers"]["b"], 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_it_is_used_as_any_array(name, states):
    found, wanted = map(USES[name], states)
    if name == "text":
        assert found == wanted
        return
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda have, want: near(np.asarray(have), np.asarray(want)), found, wanted)


def test_a_changed_stack_goes_back_into_the_step():
    """As after a moving average, a restored checkpoint, or a move to the host."""
    (params, batch), plain, step = inputs(), jax.jit(sgd), pipelined(program="stages")
    found, wanted = step(params, batch)[0], plain(params, batch)[0]
    for change in (lambda p: jax.tree.map(lambda x: x * 0.5, p), jax.device_get, lambda p: p):
        found, wanted = step(change(found), batch)[0], plain(change(wanted), batch)[0]
    alike(found, wanted)


def test_layers_within_layers_and_random_keys():
    def step(params, keys, x):
        def outer(x, part):
            weights, key = part
            x = x + jax.random.normal(key, x.shape)
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

        loss = lambda p: jnp.mean(jax.lax.scan(outer, x, (p["w"], keys))[0] ** 2)  # noqa: E731
        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), keys

    args = (
        {"w": array(2, 2, WIDTH, WIDTH)},
        jax.random.split(jax.random.key(1), 2),
        array(16, WIDTH),
    )
    (found, keys), (wanted, same) = pipelined(step, program="stages")(*args), jax.jit(step)(*args)
    alike(found, wanted)
    alike(found["w"][1][0], wanted["w"][1][0])
    assert keys.shape == (2,) and jnp.array_equal(
        jax.random.key_data(keys), jax.random.key_data(same)
    )


def test_an_argument_given_twice_where_it_is_donated_is_refused():
    def step(params, other, batch):
        return sgd(params, batch)[0], jax.tree.map(jnp.add, params, other)

    params, batch = inputs()
    step = pipelined(step, donate_argnums=0)
    state, _ = step(params, jax.tree.map(jnp.copy, params), batch)
    with pytest.raises(UsageError, match="are the same array, and it is donated"):
        step(state, {**jax.tree.map(jnp.copy, state), "layers": state["layers"]}, batch)
