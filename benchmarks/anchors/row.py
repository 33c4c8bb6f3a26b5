"""One published case: the anchor's plan and ours, under the anchor's objective and in the simulator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from .nearby import fastest_near

Plan = TypeVar("Plan")
TIE = 1e-9  # relative difference of objectives that counts as none
SLACK = (TIE, 0.1, inf)  # what the objective may lose to the simulator, as parts
PATIENCE = 3000  # plans tried in vain


@dataclass(frozen=True)
class Row:
    """Seconds, or what the anchor counts in; less is better. None: not published, not simulated, or no plan fits.

    published: the anchor's figure; reproduced: our evaluation of its plan by its objective.
    simulated: seconds in the neutral evaluator; `fastest`: of the plan that we found fastest there, where
    that is not the plan that is best by the objective. front: see `Chosen`.
    seconds: CPU seconds of our search by the objective, `further`: of the one in the neutral evaluator; theirs: as
    published or measured with the anchor's code.
    """

    anchor: str
    case: str
    published: float | None
    reproduced: float | None
    ours: float | None
    simulated_theirs: float | None = None
    simulated_ours: float | None = None
    simulated_fastest: float | None = None
    front: tuple[tuple[float, float], ...] = ()
    seconds: float = 0.0
    further: float = 0.0
    theirs: float | None = None
    precision: float = TIE  # relative, of the published figure
    note: str = ""

    @property
    def never_worse(self) -> bool:
        """By the anchor's objective."""
        if self.published is None or self.ours is None:
            return self.published is None or self.published == self.ours
        return self.ours <= self.published * (1 + self.precision)

    @property
    def simulated_both(self) -> float | None:
        """Of our plans that are no worse by the objective, the fastest simulated."""
        if self.published is None:
            return None
        return min(
            (took for value, took in self.front if value <= self.published * (1 + self.precision)),
            default=None,
        )

    @property
    def faithful(self) -> bool | None:
        """Whether our evaluation gives the published figure; None where there is no plan to evaluate."""
        if self.reproduced is None or self.published is None:
            return None
        return abs(self.reproduced - self.published) <= self.precision * self.published


@dataclass(frozen=True)
class Chosen(Generic[Plan]):
    """Of some plans, the best by the objective (among equals, the fastest simulated) and the fastest simulated.

    front: (objective, simulated) of the plans than which none is better by both, the best by the objective first.
    """

    plan: Plan
    objective: float
    fastest: Plan
    front: tuple[tuple[float, float], ...]


def choose(
    plans: Sequence[Plan],
    objective: Callable[[Plan], float],
    simulated: Callable[[Plan], float],
    around: Callable[[Plan], Iterable[Plan]],
) -> Chosen[Plan]:
    """From these plans and from those near them that the simulator finds fast.

    They are searched for three times: no worse by the objective than the best, a little worse, anything.
    """
    tried: dict[Plan, tuple[float, float]] = {}
    best, starts = min(map(objective, plans)), list(plans)
    for slack in SLACK:

        def seconds(plan: Plan, limit: float = best * (1 + slack)) -> float:
            if plan in tried:
                value, took = tried[plan]
                return took if value <= limit else inf
            if (value := objective(plan)) > limit:
                return inf
            tried[plan] = value, simulated(plan)
            return tried[plan][1]

        starts.append(fastest_near(starts, around, seconds, PATIENCE))
    best = min(value for value, _ in tried.values())
    plan = min((p for p in tried if tried[p][0] <= best * (1 + TIE)), key=lambda p: tried[p][1])
    fastest = min(tried, key=lambda p: tried[p][1])
    front: list[tuple[float, float]] = []
    for value, took in sorted(tried.values()):
        if not front or took < front[-1][1]:
            front.append((value, took))
    return Chosen(plan, tried[plan][0], fastest, tuple(front))


class Stopwatch:
    """CPU seconds of a block."""

    def __enter__(self) -> Stopwatch:
        self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start
