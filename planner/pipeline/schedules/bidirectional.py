"""Microbatches from both ends: half of them enter at the first rank, half at the last.

Chimera and DualPipe hold every stage twice: rank r has stages r and p - 1 - r, and the microbatches of
the second half of the step run from the last rank to the first. DualPipeV folds the pipeline instead:
rank r has stages r and 2p - 1 - r, and what returns is the same microbatches. Sources: Li and Hoefler,
Chimera, SC'21; DeepSeek-AI, DeepSeek-V3 Technical Report, section 3.2.1, and its DualPipe (DualPipeV
is Sea AI Lab's cut of it in half, as in torch's ScheduleDualPipeV).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ....ir.errors import PlanError
from ....ir.pipeline.schedule import Kind, Schedule, Step
from .classic import positive


def chimera(ranks: int, microbatches: int) -> Schedule:
    """Two 1F1B pipelines in opposite directions, each in the other's bubbles.

    In slots of equal length, microbatch i of a direction runs back through stage s in slot
    2p - 1 - s + 2i, and forward in slot s + 2i or, while the pipeline fills, s + i. With p even the two
    directions fill each other's gaps; a direction takes p / 2 microbatches every 2p slots.

    Raises:
        PlanError: an odd number of ranks or microbatches.
    """
    positive(ranks=ranks, microbatches=microbatches)
    _even("chimera", ranks=ranks, microbatches=microbatches)
    half, unit = microbatches // 2, ranks // 2
    orders: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        timed: list[tuple[int, int, Step]] = []
        for first, stage in ((0, rank), (half, ranks - 1 - rank)):
            for i in range(half):
                slot = 2 * ranks * (i // unit) + 2 * (i % unit)
                fills = i < min(unit, ranks - stage)
                timed.append(
                    ((i if fills else slot) + stage, -stage, Step("forward", stage, first + i))
                )
                timed.append(
                    (slot + 2 * ranks - 1 - stage, -stage, Step("backward", stage, first + i))
                )
        orders.append(tuple(step for _, _, step in sorted(timed)))
    return Schedule("chimera", ranks, microbatches, tuple(orders))


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Both directions at once, forward steps of one together with backward steps of the other.

    Raises:
        PlanError: an odd number of ranks or microbatches, or fewer than two microbatches per rank.
    """
    positive(ranks=ranks, microbatches=microbatches)
    _even("dualpipe", ranks=ranks, microbatches=microbatches)
    _at_least("dualpipe", 2 * ranks, microbatches)
    half, orders = microbatches // 2, list[_Order]()
    for rank in range(ranks):
        down, up = _Stream(rank, 0), _Stream(ranks - 1 - rank, half)
        own, other = (down, up) if rank < ranks // 2 else (up, down)
        orders.append(_Order(own, other).fill(min(rank, ranks - 1 - rank), ranks // 2, half))
    return _schedule("dualpipe", ranks, microbatches, orders)


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipe on a folded pipeline: each stage once, two stages on each rank.

    Raises:
        PlanError: fewer than two microbatches per rank.
    """
    positive(ranks=ranks, microbatches=microbatches)
    _at_least("dualpipe-v", 2 * ranks, microbatches)
    orders = [
        _Order(_Stream(rank, 0), _Stream(2 * ranks - 1 - rank, 0)).fill(rank, ranks, microbatches)
        for rank in range(ranks)
    ]
    return _schedule("dualpipe-v", 2 * ranks, microbatches, orders)


@dataclass
class _Stream:
    """The passes of one stage on one rank, in order of microbatches."""

    stage: int
    first: int
    begun: dict[Kind, int] = field(default_factory=lambda: {})

    def next(self, kind: Kind) -> Step:
        i = self.begun.get(kind, 0)
        self.begun[kind] = i + 1
        return Step(kind, self.stage, self.first + i)


@dataclass
class _Order:
    """One rank's order while it is written: `near` meets its microbatches first, `far` last."""

    near: _Stream
    far: _Stream
    steps: list[Step] = field(default_factory=lambda: [])
    together: set[Step] = field(default_factory=lambda: set())
    owed: deque[Step] = field(default_factory=lambda: deque())  # weight passes put off

    def fill(self, depth: int, depths: int, microbatches: int) -> _Order:
        """The eight phases, for the rank at `depth` of the `depths` between an end and the middle.

        Depth 0 is an end of the pipeline; the deeper a rank, the sooner it meets the other stream.
        """
        deep, shallow = depth + 1, depths - depth - 1
        for _ in range(2 * shallow):
            self.forward(self.near)
        for _ in range(deep):
            self.forward(self.near)
            self.forward(self.far)
        for _ in range(shallow):
            self.split(self.far)
            self.weight()
            self.forward(self.far)
        for i in range(microbatches - 2 * depths + deep):
            self.both(self.near, self.far, apart=i == 0 and shallow == 0)
            self.both(self.far, self.near)
        for _ in range(shallow):
            self.backward(self.far)
            self.both(self.far, self.near)
        for i in range(2 * deep):
            back = self.split if i >= deep else self.backward
            back(self.near if i % 2 else self.far)
        for _ in range(shallow):
            self.weight()
            self.split(self.near)
        while self.owed:
            self.weight()
        return self

    def forward(self, stream: _Stream) -> None:
        self.steps.append(stream.next("forward"))

    def backward(self, stream: _Stream) -> None:
        self.steps.append(stream.next("backward"))

    def split(self, stream: _Stream) -> None:
        self.backward(stream)
        self.owed.append(self.steps[-1]._replace(kind="weight"))

    def weight(self) -> None:
        self.steps.append(self.owed.popleft())

    def both(self, forward: _Stream, backward: _Stream, apart: bool = False) -> None:
        self.forward(forward)
        if not apart:
            self.together.add(self.steps[-1])
        self.backward(backward)


def _schedule(name: str, stages: int, microbatches: int, orders: list[_Order]) -> Schedule:
    together = frozenset(step for order in orders for step in order.together)
    return Schedule(
        name, stages, microbatches, tuple(tuple(order.steps) for order in orders), together
    )


def _even(name: str, **counts: int) -> None:
    for what, count in counts.items():
        if count % 2:
            raise PlanError(
                f"{name} takes an even number of {what}, got {count}.",
                where=what, fix=f"{count - 1} or {count + 1}" if count > 1 else "2",
            )  # fmt: skip


def _at_least(name: str, least: int, microbatches: int) -> None:
    if microbatches < least:
        raise PlanError(
            f"{name} takes at least two microbatches per rank, got {microbatches}.",
            where="microbatches", fix=f"{least} or more",
        )  # fmt: skip
