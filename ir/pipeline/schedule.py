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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from ..errors import PlanError

Kind = Literal["forward", "backward", "weight"]
MARKS: dict[str, Kind] = {"F": "forward", "B": "backward", "W": "weight"}


class Step(NamedTuple):
    """One pass of one microbatch through one stage: `3B5` is microbatch 5 back through stage 3.

    `backward` also makes the gradients of weights, unless the schedule has a `weight` step for them.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind[0].upper()}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Passed:
    """One pass of a microbatch through a stage; `start` is in seconds from the start of the record."""

    rank: int
    step: Step
    start: float
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """`orders[rank]` are the steps of one rank.

    `together` are forward steps that run as one with the backward step of another microbatch that
    follows them in the order: both start when both can (DualPipe hides communication so).
    """

    name: str
    stages: int
    microbatches: int
    orders: tuple[tuple[Step, ...], ...]
    together: frozenset[Step] = frozenset()

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
    def homes(self) -> tuple[int, ...]:
        """The (first) rank of each stage."""
        return tuple(
            next(r for r, held in enumerate(self.held) if stage in held)
            for stage in range(self.stages)
        )

    @cached_property
    def splits(self) -> bool:
        """Whether some gradients of weights are passes of their own."""
        return any(step.kind == "weight" for order in self.orders for step in order)

    def whole(self, step: Step) -> bool:
        """Whether a backward step makes the gradients of weights too."""
        kind, stage, microbatch = step
        return kind == "backward" and not (
            self.splits and Step("weight", stage, microbatch) in self.rank_of
        )

    @cached_property
    def flying(self) -> tuple[tuple[tuple[int, ...], np.ndarray, np.ndarray], ...]:
        """Of each rank: its stages and, after each of its steps (rows), how many results of each stage's forward
        passes it holds, and how many that wait for weight passes."""
        return tuple(
            self._flying(order, held) for order, held in zip(self.orders, self.held, strict=True)
        )

    def _flying(
        self, order: tuple[Step, ...], held: tuple[int, ...]
    ) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
        results, waiting = np.zeros((2, len(order), len(held)))
        for row, step in enumerate(order):
            column = held.index(step.stage)
            results[row, column] = {"forward": 1, "backward": -1, "weight": 0}[step.kind]
            waiting[row, column] = (
                -1 if step.kind == "weight" else step.kind == "backward" and not self.whole(step)
            )
        return held, np.cumsum(results, axis=0), np.cumsum(waiting, axis=0)

    @cached_property
    def slots(self) -> tuple[tuple[tuple[Step, ...], ...], ...]:
        """Each rank's order, steps that run as one in one slot."""
        return tuple(tuple(_slots(order, self.together)) for order in self.orders)

    def text(self) -> tuple[str, ...]:
        """A line per rank: `0F0 0F1 0B0 0B1`, and `0F7+7B3` for two steps that run as one."""
        return tuple(" ".join("+".join(map(str, slot)) for slot in slots) for slots in self.slots)


def _slots(order: tuple[Step, ...], together: frozenset[Step]) -> Iterator[tuple[Step, ...]]:
    steps = iter(order)
    for step in steps:
        second = next(steps, None) if step in together else None
        yield (step,) if second is None else (step, second)


def read_schedule(name: str, stages: int, microbatches: int, lines: Iterable[str]) -> Schedule:
    """From the lines that `Schedule.text` writes.

    Raises:
        PlanError: a word that is no step.
    """
    slots = [[[_step(word) for word in slot.split("+")] for slot in line.split()] for line in lines]
    orders = tuple(tuple(step for slot in order for step in slot) for order in slots)
    together = frozenset(step for order in slots for slot in order for step in slot[:-1])
    return Schedule(name, stages, microbatches, orders, together)


def _step(word: str) -> Step:
    found = re.fullmatch(r"([0-9]{1,9})([FBW])([0-9]{1,9})", word)
    if found is None:
        raise PlanError(
            f"`{word}` is no step.", where="schedule", fix="stage, F, B or W, microbatch, as in 3B5"
        )
    return Step(MARKS[found[2]], int(found[1]), int(found[3]))


def needs(schedule: Schedule, step: Step) -> list[Step]:
    """The steps whose results a step takes."""
    kind, stage, microbatch = step
    match kind:
        case "forward":
            return [Step("forward", stage - 1, microbatch)] if stage else []
        case "weight":
            return [Step("backward", stage, microbatch)]
        case _:
            own = Step("forward", stage, microbatch)
            after = stage + 1 < schedule.stages
            return [own, Step("backward", stage + 1, microbatch)] if after else [own]


def peak_held(
    schedule: Schedule, rank: int, forward: Sequence[float], kept: Sequence[float]
) -> float:
    """The most that a rank holds at once of what forward passes leave behind.

    Args:
        forward: per stage, what one microbatch's forward pass leaves (bytes, or 1 to count).
        kept: per stage, the part of it that waits for the weight pass after the backward pass.
    """
    stages, results, waiting = schedule.flying[rank]
    held = results @ np.array([forward[s] for s in stages]) + waiting @ np.array(
        [kept[s] for s in stages]
    )
    return max(0.0, float(held.max(initial=0.0)))


def in_flight(schedule: Schedule, rank: int, freed_by: Kind = "backward") -> int:
    """The most forward results that a rank holds at once, counted per stage and microbatch.

    Args:
        freed_by: "backward" or "weight": the pass after which a result is no longer needed.
    """
    one = [1.0] * schedule.stages
    return int(
        peak_held(schedule, rank, one, one if freed_by == "weight" else [0.0] * schedule.stages)
    )


def microbatches_held(schedule: Schedule, rank: int) -> int:
    """Of how many microbatches a rank holds something at once, at most: each from its first step there to its last."""
    order = schedule.orders[rank]
    first = {step.microbatch: k for k, step in reversed([*enumerate(order)])}
    last = {step.microbatch: k for k, step in enumerate(order)}
    return max((sum(first[m] <= k <= last[m] for m in first) for k in first.values()), default=0)


def check(schedule: Schedule) -> None:
    """Every pass happens once, in an order in which no rank waits for ever.

    Raises:
        PlanError: the step that is missing, repeated, out of place, or part of a deadlock.
    """
    _complete(schedule)
    _paired(schedule)
    slot_of = {step: slot for order in schedule.slots for slot in order for step in slot}
    waits: TopologicalSorter[tuple[Step, ...]] = TopologicalSorter()
    for order in schedule.slots:
        for before, slot in pairwise(order):
            waits.add(slot, before)
        for slot in order:
            waits.add(slot, *(slot_of[need] for step in slot for need in needs(schedule, step)))
    try:
        waits.prepare()
    except CycleError as cycle:
        steps = [" with ".join(map(str, slot)) for slot in cycle.args[1][::-1]]
        _refuse(schedule, f"waits for itself: {' after '.join(steps)}")


def _paired(schedule: Schedule) -> None:
    pairs = {
        slot[0]
        for order in schedule.slots
        for slot in order
        if [s.kind for s in slot] == ["forward", "backward"]
    }
    if odd := schedule.together - pairs:
        _refuse(schedule, f"has {min(odd)} together with no backward step")


def _complete(schedule: Schedule) -> None:
    """Each pass once, and all passes of a microbatch through a stage on one rank."""
    count = Counter(step for order in schedule.orders for step in order)
    for stage in range(schedule.stages):
        for m in range(schedule.microbatches):
            steps = [Step("forward", stage, m), Step("backward", stage, m)]
            if not schedule.whole(steps[1]):
                steps.append(Step("weight", stage, m))
            for step in steps:
                if (found := count.pop(step, 0)) != 1:
                    _refuse(schedule, f"has {step} {found} times")
            if len({schedule.rank_of[step] for step in steps}) > 1:
                _refuse(schedule, f"has microbatch {m} of stage {stage} on several ranks")
    if count:
        _refuse(schedule, f"has {next(iter(count))}, which does not exist")


def _refuse(schedule: Schedule, what: str) -> None:
    raise PlanError(
        f"schedule {schedule.name} {what}.",
        where="schedule",
        fix="an order in which each pass runs once",
    )
