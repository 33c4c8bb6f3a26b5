"""A pipelined step equals the single-device step, and holds what its schedule says.

SGD in float32: the parameters after a step are the gradients. A wrong order may leave the loss right
and the gradients wrong, so parameters are compared, after one step and after three.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from meshwright.api import parallelize, plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import reference, verify_outputs
from meshwright.ir.errors import PlanError
from meshwright.ir.schedule import Schedule, Step, in_flight
from meshwright.models import build
from meshwright.planner.pipeline.schedules import gpipe, interleaved, one_f_one_b
from meshwright.planner.request import Request

from .pipelines import pipelined


@functools.cache
def case(name: str, optimizer: str = "sgd"):
    """The captured step, its inputs and what one device makes of them."""
    example = build(name, optimizer=optimizer, dtype="f32")
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    leaves, tree = jax.tree.flatten((state, batch))
    flat = jax.jit(lambda *leaves: example.step(*jax.tree.unflatten(tree, leaves)))
    truth = replace(reference(flat, captured.graph, leaves), tolerance=0.0)  # f32 throughout: strict
    return captured, jax.tree.map(np.asarray, leaves), flat, truth


@functools.cache
def stage_plan(name: str, devices: int, microbatches: int, optimizer: str = "sgd", **pins):
    """What the planner decides for one stage's devices."""
    request = Request(microbatches=microbatches, time_limit=20, gap=0.05, **{"recompute": "none", **pins})
    return plan_captured(case(name, optimizer)[0], f"{devices}xcpu", request, name)


def lowered(name: str, schedule: Schedule, devices: int = 2, optimizer: str = "sgd", **pins):
    plan = stage_plan(name, devices, schedule.microbatches, optimizer, **pins)
    return lower(pipelined(plan, case(name, optimizer)[0], schedule), case(name, optimizer)[0])


def check_equal(name: str, schedule: Schedule, devices: int = 2, optimizer: str = "sgd", **pins) -> None:
    captured, leaves, _, truth = case(name, optimizer)
    results = lowered(name, schedule, devices, optimizer, **pins).jitted(*leaves)
    verify_outputs(truth, results, captured.graph.output_names)


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """1F1B with gradients of weights apart, each as late as the next backward pass allows."""
    orders = []
    for order in one_f_one_b(ranks, microbatches).orders:
        late = [Step("weight", step.stage, step.microbatch) for step in order if step.kind == "backward"]
        split: list[Step] = []
        for step in order:
            split.append(step)
            if step.kind == "backward" and step.microbatch > 0:
                split.append(late.pop(0))
        orders.append((*split, *late))
    return Schedule("zb", ranks, microbatches, tuple(orders))


def shuffled(stages: int, microbatches: int, seed: int) -> Schedule:
    """A random order in which no rank waits for ever: a random walk over what may run next."""
    rng, orders, done = np.random.default_rng(seed), [[] for _ in range(stages)], set()
    left = [Step(kind, s, m) for kind in ("forward", "backward") for s in range(stages) for m in range(microbatches)]
    while left:
        ready = [step for step in left if _needs(step, stages) <= done]
        step = ready[rng.integers(len(ready))]
        left.remove(step)
        done.add(step)
        orders[step.stage].append(step)
    return Schedule("shuffled", stages, microbatches, tuple(map(tuple, orders)))


def _needs(step: Step, stages: int) -> set[Step]:
    if step.kind == "forward":
        return {step._replace(stage=step.stage - 1)} if step.stage else set()
    return {step._replace(kind="forward"), *([step._replace(stage=step.stage + 1)] if step.stage < stages - 1 else [])}


def test_losses_and_gradients_equal_one_device():
    check_equal("gpt-tiny", one_f_one_b(2, 4))


SCHEDULES = {
    "gpipe": gpipe(4, 4), "1f1b": one_f_one_b(4, 8), "interleaved": interleaved(2, 4, 2),
    "zero bubble": zero_bubble(4, 4), "shuffled": shuffled(4, 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_schedule_makes_the_same_gradients(schedule):
    check_equal("gpt-tiny", schedule)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_rank_holds_as_many_microbatches_as_its_schedule_says(schedule):
    running = lowered("gpt-tiny", schedule)
    jax.block_until_ready(running.jitted(*case("gpt-tiny")[1]))
    freed_by = "weight" if schedule.splits else "backward"
    assert running.peaks == [in_flight(schedule, rank, freed_by) for rank in range(schedule.ranks)]


@pytest.mark.slow
def test_tied_embeddings_get_both_gradients():
    check_equal("llama-tiny", one_f_one_b(2, 2))


@pytest.mark.slow
def test_stages_that_are_cut_by_data_and_by_tensor_dims_under_adam_and_clipping():
    check_equal("gpt-tiny", one_f_one_b(2, 2), 4, "adamw", mesh=(2, 2))


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
    check_equal("gpt-tiny", one_f_one_b(2, 2), recompute="full")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-tiny", "wrn-tiny"])
def test_statistics_of_the_whole_batch_allow_one_microbatch(name):
    check_equal(name, one_f_one_b(2, 1))
    plan, captured = stage_plan(name, 2, 1), case(name)[0]
    with pytest.raises(PlanError, match="pipeline of 2 microbatches is not possible"):
        lower(pipelined(plan, captured, one_f_one_b(2, 2)), captured)


@pytest.mark.slow
def test_state_is_passed_on_from_step_to_step():
    captured, leaves, flat, _ = case("gpt-tiny")
    running, ours, theirs = lowered("gpt-tiny", one_f_one_b(2, 4)), leaves, leaves
    for _ in range(3):
        found, wanted = running.jitted(*ours), jax.tree.leaves(flat(*theirs))
        new = dict(captured.graph.state)
        ours = [found[new[k]] if k in new else leaf for k, leaf in enumerate(leaves)]
        theirs = [wanted[new[k]] if k in new else leaf for k, leaf in enumerate(leaves)]
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(have), np.asarray(want), rtol=1e-3, atol=2e-5)


def test_the_decorator_runs_and_verifies_a_pipeline():
    example = build("gpt-tiny", optimizer="sgd", dtype="f32")
    plan = pipelined(stage_plan("gpt-tiny", 2, 4), case("gpt-tiny")[0], one_f_one_b(2, 4))
    step = parallelize(example.step, plan=plan, verify=True, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    state, _ = step(state, batch)
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
