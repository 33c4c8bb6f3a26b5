"""The lines that start a plan on its cluster: `meshwright run` in one process per host, or several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import UsageError
from ..ir.plan import Plan
from ..output import say
from .options import PlanFile, app

PORT = (
    8476  # of the coordinator, if no other is asked for; the one that jax's documents use for TPUs
)
HOST = "$HOST0"


class Launcher(StrEnum):
    slurm = "slurm"
    torchrun = "torchrun"
    jax = "jax"


@dataclass(frozen=True)
class ProcessLayout:
    """`nodes` hosts with `per_node` processes each, which have `devices` devices each."""

    nodes: int
    per_node: int
    devices: int
    kind: str  # of device
    names: tuple[str, ...]  # of the hosts, if the cluster knows them

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


def job(plan: Plan, per_node: int) -> ProcessLayout:
    """How a plan's devices fall on the hosts of its cluster.

    Raises:
        UsageError: hosts that are not alike, or devices that do not come out even.
    """
    cluster, needed = plan.cluster, plan.device_count
    sizes = {(group.device, group.per_host) for group in cluster.groups}
    if len(sizes) > 1:
        what = ", ".join(f"{size} {device}" for device, size in sorted(sizes))
        raise UsageError(
            f"the hosts of {cluster.name} are not alike ({what}).", where="launch",
            fix="in each process, k from 0: meshwright run PLAN --coordinator "
            f"{next((n for g in cluster.groups for n in g.names or ()), HOST)}:{PORT} --processes N --process k",
        )  # fmt: skip
    each = cluster.groups[0].per_host
    if needed > each and needed % each:
        raise UsageError(
            f"the plan's {needed} devices do not fill hosts of {each}.", where=f"plan `{plan.name}`",
            fix=f"a plan for a multiple of {each} devices",
        )  # fmt: skip
    here = min(needed, each)
    if per_node < 1 or here % per_node:
        raise UsageError(
            f"{here} devices of a host cannot be dealt out to {per_node} processes.", where="--per-host",
            fix=f"a number that divides {here}",
        )  # fmt: skip
    names = tuple(name for group in cluster.groups for name in group.names or ())
    return ProcessLayout(-(-needed // each), per_node, here // per_node, cluster.device.kind, names)


def lines(found: ProcessLayout, launcher: Launcher, run: str, port: int = PORT) -> list[str]:
    """What to type.

    Raises:
        UsageError: what a launcher cannot do.
    """
    return {Launcher.slurm: _slurm, Launcher.torchrun: _torchrun, Launcher.jax: _jax}[launcher](
        found, run, port
    )


def _slurm(found: ProcessLayout, run: str, port: int) -> list[str]:
    """One step; each process finds its seat in slurm's variables, and the coordinator's port by the job."""
    words = ["srun", f"--nodes={found.nodes}", f"--ntasks-per-node={found.per_node}"]
    if found.kind in ("cuda", "rocm"):
        words.append(f"--gpus-per-node={found.per_node * found.devices}")
    if found.names:
        words.append(f"--nodelist={','.join(found.names[: found.nodes])}")
    return [" ".join([*words, run])]


def _torchrun(found: ProcessLayout, run: str, port: int) -> list[str]:
    first = found.names[0] if found.names else HOST
    there = f"--nnodes={found.nodes} --nproc-per-node={found.per_node}"
    if found.nodes == 1:
        return [f"torchrun --standalone {there} --no-python {run}"]
    same = f"torchrun {there} --rdzv-backend=c10d --rdzv-endpoint={first}:{port} --no-python {run}"
    return [f"# on each of the {found.nodes} hosts{_unnamed(found)}", same]


def _jax(found: ProcessLayout, run: str, port: int) -> list[str]:
    if found.processes == 1:
        return [run]
    if found.per_node > 1 and found.kind != "cpu":
        raise UsageError(
            "jax's own variables do not say which devices a process has.", where="--per-host",
            fix="--per-host 1, or --with slurm or torchrun",
        )  # fmt: skip
    first = "127.0.0.1" if found.nodes == 1 else found.names[0] if found.names else HOST
    rows = [f"# process by process{_unnamed(found)}"]
    for number in range(found.processes):
        host, last = number // found.per_node, number == found.processes - 1
        where = (
            f"  # on {found.names[host]}"
            if found.names
            else f"  # on host {host}"
            if found.nodes > 1
            else ""
        )
        seat = f"--coordinator {first}:{port} --processes {found.processes} --process {number}"
        rows.append(f"{run} {seat}" + (" &" if found.nodes == 1 and not last else "") + where)
    return rows


def _unnamed(found: ProcessLayout) -> str:
    return "" if found.names or found.nodes == 1 else ", with HOST0 set to the name of the first"


@app.command()
def launch(
    plan: PlanFile,
    launcher: Annotated[Launcher, typer.Option("--with", help="What starts the processes.")],
    per_host: Annotated[int, typer.Option(help="Processes per host, which share its devices.")] = 1,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of process 0, for torchrun and jax.")
    ] = PORT,
    more: Annotated[
        str, typer.Option("--run", help="Options of `meshwright run`: '--steps 100 --verify'.")
    ] = "",
) -> None:
    """Print the lines that run a saved plan on the hosts of its cluster."""
    from ..ir.codec import load_plan

    for line in lines(
        job(load_plan(plan), per_host), launcher, _command(plan, shlex.split(more)), port
    ):
        say(line)


def _command(plan: Path, options: Sequence[str]) -> str:
    return shlex.join(["meshwright", "run", str(plan), *options])
