"""The search for schedules under limits of memory: against exact search, published schedules, the catalogue."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.ir.errors import InfeasibleError, PlanError
from meshwright.ir.pipeline.instructions import check_instructions, instructions
from meshwright.ir.pipeline.schedule import check
from meshwright.planner.pipeline.greedy import greedy, manners
from meshwright.planner.pipeline.limited import search_schedule
from meshwright.planner.pipeline.schedules import SCHEDULES, schedule_named
from meshwright.planner.pipeline.simulate import StageSeconds, pipeline_tasks, simulate
from meshwright.planner.pipeline.tighten import ActivationMemory

from .exact_schedules import optimum

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "pipeline" / "schedules_zb.json"


def case(
    seed: int, ranks: int, microbatches: int, chunks: int = 1
) -> tuple[list[StageSeconds], ActivationMemory]:
    """Whole seconds and sizes at random; limits with room for one microbatch up to all."""
    rng = random.Random(seed)
    send, n = rng.choice((0, 1, 2)), ranks * chunks
    stages = [
        StageSeconds(rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), send)
        for _ in range(n)
    ]
    forward, kept = ([rng.randint(low, 5) for _ in range(n)] for low in (2, 1))
    folds = placements(ranks, chunks)
    least = [max(sum(forward[s] for s in fold[rank]) for fold in folds) for rank in range(ranks)]
    return stages, ActivationMemory(
        forward, kept, [one + rng.randint(0, one * microbatches) for one in least]
    )


def placements(ranks: int, chunks: int) -> list[list[list[int]]]:
    """The stages of each rank: round and round, and folded."""
    looped = [[rank + chunk * ranks for chunk in range(chunks)] for rank in range(ranks)]
    folded = [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]
    return [looped, folded] if chunks == 2 else [looped]


def ratio(seed: int, ranks: int, microbatches: int, chunks: int = 1) -> float:
    stages, held = case(seed, ranks, microbatches, chunks)
    found = search_schedule(stages, held, microbatches)
    best = min(optimum(stages, held, microbatches, fold) for fold in placements(ranks, chunks))
    assert found.lower_bound <= best + 1e-6
    assert found.seconds >= best - 1e-6
    return found.seconds / best


# ---------------------------------------------------------------- exact search


def test_one_stage_per_rank_is_nearly_always_the_optimum():
    """Of 1200 random cases 98 % were optimal, so the median; the worst took 1.11 times the optimum."""
    sizes = [(p, m) for p in (2, 3) for m in (2, 3, 4)]
    found = [ratio(seed, *sizes[seed % len(sizes)]) for seed in range(90)]
    assert sum(one < 1 + 1e-9 for one in found) >= 0.95 * len(found)
    assert max(found) < 1.12


def test_two_stages_per_rank_are_near_the_optimum():
    """Of 120 random cases with two ranks 62 % were optimal; the worst took 1.22 times the optimum."""
    found = [ratio(seed, 2, 2 + seed % 2, chunks=2) for seed in range(20)]
    assert median(found) < 1.03
    assert max(found) < 1.23


# ---------------------------------------------------------------- laws


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_what_is_found_runs_fits_and_beats_the_catalogue(seed, ranks, microbatches, chunks):
    stages, held = case(seed, ranks, microbatches, chunks)
    found = search_schedule(stages, held, microbatches)
    check(found.schedule)
    check_instructions(instructions(found.schedule))
    assert held.fits(found.schedule)
    assert found.lower_bound <= found.seconds * (1 + 1e-9)
    for entry in SCHEDULES:
        if entry.copies == 1 and entry.chunks in (chunks, None):
            try:
                known = schedule_named(entry.name, ranks, microbatches, chunks)
            except PlanError:
                continue
            if held.fits(known):
                assert found.seconds <= simulate(pipeline_tasks(known, stages)).makespan * (
                    1 + 1e-9
                )


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_greedy_orders_fit_and_take_no_longer_than_expected(seed, ranks, microbatches):
    stages, held = case(seed, ranks, microbatches)
    for manner in islice(manners(held, microbatches), 0, None, 7):
        schedule, seconds = greedy(stages, held, microbatches, manner)
        check(schedule)
        assert held.fits(schedule)
        assert simulate(pipeline_tasks(schedule, stages)).makespan <= seconds * (1 + 1e-9)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="published schedules are not here")
@pytest.mark.parametrize("chunks", [1, 2])
def test_as_fast_as_published_zero_bubble_schedules(chunks):
    """With the memory that sail-sg's schedules take: makespan and span with one stage per rank never more; with
    two, makespans of at most 1.01 times theirs (V-Half, uneven seconds), most of them less. Of those left out
    for their time one is above: V-Half on eight ranks with 32 microbatches and uneven seconds, by 1.6 %."""
    for e in json.loads(PUBLISHED.read_text())["schedules"]:
        if e["chunks"] != chunks or e["m"] > 12 or (chunks == 2 and e["F"] != 5):
            continue
        part = [1 / chunks] * e["p"] * chunks
        seconds = StageSeconds(e["F"] / chunks, e["B"] / chunks, e["W"] / chunks, e["comm"])
        held = ActivationMemory(part, part, [max(e["peak_F_units_actfreedW"])] * e["p"])
        found = search_schedule([seconds] * len(part), held, e["m"])
        assert found.seconds <= e["makespan"] * (1 + 1e-9 if chunks == 1 else 1.01)
        if chunks == 1:
            assert max(found.run.span(rank) for rank in range(e["p"])) <= e["max_stage_span"] * (
                1 + 1e-9
            )


# ---------------------------------------------------------------- limits


def test_more_memory_is_never_slower_and_the_least_is_one_microbatch():
    stages = [StageSeconds(5, 6, 4, 0.1)] * 4
    seconds = [
        search_schedule(stages, ActivationMemory([1] * 4, [0.5] * 4, [limit] * 4), 8).seconds
        for limit in range(1, 9)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[3] < 0.7 * seconds[0]
    with pytest.raises(
        InfeasibleError, match="rank 0 has no room for one microbatch: it takes 1 B"
    ) as error:
        search_schedule(stages, ActivationMemory([1] * 4, [0.5] * 4, [0.9] * 4), 8)
    assert (error.value.needed_bytes, error.value.limit_bytes) == (1, 0.9)


def test_a_refusal_counts_what_a_rank_always_holds():
    stages = [StageSeconds(1, 1, 1)] * 2
    gib = 2.0**30
    held = ActivationMemory([gib] * 2, [gib] * 2, [8 * gib] * 2, static=[2 * gib, 7.5 * gib])
    with pytest.raises(
        InfeasibleError, match=r"rank 1 .* takes 8.5 GiB, the limit is 8 GiB"
    ) as error:
        search_schedule(stages, held, 4)
    assert "7.5 GiB are always taken" in str(error.value)
    assert "a limit of 8.5 GiB" in str(error.value)
    enough = ActivationMemory(held.forward, held.kept, [error.value.needed_bytes] * 2, held.static)
    assert enough.fits(search_schedule(stages, enough, 4).schedule)


def test_without_room_for_late_weight_passes_backward_passes_are_whole():
    stages = [StageSeconds(1, 1, 1)] * 4
    for chunks in (1, 2):
        held = ActivationMemory([1] * 4, [9] * 4, [chunks + 0.5] * (4 // chunks))
        found = search_schedule(stages, held, 4)
        assert held.fits(found.schedule)
        assert not found.schedule.splits


def test_stages_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(PlanError, match="3 stages with 4 microbatches make no pipeline of 2 ranks"):
        search_schedule([StageSeconds(1, 1, 1)] * 3, ActivationMemory([1] * 3, [1] * 3, [4] * 2), 4)
