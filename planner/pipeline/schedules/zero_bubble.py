"""1F1B with gradients of weights as passes of their own, put where ranks would wait.

Rank r runs its weight passes r (ZB-H1) or 2r (ZB-H2) microbatches late, so that the gradients of
inputs, for which other ranks wait, come first. Sources: Qi et al., Zero Bubble Pipeline Parallelism,
ICLR 2024, section 2; the interleaved form is that of torch's pipelining (ScheduleInterleavedZeroBubble).
"""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.pipeline.schedule import Kind, Schedule, Step
from .classic import group_size, passes, positive


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """ZB1P: as many forward results held as in 1F1B, a bubble of (p - 1)(F + B - W)."""
    positive(ranks=ranks, microbatches=microbatches)
    orders = tuple(
        _late(
            _plain("forward", rank, microbatches),
            _plain("backward", rank, microbatches),
            ranks - rank,
            rank,
        )
        for rank in range(ranks)
    )
    return Schedule("zb-h1", ranks, microbatches, orders)


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """ZB2P: no bubble where F = B = W, for 2p - 1 forward results held on every rank."""
    positive(ranks=ranks, microbatches=microbatches)
    orders = tuple(
        _late(
            _plain("forward", rank, microbatches), _plain("backward", rank, microbatches),
            2 * (ranks - rank) - 1, 2 * rank,
        )
        for rank in range(ranks)
    )  # fmt: skip
    return Schedule("zb-h2", ranks, microbatches, orders)


def interleaved_zero_bubble(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B, each rank's weight passes as late as in ZB-H1.

    Raises:
        PlanError: microbatches make no equal groups (see `group_size`).
    """
    positive(ranks=ranks, microbatches=microbatches, chunks=chunks)
    group = group_size(ranks, microbatches)
    orders: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        held = range(rank, ranks * chunks, ranks)
        forward = passes("forward", held, group, microbatches)
        backward = passes("backward", held, group, microbatches)
        orders.append(_late(forward, backward, (chunks - 1) * group + ranks - rank, rank))
    return Schedule("interleaved-zero-bubble", ranks * chunks, microbatches, tuple(orders))


def _plain(kind: Kind, rank: int, microbatches: int) -> list[Step]:
    return passes(kind, [rank], 1, microbatches)


def _late(
    forward: Sequence[Step], backward: Sequence[Step], ahead: int, late: int
) -> tuple[Step, ...]:
    """`ahead` forward steps before the first backward step, each weight step `late` backward steps late."""
    order = [*forward[:ahead]]
    for i, step in enumerate(backward):
        order.append(step)
        if i >= late:
            order.append(backward[i - late]._replace(kind="weight"))
        order += forward[ahead + i : ahead + i + 1]
    return (
        *order,
        *(step._replace(kind="weight") for step in backward[max(0, len(backward) - late) :]),
    )
