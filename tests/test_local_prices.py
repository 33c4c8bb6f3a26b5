"""The search's tables and local programs say the same: priced either way, a plan costs as much."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import isclose

import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import composed
from meshwright.ir.errors import InfeasibleError
from meshwright.ir.local.program import ON_SHARDS
from meshwright.ir.passes.localize import localize
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build as build_space
from meshwright.planner.report.instructions import PlanDecisions
from meshwright.planner.report.local_prices import LocalPrices
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
    captured = captured_of(name)
    attention = "fused" if squeezed else "plain"
    request = Request(mesh=mesh, microbatches=microbatches, attention=attention, overlap="none")
    plan = plan_captured(captured, "8xh100", request, name)
    if squeezed:
        tight = replace(request, memory=0.55 * plan.estimate.peak_bytes)
        with suppress(InfeasibleError):
            plan = plan_captured(captured, "8xh100", tight, name)
    cost = Roofline(Cluster.parse("8xh100"))
    program = prepare(fold(composed(captured.graph, attention, plan.cluster)).small, plan.recompute)
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
