"""The command that shows one pipeline schedule, or searches for one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..output import say
from .options import Format, FormatOption, app


@app.command()
def schedule(
    name: Annotated[
        str | None,
        typer.Argument(
            help="1f1b, zb-h1, zbv, ...; a CSV file of torch's pipelining; `search`; nothing lists all."
        ),
    ] = None,
    stages: Annotated[
        int | None, typer.Option("--stages", "--pp", help="Ranks; each holds --chunks stages.")
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches per step.")] = None,
    chunks: Annotated[
        int | None, typer.Option(help="Stages per rank, where the schedule takes any.")
    ] = None,
    forward: Annotated[
        str,
        typer.Option(
            help="Seconds of a microbatch's forward pass on a rank: 1, 5ms, or per stage 5ms,6ms,..."
        ),
    ] = "1",
    backward: Annotated[str, typer.Option(help="Of its gradients of inputs.")] = "1",
    weight: Annotated[str, typer.Option(help="Of its gradients of weights.")] = "1",
    send: Annotated[
        str, typer.Option(help="Of sending its result to the next stage, or back.")
    ] = "0",
    memory_limit: Annotated[
        str | None, typer.Option(help="Per rank: a number of microbatches, or bytes with --held.")
    ] = None,
    held: Annotated[
        str | None,
        typer.Option(help="Bytes that a microbatch's forward pass leaves on a rank, or per stage."),
    ] = None,
    kept: Annotated[
        float, typer.Option(help="Share of it that waits for gradients of weights.")
    ] = 1.0,
    static: Annotated[str, typer.Option(help="Of the limit, what a rank always holds.")] = "0",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the passes as CSV for torch's pipelining."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the timeline for Perfetto (ui.perfetto.dev).")
    ] = None,
    width: Annotated[
        int, typer.Option(min=8, max=1000, help="Of the timeline, in characters.")
    ] = 96,
    format: FormatOption = Format.text,
) -> None:
    """Simulate a pipeline schedule: timeline, makespan, span, idle times and memory of each rank.

    The search finds the fastest order for these seconds under the memory limit.
    """
    from ..ir.codec import check_writable, write_whole
    from ..ir.pipeline.torch_csv import to_torch_csv
    from ..schedule_view import catalogue, catalogue_text, data, text
    from ..scheduling import Memory, Seconds, Size, study

    if name is None:
        say(json.dumps(catalogue(), indent=1) if format is Format.json else catalogue_text())
        return
    for path in filter(None, (output, trace)):
        check_writable(path)
    size, seconds = Size(stages, microbatches, chunks), Seconds(forward, backward, weight, send)
    found = study(name, size, seconds, Memory(memory_limit, held, kept, static))
    if output is not None:
        write_whole(output, to_torch_csv(found.schedule))
        print(f"wrote {output}", file=sys.stderr)
    if trace is not None:
        write_whole(trace, json.dumps(found.timeline.perfetto()))
        print(f"wrote {trace}", file=sys.stderr)
    say(json.dumps(data(found), indent=1) if format is Format.json else text(found, width))
    found.check_limit()
