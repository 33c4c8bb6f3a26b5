"""Numbers that the whole batch makes and gradients are only scaled by are applied after the last microbatch.

Compared with the unsharded step, under SGD so that gradients show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.passes.late import SCALED
from meshwright.ir.passes.microbatch import Refusal, TimeAxis
from meshwright.ir.program import prepare

from .test_early_totals import inputs, layer


def hidden(params, x, scanned=False):
    h = params["embed"][x]
    if scanned:
        return jax.lax.scan(lambda h, w: (layer(h, w), None), h, params["layers"])[0]
    for w in zip(*params["layers"], strict=True):
        h = layer(h, w)
    return h


def routed_tokens(h, head, y):
    """Only tokens that the model sends on count, and by how many there are."""
    logits = h @ head
    sent = (logits[..., 0] > logits[..., 1]).astype(h.dtype)
    loss = jax.nn.logsumexp(logits, -1) - logits[..., 2]
    return (loss * sent).sum() / jnp.maximum(sent.sum(), 1)


def made_weights(h, head, y):
    weight = jax.lax.stop_gradient(jax.nn.sigmoid(h[..., 0]))
    share = weight / weight.sum()
    return (jax.nn.logsumexp(h @ head, -1) * share).sum()


def root_mean_square(h, head, y):
    return jnp.sqrt(jnp.mean((h @ head) ** 2))


def log_of_a_sum(h, head, y):
    return jnp.log(jnp.sum(jnp.exp(0.1 * (h @ head))))


def both(h, head, y):
    """A masked mean whose root is taken: one count is known early, one factor late."""
    mask = (y > 0).astype(h.dtype)
    loss = jax.nn.logsumexp(h @ head, -1)
    return jnp.sqrt((loss * mask).sum() / mask.sum())


FORMS = [routed_tokens, made_weights, root_mean_square, log_of_a_sum, both]


def two_factors(h, head, y):
    """Its gradient is a sum of two, each with another factor."""
    weight = jax.nn.sigmoid(h[..., 0])
    return (jax.nn.logsumexp(h @ head, -1) * weight).sum() / weight.sum()


def compared(h, head, y):
    score = (h @ head).sum(-1)
    return jnp.mean(jax.nn.relu(score - score.mean()))


def product_of_means(h, head, y):
    share = jax.nn.softmax(h @ head)
    return jnp.sum(
        share.mean((0, 1)) * jax.nn.one_hot(share.argmax(-1), share.shape[-1]).mean((0, 1))
    )


def training(form, scanned=False, dtype="f4"):
    def step(params, x, y):
        def loss(params):
            return form(hidden(params, x, scanned), params["head"], y)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), {"loss": value}

    return step


def prepared(form, dtype="f4", **options):
    params, x, y = inputs()
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
    return prepare(fold(capture(training(form, **options), params, x, y).graph).small, "none")


@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_only_scales_is_applied_to_totals(form, scanned):
    program = prepared(form, scanned=scanned)
    assert isinstance(program.time, TimeAxis)
    scaled = [i for i, op in enumerate(program.graph.ops) if SCALED in op.tag]
    assert scaled and program.time.body.isdisjoint(scaled)


@pytest.mark.parametrize(
    "form", [two_factors, compared, product_of_means], ids=lambda form: form.__name__
)
def test_what_is_no_multiple_is_refused(form):
    program = prepared(form)
    assert isinstance(program.time, Refusal) and "over the whole batch" in program.time.reason
    assert not any(SCALED in op.tag for op in program.graph.ops)


def test_half_floats_would_overflow_unscaled():
    assert isinstance(prepared(root_mean_square, "float16").time, Refusal)
    assert isinstance(prepared(root_mean_square, "bfloat16").time, TimeAxis)


def run(form, scanned=False, **request):
    step, args = training(form, scanned), inputs()
    running = mw.parallelize(step, cluster="8xcpu", verify=True, time_limit=20, **request)
    params, metrics = running(*args)
    truth, expected = jax.jit(step)(*args)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert np.abs(truth["head"] - args[0]["head"]).max() > 1e-3
    for name in ("embed", "head"):
        moved = np.abs(truth[name] - args[0][name]).max()
        np.testing.assert_allclose(params[name], truth[name], atol=1e-5 * max(moved, 0.1))


@pytest.mark.parametrize("form", FORMS[:1], ids=lambda form: form.__name__)
def test_microbatches_equal_plain_jax(form):
    run(form, microbatches=4, mesh=(4, 2))


@pytest.mark.parametrize("program", [pytest.param("stages", marks=pytest.mark.slow), "single"])
def test_pipelines_equal_plain_jax(program):
    run(routed_tokens, scanned=True, pp=2, microbatches=4, program=program)


def test_a_pipeline_that_counts_the_batch_early_reads_it_whole_in_its_updates():
    """The count scales the loss late too, so the update reads the batch, which no pass hands it in pieces."""
    run(both, pp=2, microbatches=4)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_equals_plain_jax(form):
    run(form, microbatches=2, mesh=(8,))
    run(form, pp=2, microbatches=4)
    run(form, scanned=True, microbatches=4, recompute="full")
