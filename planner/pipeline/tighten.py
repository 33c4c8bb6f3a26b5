"""Fill the bubbles of a schedule with steps from later in its own orders, under a memory limit.

The orders given need not be good, only free of deadlock and within the limit. Steps move forward
in time when they are ready and their rank would wait; what remains keeps its order, so there is
always a way to finish, and the check of memory on what remains keeps every rank within its limit.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf

from ...ir.pipeline.schedule import Schedule, Step, needs, peak_held
from .simulate import StageSeconds

SLACK = 1e-9  # of a limit, for sums of floats


@dataclass(frozen=True)
class ActivationMemory:
    """What ranks may hold of what forward passes leave behind; units are the caller's (bytes, or counts).

    forward, kept: per stage, what one forward pass leaves, and what waits between backward and weight pass.
    limits: per rank.
    static: per rank, what of its limit is taken throughout; nothing where it is empty.
    """

    forward: Sequence[float]
    kept: Sequence[float]
    limits: Sequence[float]
    static: Sequence[float] = ()

    @cached_property
    def room(self) -> list[float]:
        """Per rank, what is left of its limit, with some slack for sums of floats."""
        static = self.static or [0.0] * len(self.limits)
        return [
            limit * (1 + SLACK) - taken for limit, taken in zip(self.limits, static, strict=True)
        ]

    def fits(self, schedule: Schedule) -> bool:
        """Whether every rank of a schedule stays within its limit."""
        return all(
            peak_held(schedule, r, self.forward, self.kept) <= room
            for r, room in enumerate(self.room)
        )

    def change(self, step: Step, whole: bool) -> float:
        """What a step adds; `whole`: it makes the gradients of weights too."""
        if step.kind == "forward":
            return self.forward[step.stage]
        if step.kind == "weight":
            return -self.kept[step.stage]
        return (0.0 if whole else self.kept[step.stage]) - self.forward[step.stage]


@dataclass(frozen=True, slots=True)
class Policy:
    """How ranks choose. Weight passes come last, but for one: it makes room for a step that is ready and lacks it.

    reserve: a forward step overtakes others only where there is room for all of them at once.
    patience: a step may delay the one that comes first in order by this part of its own seconds.
    """

    reserve: bool = False
    patience: float = 0.0


def tighten(
    schedule: Schedule, stages: Sequence[StageSeconds], held: ActivationMemory, policy: Policy
) -> Schedule:
    """The same steps on the same ranks, in the orders in which the ranks would take them."""
    return _Ranks(schedule, stages, held, policy).run()


@dataclass
class _Ranks:
    schedule: Schedule
    stages: Sequence[StageSeconds]
    held: ActivationMemory
    policy: Policy
    left: list[dict[Step, None]] = field(init=False)  # per rank, in order
    done: list[list[Step]] = field(init=False)
    holds: list[float] = field(init=False)
    end: dict[Step, float] = field(default_factory=lambda: {})
    changes: dict[Step, float] = field(init=False)  # what each step adds to what its rank holds
    queues: dict[tuple[str, int, int], list[tuple[int, Step]]] = field(
        init=False
    )  # per kind, stage and rank: steps left with their places in the order, the first one last
    heads: list[list[tuple[int, Step]]] = field(init=False)  # per rank: the first of each queue
    sources: dict[Step, list[tuple[Step, float]]] = field(
        init=False
    )  # what each step takes, and the seconds that it travels
    # When a step has all that it takes.
    arrived: dict[Step, float] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        whole = self.schedule.whole
        self.changes = {step: self.held.change(step, whole(step)) for step in self.schedule.rank_of}
        self.sources = {
            step: [(need, self._sending(need, rank)) for need in needs(self.schedule, step)]
            for step, rank in self.schedule.rank_of.items()
        }
        self.left = [dict.fromkeys(order) for order in self.schedule.orders]
        self.queues, self.heads = defaultdict(list), [[] for _ in self.left]
        for rank, order in enumerate(self.schedule.orders):
            for place, step in reversed(list(enumerate(order))):
                self.queues[step.kind, step.stage, rank].append((place, step))
        for key, queue in self.queues.items():
            insort(self.heads[key[-1]], queue[-1])
        self.done = [[] for _ in self.left]
        self.holds = [0.0] * len(self.left)

    def run(self) -> Schedule:
        """Each event is a moment at which a rank looks for work: when it is free or something arrives."""
        free = [0.0] * len(self.left)
        events = [(0.0, rank) for rank in range(len(self.left))]
        while events:
            now, rank = heapq.heappop(events)
            if free[rank] > now or not self.left[rank]:
                continue
            step = self._choose(rank, now)
            if step is None:
                continue
            free[rank] = self._start(rank, step, now)
            heapq.heappush(events, (free[rank], rank))
            for other in {self.schedule.rank_of[s] for s in _followers(self.schedule, step)}:
                heapq.heappush(events, (self.end[step] + self._sending(step, other), other))
        return replace(self.schedule, orders=tuple(map(tuple, self.done)))

    def _start(self, rank: int, step: Step, now: float) -> float:
        del self.left[rank][step]
        queue = self.queues[step.kind, step.stage, rank]
        self.heads[rank].remove(queue.pop())
        if queue:
            insort(self.heads[rank], queue[-1])
        self.done[rank].append(step)
        self.holds[rank] += self.changes[step]
        self.end[step] = now + self.stages[step.stage].of(self.schedule, step)
        return self.end[step]

    def _sending(self, step: Step, rank: int) -> float:
        """Seconds in which a step's result comes to a rank."""
        away = self.schedule.rank_of[step] != rank
        return self.stages[step.stage].sending(step.kind) if away else 0.0

    def _ready(self, step: Step) -> float:
        """When the rank of a step has all that it takes; inf where something is not made yet."""
        if step not in self.arrived:
            latest = 0.0
            for source, sent in self.sources[step]:
                if source not in self.end:
                    return inf
                latest = max(latest, self.end[source] + sent)
            self.arrived[step] = latest
        return self.arrived[step]

    def _choose(self, rank: int, now: float) -> Step | None:
        """The first step that is ready, fits, and does not hold up a better one."""
        awaited = inf
        others, weights = self._candidates(rank)
        for step in (*others, *weights):
            ready = self._ready(step)
            if now < ready >= awaited:
                continue  # no better than one that is waited for, whether it fits or not
            if not self._fits(rank, step):
                full = ready <= now and self.holds[rank] + self.changes[step] > self.held.room[rank]
                if full and (freed := next((w for w in weights if self._ready(w) <= now), None)):
                    return freed
            elif ready > now:
                awaited = min(awaited, ready)
            else:
                seconds = self.stages[step.stage].of(self.schedule, step)
                if now + seconds * (1 - self.policy.patience) <= awaited * (1 + SLACK):
                    return step
        return None

    def _candidates(self, rank: int) -> tuple[list[Step], list[Step]]:
        """The first step left of each kind and stage, weight passes apart."""
        found = [step for _, step in self.heads[rank]]
        return [s for s in found if s.kind != "weight"], [s for s in found if s.kind == "weight"]

    def _fits(self, rank: int, step: Step) -> bool:
        """Whether what remains stays within the limit after a step is moved to the front."""
        room = self.held.room[rank]
        holds = crowd = self.holds[rank] + self.changes[step]
        if holds > room:
            return False
        crowds = self.policy.reserve and step.kind == "forward"
        for before in self.left[rank]:
            if before is step:
                return True
            holds += (change := self.changes[before])
            if crowds and before.kind == "forward":
                crowd += change
            if holds > room or crowd > room:
                return False
        return True


def _followers(schedule: Schedule, step: Step) -> list[Step]:
    """The steps that take a step's result."""
    kind, stage, microbatch = step
    match kind:
        case "forward":
            found = [Step("backward", stage, microbatch), Step("forward", stage + 1, microbatch)]
        case "backward":
            found = [Step("weight", stage, microbatch), Step("backward", stage - 1, microbatch)]
        case _:
            found = []
    return [s for s in found if s in schedule.rank_of]
