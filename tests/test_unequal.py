"""Pipelines whose stages have unequal numbers of devices: exact splits, an oracle, what is won, a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.api import plan_captured
from meshwright.backends.xla.lower_pipeline import lower_pipeline
from meshwright.backends.xla.verify import verify_outputs
from meshwright.ir.errors import PlanError
from meshwright.planner.pipeline.choices import PipelineConfig
from meshwright.planner.pipeline.partition import Pace, near_least_step
from meshwright.planner.pipeline.priced import Pricing
from meshwright.planner.pipeline.schedules import one_f_one_b
from meshwright.planner.pipeline.search import Pipelines
from meshwright.planner.pipeline.unequal import Unequal
from meshwright.planner.pipeline.units import runs_of
from meshwright.planner.pipeline.watched import Watched
from meshwright.planner.plans import drop_dispatched
from meshwright.planner.request import Request
from meshwright.planner.search.meshes import plane_meshes
from meshwright.view.text import plan_head
from meshwright.view.words import duty

from .pipelines import case, pipelines_on
from .test_parts import chain_problem

UNLIKE = (512, 128, 48, 64, 128)  # four products: about 4, 1, 1, 2 parts of the time


def deals(devices: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Sizes of stages, in order, that use all devices."""
    yield from (
        d for n in range(1, devices + 1) for d in product(sizes, repeat=n) if sum(d) == devices
    )


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.data(),
)
def test_unequal_splits_equal_trying_all(units, devices, microbatches, data):
    """Work that is not cut evenly: d devices take the d-th part and one second."""
    stages = data.draw(st.one_of(st.none(), st.integers(1, min(len(units), devices))))
    once = data.draw(st.integers(0, 9))

    def took(first, last, size):
        way = sum(units[first:last]) / size + 1
        return way, (microbatches - 1) * way + once * (last - first)

    paces = {}
    for size in (1, 2, 4):
        tables = np.full((2, len(units) + 1, len(units) + 1), inf)
        for a, b in combinations(range(len(units) + 1), 2):
            tables[:, a, b] = took(a, b, size)
        paces[size] = Pace(*tables)
    every = [
        sum(way for way, _ in each) + max(again for _, again in each)
        for sizes in deals(devices, (1, 2, 4))
        if stages in (None, len(sizes))
        for cut in combinations(range(1, len(units)), len(sizes) - 1)
        for each in [
            [took(a, b, d) for a, b, d in zip((0, *cut), (*cut, len(units)), sizes, strict=True)]
        ]
    ]
    found = near_least_step(paces, devices, stages, coarse=1e-9)
    assert (found is None) == (not every)
    if found is not None:
        seconds, pieces = found
        assert seconds == pytest.approx(min(every)) and sum(p.devices for p in pieces) == devices
        assert [p.first for p in pieces[1:]] == [p.last for p in pieces[:-1]]
        assert stages in (None, len(pieces))


# ---------------------------------------------------------------- planned


REQUEST = Request(pp=4, microbatches=8, recompute="none", schedule="1f1b", gap=0.0)


def explored(request: Request, widths=UNLIKE, cluster: str = "8xcpu") -> tuple[Pipelines, Unequal]:
    pipelines = pipelines_on(chain_problem(cluster, request, 8192, widths))
    pipelines.explore()
    unequal = Unequal(pipelines)
    unequal.explore(pipelines.best.seconds)
    return pipelines, unequal


def test_unequal_stages_equal_trying_every_split():
    """Oracle: every cut of the chain on every deal of the devices, with the fastest layouts per number of devices."""
    equal, unequal = explored(REQUEST)
    units, layouts = unequal.units, unequal.layouts
    ranks = {}
    for size in (1, 2, 4):
        whole = Watched(runs_of(units, 0, len(units)), 1.0)
        shapes = [
            PipelineConfig(4, mesh, "none", 8)
            for mesh in plane_meshes(unequal.problem.cluster, size)
        ]
        ranks[size] = layouts.fastest(shapes, (whole,))
    best, at = inf, ()
    for sizes in (each for each in deals(8, (1, 2, 4)) if len(each) == 4):
        pricing = Pricing(
            units, unequal._places([ranks[size] for size in sizes]), unequal.problem.cluster
        )
        for cut in combinations(range(1, len(units)), 3):
            priced = pricing.with_cut(one_f_one_b(4, 8), (0, *cut))
            if priced is not None and priced.seconds < best:
                best, at = priced.seconds, sizes
    assert at == (4, 1, 1, 2)
    assert best <= unequal.best * (1 + 1e-9)
    assert unequal.best <= 1.02 * best < equal.best.seconds
    assert unequal.lower_bound() <= best  # where stages may be equal too, it had said nothing


def test_layouts_of_unequal_stages_are_found_with_overlap():
    _, unequal = explored(replace(REQUEST, overlap="all"), cluster="8xh100x1@ib400")
    whole = Watched(runs_of(unequal.units, 0, len(unequal.units)), 1.0)
    shapes = [
        PipelineConfig(4, mesh, "none", 8) for mesh in plane_meshes(unequal.problem.cluster, 4)
    ]
    rank = unequal.layouts.fastest(shapes, (whole,))
    assert rank is not None
    each, _ = unequal.layouts.costs(rank)
    timed = rank.space.timed(rank.choices)
    assert timed is not None and sum(unit.passes for unit in each) > 0


def test_chains_that_are_even_keep_equal_stages():
    equal, unequal = explored(REQUEST, widths=(64, 65, 66, 67, 68))
    assert unequal.found is None and equal.best.priced is not None
    assert unequal.left_out[0].startswith("stages of unequal meshes, but for"), (
        "they were looked at"
    )


def test_stages_that_do_not_divide_the_devices_equal_one_device():
    captured, leaves, _, truth = case("gpt-tiny")
    plan = plan_captured(
        captured, "8xcpu", Request(pp=3, microbatches=4, schedule="1f1b"), "gpt-tiny"
    )
    pipe = plan.pipeline
    assert pipe is not None and plan.device_count == 8
    assert sorted(stage.mesh.size for stage in pipe.stages) == [2, 2, 4]
    assert {
        first % stage.mesh.size for first, stage in zip(pipe.first, pipe.stages, strict=True)
    } == {0}
    assert plan.proof.lower_bound < plan.estimate.step_seconds == plan.proof.objective
    assert (
        "stages of unequal meshes, but for the most promising by an estimate" in plan.proof.left_out
    )
    head = plan_head(plan)
    assert re.search("8 devices as 3 ranks of (x=2 and x=4|x=4 and x=2):?\n", head)
    assert "feasible, only the most promising were solved" in head
    assert re.search(
        r"  runs    programs of each stage, [\d.]+ ms with the host's dispatch\n", head
    )
    assert "no single program for all stages: stages have unequal numbers of devices." in plan.notes
    for uses in {stage.uses for stage in pipe.stages}:
        assert f"{duty(uses[0])} parallel {uses[0].size} over x" in head
    assert {len(stage.uses) for stage in pipe.stages} == {1}
    verify_outputs(
        truth, lower_pipeline(plan, captured).jitted(*leaves), captured.graph.output_names
    )


def test_unequal_stages_are_given_up_for_a_plan_without_dispatch():
    _, unequal = explored(REQUEST)
    assert unequal.best < unequal.dispatched
    given_up = unequal.alternative
    assert drop_dispatched(unequal, 1.01 * unequal.dispatched) == [] and unequal.found is not None
    assert drop_dispatched(unequal, 1.01 * unequal.best) == [given_up] and unequal.found is None
    assert given_up.seconds < given_up.dispatched and re.match(
        r"stages on [\d ]+ devices, 1f1b: [\d.]+ ms by", str(given_up)
    )


def test_stages_of_a_pinned_mesh_are_equal():
    _, unequal = explored(replace(REQUEST, mesh=(2,)))
    assert unequal.found is None and unequal.left_out[0] == "stages of different meshes"
    with pytest.raises(PlanError, match="cannot be cut into 3 equal stages"):
        plan_captured(case("gpt-tiny")[0], "8xcpu", Request(pp=3, mesh=(2,)), "gpt-tiny")
