"""One microbatch after another: GPipe, 1F1B, and both with several chunks per rank.

Chunk c of rank r is stage c * ranks + r. Sources: Huang et al., GPipe, NeurIPS 2019; Fan et al.,
DAPPLE, PPoPP 2021, and Narayanan et al., PipeDream-2BW, ICML 2021 (1F1B); Narayanan et al., SC'21,
section 2.2 (interleaving); Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.errors import PlanError
from ....ir.pipeline.schedule import Kind, Schedule, Step


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forward passes, then all backward passes."""
    positive(ranks=ranks, microbatches=microbatches)
    kinds: tuple[Kind, ...] = ("forward", "backward")
    orders = tuple(
        tuple(Step(kind, rank, m) for kind in kinds for m in range(microbatches))
        for rank in range(ranks)
    )
    return Schedule("gpipe", ranks, microbatches, orders)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """As many forward passes as there are ranks behind, then backward and forward by turns."""
    positive(ranks=ranks, microbatches=microbatches)
    orders: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        forward = passes("forward", [rank], 1, microbatches)
        backward = passes("backward", [rank], 1, microbatches)
        orders.append(_alternate(forward, backward, ranks - rank - 1))
    return Schedule("1f1b", ranks, microbatches, tuple(orders))


def round_robin(replicas: Sequence[int], microbatches: int) -> Schedule:
    """1F1B over stages that are replicated: replica r of R takes microbatches r, r + R, r + 2R, ...

    A replica begins with as many forward passes as keep all replicas behind it busy. Source: Narayanan et
    al., PipeDream, SOSP 2019, section 3.2 (1F1B-RR).
    """
    positive(microbatches=microbatches, replicas=min(replicas, default=0))
    orders: list[tuple[Step, ...]] = []
    for stage, count in enumerate(replicas):
        ahead = -(-sum(replicas[stage:]) // count) - 1
        for replica in range(count):
            forward = [Step("forward", stage, m) for m in range(replica, microbatches, count)]
            orders.append(
                _alternate(forward, [step._replace(kind="backward") for step in forward], ahead)
            )
    return Schedule("1f1b-rr", len(replicas), microbatches, tuple(orders))


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over `chunks` chunks per rank, in groups of about as many microbatches as there are ranks.

    Raises:
        PlanError: microbatches make no equal groups (see `group_size`).
    """
    positive(ranks=ranks, microbatches=microbatches, chunks=chunks)
    if chunks == 1:
        return one_f_one_b(ranks, microbatches)
    group = group_size(ranks, microbatches)
    orders: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        held = range(rank, ranks * chunks, ranks)
        forward = passes("forward", held, group, microbatches)
        backward = passes("backward", held, group, microbatches)
        orders.append(_alternate(forward, backward, 2 * (ranks - rank - 1) + (chunks - 1) * group))
    return Schedule("interleaved", ranks * chunks, microbatches, tuple(orders))


def looped_bfs(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Chunk by chunk, all microbatches through one before the next; backward in the reverse order."""
    positive(ranks=ranks, microbatches=microbatches, chunks=chunks)
    orders: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        forward = passes("forward", range(rank, ranks * chunks, ranks), microbatches, microbatches)
        orders.append((*forward, *(step._replace(kind="backward") for step in reversed(forward))))
    return Schedule("looped-bfs", ranks * chunks, microbatches, tuple(orders))


def schedule_of(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """The usual schedule of so many ranks and chunks."""
    return (
        one_f_one_b(ranks, microbatches)
        if chunks == 1
        else interleaved(ranks, microbatches, chunks)
    )


def group_size(ranks: int, microbatches: int) -> int:
    """Microbatches that pass through one chunk before a rank turns to the next.

    As many as there are ranks where that divides; else as in torch's pipelining (ScheduleInterleaved1F1B):
    as many groups as whole ones would fit, each a little larger.

    Raises:
        PlanError: the groups would not be equal.
    """
    groups = max(1, microbatches // ranks)
    if microbatches % groups:
        raise PlanError(
            f"{microbatches} microbatches make no {groups} equal groups of {ranks} or a few more.",
            where="microbatches", fix=f"a multiple of {ranks} microbatches, or one chunk per rank",
        )  # fmt: skip
    return microbatches // groups


def passes(kind: Kind, stages: Sequence[int], group: int, microbatches: int) -> list[Step]:
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


def positive(**counts: int) -> None:
    """Refuse counts below 1.

    Raises:
        PlanError: the first of them.
    """
    for name, count in counts.items():
        if count < 1:
            raise PlanError(
                f"{name} cannot be {count}.", where=f"schedule: {name}", fix="1 or more"
            )
