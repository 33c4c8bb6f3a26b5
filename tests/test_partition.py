"""Cutting chains and graphs into stages: against trying everything."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.ir.errors import PlanError
from meshwright.ir.pipeline.schedule import check, in_flight
from meshwright.planner.pipeline.ideals import closed_sets, members
from meshwright.planner.pipeline.partition import StagePiece, best_cuts, halved, least_step
from meshwright.planner.pipeline.schedules import one_f_one_b, round_robin

SECONDS = st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 7.0, float("inf")])


@st.composite
def tables(draw, count=2):
    """Units, devices and tables `[devices, first, last]` of seconds."""
    units, devices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    found = []
    for _ in range(count):
        table = np.full((devices + 1, units + 1, units + 1), np.inf)
        for a, b in combinations(range(units + 1), 2):
            table[1:, a, b] = draw(st.lists(SECONDS, min_size=devices, max_size=devices))
        found.append(table)
    return units, devices, found


def pipelines(units, devices):
    """All ways to cut units into stages on exactly so many devices."""
    for stages in range(1, units + 1):
        for inner in combinations(range(1, units), stages - 1):
            cuts = (0, *inner, units)
            for own in product(range(1, devices + 1), repeat=stages):
                if sum(own) == devices:
                    yield [
                        StagePiece(a, b, d) for a, b, d in zip(cuts, cuts[1:], own, strict=False)
                    ]


@given(tables(), st.sampled_from([np.maximum, np.add]))
def test_best_cuts_equal_trying_every_pipeline(drawn, join):
    units, devices, (first, later) = drawn
    cuts = best_cuts(0, first, later, devices, join)

    def seconds(pieces):
        return join.reduce(
            [(later if i else first)[p.devices, p.first, p.last] for i, p in enumerate(pieces)]
        )

    best = min(map(seconds, pipelines(units, devices)), default=np.inf)
    assert cuts.seconds[devices, units] == pytest.approx(best)
    if np.isfinite(best):
        assert seconds(cuts.pieces(units, devices)) == pytest.approx(best)


@given(tables(count=3), st.integers(1, 9))
def test_least_step_equals_trying_every_pipeline(drawn, microbatches):
    units, devices, of_behind = drawn

    def seconds(pieces):
        behind = range(len(pieces))[::-1]
        each = [
            of_behind[k][p.devices, p.first, p.last] for k, p in zip(behind, pieces, strict=True)
        ]
        return sum(each) + (microbatches - 1) * max(each) if np.isfinite(each).all() else np.inf

    best = min((seconds(p) for p in pipelines(units, devices) if len(p) <= 3), default=np.inf)
    found = least_step(of_behind, devices, microbatches)
    if np.isinf(best):
        assert found is None
    else:
        assert found is not None
        assert found[0] == pytest.approx(best) == pytest.approx(seconds(found[1]))


def alpas_cases():
    path = Path(__file__).parents[2] / "shared/data/planners/alpa_oracle/stage_dp_cases.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("number", range(len(alpas_cases())))
def test_alpas_stage_optima(number):
    """Layers x layers x submeshes x configurations, and how many stages may follow each before it has no room."""
    case = alpas_cases()[number]
    seconds, most_after = np.array(case["cost"]), np.array(case["max_succ_stages"])
    sizes, layers = [hosts * each for hosts, each in case["submesh_choices"]], len(seconds)
    by_behind = []
    for behind in range(layers):
        table = np.full((case["num_devices"] + 1, layers + 1, layers + 1), np.inf)
        best = np.where(most_after >= behind, seconds, np.inf).min(axis=3)
        for submesh, size in enumerate(sizes):
            if size <= case["num_devices"]:
                np.minimum(
                    table[size, :layers, 1:], best[:, :, submesh], out=table[size, :layers, 1:]
                )
        by_behind.append(table)
    found = least_step(by_behind, case["num_devices"], case["num_microbatches"])
    if case["brute_force"] is None or not np.isfinite(case["brute_force"]):
        assert found is None
    else:
        assert found is not None and found[0] == pytest.approx(case["brute_force"], rel=1e-6)


@st.composite
def graphs(draw):
    units = draw(st.integers(1, 6))
    pairs = list(combinations(range(units), 2))
    return units, draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []


@given(graphs())
def test_closed_sets_are_all_sets_that_hold_what_their_units_need(graph):
    units, edges = graph
    every = [
        some
        for some in range(1 << units)
        if all(some >> a & 1 or not some >> b & 1 for a, b in edges)
    ]
    found = closed_sets(units, edges, 1 << units)
    assert sorted(found) == every
    assert [some.bit_count() for some in found] == sorted(some.bit_count() for some in found)


def test_too_many_closed_sets_and_cycles_are_refused():
    with pytest.raises(PlanError, match="a graph of 10 units can be cut in more than 100 places"):
        closed_sets(10, [], 100)
    with pytest.raises(PlanError, match="unit 1 comes before itself"):
        closed_sets(3, [(0, 1), (1, 2), (2, 1)], 100)


def test_members_of_a_set():
    assert members(0b101101) == [0, 2, 3, 5]


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8), st.floats(0, 120))
def test_halving_finds_the_least_slowest(values, smallest):
    possible = [v for v in values if v >= smallest]
    found = halved(
        lambda limit: max((v for v in possible if v <= limit), default=None), float, 0.5, 200.0
    )
    assert found == (pytest.approx(min(possible)) if possible else None)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 30))
def test_replicas_by_turns_never_wait_for_ever_and_hold_what_keeps_them_busy(
    replicas, microbatches
):
    schedule = round_robin(replicas, microbatches)
    check(schedule)
    rank = 0
    for stage, count in enumerate(replicas):
        for replica in range(count):
            mine = len(range(replica, microbatches, count))
            assert in_flight(schedule, rank) == min(mine, -(-sum(replicas[stage:]) // count))
            rank += 1


def test_single_replicas_by_turns_are_1f1b():
    assert round_robin([1, 1, 1], 7).orders == one_f_one_b(3, 7).orders
