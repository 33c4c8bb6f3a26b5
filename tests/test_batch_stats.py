"""Statistics per microbatch: `batch_stats="microbatch"` gives what the step on each microbatch gives, averaged.

Under SGD, so that gradients show. The rows of a microbatch are those that `time_groups` deals out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla import by_microbatch
from meshwright.ir.errors import PlanError, VerificationError
from meshwright.ir.passes.microbatch import time_groups

LAYERS, WIDTH, ROWS = 3, 16, 32


def mean_of(x, mask):
    return x.mean(0) if mask is None else (x * mask[:, None]).sum(0) / mask.sum()


def normed(x, layer, mask):
    mean = mean_of(x, mask)
    variance = mean_of((x - mean) ** 2, mask)
    scaled = (x - mean) * jax.lax.rsqrt(variance + 1e-3)
    return scaled * layer["scale"] + layer["bias"], (mean, variance)


def fast(x, layer, mask):
    """As flax does: the second moment less the square of the first."""
    mean = mean_of(x, mask)
    variance = jnp.maximum(0.0, mean_of(x * x, mask) - mean**2)
    return (x - mean) * (layer["scale"] * jax.lax.rsqrt(variance + 1e-3)) + layer["bias"], (
        mean,
        variance,
    )


def training(norm, masked=False):
    def forward(params, averages, x, y):
        mask = (y[:, 0] > -1).astype(x.dtype) if masked else None
        kept = []
        for layer, average in zip(params, averages, strict=True):
            x, found = norm(x @ layer["w"], layer, mask)
            kept.append(jax.tree.map(lambda a, s: 0.9 * a + 0.1 * s, average, found))
            x = jax.nn.relu(x)
        return jnp.mean((x - y) ** 2), kept

    def step(state, x, y):
        params, averages = state
        (loss, kept), grads = jax.value_and_grad(forward, has_aux=True)(params, averages, x, y)
        return (jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), kept), {"loss": loss}

    return step


def inputs():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = [
        {"w": 0.3 * normal(WIDTH, WIDTH), "scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
        for _ in range(LAYERS)
    ]
    averages = [(jnp.zeros(WIDTH), jnp.ones(WIDTH)) for _ in range(LAYERS)]
    return (params, averages), normal(ROWS, WIDTH) + 1, normal(ROWS, WIDTH)


def by_hand(step, plan, state, x, y):
    """The mean of what the step gives for each microbatch."""
    count = plan.microbatches
    groups = time_groups(ROWS, plan.mesh, count)

    def parts(rows):
        return (
            rows.reshape(groups, count, -1, rows.shape[-1])
            .swapaxes(0, 1)
            .reshape(count, -1, rows.shape[-1])
        )

    found = [step(state, *part) for part in zip(parts(x), parts(y), strict=True)]
    return jax.tree.map(lambda *each: sum(each) / count, *found)


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, wanted)


@pytest.mark.parametrize(
    ("norm", "masked", "request_"),
    [
        (normed, False, {"mesh": (8,), "microbatches": 4}),
        (fast, False, {"mesh": (4, 2), "microbatches": 2, "recompute": "full"}),
        (fast, True, {"mesh": (2, 4), "microbatches": 4}),
    ],
    ids=["two passes", "fast and recomputed", "masked"],
)
def test_each_microbatch_is_normed_by_itself(norm, masked, request_):
    step = training(norm, masked)
    made = mw.parallelize(step, verify=True, batch_stats="microbatch", **request_)
    found, plan = made(*inputs()), made.plan(*inputs())
    wanted = by_hand(step, plan, *inputs())
    close(found, wanted)
    with pytest.raises(AssertionError):
        close(found, step(*inputs()))
    [note] = [note for note in plan.notes if "batch_stats" in note]
    assert f"each of {plan.microbatches} microbatches" in note and "test_batch_stats.py" in note
    assert "statistics of each microbatch" in str(plan.batch)


def test_with_one_microbatch_nothing_changes():
    step = training(normed)
    made = mw.parallelize(step, verify=True, batch_stats="microbatch", mesh=(8,), microbatches=1)
    close(made(*inputs()), step(*inputs()))
    assert any("changes nothing with one microbatch" in note for note in made.plan(*inputs()).notes)


def test_verify_compares_with_the_step_microbatch_by_microbatch(monkeypatch):
    """Statistics of the whole batch are not what was asked for."""
    monkeypatch.setattr("meshwright.parallel.by_microbatch", lambda plan, captured: None)
    made = mw.parallelize(
        training(normed), verify=True, batch_stats="microbatch", mesh=(8,), microbatches=4
    )
    with pytest.raises(VerificationError):
        made(*inputs())
    assert (
        by_microbatch.by_microbatch(made.plan(*inputs()), made.lower(*inputs()).lowered.captured)
        is not None
    )


def test_statistics_are_of_the_whole_batch_unless_told():
    with pytest.raises(PlanError, match="a mean over the whole batch") as refused:
        mw.parallelize(training(normed), mesh=(8,), microbatches=4)(*inputs())
    assert 'batch_stats="microbatch"' in str(refused.value)
    free = mw.plan(training(normed), *inputs(), cluster="8xcpu")
    assert free.microbatches == 1 and free.batch.statistics == "batch"


def largest(x, layer, mask):
    return x / x.max(0) * layer["scale"] + layer["bias"], (x.mean(0), x.mean(0))


def test_what_it_cannot_do_is_refused():
    """A maximum of microbatches stands for none of the batch; then the option is not named."""
    for options in ({}, {"batch_stats": "microbatch"}):
        with pytest.raises(PlanError, match="a maximum over the whole batch") as refused:
            mw.parallelize(training(largest), mesh=(8,), microbatches=4, **options)(*inputs())
        assert 'batch_stats="microbatch"' not in str(refused.value)
    with pytest.raises(PlanError, match="batch_stats cannot be microbatch with a pipeline"):
        mw.parallelize(training(normed), pp=2, batch_stats="microbatch")(*inputs())
    with pytest.raises(PlanError, match="batch_stats cannot be 'batches'"):
        mw.Request(batch_stats="batches")


def test_the_plan_keeps_it(tmp_path):
    made = mw.parallelize(training(normed), batch_stats="microbatch", mesh=(8,), microbatches=4)
    plan = made.plan(*inputs())
    mw.save_plan(plan, tmp_path / "plan.json")
    again = mw.parallelize(training(normed), plan=mw.load_plan(tmp_path / "plan.json"), verify=True)
    close(again(*inputs()), made(*inputs()))
