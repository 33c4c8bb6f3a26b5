"""Bounds of pipelines against every cut: seconds, what stages hold, and what a search ends with."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from meshwright.planner.intra.solve import live_of
from meshwright.planner.pipeline import priced
from meshwright.planner.pipeline.choices import PipelineConfig
from meshwright.planner.pipeline.priced import Place, Pricing
from meshwright.planner.pipeline.schedules import SCHEDULES, schedule_named
from meshwright.planner.pipeline.simulate import StageSeconds, pipeline_tasks, simulate
from meshwright.planner.pipeline.stage_memory import StageMemory
from meshwright.planner.pipeline.unit_costs import unit_seconds
from meshwright.planner.pipeline.units import runs_of
from meshwright.planner.search.meshes import mesh_of
from meshwright.planner.solver.anytime import solve_live

from .pipelines import pipelines_on, problem_of


def test_no_pipeline_is_faster_than_the_bound():
    """Oracle: every shape of the space solved and priced, one by one."""
    problem = problem_of("llama-tiny", "4xcpu", batch=4)
    pipelines = pipelines_on(problem)
    pipelines.explore()
    bound, best = pipelines.lower_bound(), pipelines.best.seconds
    assert 0 < bound <= best < float("inf")
    every = pipelines_on(problem)
    for family in every.choices.families():
        for many in every.choices.counts:
            every.solve_shape(type(family)(family.stages, family.mesh, family.policy, many))
    assert bound <= every.best.seconds * (1 + 1e-9)
    assert best <= every.best.seconds * (1 + problem.request.good_enough)


@pytest.mark.parametrize(("layers", "stages"), [(9, 2), (16, 2), (16, 4), (18, 4)])
def test_no_cut_of_any_layouts_is_faster_than_the_bounds(layers, stages):
    """Every cut into stages, with layouts that are solved for and near them. Where all stages have equally many layers,
    an end comes on top of one of them, and the bound counts it: so it is close to the best cut."""
    problem = problem_of("gpt-tiny", "8xh100x1@ib100", batch=16, layers=layers)
    pipelines, rng, many = pipelines_on(problem), np.random.default_rng(layers * stages), 8
    shape = PipelineConfig(stages, mesh_of((8 // stages,)), "none", many)
    space, units = pipelines.bounds.likely(shape), pipelines.choices.units
    bound, live = pipelines.bounds.relaxed(shape, 1e9)[1], live_of(space)
    assert 0 < pipelines.choices.floor(shape) <= bound * (1 + 1e-9)
    found = solve_live(live, time_limit=5).choices
    assert found is not None
    tried = {found}
    while len(tried) < 6:
        node, other = int(rng.integers(len(found))), list(found)
        other[node] = int(rng.integers(len(live.costs[node])))
        tried |= {tuple(other)} if np.isfinite(live.cost(other)) else set()
    least = float("inf")
    for choices in tried:
        holdings = pipelines.bounds.holdings("none", many)
        each, memory = (
            unit_seconds(holdings.cut, space, choices),
            StageMemory(holdings, space, choices),
        )
        places = tuple(
            Place(each, memory, 1e15, r * shape.mesh.size, shape.mesh.size) for r in range(stages)
        )
        pricing, one = (
            Pricing(units, places, problem.cluster),
            schedule_named("1f1b", stages, many, None),
        )
        for cut in combinations(range(1, len(units)), stages - 1):
            priced = pricing.with_cut(one, (0, *cut))
            assert priced is not None and priced.seconds >= bound * (1 - 1e-9)
            least = min(least, priced.seconds)
    even = units.repeats % stages == 0
    assert (pipelines.choices.more(shape) > 0) == even
    assert least < 1.3 * bound


@pytest.mark.parametrize(
    ("layers", "stages", "overlap"), [(16, 4, ()), (18, 4, "all"), (19, 2, ()), (19, 2, "all")]
)
def test_no_cut_that_fits_is_faster_than_the_bound_by_cases(layers, stages, overlap):
    """Every cut, with layouts that are solved for under ever less memory; the bound tells what memory rules out."""
    problem = problem_of("gpt-tiny", "8xh100x1@ib100", batch=16, layers=layers)
    problem = replace(problem, request=replace(problem.request, schedule="1f1b", overlap=overlap))
    shape, told = PipelineConfig(stages, mesh_of((8 // stages,)), "none", 8), 0
    free = pipelines_on(problem)
    free.solve_shape(shape)
    assert free.best.priced is not None
    roomy, peak = free.bounds.by_cases(shape, 2 * free.best.seconds)[0], max(free.best.priced.peaks)
    one, units = schedule_named("1f1b", stages, 8), free.choices.units
    for share in (1.0, 0.8, 0.65, 0.5, 0.4, 0.33, 0.28, 0.24):
        problem = replace(problem, request=replace(problem.request, memory=share * peak))
        pipelines = pipelines_on(problem)
        pipelines.solve_shape(shape)
        if (pricing := pipelines.best.pricing) is None:
            continue
        cuts = combinations(range(1, len(units)), stages - 1)
        fitting = [found for cut in cuts if (found := pricing.with_cut(one, (0, *cut)))]
        least = min(priced.seconds for priced in fitting)
        for enough in (0.9 * least, least, 1.2 * least):
            bound, fullest = pipelines.bounds.by_cases(shape, enough)
            assert bound <= least * (1 + 1e-9) and fullest >= layers / stages
            told += bound > roomy * (1 + 1e-6)
    assert told


def test_bounds_with_overlap_read_choices_as_the_space_numbers_them():
    """Copies that share memory double the choices of their nodes in the solver's problem alone."""
    problem, shape = (
        problem_of("llama-tiny", "2xh100x8@ib400", batch=64, layers=16),
        PipelineConfig(2, mesh_of((4, 2)), "none", 8),
    )
    problem = replace(problem, request=replace(problem.request, overlap="all"))
    for memory in (1e15, 30e6, 20e6, 15e6, 12e6, 10e6):
        problem = replace(problem, request=replace(problem.request, memory=memory))
        bounds = pipelines_on(problem).bounds
        space, limiting = bounds.space(shape), bounds._within(shape, 8, 8)
        assert limiting is not None and limiting(space).origins
        found, _ = bounds.bound(space, limiting)
        if found.choices is not None:
            timed = space.timed(found.choices)
            assert timed is not None and found.lower_bound <= timed.seconds * (1 + 1e-9)


def test_what_does_not_fit_says_nothing_of_more_microbatches():
    """Oracle: every count by itself. Four microbatches of this fit on no mesh, sixteen do and are faster than all."""
    problem = problem_of("gpt3-1.3b", "8xh100x8@ib400", batch=512)
    problem = replace(
        problem, request=replace(problem.request, pp=4, schedule="1f1b", recompute="none")
    )
    whole, every = pipelines_on(problem), pipelines_on(problem)
    whole.explore()
    for many in (16, 32, 64):
        every.solve_shape(PipelineConfig(4, mesh_of((8, 2)), "none", many))
    assert whole.best.seconds <= every.best.seconds * (1 + problem.request.good_enough)
    assert whole.lower_bound() <= every.best.seconds


@pytest.mark.parametrize(("layers", "stages"), [(8, 4), (9, 2), (16, 4), (19, 3)])
def test_stages_that_a_bound_watches_are_within_those_of_every_cut(layers, stages):
    """Every cut whose fullest stage has from `low` to `high` layers, halves of layers too where these are few."""
    problem = problem_of("gpt-tiny", "8xcpu", batch=16, layers=layers)
    bounds = pipelines_on(problem).bounds
    units, shape, met = bounds.choices.units, PipelineConfig(stages, mesh_of((2,)), "none", 8), 0
    least, holds = (
        bounds.choices.fullest_at_least(stages),
        lambda a, b: all(x >= y for x, y in zip(a, b, strict=True)),
    )
    for low, high in ((least, least), (least + 1, least + 1), (least, least + 3)):
        *first, last = (each.runs for each in bounds._ends(shape, high))
        (fullest,) = [each.runs for each in bounds._fullest(low)] or [(0,) * len(units.names)]
        together = [each.runs for each in bounds._together(shape, high)]
        for cut in combinations(range(1, len(units)), stages - 1):
            edges = [*pairwise((0, *cut, len(units)))]
            runs = [runs_of(units, *edge) for edge in edges]
            most = max(sum(end - 1 in range(*edge) for end in units.ends) for edge in edges)
            if not low <= most <= high:
                continue
            met += 1
            assert holds(runs[-1], last) and all(holds(runs[0], each) for each in first)
            assert any(holds(each, fullest) for each in runs)
            assert all(holds(np.sum(runs, axis=0), each) for each in together)
    assert met


def test_no_order_of_passes_is_faster_than_what_rules_schedules_out():
    """Stages unlike each other, every schedule that holds each stage once."""
    rng = np.random.default_rng(0)
    for entry in (each for each in SCHEDULES if each.copies == 1):
        for ranks, many in ((2, 4), (4, 8), (3, 6)):
            schedule = schedule_named(entry.name, ranks, many)
            stages = [StageSeconds(*rng.uniform(0.1, 1, 5)) for _ in range(schedule.stages)]
            makespan = simulate(pipeline_tasks(schedule, stages)).makespan
            assert priced._at_least(schedule, stages) <= makespan * (1 + 1e-9)
