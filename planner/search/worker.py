"""What a worker does (`workers.py`): a process that works out bounds, one after another, as it is asked for them."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from ...ir.analysis.blocks import Folded
from ...ir.cluster.cluster import Cluster
from ..cost.model import CostModel
from ..pipeline.bounds import Bounds
from ..pipeline.choices import Choices
from ..pipeline.units import Units
from ..problem import Problem
from ..request import Request
from ..solver.anytime import solve_live
from ..solver.live import Demand, Live
from ..solver.onehot import Edge
from ..trace import Trace
from .candidates import Best, Candidate
from .search import Search
from .workers import Key

FOREVER = 1e9  # seconds: the search has the clock


def serve() -> None:
    """Answer what standard input asks, until the search is gone."""
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
    """Load compiled functions before there is something to do."""
    free = np.zeros(2)
    rows = (Demand(0, 0, 1, np.array([2.0, 1.0])), Demand(1, 0, 1, np.array([1.0, 2.0])))
    table = Edge(0, 1, np.array([[0.0, 1.0], [2.0, 0.0]]))
    solve_live(Live((free, free), (table,), rows, np.array([3.0])), time_limit=1.0)


def _worker(
    folded: Folded, cluster: Cluster, request: Request, cost: CostModel, units: Units
) -> Callable[[Key], Any]:
    trace = Trace(FOREVER)
    problem = Problem(folded, cluster, replace(request, time_limit=FOREVER), cost, "", "")
    flat, choices = Search(problem, trace), Choices(problem)
    choices.units = units
    bounds = Bounds(problem, trace, choices)
    for family in {
        each.policy: each for each in choices.families()
    }.values():  # what all bounds begin with
        choices.floor(family)
        bounds.cannot_fit(replace(family, microbatches=choices.counts[-1]))

    def work_out(key: Key) -> Any:
        what, seconds = key
        if isinstance(what, Candidate):
            flat.bound_cutoff, flat.best = seconds, Best()
            found = flat.relaxed(what)
            return None if flat.best.answer else found  # a plan was met: the search should see it
        return bounds.relaxed(what, seconds)

    return work_out
