"""`meshwright calibrate`: measure this machine, and fit what plans assume of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..output import say
from .options import Format, FormatOption, app


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to save the profile.")],
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Emulate so many CPU devices; this process's own if not given."),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Measure this machine's devices and write a profile that a cluster file can name.

    Takes tens of seconds; nothing else should run meanwhile.
    """
    from ..calibration import calibrate as measure
    from ..calibration import profile_text
    from ..emulation import emulate
    from ..ir.codec import check_writable, write_whole
    from ..progress import Progress

    check_writable(output)
    if devices is not None:
        emulate(devices)
    with Progress() as progress:
        found = measure(tell=progress.say)
    write_whole(output, found.dump())
    say(found.dump() if format is Format.json else profile_text(found))
