"""The best schedule under a limit of memory per rank, for the seconds that passes really take.

    candidates   what the catalogue has for so many ranks and chunks
                 one stage per rank: orders listed greedily, in every manner of a grid (`greedy`)
                 more: the catalogue's orders with their bubbles filled (`tighten`)
    best         the least makespan in the simulator, then the least span of a rank; never worse than the
                 catalogue's schedules that fit

A bound says how far from the best any order could be. Nothing fits only where a rank has no room for one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ...ir.errors import InfeasibleError, PlanError
from ...ir.schedule import Schedule
from ...ir.units import format_bytes
from .greedy import greedy, manners
from .schedules import SCHEDULES, schedule_named
from .simulate import Run, StageSeconds, pipeline_tasks, simulate
from .tighten import Held, Policy, tighten

WORK = 600_000  # steps to schedule at most, over all candidates: about two seconds
POLICIES = tuple(Policy(reserve, patience) for patience in (0.0, 0.5, 1.0) for reserve in (False, True))


@dataclass(frozen=True)
class Searched:
    """The best schedule found; seconds of passes and transfers, without what ranks do once per step."""

    schedule: Schedule
    run: Run
    tried: int
    lower_bound: float

    @property
    def makespan(self) -> float:
        return self.run.makespan

    @property
    def span(self) -> float:
        """The longest of any rank."""
        return max(self.run.span(rank) for rank in range(self.schedule.ranks))


def search_schedule(
    stages: Sequence[StageSeconds],
    held: Held,
    microbatches: int,
    show: Callable[[float], str] = format_bytes,
) -> Searched:
    """The best schedule found for as many ranks as there are limits.

    Args:
        stages: seconds of one microbatch, for every stage; a multiple of the ranks.
        held: limits, and what counts towards them.
        show: how amounts of memory are written.

    Raises:
        InfeasibleError: a rank has no room for one microbatch.
        PlanError: stages that ranks cannot hold equally many of.
    """
    chunks = _chunks(stages, held)
    _room(held, chunks, show)
    best, tried = None, 0
    for schedule in _candidates(stages, held, microbatches, chunks):
        tried += 1
        run = simulate(pipeline_tasks(schedule, stages))
        if best is None or _rank(run) < _rank(best.run):
            best = Searched(schedule, run, 0, 0.0)
    assert best is not None, "one microbatch after another always fits"
    return replace(best, tried=tried, lower_bound=lower_bound(stages, held, microbatches))
