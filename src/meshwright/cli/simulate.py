"""`meshwright simulate`: a saved plan on any cluster, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..ir.units import format_bytes, format_seconds
from ..output import say
from .figures import Changes, TraceFile, changes_of, likely, memory_words
from .options import Format, FormatOption, PlanFile, app


@app.command()
def simulate(
    plan: PlanFile,
    changes: Changes = None,
    trace: TraceFile = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            help="What runs beside computation: parameters,gradients,tensor; all; none; as the plan says if not given."
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Simulate a step of a saved plan, with communication beside computation where the plan assumes it."""
    from ..ir.codec import check_writable, load_plan, write_whole
    from ..planner.report.pipeline_prices import PipelineSimulation
    from ..simulation import simulate as run

    if trace is not None:
        check_writable(trace)
    loaded, asked = load_plan(plan), changes_of(changes)
    if loaded.pipeline is not None and not asked and overlap is None:
        _simulate_pipeline(loaded, trace, format)
        return
    found = run(loaded, changes=asked, overlap=overlap)
    if trace is not None:
        write_whole(trace, json.dumps(found.timeline.perfetto()))
    if isinstance(found.result, PipelineSimulation):
        _say_changed(found, format)
        return
    if format is Format.json:
        say(json.dumps(_simulated(found), indent=1))
        return
    result, between = found.result, found.between
    ran = result.run.makespan
    say(f"step           {format_seconds(found.seconds)}" + likely(between))
    say(
        f"simulated      {format_seconds(ran)} ({ran / (found.seconds or 1.0) - 1:+.1%}); {found.execution.beside}"
    )
    say(f"compute        {format_seconds(result.compute)}")
    say(f"communication  {_hidden(result.communication, result.exposed)}")
    planned = format_seconds(found.plan.estimate.step_seconds)
    say(f"unoverlapped   {format_seconds(result.serial)}; the plan says {planned}")
    fits = "" if result.peak <= found.limit else ": it does not fit"
    say(f"memory         {memory_words(result.memory)} of {format_bytes(found.limit)}{fits}")
    say(f"error          {found.band}; {found.hangs_on}")
    say(found.timeline.text())


def _hidden(seconds: float, exposed: float) -> str:
    """How much of what is sent runs beside computation; what rounding leaves of a sum is none."""
    hidden = seconds - exposed
    rest = hidden if hidden > 1e-9 * seconds else 0.0
    return f"{format_seconds(seconds)}, {format_seconds(rest)} hidden, {format_seconds(exposed)} exposed"


OF_LAYERS = (
    "the plan runs a single program for all stages; simulated are the passes of its layers, as if each stage had\n"
    "         programs of its own. The plan's figure adds embedding and head, which all stages share, the exchanges\n"
    "         around them, and that in the single program stages wait for each other at every microbatch"
)


def _simulate_pipeline(plan: Any, trace: Path | None, format: Format) -> None:
    """The schedule of a plan's pipeline, with the seconds that the plan gives its stages."""
    from ..ir.codec import write_whole
    from ..pipeline_view import LEGEND, figures, parts_of_step, simulated

    line, rows, parts = simulated(plan), figures(plan), parts_of_step(plan)
    if trace is not None:
        write_whole(trace, json.dumps(line.perfetto()))
    if format is Format.json:
        data = {
            "seconds": line.seconds,
            "planned": plan.estimate.step_seconds,
            "ranks": rows,
            "sent": parts.sent,
            "exposed": parts.exposed,
            "program": plan.pipeline.program,
            "simulated": "stages",
        }
        say(json.dumps(data, indent=1))
        return
    say(
        f"step     {format_seconds(line.seconds)}; the plan says {format_seconds(plan.estimate.step_seconds)}"
    )
    if plan.pipeline.program == "single":
        say(f"beware   {OF_LAYERS}")
    say(f"between  stages {_hidden(parts.sent, parts.exposed)}")
    say(f"error    {plan.proof.band}")
    say(line.text())
    say(LEGEND)
    for row in rows:
        say(
            f"rank {row['rank']:<3} busy {format_seconds(row['busy'])}, span {format_seconds(row['span'])}, "
            f"idle in it {row['idle']:.1%}, memory {format_bytes(row['peak_bytes'])}"
        )


def _say_changed(found: Any, format: Format) -> None:
    """A pipeline on a changed cluster, op by op."""
    from ..pipeline_view import LEGEND

    result, planned, run = found.result, found.plan.estimate.step_seconds, found.result.run
    ranks = [
        {"rank": rank, "busy": run.busy(rank), "idle": run.idle(rank)}
        for rank in sorted({task.device for task in run.tasks})
    ]
    if format is Format.json:
        data = {
            "seconds": found.seconds, "overlap": found.execution.overlap, "between": found.between,
            "serial": result.serial, "planned": planned, "ranks": ranks, "band": found.band,
        }  # fmt: skip
        say(json.dumps(data, indent=1))
        return
    say(
        f"step           {format_seconds(found.seconds)}{likely(found.between)}; {found.execution.beside}"
    )
    say(f"unoverlapped   {format_seconds(result.serial)}; the plan says {format_seconds(planned)}")
    say(f"error          {found.band}")
    say(found.timeline.text())
    say(LEGEND)
    for each in ranks:
        say(
            f"rank {each['rank']:<3} busy {format_seconds(each['busy'])}, idle {format_seconds(each['idle'])}"
        )


def _simulated(found: Any) -> dict[str, Any]:
    result = found.result
    return {
        "seconds": found.seconds, "simulated": result.run.makespan, "overlap": found.execution.overlap,
        "between": found.between, "serial": result.serial, "compute": result.compute,
        "communication": result.communication, "exposed": result.exposed, "memory": result.memory,
        "peak_bytes": result.peak, "limit_bytes": found.limit, "planned": found.plan.estimate.step_seconds,
        "band": found.band, "hangs_on": found.hangs_on,
    }  # fmt: skip
