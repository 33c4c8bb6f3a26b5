"""A pipeline's step as it was simulated and as it was measured, side by side.

Both are timelines: rows of text with the idle times visible, a table of what each pass of each stage
was predicted to take and took, and one trace for Perfetto with both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from .ir.pipeline.schedule import Passed, Schedule
from .ir.plan import Plan
from .planner.pipeline.simulate import COMPUTE, StageSeconds, pipeline_tasks, simulate
from .planner.pipeline.timeline import Slice, Timeline

LEGEND = "F forward, B backward, W gradients of weights, U update, . idle"
APART = 1000  # added to the process numbers of the measured half of a trace


def simulated(plan: Plan) -> Timeline:
    """The step that the plan predicts: passes, transfers, and what each rank does once at the end."""
    schedule, stages = _schedule(plan), _seconds(plan)
    once = [stage.once_seconds for stage in plan.pipeline.stages]  # type: ignore[union-attr]
    run = simulate(pipeline_tasks(schedule, stages))
    tail = {rank: sum(once[s] for s in held) for rank, held in enumerate(schedule.held)}
    updates = (
        Slice("update", "update", rank, COMPUTE, run.makespan, t)
        for rank, t in tail.items()
        if t > 0
    )
    return Timeline((*Timeline.of(run).slices, *updates))


def figures(plan: Plan) -> list[dict[str, float]]:
    """Per rank: seconds busy with passes, span from its first to its last, the share of it idle, bytes."""
    schedule, stages = _schedule(plan), plan.pipeline.stages  # type: ignore[union-attr]
    run = simulate(pipeline_tasks(schedule, _seconds(plan)))
    found = []
    for rank, held in enumerate(schedule.held):
        busy, span = run.busy(rank), run.span(rank)
        peak = max(stages[s].peak_bytes for s in held)
        found.append(
            {"rank": rank, "busy": busy, "span": span, "idle": 1 - busy / span, "peak_bytes": peak}
        )
    return found


@dataclass(frozen=True)
class StepParts:
    """What a pipeline's step is made of, in seconds, on the rank that works longest; passes + update + bubble = step.

    `sent` is what transfers between stages take in all, in both directions; without `exposed`, the step would be as
    much shorter if they took no time.
    """

    rank: int
    passes: float
    update: float
    bubble: float
    sent: float
    exposed: float


def parts_of_step(plan: Plan) -> StepParts:
    """From the seconds in a plan, simulated with and without transfers."""
    schedule, stages = _schedule(plan), _seconds(plan)
    once = [stage.once_seconds for stage in plan.pipeline.stages]  # type: ignore[union-attr]
    run = simulate(pipeline_tasks(schedule, stages))
    apart = simulate(
        pipeline_tasks(schedule, [replace(each, send=0.0, back=0.0) for each in stages])
    )
    work = [run.busy(rank) + sum(once[s] for s in held) for rank, held in enumerate(schedule.held)]
    rank = max(range(len(work)), key=work.__getitem__)
    between = [s for s in range(schedule.stages - 1) if schedule.homes[s] != schedule.homes[s + 1]]
    sent = schedule.microbatches * sum(
        stages[s].send + stages[s + 1].sending("backward") for s in between
    )
    bubble = max(0.0, plan.estimate.step_seconds - work[rank])  # none, but for rounding
    exposed = max(0.0, run.makespan - apart.makespan)
    return StepParts(rank, run.busy(rank), work[rank] - run.busy(rank), bubble, sent, exposed)


def measured(passes: Sequence[Passed]) -> Timeline:
    """The passes of one recorded step."""
    return Timeline(
        tuple(Slice(str(p.step), p.step.kind, p.rank, COMPUTE, p.start, p.seconds) for p in passes)
    )


def both_text(plan: Plan, passes: Sequence[Passed], width: int = 96) -> str:
    """Simulated above measured, then pass by pass what was predicted and what was seen."""
    schedule, stages = _schedule(plan), _seconds(plan)
    found: dict[tuple[int, str], list[Passed]] = defaultdict(list)
    for each in passes:
        found[each.step.stage, each.step.kind].append(each)
    rows = [f"{'stage':<6}{'pass':<10}{'predicted':>12}{'measured':>12}{'difference':>12}"]
    for (stage, kind), those in sorted(
        found.items(), key=lambda item: (item[0][0], ORDER[item[0][1]])
    ):
        rows.append(
            _row(f"{stage:<6}{kind:<10}", stages[stage].of(schedule, those[0].step), _median(those))
        )
    ours, theirs = simulated(plan), measured(passes)
    rows.append(_row(f"{'step, passes':<16}", _last(ours), _last(theirs)))
    title = f"{schedule.name}, {schedule.stages} stages, {schedule.microbatches} microbatches"
    return "\n".join([
        f"simulated  {ours.seconds * 1e3:.2f} ms ({title})", ours.text(width), "",
        f"measured   {theirs.seconds * 1e3:.2f} ms", theirs.text(width), "",
        *rows,
        "measured seconds are medians of all microbatches; updates (U) are simulated, not recorded.",
        LEGEND,
    ])  # fmt: skip


ORDER = {"forward": 0, "backward": 1, "weight": 2}


def both_trace(plan: Plan, passes: Sequence[Passed]) -> dict[str, Any]:
    """One trace in Perfetto's format; measured ranks are processes of their own below the simulated ones."""
    trace = simulated(plan).perfetto()
    other = measured(passes).perfetto()["traceEvents"]
    events = [_named(event, "simulated") for event in trace["traceEvents"]]
    events += [_named(event | {"pid": event["pid"] + APART}, "measured") for event in other]
    return trace | {"traceEvents": events}


def _named(event: dict[str, Any], which: str) -> dict[str, Any]:
    if event["name"] != "process_name":
        return event
    return event | {"args": {"name": f"{which} rank {event['pid'] % APART}"}}


def _schedule(plan: Plan) -> Schedule:
    assert plan.pipeline is not None
    return plan.pipeline.read(plan.microbatches)


def _seconds(plan: Plan) -> list[StageSeconds]:
    """The plan's figures; its backward seconds have those of weights in them."""
    assert plan.pipeline is not None
    stages = plan.pipeline.stages
    before = (0.0, *(stage.send_seconds for stage in stages))
    return [
        StageSeconds(
            s.forward_seconds,
            s.backward_seconds - s.weight_seconds,
            s.weight_seconds,
            s.send_seconds,
            back,
        )
        for s, back in zip(stages, before, strict=False)
    ]


def _median(passes: Sequence[Passed]) -> float:
    return median(each.seconds for each in passes)


def _last(timeline: Timeline) -> float:
    """The end of the last pass; updates are not recorded."""
    return max((s.start + s.seconds for s in timeline.slices if s.kind in ORDER), default=0.0)


def _row(label: str, predicted: float, found: float) -> str:
    apart = f"{found / predicted - 1:+.0%}" if predicted > 0 else "-"
    return f"{label}{predicted * 1e3:>9.3f} ms{found * 1e3:>9.3f} ms{apart:>12}"
