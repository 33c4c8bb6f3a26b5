"""Pipelines of every schedule over stages that are cut every way equal the single-device step, on 8 devices.

Losses, metrics and the state after an SGD step in float32: what a parameter moved by is its gradient, and
differences are relative to the largest movement. Batch norm takes statistics of the whole batch, so wide ResNets run
one microbatch. Names of their parameters say nothing of tensor parallelism, so their state is cut by the planner, under
a memory limit.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from meshwright.api import Options, plan_captured
from meshwright.backends.xla.lower_pipeline import lower_pipeline
from meshwright.backends.xla.unstack import unstack
from meshwright.backends.xla.verify import reference, verify_outputs
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import InfeasibleError, PlanError
from meshwright.ir.fingerprint import fingerprint
from meshwright.ir.pipeline.schedule import Schedule
from meshwright.ir.plan import Plan
from meshwright.models import build, wide_resnet
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.pipeline.schedules import gpipe, interleaved, one_f_one_b, zb_h1
from meshwright.planner.request import Request

from .pipelines import case, pipelined, shuffled

LAYOUTS = {
    "dp": lambda n: Parallelism(dp=n), "tp": lambda n: Parallelism(tp=n), "fsdp": lambda n: Parallelism(dp=n, zero=3),
}  # fmt: skip


def schedules(microbatches: int) -> dict[str, Schedule]:
    m = microbatches
    return {
        "gpipe": gpipe(4, m), "1f1b": one_f_one_b(4, m), "interleaved": interleaved(2, m, 2), "zb-h1": zb_h1(4, m),
        "permuted": shuffled(4, m, 3),
    }  # fmt: skip


@functools.cache
def scanned(name: str):
    """As `case`, of a model whose layers are scanned: taken apart, and back for comparison."""
    example = build(name, optimizer="sgd", dtype="f32")
    apart = unstack(
        Options(donate_argnums=(0,)).capture(example.step, (example.state, example.batch), {}, True)
    )
    assert apart is not None
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    leaves, tree = jax.tree.flatten((state, batch))
    flat = jax.jit(lambda *leaves: example.step(*jax.tree.unflatten(tree, leaves)))
    pieces = jax.tree.map(np.asarray, list(apart.apart(leaves)))
    truth = replace(reference(apart.in_pieces(flat), apart.captured, pieces), tolerance=0.0)
    return apart.captured, pieces, flat, truth


def check(name: str, schedule: Schedule, layout: str) -> None:
    captured, leaves, _, truth = scanned(name) if name.endswith("-scan") else case(name)
    assert_moved(captured.graph, truth)
    plan = pipelined(
        stage_plan(name, captured, 8 // schedule.ranks, schedule.microbatches, layout),
        captured,
        schedule,
    )
    assert plan.device_count == 8
    results = lower_pipeline(plan, captured).jitted(*leaves)
    verify_outputs(truth, results, captured.graph.output_names)


def stage_plan(name: str, captured, devices: int, microbatches: int, layout: str) -> Plan:
    """One stage's devices, cut as `layout` says, which is looked at."""
    cluster, known = Cluster.parse(f"{devices}xcpu"), fingerprint(captured.graph)
    if layout == "tight":
        plan = plan_captured(captured, cluster, tight(captured, cluster, microbatches), name)
    else:
        given = {"microbatches": microbatches, "name": name, "fingerprint": known}
        plan = fixed_plan(fold(captured.graph), cluster, LAYOUTS[layout](devices), **given)
    kinds, use = {each.kind for each in plan.collectives}, plan.uses[0]
    assert {
        "dp": use.batch == 1, "tp": use.columns + use.sums > 0.5, "fsdp": {"all_gather", "reduce_scatter"} <= kinds,
        "tight": "all_gather" in kinds,
    }[layout], (use, kinds)  # fmt: skip
    return plan


def tight(captured, cluster: Cluster, microbatches: int) -> Request:
    """Hardly more memory than any plan needs, so that state is cut."""
    pins = {
        "microbatches": microbatches,
        "recompute": "none",
        "mesh": (cluster.size,),
        "time_limit": 30,
    }
    with pytest.raises(InfeasibleError) as nothing_fits:
        plan_captured(captured, cluster, Request(memory=1, **pins), "tight")
    return Request(memory=1.02 * nothing_fits.value.needed_bytes, **pins)


def assert_moved(graph, truth) -> None:
    """The unsharded step moves the parameters, so that gradients are compared at all."""
    results = jax.tree.leaves(truth.results)
    moved = [
        np.any(np.asarray(results[o]) != before)
        for o, before in truth.before.items()
        if before.ndim > 1
    ]
    assert np.mean(moved) > 0.9


FEW = [
    ("gpt-tiny", "zb-h1", "fsdp"),
    ("gpt-tiny-scan", "1f1b", "tp"),
    ("mixtral-tiny", "1f1b", "dp"),
]
CUT = [
    (name, schedule, layout)
    for name in ("gpt-tiny", "gpt-tiny-scan", "llama-tied-tiny", "mixtral-tiny")
    for schedule in schedules(4)
    for layout in LAYOUTS
]
WHOLE = [
    ("wrn-tiny", schedule, layout)
    for schedule in ("1f1b", "interleaved", "zb-h1")  # of one microbatch the others are as 1f1b
    for layout in ("dp", "tight")
]


@pytest.mark.parametrize("name, schedule, layout", FEW)
def test_a_few_equal_one_device(name, schedule, layout):
    check(name, schedules(4)[schedule], layout)


@pytest.mark.slow
@pytest.mark.parametrize("name, schedule, layout", [each for each in CUT if each not in FEW])
def test_all_equal_one_device(name, schedule, layout):
    check(name, schedules(4)[schedule], layout)


@pytest.mark.slow
@pytest.mark.parametrize("name, schedule, layout", WHOLE)
def test_with_one_microbatch_the_others_do_too(name, schedule, layout):
    check(name, schedules(1)[schedule], layout)


# Parts of models without equal layers, and halves of layers, as the planner cuts them.
PARTS = [
    ("wrn-tiny", 4, 1, "1f1b"), ("wrn-tiny", 2, 1, "zb-h1"), ("wrn-tiny", 8, 1, None),
    ("wrn-tiny", 4, 1, "interleaved"),
    ("dlrm-tiny", 4, 4, "1f1b"), ("dlrm-tiny", 2, 8, "zb-h1"), ("dlrm-tiny", 4, 4, None),
    ("gpt-tiny", 8, 4, "1f1b"), ("llama-tied-tiny", 8, 4, "zb-h1"),
]  # fmt: skip


def check_planned(name: str, stages: int, microbatches: int, schedule: str | None) -> None:
    captured, leaves, _, truth = case(name)
    assert_moved(captured.graph, truth)
    request = Request(pp=stages, microbatches=microbatches, schedule=schedule, time_limit=20)
    plan = plan_captured(captured, "8xcpu", request, name)
    assert plan.pipeline is not None and plan.device_count == 8
    words = " ".join(stage.blocks for stage in plan.pipeline.stages)
    assert "part" in words or "half" in words
    verify_outputs(
        truth, lower_pipeline(plan, captured).jitted(*leaves), captured.graph.output_names
    )


def test_planned_parts_equal_one_device():
    check_planned(*PARTS[0])


@pytest.mark.slow
@pytest.mark.parametrize("name, stages, microbatches, schedule", PARTS[1:])
def test_all_planned_parts_equal_one_device(name, stages, microbatches, schedule):
    check_planned(name, stages, microbatches, schedule)


def test_of_one_microbatch_any_order_is_the_same():
    found = schedules(1)
    assert found["gpipe"].orders == found["1f1b"].orders == found["permuted"].orders


def test_batch_norm_refuses_microbatches_at_its_line():
    with pytest.raises(PlanError, match="each example is computed with it") as refused:
        check("wrn-tiny", schedules(2)["1f1b"], "dp")
    function = wide_resnet.Convolution.__call__
    lines, first = inspect.getsourcelines(function)
    file, line = refused.value.where.split(":")
    assert file == Path(inspect.getfile(function)).name and first <= int(line) < first + len(lines)
