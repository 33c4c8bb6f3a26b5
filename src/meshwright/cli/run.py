"""`meshwright run`: train a model of the zoo with a plan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..ir.errors import LoweringError, UsageError
from .options import Backend, Emulate, Format, FormatOption, app
from .plan import searched


@app.command()
def run(
    plan: Annotated[
        Path | None, typer.Argument(help="A plan written by `meshwright plan`, or --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Plan this model here instead of reading a plan.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="With --model: emulated CPU devices.")] = 8,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="With --model: pp=4, schedule=zb-h1, microbatches=8, mesh=4x2, ..."),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="With --model: examples per step.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to train.")] = 10,
    data: Annotated[Path | None, typer.Option(help="Text to train a byte-level model on.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the first step with the unsharded step.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the state to this new folder after the last step; needs torch."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on from a folder that was saved, by any plan of this model, after its last batch."
        ),
    ] = None,
    emulate: Emulate = False,
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="What runs the step: xla, or torch, a process for each device; by default what the plan is for."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="Of initial parameters and batches of a zoo model; 0."
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="host:port of process 0, where the environment does not say it."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --coordinator: how many processes run.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, help="With --coordinator: which of them this is.")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds that one wait for another process may take; 600.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write the timeline of a pipeline, simulated and measured, for Perfetto."
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Train with a saved plan on this process's devices; a pipeline's timeline is shown after it.

    Run it in every process of a slurm step, of torchrun, or with jax's variables (see `launch`), and they share the
    plan's devices.

    With --model the plan is made on the spot: meshwright run --model gpt-tiny --devices 8 --pin pp=4
    Its stages have programs of their own, whose passes have a timeline; --pin program=single for one of all stages.

    With --backend torch the same step runs on torch, in a process of this host for each device; a pipeline too, if each
    stage has programs of its own and no layers come from a loop, but without a timeline.
    """
    from ..ir.codec import check_writable, load_plan
    from ..processes import set_deadline, take_devices
    from ..saved import Kept, check_saving
    from ..seats import seat
    from ..together import same_command
    from ..torch_training import train_on_torch
    from ..training import show, train

    if trace is not None:
        check_writable(trace)
    if save is not None:
        check_saving(save)
    others = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    alone = others | {"--trace": trace}
    if model is not None and plan is None:
        here = Backend.xla if backend is None else backend
        if here is Backend.torch:
            _check_alone(alone)
        found = _plan_here(model, devices, pin or [], global_batch, here)
    elif plan is not None and not (model or pin or global_batch):
        found = load_plan(plan)
        here = Backend(found.backend) if backend is None else backend
        if here is Backend.torch:
            _check_alone(alone)
        else:
            place = seat(coordinator, processes, process)
            take_devices(found, emulate, place, deadline)
            said = {"steps": steps, "seed": seed or 0, "verify": verify, "emulate": emulate}
            same_command(found, said, data)
    else:
        raise UsageError(
            "a plan or --model is needed; --pin and --global-batch go with --model.",
            fix="one of them",
        )
    if elsewhere := found.read_elsewhere(here.value):
        print(elsewhere, file=sys.stderr)
    how = steps, data, verify, seed, Kept(save, resume)
    if here is Backend.torch:
        set_deadline(deadline)
        trained = train_on_torch(found, step_of(found), *how, emulated=emulate or model is not None)
    else:
        with running(found):
            trained = train(found, step_of(found), *how)
    show(found, trained, trace, format is Format.json)


def _check_alone(given: dict[str, Any]) -> None:
    """Options that torch's ranks on one host have no use for.

    Raises:
        UsageError: one of them is given.
    """
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise UsageError(
            f"{', '.join(named)} goes with --backend xla; the ranks of torch are processes of this host.",
            fix="leave it out",
        )


@contextmanager
def running(plan: Any) -> Iterator[None]:
    """What XLA refuses, compiling or running: too little memory, or a call of the step's own that failed."""
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        raise LoweringError(
            "the step cannot run here, or failed as it ran.", where=f"plan `{plan.name}`",
            origin=f"{str(error).strip().splitlines()[0]:.300}", fix="a smaller model or batch, or other devices",
        ) from error  # fmt: skip


def _plan_here(
    model: str, devices: int, pins: list[str], batch: int | None, backend: Backend
) -> Any:
    from dataclasses import replace

    from ..emulation import check_room, emulate
    from ..ir.cluster.cluster import Cluster
    from ..pins import request_of
    from ..recipe import make
    from ..view.text import plan_head

    request = replace(request_of(pins), backend=backend.value)
    if request.pp != 1 and request.program is None:
        request = replace(request, program="stages")  # whose passes have a timeline to show
    emulate(devices)
    recipe = {"model": model, **({} if batch is None else {"batch": batch})}
    found = searched(make(recipe), Cluster.parse(f"{devices}xcpu"), request).model_copy(
        update={"recipe": recipe}
    )
    check_room(found, devices)
    print(plan_head(found), file=sys.stderr)
    return found


def step_of(found: Any) -> Any:
    """The model of the zoo that a plan was made for."""
    from ..recipe import make

    if not found.recipe:
        raise UsageError(
            f"the plan does not say how its step `{found.name}` is made.",
            fix="lower it in Python: mw.lower(plan, step, *arguments)",
        )
    return make(found.recipe)
