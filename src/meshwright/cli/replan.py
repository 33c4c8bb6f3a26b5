"""The command that plans anew after devices were lost or gained, from what a search kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..output import say
from .options import Format, FormatOption, app


@app.command()
def replan(
    frontier: Annotated[Path, typer.Argument(help="What `meshwright plan --frontier` saved.")],
    cluster: Annotated[str, typer.Option(help="What there is now, as for `plan`.")],
    profile: Annotated[
        Path | None, typer.Option(help="Measured figures of the cluster's devices.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to save; MODEL.plan.json if not given."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print all rows of every table.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Plan the same step for another number of devices, in seconds.

    The solutions that a search met are dealt out anew to stages; hosts that do not divide stay spare.
    """
    from ..collector import paused
    from ..ir.cluster.cluster import Cluster
    from ..ir.codec import check_writable, save_plan
    from ..planner.search.frontier import load_frontier

    known = load_frontier(frontier)
    place = output or Path(f"{known.name}.plan.json")
    check_writable(place)
    where = Cluster.parse(cluster)
    with paused():
        found = known.replanned(where if profile is None else where.with_profile(profile))
    save_plan(found, place)
    print_plan(found, format, everything)
    print(f"saved to {place}", file=sys.stderr)


def save_frontier(kept: Sequence[Any], recipe: Mapping[str, str | int | bool], place: Path) -> None:
    """Write what a search kept; `kept` is empty where it met no pipeline.

    Raises:
        PlanError: there is nothing to keep, or the file cannot be written.
    """
    from ..ir.codec import sealed, write_whole
    from ..ir.errors import PlanError

    if not kept:
        raise PlanError(
            "the search met no pipeline, so nothing was kept.", where="--frontier",
            fix="--pp auto on equal devices; without pipelines, `meshwright plan` itself is quick",
        )  # fmt: skip
    write_whole(place, sealed(kept[0].model_copy(update={"recipe": dict(recipe)})))
    print(f"saved what `replan` needs to {place}", file=sys.stderr)


def print_plan(found: Any, format: Format, everything: bool) -> None:
    from ..view import plan_text
    from ..view.words import words

    if format is Format.text:
        say(plan_text(found, everything))
        return
    data = found.model_dump(mode="json", exclude={"strategies", "slots"})
    data["proof"]["gap"] = found.proof.gap
    say(json.dumps({**data, "words": words(found)}, indent=1))
