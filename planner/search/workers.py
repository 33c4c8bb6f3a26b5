"""Other processes that work out bounds ahead of a search, one per spare core.

    search   asks for what it is likely to look at soon, the last first, so that they meet in the middle
    worker   takes the first of that, sends back its bound (`worker.py`)
    search   takes what is there, waits for what a worker is at, works out the rest itself

A bound depends on what is asked alone, so a search with workers makes the same choices as one without.
A worker is a Python of its own that imports no jax, not a fork: nothing of the caller's program runs in it.
It is started before the graph is folded, as its start takes about as long as that.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import IO, Any

from ...ir.cluster.cluster import Cluster
from ...ir.passes.recompute import POLICIES
from ..pipeline.choices import PipelineConfig
from ..pipeline.units import Units
from ..problem import Problem
from ..request import Request
from .candidates import Candidate
from .meshes import plane_meshes, stage_sizes

Key = tuple[PipelineConfig | Candidate, float]  # what is looked at, and the seconds to beat
MOST = 3  # workers: more would wait for the search
WINDOW = 6  # wanted: what is worked out but never asked for is lost
WORTH = 32  # families from which on starting one pays: it takes about a second
# Our own code and what Python has come first: the folder of a user's file may hold a json.py.
START = """import sys
sys.path.insert(0, {home!r})
sys.path += [each for each in {path!r} if each not in sys.path]
from {module} import serve
serve()"""


@contextmanager
def worker_pool(cluster: Cluster, request: Request) -> Generator[Workers | None]:
    """As many as there are cores to spare, for a search large enough; they are gone afterwards."""
    spare = min(MOST, _cores() - 1)
    if (
        not spare
        or len(cluster.groups) > 1
        or request.pp == 1
        or _families(cluster, request) < WORTH
    ):
        yield None
        return
    workers = Workers(spare)
    try:
        yield workers
    finally:
        workers.close()


def _families(cluster: Cluster, request: Request) -> int:
    """Pipelines to look at, at most, for a model that can be cut anywhere."""
    pp, policies = request.pp, 1 if request.recompute else len(POLICIES)
    sizes = stage_sizes(cluster)
    if isinstance(pp, int):
        sizes = tuple(n for n in sizes if n * pp == cluster.size)
    pinned = request.mesh and prod(request.mesh)
    return policies * sum(
        len(plane_meshes(cluster, n, request.mesh)) for n in sizes if pinned in (None, n)
    )


class Workers:
    """Bounds by key, worked out elsewhere once they have started."""

    def __init__(self, count: int, errors: int | IO[bytes] = subprocess.DEVNULL):
        self.change = threading.Condition()
        self.wanted: list[Key] = []
        self.doing: set[Key] = set()
        self.found: dict[Key, Any] = {}
        self.closed = False
        self.processes = [_start(errors) for _ in range(count)]

    def start(self, problem: Problem, units: Units) -> None:
        """Say what is searched. Of the step only the small graph counts, with the units of the whole one."""
        folded = replace(problem.folded, whole=problem.folded.small)
        payload = pickle.dumps((folded, problem.cluster, problem.request, problem.cost, units))
        for process in self.processes:
            threading.Thread(target=self._keep_busy, args=(process, payload), daemon=True).start()

    def prefetch(self, keys: Iterable[Key]) -> None:
        """What will be looked at soon, in this order; replaces what was asked for before."""
        with self.change:
            known = self.found.keys() | self.doing
            self.wanted = [key for key in islice(keys, WINDOW) if key not in known][::-1]
            self.change.notify_all()

    def result(self, key: Key) -> Any:
        """What was found for a key, waited for where a worker is at it; None where it is left to the caller."""
        with self.change:
            if key in self.wanted:
                self.wanted.remove(key)
            self.change.wait_for(lambda: key not in self.doing)
            return self.found.pop(key, None)

    def _keep_busy(self, process: subprocess.Popen[bytes], payload: bytes) -> None:
        """One thread per worker. Whatever ends a worker, the search goes on without it."""
        key: Key | None = None
        assert process.stdin and process.stdout
        try:
            process.stdin.write(payload)
            process.stdin.flush()
            pickle.load(process.stdout)  # it is ready
            while True:
                with self.change:
                    self.change.wait_for(lambda: self.wanted or self.closed)
                    if self.closed:
                        return
                    key = self.wanted.pop(0)
                    self.doing.add(key)
                pickle.dump(key, process.stdin)
                process.stdin.flush()
                found = pickle.load(process.stdout)
                with self.change:
                    self.found[key] = found
                    self.doing.discard(key)
                    self.change.notify_all()
        except (OSError, EOFError, pickle.PickleError, ValueError):
            pass
        finally:
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


def _start(errors: int | IO[bytes]) -> subprocess.Popen[bytes]:
    home = str(Path(__file__).parents[3])
    start = START.format(home=home, path=sys.path, module=f"{__package__}.worker")
    command = [sys.executable, "-P", "-c", start]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )
