"""A pipelined step equals the single-device step, and holds what its schedule says.

SGD in float32: the parameters after a step are the gradients. A wrong order may leave the loss right
and the gradients wrong, so parameters are compared, after one step and after three.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.api import parallelize
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import verify_outputs
from meshwright.ir.errors import PlanError
from meshwright.ir.pipeline.schedule import in_flight
from meshwright.models import build
from meshwright.planner.pipeline.limited import search_schedule
from meshwright.planner.pipeline.schedules import gpipe, interleaved, one_f_one_b
from meshwright.planner.pipeline.simulate import StageSeconds
from meshwright.planner.pipeline.tighten import ActivationMemory

from .pipelines import (
    case,
    check_equal,
    half_split,
    lowered,
    pipelined,
    shuffled,
    some,
    stage_plan,
    zero_bubble,
)


def test_losses_and_gradients_equal_one_device():
    check_equal("gpt-tiny", one_f_one_b(2, 4))


SCHEDULES = {
    "gpipe": gpipe(4, 4), "1f1b": one_f_one_b(4, 8), "interleaved": interleaved(2, 4, 2),
    "zero bubble": zero_bubble(4, 4), "half split": half_split(2, 4), "shuffled": shuffled(4, 4, 3),
    "searched": search_schedule(
        [StageSeconds(2, 3, 4, 0.1), StageSeconds(4, 1, 1, 0.1)], ActivationMemory([2] * 2, [1] * 2, [8, 5]), 4
    ).schedule,
}  # fmt: skip


@pytest.mark.parametrize("schedule", some(SCHEDULES, "interleaved", "zero bubble", "shuffled"))
def test_every_schedule_makes_the_same_gradients(schedule):
    check_equal("gpt-tiny", schedule)


@pytest.mark.parametrize("schedule", some(SCHEDULES, "1f1b", "half split", "searched"))
def test_a_rank_holds_as_many_microbatches_as_its_schedule_says(schedule):
    running = lowered("gpt-tiny", schedule)
    jax.block_until_ready(running.jitted(*case("gpt-tiny")[1]))
    freed_by = "weight" if schedule.splits else "backward"
    assert running.driver.peaks == [
        in_flight(schedule, rank, freed_by) for rank in range(schedule.ranks)
    ]


@pytest.mark.parametrize("program", ["stages", "single"])
def test_results_may_be_numbers_of_the_step_itself(program):
    """A learning rate among the metrics, and a table: no op makes them."""

    def loss(weights, x):
        x = x @ weights["in"]
        for layer in weights["layers"]:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x @ weights["out"]) ** 2)

    def step(weights, x):
        found, gradient = jax.value_and_grad(loss)(weights, x)
        new = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient)
        return new, {"loss": found, "rate": jnp.float32(0.1), "table": jnp.arange(4.0)}

    keys = iter(jax.random.split(jax.random.key(0), 6))
    layers = [jax.random.normal(next(keys), (16, 16)) for _ in range(4)]
    ends = {
        "in": jax.random.normal(next(keys), (8, 16)),
        "out": jax.random.normal(next(keys), (16, 4)),
    }
    weights = {"layers": layers, **ends}
    pins = {"pp": 2, "microbatches": 2, "program": program, "schedule": "gpipe"}
    found = parallelize(step, cluster="2xcpu", **pins)(weights, jnp.ones((8, 8)))
    wanted = jax.jit(step)(weights, jnp.ones((8, 8)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.slow
def test_tied_embeddings_get_both_gradients():
    check_equal("llama-tied-tiny", one_f_one_b(2, 2))


@pytest.mark.slow
def test_stages_that_are_cut_by_data_and_by_tensor_dims_under_adam_and_clipping():
    check_equal("gpt-tiny", one_f_one_b(2, 2), 4, "adamw", mesh=(2, 2))


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
    check_equal("gpt-tiny", one_f_one_b(2, 2), recompute="full")


@pytest.mark.slow
def test_statistics_of_the_whole_batch_allow_one_microbatch():
    check_equal("wrn-tiny", one_f_one_b(2, 1))
    plan, captured = stage_plan("wrn-tiny", 2, 1), case("wrn-tiny")[0]
    with pytest.raises(PlanError, match="pipeline of 2 microbatches is not possible"):
        lower(pipelined(plan, captured, one_f_one_b(2, 2)), captured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, optimizer, near",
    [(one_f_one_b(2, 4), "sgd", 2e-5), (interleaved(2, 4, 2), "adamw", 3e-4)],
)
def test_state_is_passed_on_from_step_to_step(schedule, optimizer, near):
    """Counters of the optimizer are read by all stages, of which two may share their devices."""
    captured, leaves, flat, _ = case("gpt-tiny", optimizer)
    running, ours, theirs = lowered("gpt-tiny", schedule, optimizer=optimizer), leaves, leaves
    for _ in range(3):
        found, wanted = running.jitted(*ours), jax.tree.leaves(flat(*theirs))
        new = dict(captured.graph.state)
        ours = [found[new[k]] if k in new else leaf for k, leaf in enumerate(leaves)]
        theirs = [wanted[new[k]] if k in new else leaf for k, leaf in enumerate(leaves)]
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(have), np.asarray(want), rtol=1e-3, atol=near)


def test_the_decorator_runs_and_verifies_a_pipeline():
    example = build("gpt-tiny", optimizer="sgd", dtype="f32")
    plan = pipelined(stage_plan("gpt-tiny", 2, 4), case("gpt-tiny")[0], one_f_one_b(2, 4))
    step = parallelize(example.step, plan=plan, verify=True, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    state, _ = step(state, batch)
    state, metrics = step(state, batch)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.slow
def test_stages_of_one_rank_share_the_counter_of_steps():
    """Adam counts steps once for all parameters; two stages of a rank update from it, neither gives it up first."""
    example = build("gpt-tiny", dtype="f32")
    schedule = interleaved(2, 2, 2)
    plan = pipelined(stage_plan("gpt-tiny", 2, 2, "adamw"), case("gpt-tiny", "adamw")[0], schedule)
    step = parallelize(example.step, plan=plan, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    for _ in range(2):
        state, metrics = step(state, batch)
    assert np.isfinite(float(metrics["loss"]))


def test_more_stages_than_the_forward_pass_has_room_for_are_refused():
    plan, captured = stage_plan("gpt-tiny", 2, 4), case("gpt-tiny")[0]
    with pytest.raises(PlanError, match="stage 1 of 2 has no op of the forward pass"):
        lower(pipelined(plan, captured, one_f_one_b(2, 4), [0, len(captured.graph.ops)]), captured)


@pytest.mark.slow
def test_stages_may_have_different_meshes():
    """Four devices, then two: each microbatch has the same rows on both."""
    schedule, (captured, leaves, _, truth) = one_f_one_b(2, 2), case("gpt-tiny")
    wide, narrow = (
        pipelined(stage_plan("gpt-tiny", n, 2, mesh=(n,)), captured, schedule) for n in (4, 2)
    )
    stages = (wide.pipeline.stages[0], narrow.pipeline.stages[1])
    plan = wide.model_copy(update={"pipeline": wide.pipeline.model_copy(update={"stages": stages})})
    verify_outputs(truth, lower(plan, captured).jitted(*leaves), captured.graph.output_names)


def test_scalars_cross_together():
    """Clipping needs the norm of every gradient on every stage: one message from each stage to each."""
    running = lowered("gpt-tiny", one_f_one_b(2, 2), optimizer="adamw")
    sent = [
        sorted(len(message.values) for message in program.messages)
        for name, program in running.passes.items()
        if name.startswith("update 0")
    ]
    assert all(sum(sizes) > 10 and len(sizes) <= 2 for sizes in sent), sent
