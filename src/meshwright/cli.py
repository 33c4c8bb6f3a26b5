"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 1 the sharded results differ from the unsharded ones; 2 wrong
usage, model, cluster or file; 3 nothing fits; 4 stopped before any plan was found;
5 the plan cannot run here, or belongs to something else; 6 a package is missing;
7 another process of the run has ended, or was waited for too long;
70 a defect of meshwright; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

from . import launch, schedule_cli, whatif  # noqa: F401  (they add their commands to the app)
from .interrupts import heard
from .ir.errors import MeshwrightError, ProcessError, UsageError
from .ir.units import counted, parse_bytes
from .options import Emulate, Format, FormatOption, PlanFile, app
from .replan import print_plan, save_frontier

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line and exit with the code that belongs to the outcome."""
    code: object = 0
    try:
        with heard():
            code = app(standalone_mode=False)
    except ProcessError as error:
        from .backends.xla.meetings import leave

        leave(error)
    except MeshwrightError as error:
        _fail(error.report(), error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if hasattr(error, "format_message"):  # what typer says about options it does not know
            _fail(_usage(error), 2)
        if os.environ.get("MESHWRIGHT_TRACEBACK"):
            raise
        _fail(_defect(error), 70)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # at once: XLA's threads may be in the middle of a step
    sys.exit(0)


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
    print(message, file=sys.stderr, flush=True)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        os._exit(code)  # an orderly exit waits for the other processes, and they for this one
    sys.exit(code)


# ---------------------------------------------------------------- plan


@app.command()
def plan(
    cluster: Annotated[
        str, typer.Option(help="8xcpu, 4xh100x8@ib400, v5p-256, a YAML file; see `clusters`.")
    ],
    model: Annotated[
        str, typer.Option(help="A model of the zoo (see `models`), or FILE.py:FUNCTION.")
    ],
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", "--batch", help="Examples per step.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    layers: Annotated[int | None, typer.Option(help="Depth.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation: bf16 or f32.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured figures of the cluster's devices, from `calibrate`.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Bytes per device that may be used, as in 60GiB.")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Pin the mesh, as in 128x8.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Pin the microbatch count.")] = None,
    recompute: Annotated[
        str | None, typer.Option(help="Pin recompute: none, elementwise, selective, full.")
    ] = None,
    pp: Annotated[
        str, typer.Option(help="Stages of a pipeline, or auto: planned. The mesh is then that of a stage.")
    ] = "1",
    schedule: Annotated[str | None, typer.Option(help="Pin the schedule: 1f1b, interleaved, zb-h1, ...")] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank, for interleaved; 2 if not given.")] = None,
    program: Annotated[
        str | None, typer.Option(help="stages: programs of each stage; single: one for all stages, as gpipe.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds of search.")] = 60.0,
    gap: Annotated[
        float | None, typer.Option(help="Good enough: 0.01 (the default; 0.05 with --pp) stops at a proven 1 %.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal plans.")] = 0,
    search: Annotated[
        str, typer.Option(help="exact, or mcmc: FlexFlow's search, for comparison; it proves nothing.")
    ] = "exact",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to save; MODEL.plan.json if not given.")
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="Save what `replan` needs when devices are lost or gained; with --pp.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print all rows of every table.")] = False,
    format: FormatOption = Format.text,
) -> None:
    """Plan a training step for a cluster, print the plan and save it.

    Ctrl-C ends the search with the best plan so far and its gap.
    """
    from .emulation import trace_on_cpu
    from .ir.cluster import Cluster
    from .ir.codec import check_writable, save_plan
    from .planner.request import Request, parse_mesh, parse_pp
    from .recipe import make

    options = {
        "batch": global_batch, "seq": seq, "layers": layers, "optimizer": optimizer, "dtype": dtype,
    }  # fmt: skip
    recipe = {"model": model, **{k: v for k, v in options.items() if v is not None}}
    trace_on_cpu()
    where = Cluster.parse(cluster)
    if profile is not None:
        where = where.with_profile(profile)
    request = Request(
        memory=None if memory is None else parse_bytes(memory),
        mesh=None if mesh is None else parse_mesh(mesh),
        microbatches=microbatches,
        recompute=cast(Any, recompute),
        pp=parse_pp(pp),
        schedule=schedule,
        chunks=chunks,
        program=cast(Any, program),
        time_limit=time_limit,
        gap=gap,
        seed=seed,
        search=cast(Any, search),
    )
    made = make(recipe)
    place = output or Path(f"{made.name}.plan.json")
    for written in (place, frontier or place):
        check_writable(written)
    if frontier is not None and request.pp == 1:
        save_frontier([], recipe, frontier)
    kept: list[Any] = []
    found = _search(made, where, request, kept.append).model_copy(update={"recipe": recipe})
    save_plan(found, place)
    print_plan(found, format, everything)
    print(f"saved to {place}", file=sys.stderr)
    if frontier is not None:
        save_frontier(kept, recipe, frontier)


def _search(made: Any, where: Any, request: Any, keep: Any = None) -> Any:
    """Trace and plan, telling stderr what happens."""
    from .api import plan_captured
    from .planner.request import check_early
    from .progress import Progress

    check_early(request, where)
    with Progress() as progress:
        progress.say(f"tracing {made.name}")
        captured = made.capture(request.pp != 1)
        progress.say(f"searching plans for {counted(where.size, 'device')} (Ctrl-C: best so far)")
        return plan_captured(captured, where, request, made.name, progress.line, progress.now, keep)


# ---------------------------------------------------------------- show


@app.command()
def show(
    plan: PlanFile,
    everything: Annotated[bool, typer.Option("--all", help="Print all rows of every table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the plan as an HTML page.")] = None,
    format: FormatOption = Format.text,
) -> None:
    """Print a saved plan."""
    from .ir.codec import load_plan, write_whole
    from .view.html import page

    found = load_plan(plan)
    if html is not None:
        write_whole(html, page(found))
        print(f"wrote {html}", file=sys.stderr)
    print_plan(found, format, everything)


# ---------------------------------------------------------------- run and audit


@app.command()
def run(
    plan: Annotated[Path | None, typer.Argument(help="A plan written by `meshwright plan`, or --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Plan this model here instead of reading a plan.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="With --model: emulated CPU devices.")] = 8,
    pin: Annotated[
        list[str] | None, typer.Option(help="With --model: pp=4, schedule=zb-h1, microbatches=8, mesh=4x2, ...")
    ] = None,
    global_batch: Annotated[int | None, typer.Option(help="With --model: examples per step.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to train.")] = 10,
    data: Annotated[
        Path | None, typer.Option(help="Text to train a byte-level model on.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the first step with the unsharded step.")
    ] = False,
    emulate: Emulate = False,
    seed: Annotated[int, typer.Option(help="Of initial parameters and batches.")] = 0,
    coordinator: Annotated[
        str | None, typer.Option(help="host:port of process 0, where the environment does not say it.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="With --coordinator: how many processes run.")] = None,
    process: Annotated[int | None, typer.Option(min=0, help="With --coordinator: which of them this is.")] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds that one wait for another process may take; 600.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the timeline of a pipeline, simulated and measured, for Perfetto.")
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Train with a saved plan on this process's devices; a pipeline's timeline is shown after it.

    Run it in every process of a slurm step, of torchrun, or with jax's variables (see `launch`), and they share the
    plan's devices.

    With --model the plan is made on the spot: meshwright run --model gpt-tiny --devices 8 --pin pp=4
    Its stages have programs of their own, whose passes have a timeline; --pin program=single for one of all stages.
    """
    from .ir.codec import check_writable, load_plan
    from .processes import seat, take_devices
    from .training import show, train

    if trace is not None:
        check_writable(trace)
    if model is not None and plan is None:
        found = _plan_here(model, devices, pin or [], global_batch)
    elif plan is not None and not (model or pin or global_batch):
        found = load_plan(plan)
        take_devices(found, emulate, seat(coordinator, processes, process), deadline)
    else:
        raise UsageError("a plan or --model is needed; --pin and --global-batch go with --model.", fix="one of them")
    show(found, train(found, _made(found), steps, data, verify, seed), trace, format is Format.json)


def _plan_here(model: str, devices: int, pins: list[str], batch: int | None) -> Any:
    from dataclasses import replace

    from .emulation import check_room, emulate
    from .ir.cluster import Cluster
    from .pins import request_of
    from .recipe import make
    from .view.text import plan_head

    request = request_of(pins)
    if request.pp != 1 and request.program is None:
        request = replace(request, program="stages")  # whose passes have a timeline to show
    emulate(devices)
    recipe = {"model": model, **({} if batch is None else {"batch": batch})}
    found = _search(make(recipe), Cluster.parse(f"{devices}xcpu"), request).model_copy(update={"recipe": recipe})
    check_room(found, devices)
    print(plan_head(found), file=sys.stderr)
    return found


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

    from .api import RunningStep
    from .backends.xla.lower import lower
    from .backends.xla.topology import topology_devices
    from .ir.codec import load_plan
    from .processes import take_devices
    from .view import audit_text

    found = load_plan(plan)
    if topology is None:
        take_devices(found, emulate)
        devices = None
    else:
        if emulate:
            raise UsageError("--emulate and --topology are two machines.", fix="one of them")
        devices = topology_devices(topology, found.cluster)
    made = _made(found)
    report = RunningStep(lower(found, made.capture(found.pipeline is not None), devices)).audit()
    if format is Format.json:
        lines = [{**asdict(line), "difference": _finite(line.difference)} for line in report.lines]
        totals = {
            "predicted_bytes": report.predicted_bytes, "compiled_bytes": report.compiled_bytes, "lines": lines,
            "difference": _finite(report.difference), "predicted_peak": report.predicted_peak,
            "compiled_peak": report.compiled_peak, "compiled_parts": report.parts, "limit": report.limit,
        }  # fmt: skip
        full, ranks = report.fullest, [*map(asdict, report.ranks)]
        print(json.dumps(totals | ({"fullest_rank": full[0].rank, "ranks": ranks} if full else {}), indent=1))
    else:
        print(audit_text(report))
    if report.compiled_peak > report.limit:
        raise typer.Exit(3)


def _finite(number: float) -> float | None:
    return number if abs(number) != float("inf") else None


def _made(found: Any) -> Any:
    from .recipe import make

    if not found.recipe:
        raise UsageError(
            f"the plan does not say how its step `{found.name}` is made.",
            fix="lower it in Python: mw.lower(plan, step, *arguments)",
        )
    return make(found.recipe)


# ---------------------------------------------------------------- solve


@app.command()
def solve(
    file: Annotated[Path, typer.Argument(help="A cost graph, .json or .json.gz.")],
    time_limit: Annotated[float, typer.Option(help="Seconds of search.")] = 120.0,
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
    from .ir.codec import check_writable, write_whole
    from .ir.errors import InfeasibleError, StoppedError
    from .planner.solver.anytime import solve_live
    from .planner.solver.iopddl import read
    from .planner.solver.onehot import relative_gap
    from .progress import Progress

    if not 0 < time_limit < float("inf"):
        raise UsageError(f"a time limit of {time_limit} s is none.", where="--time-limit", fix="seconds above 0")
    if not 0 <= gap < 1:
        raise UsageError(f"a gap of {gap} is none.", where="--gap", fix="a share from 0 up to 1")
    if seed < 0:
        raise UsageError(f"a seed of {seed} is none.", where="--seed", fix="0 or more")
    if output is not None:
        check_writable(output)
    live = read(file)
    with Progress() as progress:
        progress.say(f"searching {len(live.costs)} nodes, {int(live.sizes.sum())} strategies")
        found = solve_live(live, time_limit=time_limit, gap=gap, seed=seed, report=_told(progress))
    if found.status == "infeasible":
        fix = "a larger usage_limit" if "limit" in found.reason else "fewer costs of 1e18 and more"
        raise InfeasibleError(f"nothing fits: {found.reason}.", where=str(file), fix=fix)
    if found.choices is None or found.objective is None:
        raise StoppedError(f"{found.reason}.", where=f"stopped by {found.stopped_by}", fix="more time")
    results = {
        "cost": found.objective, "lower_bound": found.lower_bound, "status": found.status,
        "gap": relative_gap(found.objective, found.lower_bound), "stopped_by": found.stopped_by,
        "peak_usage": float(max(live.used(found.choices), default=0.0)),
        "usage_limit": _finite(float(min(live.limits, default=float("inf")))), "assignment": found.choices,
    }  # fmt: skip
    if output is not None:
        write_whole(output, json.dumps(found.choices) + "\n")
    if format is Format.json:
        print(json.dumps(results))
        return
    print(f"cost        {found.objective:.0f}")
    print(f"proof       {found.status}: at least {found.lower_bound:.0f}, gap {results['gap']:.2%}")
    print(f"peak usage  {results['peak_usage']:.0f} of {results['usage_limit'] or float('inf'):.0f}")
    print(f"assignment  {json.dumps(found.choices)}")


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
        print(json.dumps(names()) if format is Format.json else "\n".join(names()))
        return
    try:
        line = describe(name)
    except ModelError as error:
        raise UsageError(error.what, where=error.where, fix=error.hint) from error
    print(json.dumps({"name": name, "description": line}) if format is Format.json else line)


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
    from .ir import presets
    from .ir.cluster import Cluster

    if measure and spec != "local":
        raise UsageError("only this machine can be measured.", fix="clusters local --measure")
    if spec is None:
        print(_presets(presets.names(), format))
        return
    if measure:
        from .backends.xla.measure import measured_cluster

        found = measured_cluster()
    else:
        found = Cluster.local() if spec == "local" else Cluster.parse(spec)
    print(found.model_dump_json(indent=1) if format is Format.json else found.describe())


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
