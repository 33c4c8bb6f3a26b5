"""One run in several processes: who this process is among them, and how it joins.

    mw.connect()                                           # from the environment
    mw.connect("10.0.0.1:8476", processes=4, process=2)    # or said outright

The environment may be that of jax (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), of
torchrun (`MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE`, `RANK`) or of a slurm step. A process has all devices
of its host, unless several processes share the host; then each has its part of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import jax

from .backends.xla.meetings import DEADLINE, deadline_seconds, leave
from .emulation import MOST, check_room, emulate
from .ir.errors import LoweringError, ProcessError, UsageError
from .ir.plan import Plan

PORTS, LEAST_PORT = 4096, 61440  # of slurm jobs, by their number: above the ports that systems hand out
JOIN_SECONDS = 300  # how long processes may start apart


@dataclass(frozen=True)
class Seat:
    """Which of how many processes this is; `beside` of them share its host, of which it is number `local`."""

    coordinator: str
    processes: int
    process: int
    local: int = 0
    beside: int = 1


def seat(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None,
    env: Mapping[str, str] = os.environ,
) -> Seat | None:  # fmt: skip
    """What was said, else what the environment says; None where there is one process.

    Raises:
        UsageError: half of what is needed, or numbers that cannot be.
    """
    said = (coordinator, processes, process)
    if any(each is not None for each in said):
        if None in said:
            raise UsageError(
                f"coordinator {coordinator}, {processes} processes, process {process}: one is missing.",
                fix="all three, or none of them and an environment by jax, torchrun or slurm",
            )
        return _checked(Seat(coordinator or "", processes or 0, process or 0), "what was given")
    found = _of_jax(env) or _of_torchrun(env) or _of_slurm(env)
    return found if found is not None and found.processes > 1 else None


def _of_jax(env: Mapping[str, str]) -> Seat | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not all(name in env for name in names):
        return None
    address, count, number = (env[name] for name in names)
    return _checked(Seat(address, _int(count, names[1]), _int(number, names[2])), "JAX_* variables")


def _of_torchrun(env: Mapping[str, str]) -> Seat | None:
    names = ("WORLD_SIZE", "RANK", "MASTER_PORT")
    if not all(name in env for name in (*names, "MASTER_ADDR")):
        return None
    count, number, port = (_int(env[name], name) for name in names)
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself listens there
    local, beside = (_int(env.get(n, d), n) for n, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    return _checked(Seat(f"{env['MASTER_ADDR']}:{port}", count, number, local, beside), "torchrun's variables")


def _of_slurm(env: Mapping[str, str]) -> Seat | None:
    """Of a step of `srun`; a batch script's own environment is one process."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    if not all(name in env for name in (*names, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES")):
        return None
    count, number, local, job = (_int(env[name], name) for name in names)
    host = first_host(env["SLURM_STEP_NODELIST"])
    beside = count // _int(env["SLURM_STEP_NUM_NODES"], "SLURM_STEP_NUM_NODES")
    return _checked(Seat(f"{host}:{LEAST_PORT + job % PORTS}", count, number, local, beside), "slurm's variables")


def first_host(hosts: str) -> str:
    """`node001` of slurm's `node[001-004,009],login1`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", hosts)
    if found is None:
        raise UsageError(f"`{hosts}` names no host.", where="SLURM_STEP_NODELIST", fix="hosts as slurm lists them")
    return found[1] + (found[2] or "")


def _checked(found: Seat, where: str) -> Seat:
    if not 0 <= found.process < found.processes:
        raise UsageError(
            f"there is no process {found.process} of {found.processes}.", where=where,
            fix=f"a number from 0 to {max(found.processes - 1, 0)}",
        )  # fmt: skip
    if not re.fullmatch(r".+:\d+", found.coordinator):
        raise UsageError(f"`{found.coordinator}` is no address.", where=where, fix="host:port of process 0")
    return found


def _int(text: str, where: str) -> int:
    if not text.isdigit():
        raise UsageError(f"`{text}` is no number.", where=where, fix="a whole number")
    return int(text)


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, devices: int = 1
) -> None:
    """Join the other processes of this run, before jax is first used.

    Does nothing where neither the arguments nor the environment speak of other processes.

    Args:
        coordinator: host:port of process 0; this and the next two are found in the environment if not given.
        processes: how many there are.
        process: which of them this is.
        devices: how many accelerators each has where several processes share a host.

    Raises:
        UsageError: half of what is needed, or numbers that cannot be.
        ProcessError: the others did not come.
    """
    found = seat(coordinator, processes, process)
    if found is not None:
        join(found, devices)


def join(found: Seat, devices: int) -> None:
    """Take a seat.

    Args:
        devices: how many accelerators this process gets where several share its host.

    Raises:
        LoweringError: jax was used before.
        ProcessError: the others did not come.
    """
    deadline = deadline_seconds()
    first = found.local * devices
    own = None if found.beside == 1 else list(range(first, first + devices))
    try:
        jax.distributed.initialize(
            found.coordinator, found.processes, found.process, local_device_ids=own,
            cluster_detection_method="deactivate", initialization_timeout=JOIN_SECONDS,
            shutdown_timeout_seconds=max(1, int(min(deadline, JOIN_SECONDS))),
        )  # fmt: skip
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if "before" in first or "once" in first:
            raise LoweringError("jax is in use already.", origin=first, fix="mw.connect() first of all") from error
        raise ProcessError(
            f"process {found.process} of {found.processes} found no others.", where=found.coordinator,
            origin=first, fix="process 0 at that address, and all of them started",
        ) from error  # fmt: skip
    _explain_aborts(found)
    sys.excepthook = _end_with


def _end_with(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that nobody caught ends this process at once; jax would wait for the others, and they for this one."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(getattr(error, "exit_code", 1))


def _explain_aborts(found: Seat) -> None:
    """jax aborts a process that cannot reach the coordinator any more; say so, and end with our code."""

    def aborting(_: int) -> None:
        leave(
            ProcessError(
                "jax gives this run up: the process of the coordinator has ended, or the network has.",
                where=f"process {found.process} of {found.processes}, coordinator {found.coordinator}",
                fix="see what the other processes say; the first that ended has the reason",
            )
        )  # fmt: skip

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborting))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


_handlers: list[object] = []  # C holds on to them, and Python must


def take_devices(plan: Plan, emulated: bool, place: Seat | None = None, deadline: float | None = None) -> None:
    """For the command line: this process's devices, emulated where that is asked for or the plan is for CPUs,
    and the other processes if there are any."""
    if deadline is not None:
        os.environ[DEADLINE] = str(deadline)
    count = plan.device_count if place is None else per_process(plan, place.processes)
    if emulated or (plan.cluster.device.kind == "cpu" and count <= MOST):
        check_room(plan, count)
        emulate(count)
    if place is not None:
        _keep_stdout()
        join(place, count)


def _keep_stdout() -> None:
    """What libraries print there goes to stderr: gloo tells of every connection."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1)


def per_process(plan: Plan, processes: int) -> int:
    """How many of a plan's devices each process has.

    Raises:
        LoweringError: they cannot be dealt out evenly.
    """
    if plan.device_count % processes:
        raise LoweringError(
            f"the plan's {plan.device_count} devices cannot be dealt out to {processes} processes.",
            where=f"plan `{plan.name}`", fix="a number of processes that divides them",
        )  # fmt: skip
    return plan.device_count // processes
