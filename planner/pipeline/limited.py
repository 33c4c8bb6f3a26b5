"""The best schedule under a limit of memory per rank, for the seconds that passes really take.

    candidates   the catalogue's schedules for so many ranks and chunks, as they are
                 one stage per rank: orders listed greedily, in every manner of a grid (`greedy`)
                 more stages: the catalogue's orders, their bubbles filled anew (`tighten`)
    best         the least makespan in the simulator, then the shortest span; so never worse than the
                 catalogue's schedules that fit

Nothing fits only where some rank has no room for one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from math import inf

from ...ir.errors import InfeasibleError, PlanError
from ...ir.pipeline.schedule import Schedule
from ...ir.units import format_bytes
from .greedy import greedy, manners
from .schedules import SCHEDULES, schedule_named
from .simulate import Run, StageSeconds, pipeline_tasks, simulate
from .tighten import ActivationMemory, Policy, tighten

WORK = 300_000  # passes to put in order, over all candidates: some seconds at most
TIGHTEN = 8  # as long as this many greedy ones
Placement = tuple[tuple[int, ...], ...]  # the stages of each rank
POLICIES = tuple(
    Policy(reserve, patience) for patience in (0.5, 0.0, 1.0) for reserve in (False, True)
)


@dataclass(frozen=True)
class Searched:
    """The best schedule found, simulated: seconds of passes and transfers, nothing that happens once per step."""

    schedule: Schedule
    run: Run
    tried: int
    lower_bound: float  # no order of the passes is faster

    @property
    def seconds(self) -> float:
        return self.run.makespan


def search_schedule(
    stages: Sequence[StageSeconds],
    held: ActivationMemory,
    microbatches: int,
    show: Callable[[float], str] = format_bytes,
    work: int = WORK,
    placement: Placement | None = None,
) -> Searched:
    """The best schedule found, on as many ranks as there are limits.

    Args:
        stages: seconds of one microbatch on each stage; equally many stages for each rank.
        placement: the stages of each rank; if not given, as any schedule of the catalogue has them.
        show: how to write amounts of memory.
        work: how many passes may be put in order, over all candidates.

    Raises:
        InfeasibleError: a rank has no room for one microbatch.
        PlanError: stages that cannot be dealt out evenly.
    """
    ranks = len(held.limits)
    if microbatches < 1 or len(stages) % ranks:
        raise PlanError(
            f"{len(stages)} stages with {microbatches} microbatches make no pipeline of {ranks} ranks.",
            where="schedule search", fix="a microbatch or more, and a multiple of the ranks as stages",
        )  # fmt: skip
    known = list(_catalogue(ranks, microbatches, len(stages) // ranks, placement))
    _check_room(held, [schedule.held for schedule in known], show)
    best = _Best(stages, held)
    for schedule in known:
        best.offer(schedule)
    if len(stages) == ranks:
        for schedule, seconds in _listed(stages, held, microbatches, work):
            best.offer(schedule, seconds)
    else:
        for schedule in _tightened(stages, held, known, work):
            best.offer(schedule)
    assert best.schedule and best.run, "one microbatch after another always fits"
    return Searched(best.schedule, best.run, best.tried, lower_bound(stages, ranks, microbatches))


@dataclass
class _Best:
    stages: Sequence[StageSeconds]
    held: ActivationMemory
    schedule: Schedule | None = None
    run: Run | None = None
    worth: tuple[float, float] = (inf, inf)  # makespan, longest span of a rank
    tried: int = 0

    def offer(self, schedule: Schedule, seconds: float = 0.0) -> None:
        """Keep a schedule if it fits and is better; `seconds`: expected, worth simulating if no more than the best."""
        self.tried += 1
        if seconds > self.worth[0] * (1 + 1e-12) or not self.held.fits(schedule):
            return
        run = simulate(pipeline_tasks(schedule, self.stages))
        worth = run.makespan, max(run.span(rank) for rank in range(schedule.ranks))
        if worth < self.worth:
            self.schedule, self.run, self.worth = schedule, run, worth


def _catalogue(
    ranks: int, microbatches: int, chunks: int, placement: Placement | None
) -> Iterator[Schedule]:
    """All that are made for such numbers, hold each stage once, and where they are wanted."""
    for entry in SCHEDULES:
        if entry.copies == 1 and entry.chunks in (chunks, None if chunks > 1 else chunks):
            try:
                found = schedule_named(entry.name, ranks, microbatches, chunks)
            except PlanError:
                continue
            if placement is None or found.held == placement:
                yield found


def _listed(
    stages: Sequence[StageSeconds], held: ActivationMemory, microbatches: int, work: int
) -> Iterator[tuple[Schedule, float]]:
    left = work
    for manner in manners(held, microbatches):
        yield greedy(stages, held, microbatches, manner)
        if (left := left - 3 * len(stages) * microbatches) <= 0:
            return


def _tightened(
    stages: Sequence[StageSeconds], held: ActivationMemory, known: Sequence[Schedule], work: int
) -> Iterator[Schedule]:
    left, plain = work, [schedule for schedule in known if not schedule.together]
    in_turn = list(map(_in_turn, plain))
    for bases in (plain, in_turn, list(map(_whole, in_turn))):
        for policy, base in product(
            POLICIES, [schedule for schedule in bases if held.fits(schedule)]
        ):
            yield replace(tighten(base, stages, held, policy), name="searched")
            if (left := left - TIGHTEN * 3 * len(stages) * base.microbatches) <= 0:
                return


def _in_turn(schedule: Schedule) -> Schedule:
    """One microbatch after another: nothing holds less, but for whole backward passes."""
    orders = tuple(
        tuple(sorted(order, key=lambda step: step.microbatch)) for order in schedule.orders
    )
    return replace(schedule, orders=orders)


def _whole(schedule: Schedule) -> Schedule:
    """Backward passes make all gradients, so that nothing waits for weight passes."""
    return replace(
        schedule,
        orders=tuple(tuple(s for s in order if s.kind != "weight") for order in schedule.orders),
    )


def _check_room(
    held: ActivationMemory, placements: Sequence[Placement], show: Callable[[float], str]
) -> None:
    """Refuse limits without room for one microbatch, however its stages are placed.

    Raises:
        InfeasibleError: the rank that lacks most where least is lacking, and the least limit that would do.
    """
    static = held.static or [0.0] * len(held.limits)
    found: list[tuple[float, int, list[float]]] = []
    for placement in placements:
        least = [
            taken + sum(held.forward[s] for s in of)
            for taken, of in zip(static, placement, strict=True)
        ]
        lacks = [
            needed - taken - room
            for needed, taken, room in zip(least, static, held.room, strict=True)
        ]
        worst = max(range(len(lacks)), key=lambda rank: lacks[rank])
        found.append((lacks[worst], worst, least))
    lacking, rank, least = min(found)
    if lacking > 0:
        limit, taken = held.limits[rank], static[rank]
        raise InfeasibleError(
            f"rank {rank} has no room for one microbatch: it takes {show(least[rank])}, the limit is {show(limit)}.",
            where=f"rank {rank}" + (f", of whose memory {show(taken)} are always taken" if taken else ""),
            fix=f"a limit of {show(max(least))}, smaller microbatches or recompute",
            needed_bytes=least[rank], limit_bytes=limit,
        )  # fmt: skip


def lower_bound(stages: Sequence[StageSeconds], ranks: int, microbatches: int) -> float:
    """Seconds that no order of the passes beats, whatever the limits.

    One stage per rank: a rank waits for the first microbatch, then has all its passes to run; or its forward and
    backward passes, after which the last microbatch goes back to the first rank for its weight pass.
    More stages: ranks share the work evenly, and one microbatch goes there and back.
    """
    last = stages[0].weight
    there_and_back = sum(s.forward + s.backward for s in stages) + last
    if len(stages) > ranks:
        work = sum(s.forward + s.backward + s.weight for s in stages)
        return max(there_and_back, microbatches * work / ranks)
    there = [0.0, *accumulate(s.forward + s.send for s in stages[:-1])]
    back = [
        0.0,
        *accumulate(s.backward + after.sending("backward") for s, after in pairwise(stages)),
    ]
    found: list[float] = []
    for stage, before, behind in zip(stages, there, back, strict=True):
        both = microbatches * (stage.forward + stage.backward)
        found.append(
            before
            + both
            + max(microbatches * stage.weight, behind + (last if behind else stage.weight))
        )
    return max(found)
