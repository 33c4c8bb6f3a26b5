"""Communication beside computation in pipelines: bounds that hold, cuts that are best, one step time everywhere."""

from __future__ import annotations

import functools
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import Captured, capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import verify_outputs
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import load_plan, save_plan
from meshwright.ir.execution import parse_overlap
from meshwright.ir.execution_model import execution_model
from meshwright.ir.pipeline.schedule import needs
from meshwright.ir.plan import Plan
from meshwright.ir.sharding import Sharding
from meshwright.models import build
from meshwright.pipeline_view import simulated
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.solve import live_of
from meshwright.planner.intra.windows import MANY
from meshwright.planner.pipeline.choices import PipelineConfig
from meshwright.planner.pipeline.dealing import deal_spans
from meshwright.planner.pipeline.priced import Place, Priced, Pricing
from meshwright.planner.pipeline.schedules import schedule_named
from meshwright.planner.pipeline.search import Pipelines
from meshwright.planner.pipeline.simulate import COMPUTE, SLOWDOWN, Task, simulate
from meshwright.planner.pipeline.stage_memory import Holdings, StageMemory
from meshwright.planner.pipeline.unit_costs import (
    Busy,
    UnitSeconds,
    seconds_of_runs,
    together,
    unit_seconds,
)
from meshwright.planner.pipeline.units import runs_of
from meshwright.planner.problem import Problem
from meshwright.planner.request import Request
from meshwright.planner.search.meshes import mesh_of
from meshwright.planner.solver.anytime import solve_live
from meshwright.view.text import plan_text

from .pipelines import case, pipelines_on

SLOW = Cluster.parse("2xh100x8@ib100").with_("fabric.nvlink4.bandwidth", "60GB/s")
ALL = ("parameters", "gradients", "tensor", "stages")


@functools.cache
def captured(layers: int = 8, batch: int = 32) -> Captured:
    example = build("gpt2", layers=layers, batch=batch)
    return capture(example.step, example.state, example.batch, donate_argnums=0)


def problem_on(overlap: str, layers: int = 8, **pins) -> Problem:
    request = Request(pp="auto", overlap=overlap, **pins)
    small = fold(captured(layers).graph)
    return Problem(small, SLOW, request, Roofline(SLOW), "gpt2", "x")


def pricings(pipelines: Pipelines, shape: PipelineConfig, how_many: int):
    """Layouts that are solved for under several multipliers, and some near them, priced."""
    space, rng = pipelines.bounds.likely(shape), np.random.default_rng(0)
    holdings = pipelines.bounds.holdings(shape.policy, shape.microbatches)
    overlap, tried = pipelines.problem.request.execution.within, []
    for share in (0.0, 0.5, 1.0):
        live = live_of(space.bounding(np.full(MANY, share)) if overlap else space)
        found = solve_live(live, time_limit=5).choices
        assert found is not None
        tried.append(found)
        for _ in range(how_many):
            node, other = int(rng.integers(len(found))), list(found)
            other[node] = int(rng.integers(len(live.costs[node])))
            tried += [tuple(other)] if np.isfinite(live.cost(other)) else []
    for choices in dict.fromkeys(tried):
        each = unit_seconds(holdings.cut, space, choices, overlap)
        memory, size = StageMemory(holdings, space, choices), shape.mesh.size
        places = (Place(each, memory, 1e15, rank * size, size) for rank in range(shape.stages))
        yield Pricing(pipelines.choices.units, tuple(places), SLOW)


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("overlap", "mesh", "many", "stages"),
    [("all", (2, 2), 8, 4), ("all", (8,), 2, 2), ("parameters,gradients", (4, 2), 1, 2)],
)
def test_no_cut_of_any_layouts_is_faster_than_the_bounds(overlap, mesh, many, stages):
    pipelines = pipelines_on(problem_on(overlap))
    shape, units = PipelineConfig(stages, mesh_of(mesh), "none", many), pipelines.choices.units
    bound = pipelines.bounds.relaxed(shape, 1e9)[1]
    assert pipelines.choices.floor(shape) <= bound * (1 + 1e-9)
    least, hidden = float("inf"), 0.0
    for pricing in pricings(pipelines, shape, 2):
        for name in ("1f1b", "zb-h1"):
            schedule = schedule_named(name, stages, many)
            dealt = pricing.price(schedule)
            assert dealt is not None
            for cut in [dealt.firsts[1:], *combinations(range(1, len(units)), stages - 1)][::5]:
                priced = pricing.with_cut(schedule, (0, *cut))
                serial = pricing.serial.with_cut(schedule, (0, *cut))
                assert priced is not None and serial is not None
                assert bound <= priced.seconds * (1 + 1e-9)
                assert priced.seconds <= serial.seconds * (1 + 1e-9)
                hidden = max(hidden, serial.seconds - priced.seconds)
                least = min(least, priced.seconds)
    assert hidden > 0.01 * least, "what the test is about"
    assert least < 1.5 * bound


def test_overlap_bounds_no_higher_than_none():
    shape = PipelineConfig(2, mesh_of((4, 2)), "none", 4)
    bounds = [
        pipelines_on(problem_on(each)).bounds.relaxed(shape, 1e9)[0] for each in ("none", "all")
    ]
    assert bounds[1] < bounds[0]


# ---------------------------------------------------------------- seconds of stages

seconds = st.floats(0, 3)
busy = st.builds(Busy, seconds, seconds, seconds)
works = st.builds(
    UnitSeconds, busy, busy, busy, apart=seconds, early=seconds, late=seconds, handed=st.just(0.0)
)


@given(st.lists(works, min_size=1, max_size=4), st.data())
def test_a_stage_takes_no_longer_than_its_units_and_no_less_than_any_mean_of_its_sides(each, data):
    runs = [data.draw(st.integers(0, 3)) for _ in each]
    stage, share = together(runs, each), data.draw(st.floats(0, 1))
    assert stage.passes <= sum(n * u.passes for n, u in zip(runs, each, strict=True)) + 1e-9
    assert stage.passes <= stage.serial.passes + 1e-9
    assert 0 <= stage.once <= stage.serial.once + 1e-9

    def mean(work: Busy, beside: float = 0.0) -> float:
        c, h, s = work.compute, work.beside + beside, SLOWDOWN - 1
        return work.alone + (1 - share) * (c + s * h) + share * (h + s * c)

    back = stage.backward + stage.weight
    assert stage.whole <= stage.backward.seconds + stage.weight.seconds + 1e-9
    least = mean(stage.forward, stage.early) + mean(back, stage.late) + stage.apart
    assert least <= stage.passes + stage.once + 1e-9


@given(st.lists(works, min_size=2, max_size=7), st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=60)
def test_dealing_stages_that_overlap_equals_trying_every_cut(units, stages, share):
    """A stage's seconds are no sum of its units': exchanges of one hide behind products of another."""

    table = seconds_of_runs(units, share)
    span = lambda first, last: float(table[first, last])  # noqa: E731
    for first, last in combinations(range(len(units) + 1), 2):
        work = together([1] * (last - first), units[first:last])
        assert span(first, last) == pytest.approx(work.passes + share * work.once)

    def slowest(firsts) -> float:
        return max(span(a, b) for a, b in pairwise((*firsts, len(units))))

    found = deal_spans([table.tolist()] * stages, len(units))
    every = [(0, *cut) for cut in combinations(range(1, len(units)), stages - 1)]
    assert (found is None) == (not every)
    if found is not None:
        assert slowest(found) == pytest.approx(min(map(slowest, every)))


# ---------------------------------------------------------------- the simulator


def turn_by_turn(pricing: Pricing, priced: Priced, turns: int = 48) -> float:
    """The step in an event simulator: each pass in a few turns, what hides goes when its turn has been computed, the
    turn after the next waits for it; so with what is gathered early, which waits for nothing, and what is reduced late,
    for which nothing waits; sends and what else is done once as the plan has them."""
    schedule, tasks, ends = priced.schedule, list[Task](), {}
    units = [
        together(priced.runs(pricing.units, s), pricing.places[rank].each)
        for s, rank in enumerate(schedule.homes)
    ]
    left = [list(order) for order in schedule.orders]
    reduced: list[tuple[int, float, list[int]]] = []
    before: dict[int, list[int]] = {rank: [] for rank in range(schedule.ranks)}

    def task(rank, stream, took, after, loose=False) -> int:
        tasks.append(Task("", rank, stream, took, tuple(after), loose=loose))
        return len(tasks) - 1

    def run(step, rank: int) -> None:
        work, many = units[step.stage], schedule.microbatches
        one = {"forward": work.forward, "backward": work.backward, "weight": work.weight}[step.kind]
        one = one + work.weight if schedule.whole(step) else one
        early = work.early if step.kind == "forward" and step.microbatch == 0 else 0.0
        late = work.late if step.kind == "backward" and step.microbatch == many - 1 else 0.0
        passing: list[int] = []
        come: list[int] = []
        waits = [ends[needed] for needed in needs(schedule, step)]
        waits = [[*before[rank], *(n for each in waits for n in each)]]
        for turn in range(turns):
            if one.alone:
                waits.append([task(rank, "alone", one.alone / turns, waits[-1])])
            done = task(
                rank, COMPUTE, one.compute / turns, [*waits[-1], *passing[-2:-1], *come[-1:]]
            )
            start = [done] if turn else waits[0]
            passing.append(task(rank, "link", one.beside / turns, start, loose=True))
            if early:
                come.append(task(rank, "link", early / turns, [], loose=True))
            if late:
                reduced.append((rank, late / turns, start))
            waits.append([done])
        before[rank] = waits[-1]
        ends[step] = [*waits[-1], passing[-1]]
        stage = priced.stages[step.stage]
        if step.kind != "weight" and (took := stage.sending(step.kind)):
            ends[step] = [task(rank + 1000, "send", took, ends[step])]  # on wires of its own

    while any(left):
        for rank, order in enumerate(left):
            while order and all(needed in ends for needed in needs(schedule, order[0])):
                run(order.pop(0), rank)
    for rank, took, start in reduced:  # after what is waited for, where both are ready
        task(rank, "link", took, start, loose=True)
    tail = max(sum(units[s].apart for s in held) for held in schedule.held)
    return simulate(tasks, SLOWDOWN).makespan + tail


@pytest.mark.parametrize("overlap", ["tensor", "all"])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_windows_and_an_event_simulator_agree(overlap, name):
    pipelines = pipelines_on(problem_on(overlap, layers=24))
    shape = PipelineConfig(2, mesh_of((2, 4)), "none", 16)
    pricing = next(pricings(pipelines, shape, 0))
    priced = pricing.price(schedule_named(name, 2, 16))
    assert priced is not None
    serial = pricing.serial.with_cut(priced.schedule, priced.firsts)
    assert serial is not None and serial.seconds > 1.03 * priced.seconds
    assert turn_by_turn(pricing, priced) == pytest.approx(priced.seconds, rel=0.02)


# ---------------------------------------------------------------- memory


def test_what_comes_early_and_what_leaves_late_takes_memory():
    """Weights gathered for each microbatch, where sharding them cuts the step's bytes: of two layers' at once."""
    alone = pipelines_on(problem_on("none"))
    shape, peaks = PipelineConfig(2, mesh_of((8,)), "none", 4), []
    space, cut = alone.bounds.likely(shape), alone.choices.cut("none", 4)
    runs = runs_of(alone.choices.units, 0, len(alone.choices.units) // 2)
    ways = lambda each: each.ways(space.mesh) if isinstance(each, Sharding) else 0  # noqa: E731
    choices = tuple(int(np.argmax([*map(ways, node.choices)])) for node in space.nodes)
    for overlap in ("none", "parameters", "parameters,gradients"):
        memory = StageMemory(
            Holdings.of(cut, 4, execution_model(SLOW.device.kind), parse_overlap(overlap)),
            space,
            choices,
        )
        peaks.append(float(next(iter(memory._profiles(runs)))[1].sum()))
    assert peaks[0] < peaks[1] < peaks[2]


# ---------------------------------------------------------------- whole plans


@functools.cache
def planned(overlap: str, pp: int | str = 2, **pins) -> Plan:
    few = {"microbatches": 4, "recompute": "none", "gap": 0.1}
    request = Request(pp=pp, overlap=overlap, time_limit=30, **{**few, **pins})  # type: ignore[arg-type]
    return plan_captured(captured(4), "h100x8", request, "gpt2")


def test_a_pipeline_with_overlap_is_faster_and_says_one_step_everywhere(tmp_path):
    alone, beside = (planned(each, program="stages") for each in ("none", "all"))
    found = beside.estimate
    assert found.step_seconds < alone.estimate.step_seconds and found.hidden_seconds > 0
    assert beside.proof.lower_bound <= found.step_seconds
    assert found.step_seconds == pytest.approx(
        found.compute_seconds + found.communication_seconds - found.hidden_seconds
    )
    assert simulated(beside).seconds == pytest.approx(found.step_seconds)
    assert beside.overlap == ALL and "run beside computation" in beside.proof.band
    assert not any("overlap" in each for each in beside.proof.left_out)
    assert any("overlap" in each for each in alone.proof.left_out)
    assert "sends between stages run beside" in plan_text(beside)
    save_plan(beside, tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json").overlap == ALL


def test_plans_with_and_without_stages_are_compared_under_one_model():
    both, flat, stages = planned("all", "auto"), planned("all", 1), planned("all", 2)
    within = 1 + (both.proof.good_enough or 0.0)
    assert both.estimate.step_seconds <= within * min(
        flat.estimate.step_seconds, stages.estimate.step_seconds
    )
    assert both.proof.lower_bound <= flat.estimate.step_seconds
    assert both.proof.lower_bound <= stages.estimate.step_seconds
    assert both.overlap == (ALL if both.pipeline else ALL[:3])


def test_a_single_program_overlaps_too():
    request = {"program": "single"}
    alone, beside = (planned(each, 2, **request) for each in ("none", "all"))
    assert beside.pipeline is not None and beside.pipeline.program == "single"
    assert beside.proof.lower_bound <= beside.estimate.step_seconds
    assert beside.estimate.step_seconds < alone.estimate.step_seconds


@pytest.mark.slow
def test_what_is_planned_with_overlap_runs_as_the_unsharded_step():
    """Where gathers and reductions come early or late changes no number."""
    step, leaves, _, truth = case("gpt-tiny")
    few = {"microbatches": 2, "recompute": "none", "program": "stages", "attention": "fused"}
    request = Request(pp=2, overlap="all", gap=0.1, **few)  # type: ignore[arg-type]
    plan = plan_captured(step, Cluster.parse("h100x4"), request, "gpt-tiny")
    assert plan.overlap == ALL and plan.pipeline is not None and plan.mesh.size == 2
    verify_outputs(truth, lower(plan, step).jitted(*leaves), step.graph.output_names)
