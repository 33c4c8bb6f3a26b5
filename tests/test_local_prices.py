"""The search's tables and local programs say the same: priced either way, a plan costs as much."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import isclose

import pytest

from meshwright import pricing
from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import composed
from meshwright.ir.errors import InfeasibleError
from meshwright.ir.local.program import ON_SHARDS
from meshwright.ir.passes.localize import localize
from meshwright.ir.passes.localize_pipeline import localize_pipeline
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.pipeline_view import simulated
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build as build_space
from meshwright.planner.jobs.pinned import Parallelism, Pinned
from meshwright.planner.problem import cost_of
from meshwright.planner.report.chosen import prices_of
from meshwright.planner.report.instructions import PlanDecisions
from meshwright.planner.report.local_prices import LocalPrices
from meshwright.planner.report.pipeline_prices import PipelinePrices, simulate_pipeline
from meshwright.planner.request import Request

from .pipelines import captured_of


def seconds(prices: LocalPrices) -> tuple[float, float]:
    """Of communication, and of computation."""
    moved = computed = 0.0
    for op, runs in prices.runs():
        if op.kind in ON_SHARDS:
            moved += runs * prices.move(op)
        elif prices.computes(op):
            moved += runs * sum(each for _, _, each in prices.inside(op))
            computed += runs * prices.compute(op)
    return moved, computed


NAMES = (
    "gpt-tiny",
    "gpt-tiny-scan",
    "llama-tiny",
    "mixtral-tiny",
    "deepseek-tiny",
    "vit-tiny",
    "dlrm-tiny",
    "wrn-tiny",
)
CASES = [
    pytest.param(
        *(name, mesh, microbatches, squeezed),
        marks=[pytest.mark.slow]
        * (len(mesh) < 3 or (name != "gpt-tiny" and not (squeezed and microbatches == 4))),
        id=f"{name}-{'x'.join(map(str, mesh))}-{microbatches}-{'squeezed' if squeezed else 'free'}",
    )
    for name in NAMES
    for mesh in ((8,), (4, 2), (2, 2, 2))
    for microbatches in ((1,) if name == "wrn-tiny" else (1, 4))  # batch norm
    for squeezed in (False, True)
]


@pytest.mark.parametrize("name, mesh, microbatches, squeezed", CASES)
def test_tables_and_programs_cost_the_same(name, mesh, microbatches, squeezed):
    check_prices(name, mesh, microbatches, squeezed, "xla")


@pytest.mark.parametrize(
    "name, microbatches, squeezed",
    [
        ("llama-tiny", 4, True),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("gpt-tiny", 1, False), ("mixtral-tiny", 4, True), ("vit-tiny", 4, False))
        ),
    ],
)
def test_tables_and_programs_that_torch_runs_op_by_op_cost_the_same(name, microbatches, squeezed):
    check_prices(name, (4, 2), microbatches, squeezed, "torch")


def check_prices(name, mesh, microbatches, squeezed, backend):
    captured = captured_of(name)
    attention = "fused" if squeezed else "plain"
    request = Request(
        mesh=mesh,
        microbatches=microbatches,
        attention=attention,
        overlap="none",
        backend=backend,
    )
    plan = plan_captured(captured, "8xh100", request, name)
    if squeezed:
        tight = replace(request, memory=0.55 * plan.estimate.peak_bytes)
        with suppress(InfeasibleError):
            plan = plan_captured(captured, "8xh100", tight, name)
    cost = cost_of(Cluster.parse("8xh100"), request)
    graph = composed(captured.graph, attention, plan.cluster, backend=backend)
    program = prepare(fold(graph).small, plan.recompute)
    layouts = Layouts(cost.collectives(plan.mesh))
    space = build_space(program, plan.microbatches, cost, layouts, PlanDecisions(plan))
    choices = (0,) * len(space.nodes)
    by_tables = sum(
        float(seconds[0] - (space.settled[tag][0] if tag in space.settled else 0.0))
        * space.runs[tag]
        for tag, seconds in space.own.items()
    )
    prices = LocalPrices(localize(program, plan), space, cost, plan.strategies)
    moved, computed = seconds(prices)
    assert isclose(computed, by_tables, rel_tol=1e-9)
    assert isclose(moved + computed, space.serial(choices), rel_tol=1e-9)


ALIKE = ("gpt-tiny", "llama-tiny", "mixtral-tiny", "deepseek-tiny")


@pytest.mark.parametrize(
    "name, microbatches",
    [
        ("llama-tiny", 4),
        *(pytest.param(n, m, marks=pytest.mark.slow) for n in ALIKE for m in (1, 4)),
    ],
)
def test_tables_and_programs_of_stages_cost_the_same(name, microbatches):
    """Passes of stages save less (`saved.py`): what is made again is in both."""
    example = build(name)
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    request = Request(pp=2, microbatches=microbatches, recompute="none", overlap="none")
    plan = plan_captured(captured, "8xh100", request, name)
    assert plan.pipeline is not None
    cost = Roofline(Cluster.parse("8xh100"))
    folded = fold(composed(captured.graph, plan.attention, plan.cluster))
    program = prepare(folded.small, plan.recompute, in_stages=True)
    layouts = Layouts(cost.collectives(plan.mesh))
    space = build_space(program, plan.microbatches, cost, layouts, PlanDecisions(plan))
    choices = (0,) * len(space.nodes)
    prices = LocalPrices(localize(program, plan), space, cost, plan.strategies)
    assert isclose(sum(seconds(prices)), space.serial(choices), rel_tol=1e-9)


@pytest.mark.parametrize(
    "name, overlap",
    [
        ("llama-tiny", "none"),
        *(pytest.param(n, o, marks=pytest.mark.slow) for n in ALIKE for o in ("none", "all")),
    ],
)
def test_ranks_of_a_pipeline_take_what_the_tables_say(name, overlap):
    """Passes, moves and the order of both. The tables take gradients that cross for as large as results, which they are
    where nothing hides; exchanges of updates they count by units of the model."""
    captured = captured_of(name)
    request = Request(
        pp=2, microbatches=4, recompute="none", overlap=overlap, schedule="1f1b", program="stages"
    )
    plan = plan_captured(captured, "8xh100", request, name)
    graph = composed(captured.graph, plan.attention, plan.cluster)
    small = prepare(fold(graph).small, plan.recompute, in_stages=True)
    given = plan, localize_pipeline(plan, graph), small, Roofline(Cluster.parse("8xh100"))
    stages = PipelinePrices(*given, plan.overlap).stages()
    for work, told in zip(stages, plan.pipeline.stages, strict=True):
        assert isclose(work.forward.seconds, told.forward_seconds, rel_tol=1e-9)
        assert isclose(work.whole, told.backward_seconds, rel_tol=1e-9)
    if overlap != "none":
        return
    run = simulate_pipeline(*given, plan.overlap).run
    passes = max(end for task, end in zip(run.tasks, run.end, strict=True) if task.kind != "update")
    by_plan = [each for each in simulated(plan).slices if each.kind != "update"]
    assert isclose(passes, max(each.start + each.seconds for each in by_plan), rel_tol=1e-9)


JOB = pricing.Shape("llama", 4, 272, 8, 8, 500, 1024, 256)  # 500 does not divide over 16
MIXTURE = pricing.Shape("mixtral", 4, 256, 8, 8, 512, 1024, 256, experts=pricing.Experts(8, 2, 512))


@pytest.mark.parametrize(
    "shape, parallelism",
    [
        (JOB, Parallelism(dp=16, zero=3)),
        (JOB, Parallelism(tp=2, cp=4, cp_kind="a2a")),
        (JOB, Parallelism(tp=2, dp=4, zero=1, sequence_parallel=True)),
        (MIXTURE, Parallelism(dp=4, ep=4, tp=2, zero=2)),
    ],
    ids=lambda each: (
        each.family if isinstance(each, pricing.Shape) else f"zero{each.zero}-cp{each.cp}"
    ),
)
def test_tables_and_programs_of_jobs_cost_the_same(shape, parallelism):
    """Of what travels: dims that do not divide, and axes that cut a dim in another order than the mesh's, included."""
    cost = Roofline(Cluster.parse("b200x8"), fused_attention=True)
    program = pricing._program(shape, parallelism.dp, "none", "fused", "plain")
    pinned = Pinned(program, parallelism)
    space = build_space(
        program, 1, cost, Layouts(cost.collectives(pinned.mesh)), pinned, dealt=True
    )
    choices = (0,) * len(space.nodes)
    computed = sum(
        float(own[0] - (space.settled[tag][0] if tag in space.settled else 0.0)) * space.runs[tag]
        for tag, own in space.own.items()
    )
    orders = {op.tag: order for op in program.graph.ops if (order := pinned.order(op))}
    moved, _ = seconds(prices_of(space, choices, cost, orders))
    assert moved > 0 and isclose(moved, space.serial(choices) - computed, rel_tol=1e-9)
