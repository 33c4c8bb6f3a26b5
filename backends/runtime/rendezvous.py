"""Programs that several processes run together: one order, one at a time, and none waited for without end.

    rendezvous = Rendezvous(processes, in_turn=False, deadline=60)
    result = rendezvous.run("rank 1 at `forward 1 microbatch 0`", {0, 1}, call)      # call() -> (result, token)

All processes dispatch such programs in the same order. On GPUs that is enough: a device runs what it is
given in order. On CPUs it is not: programs whose operands are ready run side by side, in any order, and then
hung in 6 of 6 runs (`benchmarks/pipeline_processes.py --side-by-side`). A likely reason: gloo gives every
permutation of a group the same tag (`kCollectivePermuteSlotPrefix` with tag 0 in XLA's
`gloo_communicator.cc`), so two that are under way at once may take each other's messages. On CPUs a process
therefore waits for each such program before it dispatches the next; no run has hung since. What it runs
alone stays asynchronous.

A wait that passes the deadline ends the process: it waits inside a library, where Python cannot raise.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn

import numpy as np

from ...ir.errors import MeshwrightError, ProcessError, UsageError
from .devices import Member, Processes

DEADLINE = "MESHWRIGHT_DEADLINE"  # the environment variable: seconds
SECONDS = 600.0  # when it is not set: another process may compile as long
LOOKS = 0.2  # seconds between two looks at the clock


def deadline_seconds() -> float:
    """How long one wait for another process may take.

    Raises:
        UsageError: the environment says something that is no time.
    """
    given = os.environ.get(DEADLINE, "")
    try:
        seconds = float(given or SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(
            f"`{given}` is no time to wait for other processes.",
            where=DEADLINE,
            fix="seconds above 0",
        )
    return seconds


@dataclass(eq=False)
class Rendezvous:
    """Runs what processes run together. `in_turn`: wait for each before the next."""

    processes: Processes
    in_turn: bool
    deadline: float = field(default_factory=deadline_seconds)
    _waits: dict[object, tuple[str, str, float]] = field(
        default_factory=dict
    )  # what, for whom, since when
    _tokens: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    _threads: list[Thread] = field(default_factory=list)

    def run(self, what: str, group: Iterable[int], call: Callable[[], tuple[Any, Any]]) -> Any:
        """The result of `call`, which gives it with a token that is ready when the program has run.

        Args:
            what: the instruction, and the rank that it belongs to.
            group: the processes that take part.

        Raises:
            ProcessError: the program failed, as it does when another process ends.
        """
        self._start()
        whom = self._others(group)
        try:
            with self._waiting(what, whom):
                result, token = call()
                if self.in_turn:
                    self.processes.wait(token)
        except self.processes.failure as error:
            atexit.register(_leave_at_exit)  # before the framework's own, which may wait for others
            raise ended(what, whom, error, self.processes) from error
        if not self.in_turn:
            self._tokens.put((what, whom, token))
        return result

    def exchange(self, what: str, text: str) -> list[str]:
        """What each process says, in their order; every process calls it."""
        data = np.frombuffer(text.encode(), np.uint8)
        sizes = self.gather(what, np.array(data.size)).reshape(-1)
        rows = self.gather(
            what, np.resize(data, max(sizes)) if data.size else np.zeros(max(sizes), np.uint8)
        )
        return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]

    def gather(self, what: str, array: np.ndarray) -> np.ndarray:
        """What each process gives, in their order; every process calls it."""
        everyone = range(self.processes.process_count)
        return np.asarray(self.run(what, everyone, lambda: (self.processes.gather(array), ())))

    def _others(self, group: Iterable[int]) -> str:
        """The processes that this one waits for."""
        others = sorted(set(group) - {self.processes.process})
        return f"process{'es' if len(others) > 1 else ''} {', '.join(map(str, others))}"

    @contextmanager
    def _waiting(self, what: str, whom: str) -> Iterator[None]:
        key = object()
        self._waits[key] = (what, whom, time.monotonic())
        try:
            yield
        finally:
            del self._waits[key]

    def _start(self) -> None:
        if not self._threads:
            works = [self._watch] if self.in_turn else [self._watch, self._follow]
            self._threads = [Thread(target=work, daemon=True) for work in works]
            for thread in self._threads:
                thread.start()

    def _follow(self) -> None:
        """Wait for what was dispatched, in order, so that a wait without end is seen; errors come up elsewhere."""
        while True:
            what, whom, token = self._tokens.get()
            try:
                with self._waiting(what, whom):
                    self.processes.wait(token)
            except self.processes.failure:
                pass

    def _watch(self) -> None:
        while True:
            time.sleep(min(LOOKS, self.deadline / 10))
            for what, whom, since in list(self._waits.values()):
                if time.monotonic() - since > self.deadline:
                    leave(late(what, whom, self.deadline, self.processes))


def late(what: str, whom: str, seconds: float, member: Member) -> ProcessError:
    """A wait of a process that passed the deadline."""
    return ProcessError(
        f"{what} waited {seconds:g} s for {whom}.",
        where=_name(member),
        fix=f"see what the other processes say; if they only take longer, {DEADLINE}=SECONDS",
    )


def ended(what: str, whom: str, error: Exception, member: Member) -> ProcessError:
    """A program of a process that failed while others took part."""
    return ProcessError(
        f"{what} failed while it waited for {whom}.",
        where=_name(member),
        origin=str(error).strip().splitlines()[0],
        fix="see what the other processes say; the first that ended has the reason",
    )


def _name(member: Member) -> str:
    return f"process {member.process} of {member.process_count}"


def _leave_at_exit() -> None:
    sys.stdout.flush()
    os._exit(ProcessError.exit_code)


def leave(error: MeshwrightError) -> NoReturn:
    """End this process at once: an orderly exit would wait for the others."""
    try:
        sys.stdout.flush()
        print(error.report(), file=sys.stderr, flush=True)
    finally:  # whoever read what is printed may be gone
        os._exit(error.exit_code)
