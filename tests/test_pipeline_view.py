"""The timeline of a pipeline: as recorded, and next to the simulated one."""

from __future__ import annotations

import itertools
import json

import jax
import pytest

from meshwright import cli
from meshwright.backends.runtime.recorder import Recorder
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import save_plan
from meshwright.ir.pipeline.schedule import Passed, Step, microbatches_held, needs
from meshwright.pipeline_view import both_text, both_trace, measured, parts_of_step, simulated
from meshwright.planner.pipeline.schedules import interleaved, one_f_one_b
from meshwright.planner.pipeline.timeline import check_nested
from meshwright.view.text import plan_head

from .pipelines import case, lowered, pipelined, stage_plan, timed, zero_bubble


@pytest.mark.parametrize(
    "schedule", [one_f_one_b(2, 4), interleaved(2, 4, 2)], ids=["1f1b", "interleaved"]
)
def test_recorded_passes_keep_the_order_of_ranks_and_of_data(schedule):
    running = lowered("gpt-tiny", schedule)
    jax.block_until_ready(running.jitted(*case("gpt-tiny")[1]))
    with Recorder(running.driver) as recorder:
        running.jitted(*case("gpt-tiny")[1])
    ends = {each.step: each.start + each.seconds for each in recorder.passes}
    starts = {each.step: each.start for each in recorder.passes}
    for rank, order in enumerate(schedule.orders):
        mine = sorted(
            (each for each in recorder.passes if each.rank == rank), key=lambda each: each.start
        )
        assert [each.step for each in mine] == list(order)
        assert all(a.start + a.seconds <= b.start for a, b in itertools.pairwise(mine))
    for step, start in starts.items():
        assert all(ends[need] <= start for need in needs(schedule, step))
    assert running.driver.watch is None


PASSES = [
    Passed(0, Step("forward", 0, 0), 0.0, 0.002), Passed(1, Step("forward", 1, 0), 0.002, 0.001),
    Passed(1, Step("backward", 1, 0), 0.003, 0.003), Passed(0, Step("backward", 0, 0), 0.006, 0.004),
]  # fmt: skip


def small():
    plan = stage_plan("gpt-tiny", 2, 4).model_copy(update={"name": "gpt-tiny"})
    plan = pipelined(plan, case("gpt-tiny")[0], one_f_one_b(2, 1))
    return timed(plan, forward=0.001, backward=0.004, weight=0.002, once=0.001)


def test_simulated_and_measured_stand_side_by_side(golden):
    assert both_text(small(), PASSES, 40) == golden


def test_a_step_is_work_of_the_busiest_rank_and_bubble():
    plan = small()
    plan = plan.model_copy(
        update={"estimate": plan.estimate.model_copy(update={"step_seconds": 0.011})}
    )
    parts = parts_of_step(plan)
    rounded = plan.estimate.model_copy(update={"step_seconds": parts.passes + parts.update - 1e-16})
    assert parts_of_step(plan.model_copy(update={"estimate": rounded})).bubble == 0.0
    assert (parts.passes, parts.update, parts.bubble) == pytest.approx((0.005, 0.001, 0.005))
    assert parts.sent == parts.exposed == 0
    slow = [each.model_copy(update={"send_seconds": 0.003}) for each in plan.pipeline.stages]
    pipeline = plan.pipeline.model_copy(update={"stages": tuple(slow)})
    parts = parts_of_step(plan.model_copy(update={"pipeline": pipeline}))
    assert (parts.sent, parts.exposed) == pytest.approx(
        (0.006, 0.006)
    )  # one microbatch: there and back, none beside
    assert "rank 0 works longest, 6 ms, bubble 5 ms" in plan_head(plan)


def test_no_rank_holds_more_microbatches_than_there_are():
    assert [microbatches_held(one_f_one_b(4, 8), rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [microbatches_held(zero_bubble(4, 4), rank) for rank in range(4)] == [4, 4, 3, 2]
    assert max(microbatches_held(interleaved(2, 4, 2), rank) for rank in range(2)) <= 4


def test_one_trace_holds_both():
    trace = both_trace(small(), PASSES)
    check_nested(trace)
    names = [
        event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"
    ]
    assert names == ["simulated rank 0", "simulated rank 1", "measured rank 0", "measured rank 1"]
    assert simulated(small()).seconds == pytest.approx(0.011)
    assert measured(PASSES).seconds == pytest.approx(0.010)


def test_the_command_line_runs_a_pipeline_and_shows_its_timeline(monkeypatch, capsys, tmp_path):
    recipe = {"model": "gpt-tiny", "optimizer": "sgd", "dtype": "f32"}
    plan = pipelined(stage_plan("gpt-tiny", 2, 4), case("gpt-tiny")[0], one_f_one_b(2, 4))
    update = {"recipe": recipe, "cluster": Cluster.parse("4xcpu")}
    save_plan(timed(plan, 0.001, 0.002, 0, 0).model_copy(update=update), tmp_path / "p.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["meshwright", "run", "p.json", "--steps", "2", "--trace", "t.json"]
    )
    with pytest.raises(SystemExit) as done:
        cli.main()
    found = capsys.readouterr()
    assert done.value.code == 0, found.err
    assert "measured" in found.out and "step    2" in found.out
    check_nested(json.loads((tmp_path / "t.json").read_text()))
