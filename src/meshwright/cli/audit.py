"""`meshwright audit`: a plan against the programs that the compiler makes of it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..ir.errors import UsageError
from ..output import say
from .options import Emulate, Format, FormatOption, PlanFile, app, finite
from .run import running, step_of


@app.command()
def audit(
    plan: PlanFile,
    emulate: Emulate = False,
    topology: Annotated[
        str | None, typer.Option(help="Compile for this TPU slice, as v5e:2x4; no TPU is needed.")
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Compile a saved plan and compare its communication and memory with the prediction."""
    from dataclasses import asdict

    from ..api import RunningStep
    from ..backends.xla.lower import lower
    from ..backends.xla.topology import topology_devices
    from ..ir.codec import load_plan
    from ..processes import take_devices
    from ..view import audit_text

    found = load_plan(plan)
    if found.backend != "xla":
        raise UsageError(
            f"the plan is for {found.backend}, and an audit compiles for xla, which does other things.",
            where=f"plan `{found.name}`",
            fix="plan with --backend xla",
        )
    if topology is None:
        take_devices(found, emulate)
        devices = None
    else:
        if emulate:
            raise UsageError("--emulate and --topology are two machines.", fix="one of them")
        devices = topology_devices(topology, found.cluster)
    made = step_of(found)
    with running(found):
        report = RunningStep(
            lower(found, made.capture(found.pipeline is not None), devices)
        ).audit()
    if format is Format.json:
        lines = [{**asdict(line), "difference": finite(line.difference)} for line in report.lines]
        totals = {
            "predicted_bytes": report.predicted_bytes, "compiled_bytes": report.compiled_bytes, "lines": lines,
            "difference": finite(report.difference), "predicted_peak": report.predicted_peak,
            "compiled_peak": report.compiled_peak, "compiled_parts": report.parts, "limit": report.limit,
        }  # fmt: skip
        full, ranks = report.fullest, [*map(asdict, report.ranks)]
        say(
            json.dumps(
                totals | ({"fullest_rank": full[0].rank, "ranks": ranks} if full else {}), indent=1
            )
        )
    else:
        say(audit_text(report))
    if report.compiled_peak > report.limit:
        raise typer.Exit(3)
