"""Generators of schedules against published orders and closed forms, and torch's CSV."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.ir.errors import PlanError
from meshwright.ir.pipeline.instructions import check_instructions, instructions
from meshwright.ir.pipeline.schedule import (
    MARKS,
    Schedule,
    Step,
    check,
    needs,
    peak_held,
    read_schedule,
)
from meshwright.ir.pipeline.torch_csv import from_torch_csv, to_torch_csv
from meshwright.planner.pipeline.schedules import SCHEDULES, chimera, dualpipe, schedule_named
from meshwright.planner.pipeline.simulate import Run, StageSeconds, pipeline_tasks, simulate

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "pipeline"
needs_data = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published schedules are not here")
FILES = sorted(PUBLISHED.glob("torch_csv/*.csv"))
SIZES = ((2, 4), (4, 8), (6, 24), (8, 32))


def run(
    schedule: Schedule, forward: float, backward: float, weight: float, send: float = 0.0
) -> Run:
    chunks = max(1, schedule.stages // schedule.ranks)
    each = StageSeconds(forward / chunks, backward / chunks, weight / chunks, send)
    return simulate(pipeline_tasks(schedule, [each] * schedule.stages))


def peaks(schedule: Schedule, kept: float) -> list[float]:
    """In units of one rank's forward results; `kept` is the share that waits for the weight pass."""
    chunks, n = max(1, schedule.stages // schedule.ranks), schedule.stages
    return [
        peak_held(schedule, i, [1 / chunks] * n, [kept / chunks] * n) for i in range(schedule.ranks)
    ]


def data(name: str):
    return json.loads((PUBLISHED / name).read_text())


# ---------------------------------------------------------------- published orders


@needs_data
def test_all_zero_bubble_orders_replay():
    """sail-sg's scheduler: makespan, longest span and peaks by three measures, chunks included."""
    entries = data("schedules_zb.json")["schedules"]
    assert len(entries) >= 70
    for e in entries:
        kinds = {**MARKS, "BW": MARKS["B"]}
        orders = tuple(
            tuple(Step(kinds[kind], stage, m) for kind, m, stage in order) for order in e["order"]
        )
        schedule = Schedule(e["schedule"], e["p"] * e["chunks"], e["m"], orders)
        check(schedule)
        done = run(schedule, e["F"], e["B"], e["W"], e["comm"])
        assert done.makespan == pytest.approx(e["makespan"], rel=1e-9)
        assert max(done.span(r) for r in range(e["p"])) == pytest.approx(
            e["max_stage_span"], rel=1e-9
        )
        for name, kept in (("freedB", 0.0), ("half", 0.5), ("actfreedW", 1.0)):
            assert peaks(schedule, kept) == e[f"peak_F_units_{name}"]


@needs_data
def test_v_half_and_v_min_are_as_fast_as_published():
    """With F = B = W and the same limits; V-Half takes the published time, V-Min that or less."""
    for e in (
        e for e in data("schedules_zb.json")["schedules"] if e["schedule"] in ("VHALF", "VMIN")
    ):
        ours = schedule_named(e["schedule"], e["p"], e["m"])
        assert max(peaks(ours, 1.0)) <= max(e["peak_F_units_actfreedW"])
        if e["F"] == e["B"] == e["W"]:
            makespan = run(ours, e["F"], e["B"], e["W"]).makespan
            assert makespan <= e["makespan"]
            assert e["schedule"] == "VMIN" or makespan == e["makespan"]


@needs_data
@pytest.mark.parametrize("size", [4, 8, 16])
def test_chimera_is_the_published_order(size):
    e = data(f"schedule_chimera_D{size}.json")
    half, last = e["N"] // 2, e["D"] - 1
    orders = tuple(
        tuple(Step(MARKS[k], last - rank if up else rank, i + up * half) for k, up, i in order)
        for rank, order in enumerate(e["order"])
    )
    assert chimera(e["D"], e["N"]).orders == orders


@needs_data
def test_dualpipe_is_the_published_order():
    for e in data("schedule_dualpipe.json"):
        half, last = e["N"] // 2, e["P"] - 1
        slots = tuple(
            tuple(
                tuple(
                    Step(MARKS[k[0]], last - rank if up else rank, i + up * half)
                    for k, up, i in slot
                )
                for slot in order
            )
            for rank, order in enumerate(e["orders"])
        )
        assert dualpipe(e["P"], e["N"]).slots == slots


@needs_data
@pytest.mark.parametrize(
    "file", [f for f in FILES if not f.name.startswith("sail")], ids=lambda f: f.stem
)
def test_torch_files(file):
    """Read, replayed, written again, and made by our own generator of that name."""
    name, p, m = re.fullmatch(r"(\w+)_p(\d+)_m(\d+)", file.stem).groups()  # type: ignore[union-attr]
    if name == "1F1B":
        with pytest.raises(PlanError, match="0 times"):
            from_torch_csv(
                file.read_text()
            )  # its last row runs no forward pass of the first microbatch
        return
    schedule = from_torch_csv(file.read_text())
    check(schedule)
    assert from_torch_csv(to_torch_csv(schedule)) == schedule
    ours = schedule_named(name, int(p), int(m))
    assert (ours.orders, ours.together) == (schedule.orders, schedule.together)
    entry = next((e for e in data("torch_schedules.json") if e["csv"].endswith(file.name)), None)
    assert entry or name == "GPipe"  # torch's own script gives no figures for it
    if entry is None:
        return
    one_by_one = Schedule(name, schedule.stages, schedule.microbatches, schedule.orders)
    assert run(one_by_one, 1, 1, 1).makespan == pytest.approx(entry["makespan"], rel=1e-9)
    assert any(peaks(schedule, kept) == pytest.approx(entry["peak"]) for kept in (0.0, 0.5, 1.0))


# ---------------------------------------------------------------- closed forms

SECONDS = st.integers(1, 5)


@given(st.integers(1, 8), st.integers(0, 9), SECONDS, SECONDS, SECONDS)
@settings(deadline=None, max_examples=60)
def test_idle_of_zb_h1(p, more, forward, backward, weight):
    """(p - 1)(F + B - W), if W is no longer than F and B and there are p microbatches or more."""
    weight, m = min(forward, backward, weight), p + more
    schedule = schedule_named("zb-h1", p, m)
    check(schedule)
    idle = run(schedule, forward, backward, weight).makespan - m * (forward + backward + weight)
    assert idle == pytest.approx((p - 1) * (forward + backward - weight), abs=1e-9)
    assert peaks(schedule, 0.0) == [p - rank for rank in range(p)]


@given(st.integers(1, 8), st.integers(0, 9), SECONDS, SECONDS, SECONDS)
@settings(deadline=None, max_examples=60)
def test_span_of_zb_h2(p, more, forward, backward, weight):
    """(p - 1)(F + B - 2 W) of bubbles inside the span: none where all three are equal."""
    weight, m = min(forward, backward, weight), 2 * p - 1 + more
    done = run(schedule_named("ZB2P", p, m), forward, backward, weight)
    idle = max(done.span(r) for r in range(p)) - m * (forward + backward + weight)
    assert idle == pytest.approx((p - 1) * (forward + backward - 2 * weight), abs=1e-9)


@given(st.integers(1, 8), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_v_shaped_peaks_and_span(p, more):
    m = 2 * p - 1 + more
    for name, most in (("zbv", p), ("v-half", (p + 2) // 2), ("v-min", (p + 4) // 3)):
        schedule = schedule_named(name, p, m)
        check(schedule)
        assert max(peaks(schedule, 0.0)) <= most
        if more >= p:
            assert max(peaks(schedule, 0.0)) == most
    done = run(schedule_named("zbv", p, m), 1, 1, 1)
    assert max(done.span(r) for r in range(p)) == pytest.approx(3 * m, rel=1e-9)


@given(st.sampled_from([2, 4, 6, 8]), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_chimera_makespan(p, groups):
    """2N + D - 2 slots where forward and backward take one each (Li and Hoefler, table 2)."""
    schedule = chimera(p, groups * p)
    check(schedule)
    assert run(schedule, 1, 1, 0).makespan == 2 * groups * p + p - 2


@given(st.sampled_from([2, 4, 6]), st.integers(0, 2), SECONDS, SECONDS)
@settings(deadline=None, max_examples=30)
def test_idle_of_dualpipe(p, more, both, weight):
    """(p / 2 - 1)(F&B + B - 2 W), B being the whole backward pass less nothing: here F = B, W <= F."""
    weight, m = min(both, weight), 2 * p + 2 * more
    schedule = dualpipe(p, m)
    check(schedule)
    done = run(schedule, both, both, weight)
    pair = 2 * both + weight
    assert max(done.idle(r) for r in range(p)) == pytest.approx(
        (p / 2 - 1) * (pair + both - 2 * weight), abs=1e-9
    )


def test_names_and_needs():
    assert schedule_named("dapple", 2, 4).name == "1f1b"
    with pytest.raises(PlanError, match="no schedule `zvb`") as error:
        schedule_named("zvb", 2, 4)
    assert "zbv" in str(error.value)
    with pytest.raises(PlanError, match="even number of ranks, got 3"):
        schedule_named("chimera", 3, 4)
    with pytest.raises(PlanError, match="2 chunks per rank, not 3"):
        schedule_named("zbv", 2, 4, 3)


# ---------------------------------------------------------------- instructions


@pytest.mark.parametrize("entry", SCHEDULES, ids=lambda e: e.name)
def test_every_schedule_runs_with_sends_that_wait(entry):
    for p, m in SIZES:
        schedule = schedule_named(entry.name, p, m)
        check(schedule)
        assert read_schedule(schedule.name, schedule.stages, m, schedule.text()) == schedule
        lists = instructions(schedule)
        check_instructions(lists)
        assert sum(one.what == "update" for each in lists for one in each) == p


@given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 2), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_any_valid_order_has_instructions_that_end(ranks, microbatches, chunks, chance):
    schedule = shuffled(ranks, microbatches, chunks, chance)
    check(schedule)
    check_instructions(instructions(schedule))


def shuffled(ranks: int, microbatches: int, chunks: int, chance: random.Random) -> Schedule:
    """Some valid order: again and again a step whose needs are met, by chance."""
    stages = ranks * chunks
    kinds = tuple(MARKS.values())
    left = [Step(k, s, m) for k in kinds for s in range(stages) for m in range(microbatches)]
    frame = Schedule("shuffled", stages, microbatches, tuple(() for _ in range(ranks)))
    done: set[Step] = set()
    orders: list[list[Step]] = [[] for _ in range(ranks)]
    while left:
        step = chance.choice([s for s in left if done.issuperset(needs(frame, s))])
        left.remove(step)
        done.add(step)
        orders[step.stage % ranks].append(step)
    return Schedule("shuffled", stages, microbatches, tuple(map(tuple, orders)))


def test_sends_in_another_order_than_their_receives_are_found():
    lists = [list(one) for one in instructions(schedule_named("gpipe", 2, 2))]
    moves = [i for i, one in enumerate(lists[1]) if one.what == "receive-activation"]
    lists[1][moves[0]], lists[1][moves[1]] = lists[1][moves[1]], lists[1][moves[0]]
    with pytest.raises(
        PlanError, match="ranks wait for ever: rank 0 at 0SEND_F0>1, rank 1 at 1RECV_F1<0"
    ):
        check_instructions(lists)
    early = [list(one) for one in instructions(schedule_named("gpipe", 2, 1))]
    early[1].insert(0, early[1].pop(1))
    with pytest.raises(PlanError, match="before its activation is there"):
        check_instructions(early)
