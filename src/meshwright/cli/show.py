"""`meshwright show`: print a saved plan, or what each device runs of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import UsageError
from ..output import say
from .options import Format, FormatOption, PlanFile, app
from .replan import print_plan

DEVICES = (
    "# What each device holds and runs; [x, -] is how the whole lies, xN as many layers alike."
)
RANKS = """\
# Passes of each stage, as one of its devices runs them; then what each rank does: passes, sends and receives.
# v12 is a value of the step, [x, -] how the whole lies on a stage, /m of which dim there is one microbatch."""


@app.command()
def show(
    plan: PlanFile,
    everything: Annotated[
        bool, typer.Option("--all", help="Print all rows of every table.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the plan as an HTML page.")] = None,
    program: Annotated[
        bool,
        typer.Option(
            "--program",
            help="Print what each device runs instead; of a pipeline, what each rank runs.",
        ),
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Print a saved plan."""
    from ..ir.codec import load_plan, write_whole
    from ..view.html import page

    found = load_plan(plan)
    if program:
        from ..simulation import local_program

        if everything or html is not None or format is not Format.text:
            raise UsageError(
                "a program is printed as text alone.", where="--program", fix="leave the other options away"
            )  # fmt: skip
        running = str(local_program(found)).rstrip()
        say(DEVICES if found.pipeline is None else RANKS)
        say(running)
        return
    if html is not None:
        write_whole(html, page(found))
        print(f"wrote {html}", file=sys.stderr)
    print_plan(found, format, everything)
