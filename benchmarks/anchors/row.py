"""One published case: the anchor's plan and ours, under the anchor's objective and in the simulator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Plan = TypeVar("Plan")
TIE = 1e-9  # relative difference of objectives that counts as none


@dataclass(frozen=True)
class Row:
    """Seconds, or what the anchor counts in; less is better. None: not published, not simulated, or no plan fits.

    published: the anchor's figure; reproduced: our evaluation of its plan by its objective.
    simulated: seconds in the neutral evaluator; `fastest`: of the plan that we found fastest there, where
    that is not the plan that is best by the objective.
    seconds: CPU seconds of our search; theirs: as published or measured with the anchor's code.
    """

    anchor: str
    case: str
    published: float | None
    reproduced: float | None
    ours: float | None
    simulated_theirs: float | None = None
    simulated_ours: float | None = None
    simulated_fastest: float | None = None
    seconds: float = 0.0
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
    def faithful(self) -> bool | None:
        """Whether our evaluation gives the published figure; None where there is no plan to evaluate."""
        if self.reproduced is None or self.published is None:
            return None
        return abs(self.reproduced - self.published) <= self.precision * self.published


@dataclass(frozen=True)
class Chosen(Generic[Plan]):
    """Of some plans, the best by the objective (among equals, the fastest simulated) and the fastest simulated."""

    plan: Plan
    objective: float
    simulated: float
    fastest: float


def choose(
    plans: Sequence[Plan], objective: Callable[[Plan], float], simulated: Callable[[Plan], float]
) -> Chosen[Plan]:
    values = [objective(plan) for plan in plans]
    runs = [simulated(plan) for plan in plans]
    best = min(values)
    at = min((i for i, value in enumerate(values) if value <= best * (1 + TIE)), key=lambda i: runs[i])
    return Chosen(plans[at], values[at], runs[at], min(runs))


class Stopwatch:
    """CPU seconds of a block."""

    def __enter__(self) -> Stopwatch:
        self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start
