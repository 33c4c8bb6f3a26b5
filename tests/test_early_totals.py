"""Totals that the step's inputs alone decide are taken before the first microbatch: masked means and their kin.

Compared with the unsharded step by `verify` and by hand, under SGD so that gradients show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.unstack import capture_unstacked
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.passes.early import EARLY
from meshwright.ir.passes.microbatch import Refusal, TimeAxis
from meshwright.ir.program import prepare

B, T, D, V, LAYERS = 16, 8, 32, 24, 4


def layer(h, w):
    return h + jax.nn.relu(h @ w[0]) @ w[1]


def picked(params, x, y, scanned=False):
    """Loss of each token, and which count."""
    h = params["embed"][x]
    if scanned:
        h, _ = jax.lax.scan(lambda h, w: (layer(h, w), None), h, params["layers"])
    else:
        for w in zip(*params["layers"], strict=True):
            h = layer(h, w)
    lp = jax.nn.log_softmax(h @ params["head"])
    labels = jnp.maximum(y, 0)
    return -jnp.take_along_axis(lp, labels[..., None], -1)[..., 0], (y > 0).astype("f4")


def masked(loss, mask, y):
    return (loss * mask).sum() / mask.sum()  # which the step gives back too


def at_least_one(loss, mask, y):
    return (loss * mask).sum() / jnp.maximum(mask.sum(), 1)


def chosen(loss, mask, y):
    return jnp.mean(loss, where=mask > 0)


def average(loss, mask, y):
    return jnp.average(loss, weights=mask)


def shares(loss, mask, y):
    share = mask / mask.sum()
    return (loss * share).sum()


def by_class(loss, mask, y):
    weight = jnp.linspace(0.5, 2, V)[y] * mask
    return (loss * weight).sum() / weight.sum()


def balanced(loss, mask, y):
    """Weights by how frequent a class is in the whole batch."""
    count = jnp.bincount(jnp.maximum(y, 0).ravel(), length=V)
    return (loss * mask / (1 + count[y])).mean()


def recomputed(loss, mask, y):
    return jax.checkpoint(lambda loss: masked(loss, (y > 0).astype("f4"), y))(loss)


def by_sequence(loss, mask, y):
    """Means of sequences, of those that have any token."""
    counts = mask.sum(1)
    means = (loss * mask).sum(1) / jnp.maximum(counts, 1)
    return means.sum() / (counts > 0).sum()


def counted_in_chunks(loss, mask, y):
    def chunk(sums, now):
        loss, mask = now
        return (sums[0] + (loss * mask).sum(), sums[1] + mask.sum()), None

    halves = tuple(v.reshape(B, 2, T // 2).swapaxes(0, 1) for v in (loss, mask))
    total, count = jax.lax.scan(chunk, (0.0, 0.0), halves)[0]
    return total / count


FORMS = [
    masked, at_least_one, chosen, average, shares, by_class, balanced, recomputed, by_sequence, counted_in_chunks,
]  # fmt: skip


def training(form, scanned=False):
    def step(params, x, y):
        def loss(params):
            losses, mask = picked(params, x, y, scanned)
            return form(losses, mask, y), mask.sum()

        (value, tokens), grads = jax.value_and_grad(loss, has_aux=True)(params)
        moved = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return moved, {"loss": value, "tokens": tokens}

    return step


def inputs():
    rng = np.random.default_rng(0)
    make = lambda *shape: (rng.normal(size=shape) / shape[-2] ** 0.5).astype("f4")  # noqa: E731
    params = {
        "embed": make(V, D),
        "layers": (make(LAYERS, D, D), make(LAYERS, D, D)),
        "head": make(D, V),
    }
    x, y = rng.integers(0, V, (B, T)), rng.integers(-V, V, (B, T))
    y[: B // 2] = -1  # microbatches differ in how many tokens count
    return params, x.astype("i4"), y.astype("i4")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_step_has_a_time_axis(form):
    program = prepare(fold(capture(training(form), *inputs()).graph).small, "none")
    assert isinstance(program.time, TimeAxis)
    early = [i for i, op in enumerate(program.graph.ops) if op.tag.endswith(EARLY)]
    assert early and program.time.body.isdisjoint(early)


def test_plain_means_are_left_as_they_are():
    graph = fold(capture(training(lambda loss, mask, y: loss.mean()), *inputs()).graph).small
    assert not any(op.tag.endswith(EARLY) for op in prepare(graph, "none").graph.ops)


def test_totals_of_what_the_model_makes_are_not_early():
    def compared(loss, mask, y):
        return jax.nn.relu(loss - loss.mean()).mean()

    program = prepare(fold(capture(training(compared), *inputs()).graph).small, "none")
    assert isinstance(program.time, Refusal)
    assert not any(op.tag.endswith(EARLY) for op in program.graph.ops)


def test_what_a_total_is_spread_over_is_made_per_microbatch():
    """1 / count for each token, the whole batch's, would be held through all passes."""
    program = prepare(fold(capture(training(masked), *inputs()).graph).small, "none")
    graph, time = program.graph, program.time
    assert isinstance(time, TimeAxis)
    held = {v for i, op in enumerate(graph.ops) if i not in time.body for v in op.outputs}
    read = {v for i in time.body for v in graph.ops[i].inputs} & held
    names = program.value_tags
    whole = [v for v in read if graph.types[v].shape[:1] == (B,) and "update" not in names[v]]
    consts = set(graph.constant_ids)
    made = {v: op for op in graph.ops for v in op.outputs}
    assert all(consts.issuperset(made[v].inputs) for v in whole)


def run(form, scanned=False, **request):
    step, args = training(form, scanned), inputs()
    running = mw.parallelize(step, cluster="8xcpu", verify=True, time_limit=20, **request)
    params, metrics = running(*args)
    truth, expected = jax.jit(step)(*args)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert metrics["tokens"] == expected["tokens"]
    np.testing.assert_allclose(params["embed"], truth["embed"], atol=1e-6)
    np.testing.assert_allclose(params["head"], truth["head"], atol=1e-6)


REQUESTS = {
    "microbatches": {"microbatches": 4, "mesh": (4, 2)},
    "stages": {"pp": 2, "microbatches": 4, "program": "stages"},
    "zero bubble": {"pp": 2, "microbatches": 2, "schedule": "zb-h1"},
}


@pytest.mark.parametrize(
    "request_",
    [pytest.param(r, marks=pytest.mark.slow if "pp" in r else ()) for r in REQUESTS.values()],
    ids=REQUESTS,
)
def test_a_masked_mean_equals_plain_jax(request_):
    run(masked, **request_)


@pytest.mark.parametrize("program", ["stages", pytest.param("single", marks=pytest.mark.slow)])
def test_a_masked_mean_after_scanned_layers_equals_plain_jax(program):
    run(masked, scanned=True, pp=2, microbatches=4, program=program)


def test_layers_taken_apart_have_the_same_time_axis():
    graph = capture_unstacked(training(masked, scanned=True), *inputs()).captured.graph
    assert isinstance(prepare(fold(graph).whole, "none").time, TimeAxis)


@pytest.mark.parametrize("form", FORMS[1:], ids=lambda form: form.__name__)
@pytest.mark.slow
def test_every_form_equals_plain_jax(form):
    run(form, microbatches=4, mesh=(4, 2))
    run(form, pp=2, microbatches=4)
