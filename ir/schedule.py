"""A pipeline's schedule as data: for each rank, its passes in order.

    1F1B, 4 stages    rank 0   F0 F1 F2 F3 B0 F4 B1 F5 B2 ...
                      rank 3   F0 B0 F1 B1 F2 B2 F3 B3 ...

A rank may hold several stages (interleaving), and a stage may lie on several ranks, each with
microbatches of its own (bidirectional pipelines). Planner, simulator and runtime carry out the
same lists; a plan keeps them as text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal, NamedTuple

from .errors import PlanError

Kind = Literal["forward", "backward", "weight"]
MARKS: dict[str, Kind] = {"F": "forward", "B": "backward", "W": "weight"}


class Step(NamedTuple):
    """One pass of one microbatch through one stage: `3B5` is microbatch 5 back through stage 3.

    `backward` also makes the gradients of weights, unless the schedule has `weight` steps for them.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind[0].upper()}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """`orders[rank]` are the steps of one rank."""

    name: str
    stages: int
    microbatches: int
    orders: tuple[tuple[Step, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @cached_property
    def rank_of(self) -> dict[Step, int]:
        """Where each step runs."""
        return {step: rank for rank, order in enumerate(self.orders) for step in order}

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank."""
        return tuple(tuple(sorted({step.stage for step in order})) for order in self.orders)

    @cached_property
    def splits(self) -> bool:
        """Whether gradients of weights are passes of their own."""
        return any(step.kind == "weight" for order in self.orders for step in order)

    def text(self) -> tuple[str, ...]:
        """A line per rank: `0F0 0F1 0B0 0B1`."""
        return tuple(" ".join(map(str, order)) for order in self.orders)


def read_schedule(name: str, stages: int, microbatches: int, lines: Iterable[str]) -> Schedule:
    """From the lines that `Schedule.text` writes.

    Raises:
        PlanError: a word that is no step.
    """
    return Schedule(name, stages, microbatches, tuple(tuple(map(_step, line.split())) for line in lines))


def _step(word: str) -> Step:
    found = re.fullmatch(r"(\d+)([FBW])(\d+)", word)
    if found is None:
        raise PlanError(f"`{word}` is no step.", where="schedule", fix="stage, F, B or W, microbatch, as in 3B5")
    return Step(MARKS[found[2]], int(found[1]), int(found[3]))


def needs(schedule: Schedule, step: Step) -> list[Step]:
    """The steps whose results a step takes."""
    match step.kind:
        case "forward":
            return [step._replace(stage=step.stage - 1)] if step.stage else []
        case "weight":
            return [step._replace(kind="backward")]
        case _:
            after = step.stage + 1 < schedule.stages
            return [step._replace(kind="forward")] + ([step._replace(stage=step.stage + 1)] if after else [])


def in_flight(schedule: Schedule, rank: int, freed_by: Kind = "backward") -> int:
    """The most forward results that a rank holds at once, counted per stage and microbatch.

    Args:
        freed_by: "backward" or "weight": the pass after which a result is no longer needed.
    """
    held = most = 0
    for step in schedule.orders[rank]:
        held += (step.kind == "forward") - (step.kind == freed_by)
        most = max(most, held)
    return most


def check(schedule: Schedule) -> None:
    """Every pass happens once, in an order in which no rank waits for ever.

    Raises:
        PlanError: the step that is missing, repeated, out of place, or part of a deadlock.
    """
    _complete(schedule)
    waits: TopologicalSorter[Step] = TopologicalSorter()
    for order in schedule.orders:
        for before, step in pairwise(order):
            waits.add(step, before)
        for step in order:
            waits.add(step, *needs(schedule, step))
    try:
        waits.prepare()
    except CycleError as cycle:
        _refuse(schedule, f"waits for itself: {' after '.join(map(str, cycle.args[1][::-1]))}")


def _complete(schedule: Schedule) -> None:
    """Each pass once, and all passes of a microbatch through a stage on one rank."""
    count = Counter(step for order in schedule.orders for step in order)
    kinds: tuple[Kind, ...] = ("forward", "backward", "weight") if schedule.splits else ("forward", "backward")
    for stage in range(schedule.stages):
        for m in range(schedule.microbatches):
            steps = [Step(kind, stage, m) for kind in kinds]
            for step in steps:
                if (found := count.pop(step, 0)) != 1:
                    _refuse(schedule, f"has {step} {found} times")
            if len({schedule.rank_of[step] for step in steps}) > 1:
                _refuse(schedule, f"has microbatch {m} of stage {stage} on several ranks")
    if count:
        _refuse(schedule, f"has {next(iter(count))}, which does not exist")


def _refuse(schedule: Schedule, what: str) -> None:
    raise PlanError(f"schedule {schedule.name} {what}.", where="schedule", fix="an order in which each pass runs once")
