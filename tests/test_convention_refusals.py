"""What steps may not do, and what is not taken for it: each refused in one sentence."""

import copy
import pickle
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import meshwright as mw
from meshwright.ir.errors import CaptureError, UsageError

from .decorated import BATCH, QUICK, parallel, same


def test_what_a_step_stores_outside_is_refused_by_name():
    history, box = [], type("Box", (), {})()

    def keeps(w, x):
        history.append((x @ w).mean())
        return w * 2

    def stores(w, x):
        box.loss = {"last": (x @ w).mean()}
        return w * 2

    def in_loop(w, x):
        def body(c, row):
            history.append(c)
            return c + row.sum(), None

        return w * jax.lax.scan(body, 0.0, x)[0]

    w = np.ones((16, 8), np.float32)
    for step, name in (
        (keeps, r"`history\[0\]\[?0?\]?`|`history\[0\]`"),
        (stores, "box"),
        (in_loop, "history"),
    ):
        with pytest.raises(CaptureError, match=rf"stores a value that it computes in .*({name})"):
            parallel(step)(w, BATCH["x"])


def test_looking_for_what_is_stored_meets_objects_that_are_gone():
    """`isinstance` of a proxy whose object is gone raises; a library keeps such ones."""
    history, gone = [], weakref.proxy(type("Gone", (), {})())

    def keeps(w, x):
        history.append((x @ w).mean())
        return w * 2

    with pytest.raises(ReferenceError):
        isinstance(gone, jax.Array)
    with pytest.raises(CaptureError, match="history"):
        parallel(keeps)(np.ones((16, 8), np.float32), BATCH["x"])
        history.clear()


def test_what_a_library_caches_is_no_store_of_the_users():
    """`filter_checkpoint` in a scan: jax's cache of checkpointed functions keeps values of the trace."""

    @eqx.filter_jit
    def step(model, x, y):
        @eqx.filter_value_and_grad
        def loss(model):
            def turn(h, _):
                return h + 0.1 * model(h), h

            last = jax.vmap(
                lambda h: jax.lax.scan(eqx.filter_checkpoint(turn), h, None, length=3)[0]
            )(x)
            return jnp.mean((last - y) ** 2)

        value, grads = loss(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads)), value

    model = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (2, 16, 4))
    same(parallel(step)(model, x, y)[1], step(model, x, y)[1])


def test_an_object_that_keeps_its_state_is_refused():
    class Trainer:
        def __init__(self):
            self.w = jnp.ones((16, 8))

        def step(self, x):
            self.w = self.w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(self.w)
            return (x @ self.w).mean()

    with pytest.raises(CaptureError, match=r"`Trainer\.w`"):
        parallel(Trainer().step)(BATCH["x"])


def test_an_argument_changed_in_place_is_refused_where_the_change_is_lost():
    def loses(state, batch):
        state["w"] = state["w"] - 0.1 * jax.grad(lambda w: jnp.mean((batch["x"] @ w) ** 2))(
            state["w"]
        )
        return (batch["x"] @ state["w"]).mean()

    def counts(state, batch):
        state["count"] = state["count"] + 1
        return batch["x"].mean()

    def prepares(state, batch):
        batch["x"] = batch["x"] / 255
        return (batch["x"] @ state["w"]).mean()

    def returns(state, batch):
        state["w"] = state["w"] * batch["x"].mean()
        return state

    state = {"w": np.ones((16, 8), np.float32), "count": 0}
    for step, name in ((loses, r"state\['w'\]"), (counts, r"state\['count'\]")):
        with pytest.raises(CaptureError, match=f"changes its argument `{name}` in place"):
            parallel(step)(state, BATCH)
    for step in (prepares, returns):
        same(parallel(step)(state, BATCH), jax.jit(step)(state, BATCH))


def test_pmapped_steps_and_their_means_are_refused_with_the_way_out():
    with pytest.raises(UsageError, match="under `pmap`"):
        parallel(jax.pmap(lambda x: x))
    with pytest.raises(CaptureError, match="by the name of an axis") as refusal:
        parallel(lambda x: jax.lax.pmean(x.mean(), "batch"))(BATCH["x"])
    assert "remove pmean" in str(refusal.value) and "jax.jit" not in str(refusal.value)


def test_generators_and_coroutines_are_refused_where_they_are_given():
    def generator(x):
        yield x

    async def coroutine(x):
        return x

    for step, name in ((generator, "a generator"), (coroutine, "an asynchronous function")):
        with pytest.raises(UsageError, match=name):
            parallel(step)


def test_a_parallelized_step_is_no_part_of_another_function():
    train = parallel(lambda x: x.sum(), verify=False)
    train(BATCH["x"])
    train(BATCH["x"])
    for use in (
        lambda: jax.jit(train)(BATCH["x"]),
        lambda: jax.jit(lambda: train(BATCH["x"]))(),
        lambda: jax.grad(train)(BATCH["x"]),
        lambda: jax.vmap(train)(BATCH["x"]),
        lambda: jax.eval_shape(train, BATCH["x"]),
        lambda: jax.lax.scan(lambda c, x: (c + train(x), None), 0.0, BATCH["x"]),
    ):
        with pytest.raises(UsageError, match="cannot be part of a function"):
            use()
    same(jax.jit(train.__wrapped__)(BATCH["x"]), train(BATCH["x"]), 1e-4)


@mw.parallelize(**QUICK)
def named_step(x):
    return x.sum()


def test_parallelized_steps_are_copied_and_pickled_as_functions_are():
    assert (
        copy.copy(named_step) is named_step and copy.deepcopy({"f": named_step})["f"] is named_step
    )
    with pytest.raises(UsageError, match="pickled by its name"):
        pickle.dumps(parallel(lambda x: x))


def test_methods_of_modules_take_the_module_as_an_argument():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((16, 8)))

        @mw.parallelize(**QUICK)
        def train(self, x):
            self.w[...] = self.w[...] * x.mean()
            return self.w[...].sum()

    model = Model()
    total = model.train(BATCH["x"] + 2)
    same(total, model.w[...].sum(), 1e-4)
    assert float(model.w[0, 0]) == pytest.approx(float(BATCH["x"].mean()) + 2, rel=1e-5)
    with pytest.raises(UsageError, match="`self` is no array"):
        _ = type("Plain", (), {"train": parallel(lambda self, x: x)})().train


def test_any_number_of_arguments_and_keywords():
    def step(*parts, **named):
        return sum(p.sum() for p in parts) + named["scale"] * named["x"].mean()

    given = (BATCH["x"], BATCH["y"]), {"x": BATCH["x"], "scale": 2.0}
    same(parallel(step)(*given[0], **given[1]), jax.jit(step)(*given[0], **given[1]), 1e-4)
