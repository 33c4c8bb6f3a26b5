"""Steps run as their library runs them: nnx in place, equinox's static leaves, jit's own arguments, numbers."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.errors import CaptureError, MismatchError, UsageError

from .decorated import BATCH, parallel, same

# ---------------------------------------------------------------- flax.nnx, in place


class Net(nnx.Module):
    """Everything that keeps state: parameters, running statistics, random streams."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.last = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def training(kind=nnx.Optimizer, tx=None):
    model = Net(nnx.Rngs(0))
    return model, kind(model, tx or optax.sgd(0.1, 0.9), wrt=nnx.Param)


def net_step(model, optimizer, batch):
    def loss_of(model):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def held(*objects):
    return jax.tree.leaves(nnx.state(objects))


@pytest.mark.parametrize("decorate", [nnx.jit, lambda step: step, nnx.jit(donate_argnums=(0, 1))])
def test_nnx_objects_are_updated_in_place_as_by_nnx_jit(decorate):
    mine, theirs = training(), training()
    train, plain = parallel(decorate(net_step)), nnx.jit(net_step)
    ours, expected = [], []
    for _ in range(3):
        ours.append(float(train(*mine, BATCH)))
        expected.append(float(plain(*theirs, BATCH)))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert ours[2] < ours[0]
    same(held(*mine), held(*theirs), 1e-4)


def test_variables_of_nnx_objects_are_carried_state():
    graph = capture(
        nnx.jit(net_step, donate_argnums=1), *training(tx=optax.adam(1e-2)), BATCH
    ).graph
    carried = {graph.input_name(i): graph.output_names[o] for i, o in graph.state}
    assert all(name == result for name, result in carried.items())
    assert {"model.first.kernel", "model.norm.mean", "model.drop.rngs.count"} <= set(carried)
    moments = [name for name in carried if "mu" in name and "kernel" in name]
    assert len(moments) == 2 and all(name.startswith("optimizer.") for name in moments)
    assert {graph.input_name(p).partition(".")[0] for p in graph.donated} == {"optimizer"}


def test_a_step_that_returns_nothing_moves_the_weights():
    def silent(model, optimizer, batch):
        net_step(model, optimizer, batch)

    mine, theirs = training(), training()
    assert parallel(silent)(*mine, BATCH) is None
    nnx.jit(silent)(*theirs, BATCH)
    same(held(*mine), held(*theirs), 1e-4)


def test_metrics_keywords_and_evaluation():
    def evaluate(model, metrics, *, batch):
        error = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        metrics.update(loss=error, accuracy=error > 1)

    def metrics():
        return nnx.MultiMetric(
            loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Average("accuracy")
        )

    model, mine, theirs = Net(nnx.Rngs(0)), metrics(), metrics()
    model.eval()
    train, plain = parallel(evaluate), nnx.jit(evaluate)
    for _ in range(2):
        train(model, metrics=mine, batch=BATCH)
        plain(model, metrics=theirs, batch=BATCH)
    same(mine.compute(), theirs.compute())


def test_shared_variables_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(16, 16, rngs=rngs)
            self.b = nnx.Linear(16, 16, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))[:, :8]

    def two(one, other, batch):
        def loss_of(one):
            return jnp.mean((one(batch["x"]) - batch["y"]) ** 2)

        grads = nnx.grad(loss_of)(one)
        nnx.update(one, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(one, nnx.Param), grads))
        return other.a.kernel[...].sum()

    mine, theirs = Tied(nnx.Rngs(0)), Tied(nnx.Rngs(0))
    same(parallel(two)(mine, mine, BATCH), nnx.jit(two)(theirs, theirs, BATCH))
    assert mine.a.kernel is mine.b.kernel
    same(held(mine), held(theirs))


def test_a_model_with_its_optimizer_inside_cached_and_partial():
    def inside(optimizer, batch):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(batch["x"]) - batch["y"]) ** 2))(
            optimizer.model
        )
        optimizer.update(grads)
        return loss

    expected = nnx.jit(inside)(training(nnx.ModelAndOptimizer)[1], BATCH)
    found = [
        parallel(inside)(training(nnx.ModelAndOptimizer)[1], BATCH),
        parallel(nnx.cached_partial(nnx.jit(inside), training(nnx.ModelAndOptimizer)[1]))(BATCH),
        parallel(functools.partial(inside, training(nnx.ModelAndOptimizer)[1]))(BATCH),
    ]
    for one in found:
        same(one, expected)


def test_a_returned_nnx_object_is_the_users_own_and_graph_changes_come_back():
    def step(model, batch):
        model.seen = nnx.BatchStat(batch["x"].mean(0))
        return model, model(batch["x"]).sum()

    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    returned, _ = parallel(step)(model, BATCH)
    assert returned is model
    same(model.seen[...], BATCH["x"].mean(0))


def test_nnx_objects_may_lie_anywhere_in_the_arguments():
    def step(parts, x):
        parts["model"].kernel[...] = parts["model"].kernel[...] * 2
        return {"count": parts["count"] + 1, "sum": x.sum()}

    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    found = parallel(step)({"model": model, "count": 0}, BATCH["x"])
    assert int(found["count"]) == 1
    same(model.kernel[...], before * 2)


def test_layers_of_an_nnx_model_become_stages():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(4)])
            self.last = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.tanh(layer(x))
            return self.last(x)

    def made():
        model = Deep(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    options = {"mesh": None, "microbatches": 4, "recompute": None, "time_limit": 20}
    mine, theirs, train = made(), made(), parallel(net_step, pp=2, **options)
    same(train(*mine, BATCH), nnx.jit(net_step)(*theirs, BATCH))
    same(held(*mine), held(*theirs))
    assert train.plan(*mine, BATCH).pipeline is not None


def test_nnx_modules_of_another_structure_are_another_program():
    train = parallel(lambda model, x: model(x).sum(), verify=False)
    for model in (
        nnx.Linear(16, 8, rngs=nnx.Rngs(0)),
        nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0)),
    ):
        same(train(model, BATCH["x"]), model(BATCH["x"]).sum(), 1e-4)
    running = train.lower(model, BATCH["x"])
    same(running(model, BATCH["x"]), model(BATCH["x"]).sum(), 1e-4)
    with pytest.raises(MismatchError):
        running(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), BATCH["x"])


def test_nnx_modules_may_hold_trees():
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.parts = nnx.data(
                {"linear": nnx.Linear(16, 8, rngs=rngs), "scale": (jnp.ones(8), {})}
            )

        def __call__(self, x):
            return self.parts["linear"](x) * self.parts["scale"][0]

    def step(model, x):
        model.parts["linear"].kernel[...] -= 0.1
        return model(x).sum()

    mine, theirs = Holder(nnx.Rngs(0)), Holder(nnx.Rngs(0))
    same(parallel(step)(mine, BATCH["x"]), nnx.jit(step)(theirs, BATCH["x"]), 1e-4)
    same(held(mine), held(theirs))


def test_an_nnx_object_that_is_no_argument_is_refused():
    model, optimizer = training()
    with pytest.raises(CaptureError, match="not among its arguments"):
        parallel(nnx.jit(lambda batch: net_step(model, optimizer, batch)))(BATCH)


def test_nnx_modules_under_jax_jit_lose_their_updates_and_are_refused():
    with pytest.raises(CaptureError, match="in place") as refusal:
        parallel(jax.jit(net_step))(*training(), BATCH)
    assert "nnx.jit in place of jax.jit" in str(refusal.value)


# ---------------------------------------------------------------- equinox


@eqx.filter_jit
def filtered(model, x, y, state, tx):
    loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(x) - y) ** 2))(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
    return loss, eqx.apply_updates(model, updates), state, "done"


@pytest.mark.parametrize("decorate", [lambda step: step, lambda step: step.__wrapped__])
def test_equinox_modules_keep_what_is_no_array_fixed(decorate):
    model = eqx.nn.Sequential(
        [eqx.nn.MLP(16, 8, 16, 1, key=jax.random.key(0)), eqx.nn.Lambda(jnp.tanh)]
    )
    tx = optax.adam(1e-2)
    state = tx.init(eqx.filter(model, eqx.is_array))
    step = decorate(filtered)
    if step is not filtered:
        step = lambda model, x, y, state: filtered.__wrapped__(model, x, y, state, tx)  # noqa: E731
        train, rest = parallel(step), ()
    else:
        train, rest = parallel(step), (tx,)
    mine = theirs = (model, state)
    for _ in range(2):
        loss, *mine, word = train(mine[0], BATCH["x"], BATCH["y"], mine[1], *rest)
        expected, *theirs, _ = filtered(theirs[0], BATCH["x"], BATCH["y"], theirs[1], tx)
        same(loss, expected)
    assert word == "done" and mine[0].layers[1].fn is jnp.tanh
    same(eqx.filter(mine, eqx.is_array), eqx.filter(theirs, eqx.is_array), 1e-4)
    assert len(train._known) == 1


def test_equinox_state_is_carried():
    model = eqx.nn.MLP(16, 8, 16, 1, key=jax.random.key(0))
    tx = optax.adam(1e-2)
    state = tx.init(eqx.filter(model, eqx.is_array))
    graph = capture(filtered, model, BATCH["x"], BATCH["y"], state, tx).graph
    assert len(graph.state) == len(jax.tree.leaves((eqx.filter(model, eqx.is_array), state)))


def test_numbers_in_a_filter_jitted_step_are_static():
    @eqx.filter_jit
    def step(w, x, times):
        for _ in range(times):
            w = w * 2
        return (w * x).sum(), times

    train = parallel(step)
    for times in (1, 3):
        total, back = train(np.ones(16, np.float32), BATCH["x"], times)
        assert back == times
        same(total, BATCH["x"].sum() * 2**times, 1e-3)


# ---------------------------------------------------------------- numbers, and what else is a leaf


def test_a_number_in_the_state_keeps_its_weak_type_and_is_planned_once(monkeypatch):
    from meshwright import planning

    calls, search = [], planning.search
    monkeypatch.setattr(planning, "search", lambda *a, **k: calls.append(1) or search(*a, **k))

    def step(state, batch):
        loss = lambda p: jnp.mean((batch["x"] @ p["w"] - batch["y"]) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = TrainState.create(apply_fn=None, params={"w": jnp.ones((16, 8))}, tx=optax.sgd(0.1))
    train, plain, other = parallel(step), jax.jit(step), state
    for count in range(3):
        state, other = train(state, BATCH), plain(other, BATCH)
        assert int(state.step) == count + 1
        assert [x.weak_type for x in jax.tree.leaves(state)] == [
            x.weak_type for x in jax.tree.leaves(other)
        ]
    same(state.params, other.params)
    assert len(calls) == 1
    assert (
        int(train.lower(state, BATCH)(state, BATCH).step)
        == int(train(state, batch=BATCH).step)
        == 4
    )


def test_numbers_of_every_kind_keep_jax_types():
    def step(w, scale, count, flag, pair, nothing):
        assert nothing is None
        low = w.astype(jnp.bfloat16) * scale
        return {
            "low": low,
            "count": count + 1,
            "flag": ~flag,
            "pair": pair * 1j,
            "fixed": 3,
            "none": None,
        }

    given = (np.ones((8, 8), np.float32), 0.5, np.int32(3), True, np.float64(2.0), None)
    found, expected = parallel(step)(*given), jax.jit(step)(*given)
    same(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)


@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        (lambda w: w, (np.ones((16, 16), np.float32),)),
        (lambda w: (w, w, {}), (np.ones((16, 16), np.float32),)),
        (lambda w: None, (np.ones((16, 16), np.float32),)),
        (lambda: jnp.arange(8.0), ()),
        (lambda w: jnp.float32(3), (np.ones((16, 16), np.float32),)),
        (
            lambda w, x: jax.lax.cond(x.sum() > 0, lambda: w + x, lambda: w),
            (np.ones((16, 16), np.float32),) * 2,
        ),
        (
            lambda w: jax.lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, w)
            )[1],
            (np.ones(8),),
        ),
        (lambda w, empty: (w * 2, empty), (np.ones((16, 16), np.float32), {})),
    ],
)
def test_trivial_steps_run(step, arguments):
    same(parallel(step)(*arguments), jax.jit(step)(*arguments))


def test_what_is_no_array_is_refused_by_name_with_advice_that_works():
    with pytest.raises(CaptureError, match="the step returns 'text', a str"):
        parallel(lambda x: (x, "text"))(BATCH["x"])
    with pytest.raises(CaptureError) as inside:
        parallel(lambda batch: batch["x"].sum())({**BATCH, "name": "mnist"})
    assert "batch['name']" in str(inside.value) and "static_argnames='batch'" not in str(
        inside.value
    )
    with pytest.raises(CaptureError, match="static_argnames='mode'"):
        parallel(lambda x, mode: x.sum())(BATCH["x"], "train")
    with pytest.raises(CaptureError, match=r"1099511627776 does not fit into int32"):
        parallel(lambda x, count: x * count)(BATCH["x"], 2**40)
    for size in (-1, None):
        shape = jax.ShapeDtypeStruct((size, 8), jnp.float32)  # type: ignore[arg-type]
        with pytest.raises(CaptureError, match=rf"a shape of \({size}, 8\) is no array's"):
            mw.plan(lambda x: x.sum(), shape, cluster="8xcpu")
    with pytest.raises(CaptureError, match=r"run the step once with nnx\.jit"):
        parallel(lambda model, x: model(x.missing))(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), BATCH["x"])


def test_a_step_with_shard_map_is_refused():
    def step(x):
        mesh, cut = jax.make_mesh((8,), ("a",)), jax.P("a")
        return jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=cut, out_specs=cut)(x)

    with pytest.raises(CaptureError, match="places data itself, by `shard_map`"):
        parallel(step)(BATCH["x"])


# ---------------------------------------------------------------- jit's own arguments


def scaled(w, x, mode, bias=0.0):
    scale = 2.0 if mode == "a" else 1.0
    return w - 0.1 * jax.grad(lambda w: scale * jnp.mean((x @ w) ** 2))(w) + bias


@pytest.mark.parametrize(
    "step",
    [
        jax.jit(scaled, static_argnums=2),
        functools.partial(jax.jit, static_argnames=("mode",))(scaled),
        functools.partial(jax.jit(scaled, static_argnums=(2,)), bias=0.0),
        nnx.jit(scaled, static_argnums=2),
        jax.jit(jax.jit(scaled, static_argnums=2), static_argnums=2),
        jax.jit(functools.partial(scaled, bias=0.0), static_argnames="mode"),
    ],
)
def test_static_arguments_of_a_jitted_step_are_kept(step):
    w, x = np.ones((16, 8), np.float32), BATCH["x"]
    train = parallel(step, verify=type(step) is type(jax.jit(scaled)))
    for mode in ("a", "b", "a"):
        same(train(w, x, mode=mode), scaled(w, x, mode))
        same(train(w, x, mode), scaled(w, x, mode))


def test_arguments_given_by_partial_are_arguments_of_a_jitted_step():
    w, x = np.ones((16, 8), np.float32), BATCH["x"]
    train = parallel(
        functools.partial(jax.jit(scaled, static_argnums=2, donate_argnums=0), x=x, bias=0.5)
    )
    given = train(jnp.asarray(w), mode="a")
    same(given, scaled(w, x, "a", 0.5))
    train(given, mode="a")
    assert given.is_deleted()


def test_shardings_of_a_jitted_step_are_refused():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(CaptureError, match="shardings of its own"):
        parallel(jax.jit(lambda x: x, in_shardings=here))


def test_an_unhashable_static_argument_is_named():
    train = parallel(jax.jit(scaled, static_argnums=2))
    with pytest.raises(CaptureError, match=r"\['a'\], a list, which cannot be hashed") as refusal:
        train(np.ones((16, 8), np.float32), BATCH["x"], ["a"])
    assert "`mode`" in str(refusal.value)


# ---------------------------------------------------------------- donation


def test_an_array_given_twice_where_it_is_donated_is_refused_by_both_names():
    def step(state, other):
        return state["a"] + 1, state["b"] * 2 + other.sum()

    array = jnp.ones((16, 16))
    alias = jax.device_put(array, array.sharding)
    train = parallel(step, donate_argnums=0, verify=False)
    for state, other, names in (
        ({"a": array, "b": array}, jnp.ones(4), r"`state\['a'\]` and `state\['b'\]`"),
        ({"a": array, "b": alias}, jnp.ones(4), r"`state\['a'\]` and `state\['b'\]`"),
        ({"a": array, "b": jnp.ones((16, 16))}, array, r"`state\['a'\]` and `other`"),
    ):
        with pytest.raises(UsageError, match=names):
            train(state, other)
    fresh = lambda: {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}  # noqa: E731
    for _ in range(3):
        train(fresh(), jnp.ones((16, 16)))
    twice = jnp.ones((16, 16))
    with pytest.raises(UsageError, match="same array"):
        train({"a": twice, "b": twice}, jnp.ones((16, 16)))
    parallel(step, verify=False)({"a": twice, "b": twice}, twice)
