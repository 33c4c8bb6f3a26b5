"""`meshwright models` and `clusters`: what there is to plan, and to plan for."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..ir.errors import UsageError
from ..output import say
from .options import Format, FormatOption, app


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Describe this one.")] = None,
    format: FormatOption = Format.text,
) -> None:
    """List the models of the zoo, or describe one."""
    from ..models import ModelError, describe, names

    if name is None:
        say(json.dumps(names()) if format is Format.json else "\n".join(names()))
        return
    try:
        line = describe(name)
    except ModelError as error:
        raise UsageError(error.what, where=error.where, fix=error.hint) from error
    say(json.dumps({"name": name, "description": line}) if format is Format.json else line)


@app.command()
def clusters(
    spec: Annotated[
        str | None, typer.Argument(help="A shorthand, a file, or `local`: check and describe it.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="With `local`: measure its rates (some seconds).")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """List device and fabric presets, or check and describe a cluster."""
    from ..ir.cluster import presets
    from ..ir.cluster.cluster import Cluster

    if measure and spec != "local":
        raise UsageError("only this machine can be measured.", fix="clusters local --measure")
    if spec is None:
        say(_presets(presets.names(), format))
        return
    if measure:
        from ..backends.xla.measure import measured_cluster

        found = measured_cluster()
    else:
        found = Cluster.local() if spec == "local" else Cluster.parse(spec)
    say(
        json.dumps(found.model_dump(mode="json"), indent=1)
        if format is Format.json
        else found.describe()
    )


def _presets(names: dict[str, str], format: Format) -> str:
    if format is Format.json:
        return json.dumps(names)
    width = max(map(len, names))
    rows = [f"{name.ljust(width)}  {what}" for name, what in names.items()]
    return "\n".join([*rows, "", "combine them: 8xcpu, h100x8, 4xh100x8@ib400, v5p-256"])
