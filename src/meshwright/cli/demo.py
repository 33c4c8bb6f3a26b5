"""`meshwright demo`: the main job, on emulated devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import app


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Text to train on; this project's own sources if not given.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    devices: Annotated[int, typer.Option(min=1, help="How many to emulate.")] = 8,
    large: Annotated[bool, typer.Option(help="Also plan gpt3-175b for 1024 GPUs.")] = True,
) -> None:
    """Train a byte-level GPT on emulated devices with a plan found on the spot."""
    from ..demo import run_demo

    run_demo(data, steps, devices, large)
