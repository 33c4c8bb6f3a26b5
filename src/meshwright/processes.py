"""One run in several processes: how this process joins the others, and with what.

    mw.connect()                                           # from the environment, see `seats`
    mw.connect("10.0.0.1:8476", processes=4, process=2)    # or said outright

A process has all devices of its host, unless several processes share the host; then each has its part of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from types import TracebackType

import jax

from .backends.runtime.agreement import agree, refused, watched
from .backends.runtime.rendezvous import DEADLINE, deadline_seconds, leave
from .backends.xla.agreement import look_for_devices, software
from .backends.xla.compat import coordination
from .emulation import MOST, check_room, emulate
from .ir.errors import LoweringError, ProcessError
from .ir.plan import Plan
from .seats import Seat, seat

JOIN_SECONDS = 300.0  # how long processes may start apart, if the deadline is no sooner
SLACK = 30  # seconds by which our clock ends before jax's own, which aborts


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    devices: int = 1,
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
        MismatchError: another process has other versions or settings.
    """
    found = seat(coordinator, processes, process)
    if found is not None:
        join(found, devices)


def join(found: Seat, devices: int) -> None:
    """Take a seat; by the deadline all have, with the same software, or this process ends.

    Args:
        devices: how many accelerators this process gets where several share its host.

    Raises:
        LoweringError: jax was used before.
        ProcessError: the others did not come.
        MismatchError: another process has other versions or settings.
    """
    deadline = min(deadline_seconds(), JOIN_SECONDS)
    first = found.local * devices
    own = None if found.beside == 1 else list(range(first, first + devices))
    _explain_aborts(found)
    sys.excepthook = _end_with
    if found.process == 0:
        _check_port(found)
    try:
        with watched(deadline, lambda: _nobody(found, f"waited {deadline:g} s")):
            jax.distributed.initialize(
                found.coordinator, found.processes, found.process, local_device_ids=own,
                cluster_detection_method="deactivate", initialization_timeout=int(deadline) + SLACK,
                shutdown_timeout_seconds=max(1, int(deadline)),
            )  # fmt: skip
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if "before" in first or "once" in first:
            raise LoweringError(
                "jax is in use already.", origin=first, fix="mw.connect() first of all"
            ) from error
        raise _nobody(found, first) from error
    agree(coordination(), "the software", software)


def _check_port(found: Seat) -> None:
    """Refuse a port that cannot be had: jax's service dies of it, at times by SIGSEGV."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(found.coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        ).close()
    except OSError as error:
        raise ProcessError(
            f"process 0 cannot listen at {found.coordinator}: {error.strerror or error}.",
            where=f"process 0 of {found.processes}",
            fix="another port for all processes; see whether an earlier run still lives",
        ) from error  # fmt: skip


def _nobody(found: Seat, why: str) -> ProcessError:
    return ProcessError(
        f"process {found.process} of {found.processes} found no others.", where=found.coordinator, origin=why,
        fix="process 0 at that address, all of them started, each with a number of its own",
    )  # fmt: skip


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
            refused()
            or ProcessError(
                "jax gives this run up: a process has ended or was started twice, or the network has failed.",
                where=f"process {found.process} of {found.processes}, coordinator {found.coordinator}",
                fix="see what the other processes say, and that each has a number of its own",
            )
        )  # fmt: skip

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborting))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


_handlers: list[object] = []  # C holds on to them, and Python must


def take_devices(
    plan: Plan, emulated: bool, place: Seat | None = None, deadline: float | None = None
) -> None:
    """For the command line: this process's devices, emulated where that is asked for or the plan is for CPUs,
    and the other processes if there are any."""
    set_deadline(deadline)
    count = plan.device_count if place is None else per_process(plan, place.processes)
    if emulated or (plan.cluster.device.kind == "cpu" and count <= MOST):
        check_room(plan, count)
        emulate(count)
    if place is not None:
        join(place, count)
        look_for_devices()


def set_deadline(seconds: float | None) -> None:
    """How long one wait for another process may take, if that is said."""
    if seconds is not None:
        os.environ[DEADLINE] = str(seconds)


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
