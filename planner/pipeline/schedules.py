"""Pipeline schedules as data: for each rank, its steps in order.

    1F1B, 4 ranks    rank 0   F0 F1 F2 F3 B0 F4 B1 F5 B2 ...
                     rank 3   F0 B0 F1 B1 F2 B2 F3 B3 ...

A rank may hold several chunks of the model; chunk c of rank r is stage c * ranks + r. The
simulator and the runtime carry out the same lists. Sources: Huang et al., GPipe, NeurIPS 2019;
Narayanan et al., PipeDream-2BW, ICML 2021 (1F1B), and SC'21, section 2.2 (interleaving).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import networkx as nx

from ...ir.errors import PlanError

Kind = Literal["forward", "backward", "weight"]


class Step(NamedTuple):
    """One pass of one microbatch through one chunk. `backward` also makes the gradients of
    weights, unless the schedule has `weight` steps for them."""

    kind: Kind
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """`orders[rank]` are the steps of one rank."""

    name: str
    chunks: int
    microbatches: int
    orders: tuple[tuple[Step, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Place in the model, from 0."""
        return chunk * self.ranks + rank


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forward passes, then all backward passes."""
    _positive(ranks=ranks, microbatches=microbatches)
    order = tuple(Step("forward", 0, m) for m in range(microbatches)) + tuple(
        Step("backward", 0, m) for m in range(microbatches)
    )
    return Schedule("gpipe", 1, microbatches, (order,) * ranks)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """As many forward passes as there are ranks behind, then backward and forward by turns."""
    _positive(ranks=ranks, microbatches=microbatches)
    orders = tuple(
        _alternate(_steps("forward", 1, 1, microbatches), _steps("backward", 1, 1, microbatches), ranks - rank - 1)
        for rank in range(ranks)
    )
    return Schedule("1f1b", 1, microbatches, orders)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over `chunks` chunks per rank, microbatches in groups of as many as there are ranks.

    Raises:
        PlanError: microbatches are not a multiple of the ranks.
    """
    _positive(ranks=ranks, microbatches=microbatches, chunks=chunks)
    if chunks == 1:
        return one_f_one_b(ranks, microbatches)
    if microbatches % ranks:
        raise PlanError(
            f"an interleaved schedule takes microbatches in groups of {ranks}, got {microbatches}.",
            where="schedule: interleaved", fix=f"a multiple of {ranks} microbatches, or one chunk per rank",
        )  # fmt: skip
    forward = _steps("forward", chunks, ranks, microbatches)
    backward = _steps("backward", chunks, ranks, microbatches)
    orders = tuple(
        _alternate(forward, backward, 2 * (ranks - rank - 1) + (chunks - 1) * ranks) for rank in range(ranks)
    )
    return Schedule("interleaved", chunks, microbatches, orders)


def schedule_of(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """The usual schedule of so many ranks and chunks."""
    return one_f_one_b(ranks, microbatches) if chunks == 1 else interleaved(ranks, microbatches, chunks)


def _steps(kind: Kind, chunks: int, group: int, microbatches: int) -> list[Step]:
    """Group by group of microbatches, through the chunks in the order that the pass meets them."""
    order = range(chunks) if kind == "forward" else range(chunks - 1, -1, -1)
    return [
        Step(kind, chunk, m)
        for first in range(0, microbatches, group)
        for chunk in order
        for m in range(first, first + group)
    ]


def _alternate(forward: list[Step], backward: list[Step], ahead: int) -> tuple[Step, ...]:
    """`ahead` forward steps, then one forward and one backward by turns, then the rest."""
    ahead = min(ahead, len(forward))
    mixed = [step for pair in zip(forward[ahead:], backward, strict=False) for step in pair]
    return (*forward[:ahead], *mixed, *backward[len(forward) - ahead :])


def in_flight(schedule: Schedule, rank: int) -> int:
    """The most forward results that a rank holds at once, counted per chunk and microbatch."""
    held = most = 0
    for step in schedule.orders[rank]:
        held += {"forward": 1, "backward": -1, "weight": 0}[step.kind]
        most = max(most, held)
    return most


def check(schedule: Schedule) -> None:
    """Every pass happens once, in an order in which no rank waits for ever.

    Raises:
        PlanError: the step that is missing, repeated, out of place, or part of a deadlock.
    """
    waits = nx.DiGraph()
    for rank, order in enumerate(schedule.orders):
        places = [(schedule.stage(rank, step.chunk), step) for step in order]
        _complete(schedule, rank, order)
        waits.add_edges_from(pairwise(places))
        for stage, step in places:
            for before in needs(schedule, stage, step):
                waits.add_edge(before, (stage, step))
    if not nx.is_directed_acyclic_graph(waits):
        stage, step = nx.find_cycle(waits)[0][0]
        _refuse(schedule, f"waits for itself: {step.kind} of microbatch {step.microbatch} on stage {stage}")


def needs(schedule: Schedule, stage: int, step: Step) -> list[tuple[int, Step]]:
    """The steps, with their stages, whose results a step takes."""
    ranks, last, m = schedule.ranks, schedule.stages - 1, step.microbatch

    def at(kind: Kind, where: int) -> tuple[int, Step]:
        return where, Step(kind, where // ranks, m)

    match step.kind:
        case "forward":
            return [at("forward", stage - 1)] if stage else []
        case "weight":
            return [at("backward", stage)]
        case _:
            return [at("forward", stage)] + ([at("backward", stage + 1)] if stage < last else [])


def _complete(schedule: Schedule, rank: int, order: tuple[Step, ...]) -> None:
    count = Counter(order)
    kinds: set[Kind] = {"forward", "backward", *(step.kind for step in order)}
    for kind in sorted(kinds):
        for chunk in range(schedule.chunks):
            for m in range(schedule.microbatches):
                found = count.pop(Step(kind, chunk, m), 0)
                if found != 1:
                    _refuse(schedule, f"has {kind} of microbatch {m} on rank {rank}, chunk {chunk} {found} times")
    if count:
        step = next(iter(count))
        _refuse(schedule, f"has a {step.kind} of microbatch {step.microbatch}, chunk {step.chunk}, that does not exist")


def _refuse(schedule: Schedule, what: str) -> None:
    raise PlanError(f"schedule {schedule.name} {what}.", where="schedule", fix="an order in which each pass runs once")


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise PlanError(f"{name} cannot be {count}.", where=f"schedule: {name}", fix="1 or more")
