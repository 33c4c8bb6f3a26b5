"""Generators of pipeline schedules; `ir.schedule` says what a schedule is.

Chunk c of rank r is stage c * ranks + r. Sources: Huang et al., GPipe, NeurIPS 2019;
Narayanan et al., PipeDream-2BW, ICML 2021 (1F1B), and SC'21, section 2.2 (interleaving).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import PlanError
from ...ir.schedule import Kind, Schedule, Step


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forward passes, then all backward passes."""
    _positive(ranks=ranks, microbatches=microbatches)
    kinds: tuple[Kind, ...] = ("forward", "backward")
    orders = tuple(
        tuple(Step(kind, rank, m) for kind in kinds for m in range(microbatches)) for rank in range(ranks)
    )
    return Schedule("gpipe", ranks, microbatches, orders)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """As many forward passes as there are ranks behind, then backward and forward by turns."""
    _positive(ranks=ranks, microbatches=microbatches)
    orders = []
    for rank in range(ranks):
        forward = _steps("forward", [rank], 1, microbatches)
        backward = _steps("backward", [rank], 1, microbatches)
        orders.append(_alternate(forward, backward, ranks - rank - 1))
    return Schedule("1f1b", ranks, microbatches, tuple(orders))


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
    orders = []
    for rank in range(ranks):
        held = range(rank, ranks * chunks, ranks)
        forward = _steps("forward", held, ranks, microbatches)
        backward = _steps("backward", held, ranks, microbatches)
        orders.append(_alternate(forward, backward, 2 * (ranks - rank - 1) + (chunks - 1) * ranks))
    return Schedule("interleaved", ranks * chunks, microbatches, tuple(orders))


def schedule_of(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """The usual schedule of so many ranks and chunks."""
    return one_f_one_b(ranks, microbatches) if chunks == 1 else interleaved(ranks, microbatches, chunks)


def _steps(kind: Kind, stages: Sequence[int], group: int, microbatches: int) -> list[Step]:
    """Group by group of microbatches, through the stages in the order that the pass meets them."""
    order = stages if kind == "forward" else stages[::-1]
    return [
        Step(kind, stage, m)
        for first in range(0, microbatches, group)
        for stage in order
        for m in range(first, first + group)
    ]


def _alternate(forward: list[Step], backward: list[Step], ahead: int) -> tuple[Step, ...]:
    """`ahead` forward steps, then one forward and one backward by turns, then the rest."""
    ahead = min(ahead, len(forward))
    mixed = [step for pair in zip(forward[ahead:], backward, strict=False) for step in pair]
    return (*forward[:ahead], *mixed, *backward[len(forward) - ahead :])


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise PlanError(f"{name} cannot be {count}.", where=f"schedule: {name}", fix="1 or more")
