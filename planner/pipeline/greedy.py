"""Zero-bubble orders by list scheduling: one stage per rank, seconds of every pass and a limit of memory known.

Whenever a rank is free it takes a backward pass that is ready, else a forward pass, while there is room; weight
passes fill what would be idle, and make room. `Manner` says what goes first where that is not clear: the choices
that Qi et al. (Zero Bubble Pipeline Parallelism, ICLR 2024, section 3.1) leave to a grid search.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from ...ir.pipeline.schedule import Kind, Schedule, Step
from .simulate import StageSeconds
from .tighten import SLACK, ActivationMemory

SLOPES = (2.0, 1.0, 1.5, 2.5, 0.5, 3.0, 0.0)  # 2: as far ahead as in ZB-H2; 1: as in 1F1B


@dataclass(frozen=True)
class Manner:
    """How ranks choose among passes.

    ahead: per rank, the most microbatches between their forward and their backward pass.
    fill: a weight pass may delay the pass that is awaited by this part of its own seconds.
    press: a forward pass may delay a backward pass that is awaited.
    forward_first: of a forward and a backward pass that are both ready.
    whole: a backward pass with no room for what it would leave for its weight pass is one with it at once;
        else weight passes that wait make room first.
    """

    ahead: tuple[int, ...]
    fill: float
    press: bool
    forward_first: bool
    whole: bool


def manners(held: ActivationMemory, microbatches: int) -> Iterator[Manner]:
    """A grid, what has been best most often first."""
    most = [_most(held, rank, microbatches) for rank in range(len(held.limits))]
    behind = range(len(most) - 1, -1, -1)
    steep = [
        tuple(min(n, int(1 + slope * b)) for n, b in zip(most, behind, strict=True))
        for slope in SLOPES
    ]
    grows = any(kept > forward for kept, forward in zip(held.kept, held.forward, strict=True))
    for press in (True, False):
        for forward_first in (True, False):
            for fill in (1.0, 0.0, 0.5):
                for whole in (False, True) if grows else (False,):
                    for ahead in dict.fromkeys([*steep, tuple(most)]):
                        yield Manner(ahead, fill, press, forward_first, whole)


def _most(held: ActivationMemory, rank: int, microbatches: int) -> int:
    """Microbatches in flight."""
    each = held.forward[rank]
    return microbatches if each <= 0 else max(1, min(microbatches, int(held.room[rank] / each)))


def greedy(
    stages: Sequence[StageSeconds], held: ActivationMemory, microbatches: int, manner: Manner
) -> tuple[Schedule, float]:
    """The orders in which ranks take their passes, and when the last of them ends, at the latest.

    Every rank has room for one microbatch at least. Where a rank waited in vain, the simulator may be faster.
    """
    ranks = [
        _Rank(number, seconds, held, microbatches, manner) for number, seconds in enumerate(stages)
    ]
    ranks[0].arrived["forward"] = [0.0] * microbatches
    events = [(0.0, number) for number in range(len(ranks))]
    while events:
        now, number = heapq.heappop(events)
        rank = ranks[number]
        if rank.free > now:
            continue
        kind, again = rank.choose(now)
        if kind is None:
            if again < inf:
                heapq.heappush(events, (again, number))
            continue
        microbatch = rank.take(kind, now)
        heapq.heappush(events, (rank.free, number))
        to = number + (1 if kind == "forward" else -1)
        if kind == "forward" and to == len(ranks):
            rank.arrived["backward"][microbatch] = rank.free
        elif kind != "weight" and to >= 0:
            ranks[to].arrived[kind][microbatch] = arrival = rank.sent()
            heapq.heappush(events, (arrival, to))
    orders = tuple(tuple(rank.order) for rank in ranks)
    return Schedule("searched", len(ranks), microbatches, orders), max(rank.free for rank in ranks)


@dataclass
class _Rank:
    """One rank on its way; passes of a kind run in the order of microbatches."""

    number: int
    seconds: StageSeconds
    held: ActivationMemory
    microbatches: int
    manner: Manner
    order: list[Step] = field(default_factory=lambda: [])
    free: float = 0.0  # when it has ended what it took
    line: float = 0.0  # when its last transfer has ended
    holds: float = 0.0
    done: dict[Kind, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    late: deque[int] = field(
        default_factory=lambda: deque()
    )  # microbatches whose weight passes wait
    arrived: dict[Kind, list[float]] = field(
        init=False
    )  # when the input of each microbatch is here, if known
    changes: dict[Kind, float] = field(init=False)
    takes: dict[Kind, float] = field(init=False)

    def __post_init__(self) -> None:
        self.arrived = {kind: [inf] * self.microbatches for kind in ("forward", "backward")}
        forward, kept, s = self.held.forward[self.number], self.held.kept[self.number], self.seconds
        self.takes = {"forward": s.forward, "backward": s.backward, "weight": s.weight}
        self.changes = {"forward": forward, "backward": kept - forward, "weight": -kept}

    def choose(self, now: float) -> tuple[Kind | None, float]:
        """The pass to take, or when to look again."""
        ready: dict[Kind, float] = {kind: self._ready(kind, now) for kind in self._preference}
        full = False
        for kind in self._preference:
            if ready[kind] > now:
                continue
            if not self._fits(kind):
                full = True
            elif self._may(kind, now, ready):
                return kind, now
        awaited = min((t for kind, t in ready.items() if t > now and self._fits(kind)), default=inf)
        if self.late and (full or self._ends(now, "weight", 1 - self.manner.fill) <= awaited):
            return "weight", now
        return None, awaited

    @property
    def _preference(self) -> tuple[Kind, Kind]:
        return ("forward", "backward") if self.manner.forward_first else ("backward", "forward")

    def _ready(self, kind: Kind, now: float) -> float:
        done = self.done[kind]
        if kind == "forward":
            flying = done - self.done["backward"]
            known = done < self.microbatches and flying < self.manner.ahead[self.number]
        else:
            known = done < self.done["forward"]
        return max(now, self.arrived[kind][done]) if known else inf

    def _fits(self, kind: Kind) -> bool:
        return (kind == "backward" and self._whole) or self._apart(kind)

    def _apart(self, kind: Kind) -> bool:
        return self.holds + self.changes[kind] <= self.held.room[self.number]

    @property
    def _whole(self) -> bool:
        """Whether a backward pass now would be one with its weight pass."""
        return not self._apart("backward") and (self.manner.whole or not self.late)

    def _may(self, kind: Kind, now: float, ready: dict[Kind, float]) -> bool:
        """Whether a pass that is ready delays none that should go before it."""
        other = "forward" if kind == "backward" else "backward"
        yields = kind == "forward" or self.manner.forward_first
        if not yields or self.manner.press or ready[other] <= now or not self._fits(other):
            return True
        return self._ends(now, kind) <= ready[other]

    def _ends(self, now: float, kind: Kind, part: float = 1.0) -> float:
        return now + self.takes[kind] * part * (1 - SLACK)

    def take(self, kind: Kind, now: float) -> int:
        """Run the next pass of a kind; returns its microbatch."""
        if kind == "weight":
            microbatch = self.late.popleft()
        else:
            microbatch = self.done[kind]
            self.done[kind] += 1
        self.free = now + self.takes[kind]
        if kind == "backward" and self._whole:
            self.free += self.takes["weight"]
            self.holds += self.changes["weight"]
        elif kind == "backward":
            self.late.append(microbatch)
        self.holds += self.changes[kind]
        self.order.append(Step(kind, self.number, microbatch))
        return microbatch

    def sent(self) -> float:
        """When the result of the last pass is on the other rank; transfers follow one another."""
        self.line = max(self.line, self.free) + self.seconds.sending(self.order[-1].kind)
        return self.line
