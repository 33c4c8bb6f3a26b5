"""The command line's app, and the options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..ir.version import VERSION
from ..output import apart, say


class _Command(TyperCommand):
    """A command whose results alone reach stdout."""

    def invoke(self, ctx: Any) -> Any:
        with apart():
            return super().invoke(ctx)


class _App(typer.Typer):
    def command(self, *args: Any, **options: Any) -> Any:
        return super().command(*args, cls=_Command, **options)


app = _App(
    name="meshwright",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"meshwright {VERSION}")
        raise typer.Exit


@app.callback()
def meshwright(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say which this is."),
    ] = False,
) -> None:
    """Plan, inspect and run parallel training steps."""


class Format(StrEnum):
    text = "text"
    json = "json"


class Backend(StrEnum):
    xla = "xla"
    torch = "torch"


FormatOption = Annotated[Format, typer.Option("--format", help="How results are printed.")]
PlanFile = Annotated[Path, typer.Argument(help="A plan written by `meshwright plan`.")]
Emulate = Annotated[
    bool, typer.Option("--emulate", help="Run on emulated CPU devices, whatever the plan is for.")
]


def finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if abs(number) != float("inf") else None
