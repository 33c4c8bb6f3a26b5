"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 1 the sharded results differ from the unsharded ones; 2 wrong
usage, model, cluster or file; 3 nothing fits; 4 stopped before any plan was found;
5 the plan cannot run here, or belongs to something else; 6 a package is missing;
7 another process of the run has ended, or was waited for too long;
70 a defect of meshwright; 130 interrupted; 141 whoever read the results has gone.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NoReturn

import typer

from . import launch, plan_cli, run_cli, schedule_cli, whatif  # noqa: F401  (they add their commands to the app)
from .interrupts import heard
from .ir.errors import (
    LoweringError,
    MeshwrightError,
    MissingDependencyError,
    ProcessError,
    UsageError,
)
from .ir.passes.contract import dumped_passes
from .ir.passes.order import PASSES
from .options import Format, FormatOption, PlanFile, app, finite
from .output import ReaderGoneError, flush, say, silence, tolerant
from .replan import print_plan

INTERRUPTED, CLOSED = 130, 141  # as shells count signals: 128 and SIGINT's number, SIGPIPE's
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main() -> NoReturn:
    """Run the command line and exit with the code that belongs to the outcome."""
    code: object = 0
    tolerant()
    try:
        with heard():
            dumped_passes(each.name for each in PASSES)  # a wrong name is told whatever the command
            code = app(standalone_mode=False)
        flush()  # what help printed
    except ProcessError as error:
        from .backends.xla.meetings import leave

        leave(error)
    except MeshwrightError as error:
        _fail(error.report(), error.exit_code)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ReaderGoneError, SystemExit):  # typer ends so when whoever reads its help has gone
        silence()
        sys.exit(CLOSED)
    except MemoryError as error:
        _fail(
            LoweringError(
                f"this machine has too little memory: {error or 'none is left'}."
            ).report(),
            5,
        )
    except Exception as error:
        if told := getattr(error, "format_message", None):  # of options that typer does not know
            helped = type(error).__name__ == "NoArgsIsHelpError"
            _fail(told() if helped else _usage(error), 2)
        if isinstance(error, OSError) and error.errno in FULL:  # help, which typer prints
            _fail(
                UsageError(
                    f"results cannot be printed: {error.strerror}.", fix="room where they lead"
                ).report(),
                2,
            )
        if isinstance(error, ImportError) and (missing := MissingDependencyError.of(error)):
            _fail(missing.report(), missing.exit_code)
        if os.environ.get("MESHWRIGHT_TRACEBACK"):
            raise
        _fail(_defect(error), 70)
    if code == INTERRUPTED:
        with suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # at once: XLA's threads may be in the middle of a step
    sys.exit(code if isinstance(code, int) else 0)


def _defect(error: Exception) -> str:
    """An error that no one foresaw, in the house form."""
    return MeshwrightError(
        f"meshwright failed: {type(error).__name__}: {error}.",
        fix="MESHWRIGHT_TRACEBACK=1 shows where; please report it with the command",
    ).report()


def _usage(error: Any) -> str:
    command = getattr(error.ctx, "command_path", "meshwright") if error.ctx else "meshwright"
    return UsageError(error.format_message(), fix=f"{command} --help").report()


def _fail(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # nobody may be there to read it
        print(message, file=sys.stderr, flush=True)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        os._exit(code)  # an orderly exit waits for the other processes, and they for this one
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        silence()
    sys.exit(code)


# ---------------------------------------------------------------- show


@app.command()
def show(
    plan: PlanFile,
    everything: Annotated[
        bool, typer.Option("--all", help="Print all rows of every table.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the plan as an HTML page.")] = None,
    program: Annotated[
        bool,
        typer.Option("--program", help="Print what each device runs instead, layers alike once."),
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Print a saved plan."""
    from .ir.codec import load_plan, write_whole
    from .view.html import page

    found = load_plan(plan)
    if program:
        from .simulation import local_program

        if everything or html is not None or format is not Format.text:
            raise UsageError(
                "a program is printed as text alone.", where="--program", fix="leave the other options away"
            )  # fmt: skip
        say(
            "# What each device holds and runs; [x, -] is how the whole lies, xN as many layers alike."
        )
        say(str(local_program(found)).rstrip())
        return
    if html is not None:
        write_whole(html, page(found))
        print(f"wrote {html}", file=sys.stderr)
    print_plan(found, format, everything)


# ---------------------------------------------------------------- solve


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
    from .ir.codec import check_writable, write_whole
    from .ir.errors import InfeasibleError, StoppedError
    from .planner.solver.iopddl import read
    from .planner.solver.onehot import relative_gap
    from .planner.solver.punctual import solve_until
    from .progress import Progress

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


# ---------------------------------------------------------------- lists


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Describe this one.")] = None,
    format: FormatOption = Format.text,
) -> None:
    """List the models of the zoo, or describe one."""
    from .models import ModelError, describe, names

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
    from .ir.cluster import presets
    from .ir.cluster.cluster import Cluster

    if measure and spec != "local":
        raise UsageError("only this machine can be measured.", fix="clusters local --measure")
    if spec is None:
        say(_presets(presets.names(), format))
        return
    if measure:
        from .backends.xla.measure import measured_cluster

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


# ---------------------------------------------------------------- demo


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
    from .demo import run_demo

    run_demo(data, steps, devices, large)
