"""Other processes that work out bounds ahead of a search, one per spare core.

    search   wishes: what it is likely to look at soon, the last first, so that they meet in the middle
    scout    takes the first wish, sends back its bound
    search   takes what is there, waits for what a scout is at, works out the rest itself

A bound depends on what is asked alone, so a search with scouts makes the same choices as one without.
A scout is a Python of its own that imports no jax, not a fork: nothing of the caller's program runs in it.
It is started before the graph is folded, as its start takes about as long as that.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...ir.analysis.blocks import Folded
from ...ir.cluster.cluster import Cluster
from ...ir.passes.recompute import POLICIES
from ..cost.model import CostModel
from ..request import Request
from .meshes import plane_meshes, stage_sizes

if TYPE_CHECKING:
    from ..pipeline.choices import Shape
    from ..pipeline.units import Units
    from .candidates import Candidate
    from .search import Search

Key = tuple["Shape | Candidate", float]  # what is looked at, and the seconds to beat
MOST = 3  # scouts: more would wait for the search
WINDOW = 6  # wishes: what is worked out but never asked for is lost
WORTH = 32  # families from which on starting one pays: it takes about a second
FOREVER = 1e9  # seconds: the search has the clock
# Our own code and what Python has come first: the folder of a user's file may hold a json.py.
START = """import sys
sys.path.insert(0, {home!r})
sys.path += [each for each in {path!r} if each not in sys.path]
from {module} import serve
serve()"""


@contextmanager
def hired(cluster: Cluster, request: Request) -> Iterator[Scouts | None]:
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
    scouts = Scouts(spare)
    try:
        yield scouts
    finally:
        scouts.close()


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


class Scouts:
    """Bounds by key, worked out elsewhere once they are briefed."""

    def __init__(self, count: int, errors: int | IO[bytes] = subprocess.DEVNULL):
        self.change = threading.Condition()
        self.wishes: list[Key] = []
        self.doing: set[Key] = set()
        self.found: dict[Key, Any] = {}
        self.closed = False
        self.processes = [_start(errors) for _ in range(count)]

    def brief(self, search: Search, units: Units) -> None:
        """Say what is searched. Of the step only the small graph counts, with the units of the whole one."""
        folded = replace(search.folded, whole=search.folded.small)
        payload = pickle.dumps((folded, search.cluster, search.request, search.cost, units))
        for process in self.processes:
            threading.Thread(target=self._keep_busy, args=(process, payload), daemon=True).start()

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
    start = START.format(home=home, path=sys.path, module=__name__)
    command = [sys.executable, "-P", "-c", start]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )


def serve() -> None:
    """What a scout does, until its search is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # as in the search: hardly a cycle is made, and looking for them takes long
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not disturb the answers
    asked: BinaryIO = sys.stdin.buffer
    try:
        _warm_up()
        work_out = _worker(*pickle.load(asked))
        pickle.dump(True, answers)
        answers.flush()
        while True:
            pickle.dump(work_out(pickle.load(asked)), answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return


def _warm_up() -> None:
    """Load all code, compiled functions included, before there is something to do."""
    from ..pipeline import bounds
    from ..solver.onehot import Edge

    free = np.zeros(2)
    rows = (
        bounds.Demand(0, 0, 1, np.array([2.0, 1.0])),
        bounds.Demand(1, 0, 1, np.array([1.0, 2.0])),
    )
    table = Edge(0, 1, np.array([[0.0, 1.0], [2.0, 0.0]]))
    bounds.solve_live(bounds.Live((free, free), (table,), rows, np.array([3.0])), time_limit=1.0)


def _worker(
    folded: Folded, cluster: Cluster, request: Request, cost: CostModel, units: Units
) -> Callable[[Key], Any]:
    from ..pipeline.bounds import Bounds
    from ..pipeline.choices import Choices
    from .candidates import Best, Candidate
    from .search import Search

    flat = Search(
        folded, cluster, replace(request, time_limit=FOREVER), cost, "", "", lambda line: None
    )
    choices = Choices(flat)
    choices.units = units
    bounds = Bounds(flat, choices)
    for family in {
        each.policy: each for each in choices.families()
    }.values():  # what all bounds begin with
        choices.floor(family)
        bounds.cannot_fit(replace(family, microbatches=choices.counts[-1]))

    def work_out(key: Key) -> Any:
        what, seconds = key
        if isinstance(what, Candidate):
            flat.aim, flat.best = seconds, Best()
            found = flat.relaxed(what)
            return None if flat.best.answer else found  # a plan was met: the search should see it
        return bounds.relaxed(what, seconds)

    return work_out
