"""Schedules and the simulator: closed forms, published orders, a naive oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.ir.errors import PlanError
from meshwright.ir.pipeline.schedule import MARKS, Schedule, Step, check, in_flight, read_schedule
from meshwright.planner.pipeline.schedules import gpipe, interleaved, one_f_one_b
from meshwright.planner.pipeline.simulate import (
    COMPUTE,
    Run,
    StageSeconds,
    Task,
    pipeline_tasks,
    simulate,
)
from meshwright.planner.pipeline.timeline import Timeline, check_nested

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "pipeline"
needs_data = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published schedules are not here")


def run(
    schedule: Schedule, forward: float, backward: float, send: float = 0.0, blocking: bool = False
) -> Run:
    each = StageSeconds(forward, backward, send=send)
    return simulate(pipeline_tasks(schedule, [each] * schedule.stages, blocking=blocking))


@given(st.integers(1, 9), st.integers(1, 20), st.floats(0.1, 3), st.floats(0.1, 3))
def test_idle_and_in_flight_of_plain_pipelines(ranks, microbatches, forward, backward):
    both = forward + backward
    for schedule in (gpipe(ranks, microbatches), one_f_one_b(ranks, microbatches)):
        check(schedule)
        done = run(schedule, forward, backward)
        assert done.makespan == pytest.approx((microbatches + ranks - 1) * both, rel=1e-9)
        for rank in range(ranks):
            assert done.idle(rank) == pytest.approx((ranks - 1) * both, rel=1e-9)
    plain = one_f_one_b(ranks, microbatches)
    assert [in_flight(plain, r) for r in range(ranks)] == [
        min(microbatches, ranks - r) for r in range(ranks)
    ]
    assert in_flight(gpipe(ranks, microbatches), 0) == microbatches


@given(
    st.integers(2, 6), st.integers(1, 4), st.integers(2, 4), st.floats(0.1, 3), st.floats(0.1, 3)
)
def test_interleaving_divides_the_bubble_by_the_chunks(ranks, groups, chunks, forward, backward):
    schedule = interleaved(ranks, groups * ranks, chunks)
    check(schedule)
    done = run(schedule, forward / chunks, backward / chunks)
    both = forward + backward
    assert done.idle(0) == pytest.approx((ranks - 1) * both / chunks, rel=1e-9)
    most = min(groups * ranks * chunks, 2 * (ranks - 1) + (chunks - 1) * ranks + 1)
    assert in_flight(schedule, 0) == most
    if groups > 1:
        assert in_flight(schedule, 0) / chunks == pytest.approx(ranks + (ranks - 1) / chunks)


@needs_data
def test_published_orders_take_the_published_time():
    """sail-sg's zero-bubble scheduler: orders with their makespans and peaks, transfers included."""
    published = json.loads((PUBLISHED / "schedules_zb.json").read_text())["schedules"]
    plain = [s for s in published if s["chunks"] == 1]
    assert len(plain) >= 20
    for entry in plain:
        schedule = _read(entry)
        check(schedule)
        backward = entry["B"]
        seconds = StageSeconds(entry["F"], backward, entry["W"], entry["comm"])
        done = simulate(pipeline_tasks(schedule, [seconds] * entry["p"]))
        assert done.makespan == pytest.approx(entry["makespan"], rel=1e-9), entry["schedule"]
        assert max(done.span(r) for r in range(entry["p"])) == pytest.approx(
            entry["max_stage_span"], rel=1e-9
        )
        held = [in_flight(schedule, r) for r in range(entry["p"])]
        assert held == entry["peak_F_units_freedB"], entry["schedule"]


def _read(entry: dict) -> Schedule:
    kinds = {**MARKS, "BW": MARKS["B"]}
    orders = tuple(
        tuple(Step(kinds[kind], rank, m) for kind, m, _ in order)
        for rank, order in enumerate(entry["order"])
    )
    return Schedule(entry["schedule"], entry["p"], entry["m"], orders)


@needs_data
def test_our_1f1b_is_the_published_one():
    published = json.loads((PUBLISHED / "schedules_zb.json").read_text())["schedules"]
    for entry in (e for e in published if e["schedule"] == "1F1B"):
        assert _read(entry).orders == one_f_one_b(entry["p"], entry["m"]).orders


@needs_data
@pytest.mark.parametrize(("name", "make"), [("Interleaved1F1B", interleaved), ("LoopedBFS", None)])
def test_torch_schedules(name, make):
    entries = [
        e for e in json.loads((PUBLISHED / "torch_schedules.json").read_text()) if e["name"] == name
    ]
    assert entries
    for entry in entries:
        if make is None:
            assert entry["peak"] == [entry["m"]] * entry["P"]
            continue
        schedule = make(entry["P"], entry["m"], entry["v"])
        done = run(schedule, 1 / entry["v"], 2 / entry["v"])
        assert done.makespan == pytest.approx(entry["makespan"])
        assert [in_flight(schedule, r) / entry["v"] for r in range(entry["P"])] == entry["peak"]


def test_bad_schedules_are_named():
    with pytest.raises(PlanError, match="9 microbatches make no 2 equal groups of 4"):
        interleaved(4, 9, 2)
    with pytest.raises(PlanError, match="ranks cannot be 0"):
        one_f_one_b(0, 4)
    order = (Step("backward", 0, 0), Step("forward", 0, 0))
    with pytest.raises(PlanError, match="waits for itself"):
        check(Schedule("upside down", 1, 1, (order,)))
    with pytest.raises(PlanError, match="has 0F1 0 times"):
        check(Schedule("short", 1, 2, (order,)))


def test_text_round_trip():
    schedule = interleaved(2, 4, 2)
    assert schedule.text()[0].startswith("0F0 0F1 2F0 2F1")
    assert read_schedule("interleaved", 4, 4, schedule.text()) == schedule
    with pytest.raises(PlanError, match="`F0` is no step"):
        read_schedule("x", 1, 1, ["F0"])


def test_blocking_sends_cost_compute():
    schedule = one_f_one_b(4, 8)
    assert (
        run(schedule, 1, 2, send=0.1).makespan
        < run(schedule, 1, 2, send=0.1, blocking=True).makespan
    )


# ---------------------------------------------------------------- tasks


@st.composite
def graphs(draw, loose=False):
    tasks = []
    for i in range(draw(st.integers(1, 12))):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        stream = draw(st.sampled_from([COMPUTE, "send"]))
        seconds, free = draw(st.integers(0, 6)) / 2, loose and draw(st.booleans())
        tasks.append(
            Task(
                f"t{i}", draw(st.integers(0, 1)), stream, seconds, tuple(sorted(after)), loose=free
            )
        )
    return tasks


@given(graphs(), st.sampled_from([1.0, 1.5, 2.0]))
def test_times_equal_those_of_small_steps(tasks, slowdown):
    """The oracle moves time on by 1/512 s and lets every running task work at its rate."""
    done = simulate(tasks, slowdown)
    assert done.makespan == pytest.approx(_stepped(tasks, slowdown), abs=len(tasks) / 128 + 1e-9)


@given(graphs(loose=True))
def test_times_of_loose_tasks_equal_those_of_small_steps(tasks):
    assert simulate(tasks).makespan == pytest.approx(_stepped(tasks, 1.0), abs=1e-9)


def _stepped(tasks, slowdown, dt=1 / 512):
    left, finished, now = [t.seconds for t in tasks], set(), 0.0
    streams, current = {}, {}
    for i, t in enumerate(tasks):
        streams.setdefault((t.device, t.stream), []).append(i)
    while len(finished) < len(tasks):
        for stream, order in streams.items():
            if current.get(stream) in {None, *finished}:
                open_ = [i for i in order if i not in finished]
                first = next((i for i in open_ if not tasks[i].loose), None)
                ready = (i for i in open_ if tasks[i].loose or i == first)
                current[stream] = next(
                    (i for i in ready if finished.issuperset(tasks[i].after)), None
                )
        running = [i for i in current.values() if i is not None]
        instant = [i for i in running if left[i] <= 1e-12]
        if instant:
            finished.update(instant)
            continue
        for i in running:
            beside = {
                tasks[j].stream == COMPUTE for j in running if tasks[j].device == tasks[i].device
            }
            left[i] -= dt / (slowdown if len(beside) == 2 else 1.0)
        now += dt
        finished.update(i for i in running if left[i] <= 1e-12)
    return now


def test_a_cycle_is_named():
    with pytest.raises(PlanError, match="`a` waits for itself"):
        simulate([Task("a", 0, COMPUTE, 1.0, (1,)), Task("b", 0, COMPUTE, 1.0)])


def test_exposed_and_idle_seconds():
    tasks = [
        Task("gather", 0, "gather", 2.0), Task("F0", 0, COMPUTE, 3.0, (0,)), Task("reduce", 0, "reduce", 4.0, (0,)),
    ]  # fmt: skip
    done = simulate(tasks)
    assert (done.makespan, done.exposed(0), done.idle(0)) == (6.0, 3.0, 3.0)
    slow = simulate(tasks, slowdown=2.0)
    assert slow.end == [2.0, 8.0, 9.0]  # both at half speed until F0 ends at 8, then 1 s is left


def test_updates_stall_no_updates_and_reductions_block_no_gathers():
    """A step of two layers: the gradient of the first comes last, and its update stands first in the program.

    second   0  1  2   3   4  5  6
    compute     F1 F2  B2  B1 U2 U1    in order, U2 would wait for U1, and U1 for R1
    link     G1 G2 G2' G1' R2 R1       in order, G1' would wait for R2, and so B1
    """
    names = ("G1", "F1", "G2", "F2", "G2'", "B2", "R2", "G1'", "B1", "R1", "U1", "U2")
    after = {"F1": ("G1",), "F2": ("G2", "F1"), "B2": ("F2", "G2'"), "B1": ("B2", "G1'"), "R2": ("B2",), "R1": ("B1",),
             "U1": ("R1",), "U2": ("R2",)}  # fmt: skip
    tasks = []
    for name in names:
        computes = name[0] in "FBU"
        needed = tuple(names.index(each) for each in after.get(name, ()))
        loose = not computes or name[0] == "U"
        tasks.append(Task(name, 0, COMPUTE if computes else "x", 1.0, needed, loose=loose))
    done = simulate(tasks)
    took = dict(zip(names, zip(done.start, done.end, strict=True), strict=True))
    assert took["B2"] == (3.0, 4.0) and took["R2"] == (4.0, 5.0) and took["B1"] == (4.0, 5.0)
    assert took["U2"] == (5.0, 6.0) and took["R1"] == (5.0, 6.0) and took["U1"] == (6.0, 7.0)
    assert done.makespan == 7.0
    assert simulate([replace(task, loose=False) for task in tasks]).makespan == 10.0


def test_the_timeline_shows_bubbles_and_nests():
    line = Timeline.of(run(one_f_one_b(3, 3), 1, 1, send=0.01))
    rows = line.text(24).splitlines()
    assert rows[0].split()[1].startswith("FF") and "." in rows[2][:6] and len(rows) == 3
    trace = line.perfetto()
    check_nested(trace)
    trace["traceEvents"].append(
        {"name": "odd", "ph": "X", "pid": 0, "tid": 0, "ts": 5e5, "dur": 1e12}
    )
    with pytest.raises(PlanError, match="overlap"):
        check_nested(trace)


def test_a_large_pipeline_is_quick_to_simulate():
    """64 ranks and 512 microbatches: the makespan is the closed form."""
    done = run(one_f_one_b(64, 512), 1, 2)
    assert done.makespan == (512 + 63) * 3
