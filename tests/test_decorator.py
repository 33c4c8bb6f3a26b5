"""`@mw.parallelize`, `mw.plan` and `mw.lower` as users call them."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshwright as mw
from meshwright import planning
from meshwright.backends.xla.lower import Lowered
from meshwright.backends.xla.rounding import Noise
from meshwright.backends.xla.verify import Reference, verify_outputs
from meshwright.ir.errors import (
    CaptureError,
    InfeasibleError,
    LoweringError,
    MismatchError,
    PlanError,
    UsageError,
    VerificationError,
)

QUICK = mw.Request(mesh=(8,), microbatches=1, recompute="none")


def step(params, batch, *, rate=0.1):
    def loss_of(params):
        hidden = jnp.tanh(batch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2), hidden.sum()

    (loss, total), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    new = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return new, {"loss": loss, "aux": [total, batch["x"].sum(axis=1)]}


def arguments(batch=32, width=64, hidden=128):
    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(width, hidden)).astype(np.float32),
        "down": rng.normal(size=(hidden, width)).astype(np.float32),
    }
    return params, {
        "x": rng.normal(size=(batch, width)).astype(np.float32),
        "y": rng.normal(size=(batch, width)).astype(np.float32),
    }


def parallel(function=step, **options):
    options = {"cluster": "8xcpu", "mesh": (8,), "microbatches": 1, "recompute": "none", **options}
    return mw.parallelize(function, **options)


def same(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def test_results_have_the_users_trees_and_numbers():
    params, batch = arguments()
    same(parallel()(params, batch), jax.jit(step)(params, batch))


def test_results_feed_the_next_call_and_are_laid_out_as_planned():
    params, batch = arguments()
    train, plain = parallel(), jax.jit(step)
    a = b = params
    for _ in range(3):
        (a, _), (b, _) = train(a, batch), plain(b, batch)
    same(a, b, 1e-4)
    running = train.lower(params, batch)
    wanted = running.lowered.input_shardings
    given = [leaf.sharding for leaf in jax.tree.leaves(a)]
    assert all(x.is_equivalent_to(y, 2) for x, y in zip(given, wanted, strict=False))


def test_keyword_arguments_and_any_pytree():
    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["p", "n"], meta_fields=["tag"]
    )
    @dataclass
    class State:
        p: dict
        n: jax.Array
        tag: str

    def own(state, *, batch, scale):
        new, out = step(state.p, batch, rate=scale)
        return State(new, state.n + 1, state.tag), (out, None)

    params, batch = arguments()
    state = State(params, jnp.zeros((), jnp.int32), "mine")
    found = parallel(own)(state, batch=batch, scale=0.2)
    assert isinstance(found[0], State) and found[0].tag == "mine"
    same(found, jax.jit(own)(state, batch=batch, scale=0.2))


def test_static_arguments_by_number_and_by_name():
    def own(params, batch, kind, deep=False):
        act = {"tanh": jnp.tanh, "relu": jax.nn.relu}[kind]
        out = act(batch["x"] @ params["up"])
        return params, (out * 2 if deep else out).sum()

    params, batch = arguments()
    train = parallel(own, static_argnums=2, static_argnames="deep")
    for kind, deep in (("tanh", False), ("relu", False), ("relu", True)):
        expected = own(params, batch, kind, deep=deep)
        same(train(params, batch, kind, deep=deep), expected, 1e-4)
        same(train(params, batch, kind=kind, deep=deep), expected, 1e-4)


def test_donated_arguments_are_given_up_and_others_are_not():
    params, batch = arguments()
    train = parallel(donate_argnums=0)
    first, _ = train(params, batch)
    second, _ = train(first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    kept, _ = parallel()(second, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((second, kept)))


def test_a_step_that_is_jitted_already_keeps_its_options():
    params, batch = arguments()
    jitted = jax.jit(step, donate_argnums=0)
    train = parallel(jitted)
    first, _ = train(params, batch)
    train(first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_planned_and_compiled_once_per_shapes(monkeypatch):
    calls = []
    search = planning.search
    monkeypatch.setattr(planning, "search", lambda *a, **k: calls.append(1) or search(*a, **k))
    train = parallel()
    params, batch = arguments()
    for _ in range(3):
        train(params, batch)
    assert len(calls) == 1
    train(*arguments(batch=16))
    train(params, batch)
    assert len(calls) == 2


def test_plan_lower_and_explain_without_running():
    params, batch = arguments()
    train = parallel()
    abstract = jax.eval_shape(lambda: (params, batch))
    found = train.plan(*abstract)
    assert found.mesh.shape == (8,) and train.explain(*abstract).startswith("step on 8xcpu")
    assert train.lower(*abstract).plan == found
    assert train.lower(*abstract).hlo().startswith("HloModule jit_step")
    assert abs(train.lower(*abstract).audit().difference) < 0.25


def test_a_plan_made_elsewhere_is_used(tmp_path):
    params, batch = arguments()
    found = mw.plan(step, params, batch, cluster="8xcpu", request=QUICK)
    mw.save_plan(found, tmp_path / "plan.json")
    train = mw.parallelize(step, plan=mw.load_plan(tmp_path / "plan.json"))
    same(train(params, batch), jax.jit(step)(params, batch))
    same(mw.lower(found, step, params, batch)(params, batch), jax.jit(step)(params, batch))


def test_the_devices_of_this_process_are_the_default():
    params, batch = arguments()
    train = mw.parallelize(step, mesh=(8,), microbatches=1, recompute="none")
    assert train.plan(params, batch).cluster.size == 8
    same(train(params, batch), jax.jit(step)(params, batch))


# ---------------------------------------------------------------- verify


def test_verify_compares_the_first_call():
    params, batch = arguments()
    same(parallel(verify=True)(params, batch), jax.jit(step)(params, batch))


def test_verify_with_static_and_donated_arguments():
    def own(params, batch, rate, kind):
        return step(params, batch, rate=rate if kind == "plain" else 0.0)

    params, batch = arguments()
    train = parallel(own, verify=True, static_argnums=3, donate_argnums=0)
    same(train(params, batch, 0.1, "plain"), own(params, batch, 0.1, "plain"))


def test_verify_finds_a_program_that_is_wrong(monkeypatch):
    from meshwright.backends.xla import collectives

    right = collectives.move
    broken = lambda x, steps, mesh: right(x, steps, mesh) * (1.02 if steps else 1.0)  # noqa: E731
    monkeypatch.setattr(collectives, "move", broken)
    with pytest.raises(VerificationError, match=r"output `result\[0\]"):
        parallel(verify=True)(*arguments(batch=512))  # so that cutting it pays


def test_tolerances_are_those_of_the_precision_and_of_rounding():
    one = {"w": np.ones(4, np.float32)}
    truth = Reference(one, {}, 1e-3)
    verify_outputs(truth, {"w": one["w"] + np.float32(9e-4)}, ["w"])
    with pytest.raises(VerificationError, match="`w`"):
        verify_outputs(truth, {"w": one["w"] + np.float32(2e-3)}, ["w"])
    moved = np.full(4, 0.02)
    restless = Reference(one, {0: Noise(moved, moved)}, 1e-3)
    verify_outputs(restless, {"w": one["w"] * np.float32(1.03)}, ["w"])
    with pytest.raises(VerificationError):
        verify_outputs(truth, {"w": one["w"] * np.float32("nan")}, ["w"])


def test_a_lowered_program_refuses_other_arguments():
    params, batch = arguments()
    running = mw.lower(
        mw.plan(step, params, batch, cluster="8xcpu", request=QUICK), step, params, batch
    )
    with pytest.raises(MismatchError, match=r"it takes float32\[\d+, \d+\], was given float32"):
        running(params, jax.tree.map(lambda x: x[: len(x) // 2], batch))
    with pytest.raises(MismatchError, match="made for other arguments"):
        running(batch=batch, params=params)


def test_a_step_is_compiled_once(caplog):
    train, (params, batch) = parallel(), arguments()
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        for _ in range(4):
            params, _ = train(params, batch)
    found = [
        r.getMessage()
        for r in caplog.records
        if "Finished XLA compilation of jit(step)" in r.getMessage()
    ]
    assert len(found) == 1, found


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: mw.parallelize(3), "takes a function"),
        (lambda: mw.parallelize(step, memory=(1,)), "memory cannot be"),
        (lambda: mw.parallelize(step, static_argnums=7), "static_argnums has 7"),
    ],
)
def test_wrong_options_are_refused_where_they_are_given(make, complaint):
    with pytest.raises(mw.MeshwrightError, match=complaint):
        make()


def test_updated_state_is_judged_by_its_change():
    """A gradient 8 times too large is a wrong step, however small the learning rate."""
    before, gradient = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
    after = lambda scale: [before - np.float32(1e-3) * scale * gradient]  # noqa: E731
    truth = Reference(after(1.0), {}, 1e-3, {0: before})
    verify_outputs(truth, after(1.0005), ["w"])
    for wrong in (8.0, 0.0, 1.01):
        with pytest.raises(VerificationError, match="of its change"):
            verify_outputs(truth, after(wrong), ["w"])


def test_what_is_not_finite_must_be_the_same():
    masked = [np.array([1.0, -np.inf, np.nan, np.inf], np.float32)]
    truth = Reference(masked, {}, 1e-3)
    verify_outputs(truth, masked, ["logits"])
    for position, other in ((1, 0.0), (2, 1.0), (3, -np.inf), (0, np.nan)):
        wrong = masked[0].copy()
        wrong[position] = other
        with pytest.raises(VerificationError):
            verify_outputs(truth, [wrong], ["logits"])
    empty = [np.zeros((0, 3), np.float32)]
    verify_outputs(Reference(empty, {}, 1e-3), empty, ["nothing"])


# ---------------------------------------------------------------- refusals


def test_a_plan_for_another_step_or_shapes_is_refused():
    params, batch = arguments()
    found = mw.plan(step, params, batch, cluster="8xcpu", request=QUICK)
    with pytest.raises(MismatchError, match="was made for graph"):
        mw.lower(found, step, *arguments(batch=16))
    with pytest.raises(MismatchError):
        mw.parallelize(step, plan=found)(*arguments(width=32))


def test_a_cluster_larger_than_this_process_is_refused_when_run():
    train = mw.parallelize(step, cluster="16xcpu", mesh=(16,), microbatches=1, recompute="none")
    assert train.plan(*arguments()).mesh.size == 16
    with pytest.raises(LoweringError, match="needs 16 devices, this process has 8"):
        train(*arguments())


def test_what_cannot_be_honoured_is_refused_before_anything_runs():
    params, batch = arguments()
    with pytest.raises(UsageError, match="no option 'meshh'"):
        mw.parallelize(step, meshh=(8,))
    with pytest.raises(PlanError, match="32 cannot be cut into 3"):
        parallel(microbatches=3)(params, batch)
    with pytest.raises(InfeasibleError, match="no plan fits"):
        parallel(memory=1000.0)(params, batch)
    with pytest.raises(CaptureError):
        parallel()(params, {"x": "text", "y": batch["y"]})
    with pytest.raises(mw.MeshwrightError, match="h101"):
        parallel(cluster="8xh101")(params, batch)


def test_side_effects_and_own_placements_are_refused_by_name():
    def prints(params, batch):
        jax.debug.print("x {}", batch["x"][0, 0])
        return step(params, batch)

    with pytest.raises(CaptureError) as refusal:
        parallel(prints)(*arguments())
    assert "try" in str(refusal.value)


def test_an_op_without_a_rule_is_kept_whole_and_named():
    def own(params, batch):
        new, out = step(params, batch)
        largest = jax.lax.reduce(
            params["up"], jnp.float32(0), lambda a, b: jnp.maximum(a, jnp.abs(b)), (0, 1)
        )
        return new, {**out, "largest": largest}

    params, batch = arguments()
    found = mw.plan(own, params, batch, cluster="8xcpu", request=QUICK)
    assert any(line.startswith("reduce") for line in found.opaque), found.opaque
    same(parallel(own)(params, batch), jax.jit(own)(params, batch), 1e-3)


def test_while_and_cond_are_planned_inside_and_what_they_cost_is_told():
    def own(params, batch):
        new, out = step(params, batch)
        turns = jax.lax.while_loop(lambda c: c < 5.0, lambda c: c + out["loss"] ** 0, 0.0)
        pick = jax.lax.cond(out["loss"] > 0, lambda x: x * 2, lambda x: x, params["up"])
        return new, {**out, "turns": turns, "pick": pick.sum()}

    params, batch = arguments()
    found = mw.plan(own, params, batch, cluster="8xcpu", request=QUICK)
    assert not found.opaque
    assert {note.split()[0] for note in found.notes} >= {"while", "cond"}
    same(parallel(own)(params, batch), jax.jit(own)(params, batch), 1e-4)


def test_rematerialised_custom_and_nested_functions_are_ordinary():
    @jax.custom_vjp
    def soft(x):
        return jnp.tanh(x)

    soft.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))

    @jax.jit
    def layer(w, x):
        return soft(x @ w)

    def own(params, batch):
        def loss_of(params):
            hidden = jax.checkpoint(layer)(params["up"], batch["x"])
            return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}

    params, batch = arguments()
    same(parallel(own)(params, batch), jax.jit(own)(params, batch))


def test_the_quick_way_in_notices_other_shapes_trees_and_layouts():
    params, batch = arguments()
    train, plain = parallel(), jax.jit(step)
    for _ in range(4):
        same(train(params, batch), plain(params, batch))
    assert train._quick[1] is not None
    small = arguments(batch=16)
    same(train(*small), plain(*small))
    same(train(params, batch), plain(params, batch))
    for _ in range(3):
        same(train(params, batch), plain(params, batch))
    elsewhere = jax.device_put(params, jax.devices()[3])
    same(train(elsewhere, batch), plain(params, batch))
    same(train(params, batch=batch), plain(params, batch))
    with pytest.raises(CaptureError, match="missing 1 required"):
        train(params)


def test_a_batch_that_lies_as_the_user_placed_it_is_refused_once_and_then_moved(monkeypatch):
    """By an input pipeline of their own, on a mesh of their own; jax's refusal costs more than a small step."""
    refused, real = [], Lowered.placed
    monkeypatch.setattr(Lowered, "placed", lambda *args: refused.append(1) or real(*args))
    params, batch = arguments()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("mine",))
    own = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "mine")))
    train, plain = parallel(), jax.jit(step)
    for taken in (batch, own, own, batch, own):
        same(train(params, taken), plain(params, batch))
        same(train(params, batch=taken), plain(params, batch))
    assert train._quick[0] is not None
    assert len(refused) == 2  # of each way to call it, once
    same(train(*arguments(batch=16)), plain(*arguments(batch=16)))
    with pytest.raises(CaptureError, match="missing 1 required"):
        train(params)


def test_the_quick_way_in_donates_what_was_asked():
    params, batch = arguments()
    train = parallel(donate_argnums=0)
    for _ in range(5):
        before = params
        params, _ = train(params, batch)
    assert train._quick[1] is not None
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
