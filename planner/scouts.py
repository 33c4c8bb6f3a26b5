"""Other processes that work out bounds ahead of a search, one per spare core.

    search   wishes: what it is likely to look at soon, the last first, so that they meet in the middle
    scout    takes the first wish, sends back its bound
    search   takes what is there, waits for what a scout is at, works out the rest itself

A bound depends on what is asked alone, so a search with scouts makes the same choices as one without.
A scout is a Python of its own that imports no jax, not a fork: nothing of the caller's program runs in it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from ..ir.blocks import Folded
from ..ir.cluster import Cluster
from .cost.model import CostModel
from .request import Request

if TYPE_CHECKING:
    from .pipeline.choices import Shape
    from .search import Candidate, Search

Key = tuple["Shape | Candidate", float]  # what is looked at, and the seconds to beat
MOST = 3  # scouts: more would wait for the search
WINDOW = 6  # wishes: what is worked out but never asked for is lost
WORTH = 32  # families from which on starting one pays: it takes about a second
FOREVER = 1e9  # seconds: the search has the clock
START = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve()"


class Scouts:
    """Bounds by key, worked out elsewhere."""

    def __init__(self, search: Search, count: int):
        self.change = threading.Condition()
        self.wishes: list[Key] = []
        self.doing: set[Key] = set()
        self.found: dict[Key, Any] = {}
        self.closed = False
        payload = pickle.dumps((search.folded, search.cluster, search.request, search.cost))
        self.processes = [_start() for _ in range(count)]
        for process in self.processes:
            threading.Thread(target=self._keep_busy, args=(process, payload), daemon=True).start()

    @classmethod
    def of(cls, search: Search, families: int) -> Scouts | None:
        """As many as there are cores to spare, for a search large enough."""
        spare = min(MOST, _cores() - 1)
        return cls(search, spare) if spare and families >= WORTH else None

    def wish(self, keys: Iterable[Key]) -> None:
        """What will be looked at soon, in this order; replaces earlier wishes."""
        with self.change:
            known = self.found.keys() | self.doing
            self.wishes = [key for key in islice(keys, WINDOW) if key not in known][::-1]
            self.change.notify_all()

    def take(self, key: Key) -> Any:
        """What was found for a key, waited for where a scout is at it; None where it is left to the caller."""
        with self.change:
            if key in self.wishes:
                self.wishes.remove(key)
            self.change.wait_for(lambda: key not in self.doing)
            return self.found.pop(key, None)

    def _keep_busy(self, process: subprocess.Popen[bytes], payload: bytes) -> None:
        """One thread per scout. Whatever ends a scout, the search goes on without it."""
        key: Key | None = None
        assert process.stdin and process.stdout
        try:
            process.stdin.write(payload)
            process.stdin.flush()
            pickle.load(process.stdout)  # it is ready
            while True:
                with self.change:
                    self.change.wait_for(lambda: self.wishes or self.closed)
                    if self.closed:
                        return
                    key = self.wishes.pop(0)
                    self.doing.add(key)
                pickle.dump(key, process.stdin)
                process.stdin.flush()
                found = pickle.load(process.stdout)
                with self.change:
                    self.found[key] = found
                    self.doing.discard(key)
                    self.change.notify_all()
        except (OSError, EOFError, pickle.PickleError, ValueError):
            with self.change:
                self.doing.discard(key)
                self.change.notify_all()

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()
        for process in self.processes:
            process.kill()
            process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", START.format(path=sys.path, module=__name__)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def serve() -> None:
    """What a scout does, until its search is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # as in the search: hardly a cycle is made, and looking for them takes long
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not disturb the answers
    asked: BinaryIO = sys.stdin.buffer
    work_out = _worker(*pickle.load(asked))
    try:
        pickle.dump(True, answers)
        answers.flush()
        while True:
            pickle.dump(work_out(pickle.load(asked)), answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return


def _worker(folded: Folded, cluster: Cluster, request: Request, cost: CostModel) -> Callable[[Key], Any]:
    from .pipeline.bounds import Bounds
    from .pipeline.choices import Choices
    from .search import Best, Candidate, Search

    flat = Search(folded, cluster, replace(request, time_limit=FOREVER), cost, "", "", lambda line: None)
    bounds = Bounds(flat, Choices(flat))

    def work_out(key: Key) -> Any:
        what, seconds = key
        if isinstance(what, Candidate):
            flat.outside, flat.best = seconds, Best()
            found = flat.relaxed(what)
            return None if flat.best.answer else found  # a plan was met: the search should see it
        return bounds.relaxed(what, seconds)

    return work_out
