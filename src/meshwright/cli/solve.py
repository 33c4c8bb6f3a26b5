"""`meshwright solve`: cost graphs of the ASPLOS 2025 contest."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from ..ir.errors import UsageError
from ..output import say
from .options import Format, FormatOption, app, finite


@app.command()
def solve(
    file: Annotated[Path, typer.Argument(help="A cost graph, .json or .json.gz.")],
    time_limit: Annotated[float, typer.Option(help="Seconds, reading the file included.")] = 120.0,
    gap: Annotated[float, typer.Option(help="Proven when this near the bound.")] = 1e-9,
    seed: Annotated[int, typer.Option(help="Of the random moves.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the assignment as JSON.")
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Solve a cost graph of the ASPLOS 2025 contest: one strategy per node under a memory limit.

    Prints cost, bound and one strategy index per node. Ctrl-C ends with the best so far.
    """
    begun = perf_counter()
    from ..ir.codec import check_writable, write_whole
    from ..ir.errors import InfeasibleError, StoppedError
    from ..planner.solver.iopddl import read
    from ..planner.solver.onehot import relative_gap
    from ..planner.solver.punctual import solve_until
    from ..progress import Progress

    if not 0 < time_limit < float("inf"):
        raise UsageError(
            f"a time limit of {time_limit} s is none.", where="--time-limit", fix="seconds above 0"
        )
    if not 0 <= gap < 1:
        raise UsageError(f"a gap of {gap} is none.", where="--gap", fix="a share from 0 up to 1")
    if seed < 0:
        raise UsageError(f"a seed of {seed} is none.", where="--seed", fix="0 or more")
    if output is not None:
        check_writable(output)
    live = read(file)
    with Progress() as progress:
        progress.say(f"searching {len(live.costs)} nodes, {int(live.sizes.sum())} strategies")
        found = solve_until(
            live, until=begun + time_limit, gap=gap, seed=seed, report=_told(progress)
        )
    if found.status == "infeasible":
        fix = "a larger usage_limit" if "limit" in found.reason else "fewer costs of 1e18 and more"
        raise InfeasibleError(f"nothing fits: {found.reason}.", where=str(file), fix=fix)
    if found.choices is None or found.objective is None:
        raise StoppedError(
            f"{found.reason}.", where=f"stopped by {found.stopped_by}", fix="more time"
        )
    results = {
        "cost": found.objective, "lower_bound": found.lower_bound, "status": found.status,
        "gap": relative_gap(found.objective, found.lower_bound), "stopped_by": found.stopped_by,
        "peak_usage": float(max(live.used(found.choices), default=0.0)),
        "usage_limit": finite(float(min(live.limits, default=float("inf")))), "assignment": found.choices,
    }  # fmt: skip
    if output is not None:
        write_whole(output, json.dumps(found.choices) + "\n")
    if format is Format.json:
        say(json.dumps(results))
        return
    say(f"cost        {found.objective:.0f}")
    say(f"proof       {found.status}: at least {found.lower_bound:.0f}, gap {results['gap']:.2%}")
    say(f"peak usage  {results['peak_usage']:.0f} of {results['usage_limit'] or float('inf'):.0f}")
    say(f"assignment  {json.dumps(found.choices)}")


def _told(progress: Any) -> Any:
    """Say every second at most how far the search is."""
    from time import monotonic

    last = [0.0]

    def tell(objective: float, bound: float) -> None:
        if monotonic() > last[0] + 1.0:
            last[0] = monotonic()
            best = "nothing yet" if objective == float("inf") else f"{objective:.0f}"
            progress.say(f"best {best}, bound {bound:.0f} (Ctrl-C: best so far)")

    return tell
