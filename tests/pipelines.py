"""Pipelined plans for tests, cut from ordinary plans of one stage's devices, and what they should compute."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import Captured, capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import reference, verify_outputs
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.pipeline.schedule import Schedule, Step
from meshwright.ir.plan import Pipeline, Plan, Stage
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.pipeline.schedules import one_f_one_b
from meshwright.planner.pipeline.search import Pipelines
from meshwright.planner.problem import Problem
from meshwright.planner.request import Request
from meshwright.planner.search.search import Search
from meshwright.planner.trace import Trace


def some(schedules: dict[str, Schedule], *usual: str) -> list:
    """Parameters by name; only the usual ones run where slow tests do not."""
    return [
        pytest.param(schedule, id=name, marks=() if name in usual else pytest.mark.slow)
        for name, schedule in schedules.items()
    ]


def pipelined(
    plan: Plan, captured: Captured, schedule: Schedule, cuts: list[int] | None = None
) -> Plan:
    """Every stage takes the mesh and the decisions of `plan`; layers are dealt out evenly."""
    cuts = cuts or even_cuts(captured, schedule.stages)
    stages = tuple(
        Stage(
            cut=cut, blocks="", mesh=plan.mesh, strategies=plan.strategies, slots=plan.slots, forward_seconds=0,
            backward_seconds=0, weight_seconds=0, send_seconds=0, once_seconds=0, peak_bytes=0, held=0, memory={},
        )
        for cut in cuts
    )  # fmt: skip
    first = tuple(rank * plan.mesh.size for rank in range(schedule.ranks))
    pipeline = Pipeline(schedule=schedule.name, stages=stages, first=first, orders=schedule.text())
    return plan.model_copy(update={"pipeline": pipeline, "microbatches": schedule.microbatches})


def even_cuts(captured: Captured, stages: int) -> list[int]:
    """Cuts between the layers of the forward pass, the first repeated block; without one, in its first quarter."""
    blocks = fold(captured.graph).blocks
    if not blocks:
        return [len(captured.graph.ops) * k // (4 * stages) for k in range(stages)]
    block = blocks[0]
    return [0] + [
        block.start + block.period * round(block.repeats * k / stages) for k in range(1, stages)
    ]


@functools.cache
def case(name: str, optimizer: str = "sgd"):
    """The captured step, its inputs and what one device makes of them."""
    example = build(name, optimizer=optimizer, dtype="f32")
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    leaves, tree = jax.tree.flatten((jax.tree.map(_later, state), batch))
    flat = jax.jit(lambda *leaves: example.step(*jax.tree.unflatten(tree, leaves)))
    truth = replace(reference(flat, captured, leaves), tolerance=0.0)  # f32 throughout: strict
    return captured, jax.tree.map(np.asarray, leaves), flat, truth


def _later(leaf):
    """Counters of steps as after a few of them: a learning rate that warms up from 0 would hide every gradient."""
    return leaf + 5 if leaf.ndim == 0 and np.issubdtype(leaf.dtype, np.integer) else leaf


@functools.cache
def stage_plan(name: str, devices: int, microbatches: int, optimizer: str = "sgd", **pins):
    """What the planner decides for one stage's devices."""
    request = Request(
        microbatches=microbatches, time_limit=20, gap=0.05, **{"recompute": "none", **pins}
    )
    return plan_captured(case(name, optimizer)[0], f"{devices}xcpu", request, name)


def lowered(name: str, schedule: Schedule, devices: int = 2, optimizer: str = "sgd", **pins):
    plan = stage_plan(name, devices, schedule.microbatches, optimizer, **pins)
    return lower(pipelined(plan, case(name, optimizer)[0], schedule), case(name, optimizer)[0])


def check_equal(
    name: str, schedule: Schedule, devices: int = 2, optimizer: str = "sgd", **pins
) -> None:
    captured, leaves, _, truth = case(name, optimizer)
    results = lowered(name, schedule, devices, optimizer, **pins).jitted(*leaves)
    verify_outputs(truth, results, captured.graph.output_names)


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """1F1B with gradients of weights apart, each as late as the next backward pass allows."""
    orders = []
    for order in one_f_one_b(ranks, microbatches).orders:
        late = [
            Step("weight", step.stage, step.microbatch) for step in order if step.kind == "backward"
        ]
        split: list[Step] = []
        for step in order:
            split.append(step)
            if step.kind == "backward" and step.microbatch > 0:
                split.append(late.pop(0))
        orders.append((*split, *late))
    return Schedule("zb", ranks, microbatches, tuple(orders))


def half_split(ranks: int, microbatches: int) -> Schedule:
    """As `zero_bubble`, but every other microbatch makes its gradients of weights in its backward pass."""
    full = zero_bubble(ranks, microbatches)
    orders = (
        tuple(s for s in order if s.kind != "weight" or s.microbatch % 2) for order in full.orders
    )
    return Schedule("half-split", ranks, microbatches, tuple(orders))


def shuffled(stages: int, microbatches: int, seed: int) -> Schedule:
    """A random order in which no rank waits for ever: a random walk over what may run next."""
    rng, orders, done = np.random.default_rng(seed), [[] for _ in range(stages)], set()
    left = [
        Step(kind, s, m)
        for kind in ("forward", "backward")
        for s in range(stages)
        for m in range(microbatches)
    ]
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
    return {
        step._replace(kind="forward"),
        *([step._replace(stage=step.stage + 1)] if step.stage < stages - 1 else []),
    }


def timed(plan: Plan, forward: float, backward: float, weight: float, once: float) -> Plan:
    """The plan with predicted seconds, the same for all stages."""
    seconds = {"forward": forward, "backward": backward, "weight": weight, "once": once}
    assert plan.pipeline is not None
    update = {f"{name}_seconds": value for name, value in seconds.items()}
    stages = tuple(stage.model_copy(update=update) for stage in plan.pipeline.stages)
    return plan.model_copy(update={"pipeline": plan.pipeline.model_copy(update={"stages": stages})})


@functools.lru_cache(maxsize=8)
def captured_of(name: str, **options) -> Captured:
    """A model of the zoo, traced once for the tests that follow each other."""
    example = build(name, **options)
    return capture(example.step, example.state, example.batch, donate_argnums=0)


def problem_of(name: str, cluster: str, **options) -> Problem:
    """A model of the zoo to be planned with a pipeline."""
    folded, where = fold(captured_of(name, **options).graph), Cluster.parse(cluster)
    return Problem(folded, where, Request(pp="auto"), Roofline(where), name, "x")


def pipelines_on(problem: Problem) -> Pipelines:
    """A search over its pipelines that begins now."""
    return Pipelines(problem, Trace(problem.request.time_limit))


def flat_on(problem: Problem) -> Search:
    """A search over its plans without a pipeline that begins now."""
    return Search(problem, Trace(problem.request.time_limit))


def planned(name: str, cluster: str, request: Request, **options) -> Plan:
    return plan_captured(captured_of(name, **options), cluster, request, name)
