"""Branch and bound on the priced message bound: closes what one set of prices leaves open.

At the best prices some nodes are torn between a choice that is cheap and large and one that
is dear and small: with memory paid for, both cost the same. The node where that matters most
is split into its larger and its smaller choices; of all parts the one with the lowest bound
is split next. Where no node is torn, one is split into its best choice and the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from .ascent import Ascent
from .live import Live
from .messages import Messages, Saved

ROOT_STEPS, STEPS = 300, 200  # of the ascent, at most
FIRST_STEP = 0.5  # of that distance: what the first step of a part promises
LOOK, MOVED = 40, 0.02  # give up when so many parts moved the bound by less than this share
CLOSE = 0.15  # of that distance: a choice this near the best one is as good
TORN = 0.01  # of that distance: a node whose price of memory differs less is settled
TINY = 1e-9
PENALTY = 100.0  # times that distance, on what a part forbids: a forbidden choice may save much memory, too


@dataclass(order=True)
class Subproblem:
    """The assignments that hold none of the `forbidden` choices, and a bound on them."""

    bound: float
    number: int
    forbidden: np.ndarray = field(compare=False)
    prices: np.ndarray = field(compare=False)
    reduced: np.ndarray = field(compare=False)  # of each choice, at these prices
    shares: np.ndarray = field(compare=False)  # of each choice, among the assignments last met
    messages: Saved = field(compare=False)


@dataclass
class Branching:
    """`Branching(live, offer, target, over).run(prices, tell)`; all tables of `live` are finite.

    `offer` hears of assignments that fit, `target` says from which bound on a part is done
    with, `over` when to stop, `tell` of bounds on the whole. `steps` counts those of the ascent.
    """

    live: Live
    offer: Callable[[np.ndarray], None]
    target: Callable[[], float]
    over: Callable[[], bool]

    def __post_init__(self) -> None:
        self.costs = np.concatenate(self.live.costs)
        self.messages = Messages(self.live.sizes, self.live.edges)
        self.owner = np.repeat(np.arange(len(self.live.costs)), self.live.sizes)
        self.numbers = count()
        self.steps = 0

    def run(self, prices: np.ndarray, tell: Callable[[float], None]) -> None:
        whole = np.zeros(self.costs.size, bool)
        parts = [self._bounded(whole, prices, -np.inf, ROOT_STEPS)]
        closed = np.inf  # the least bound of the parts done with
        looked, before = 0, -np.inf
        while parts and not self.over():
            tell(min(parts[0].bound, closed))
            looked += 1
            if looked % LOOK == 0:
                stalled = before > -np.inf and parts[0].bound < before + MOVED * (
                    self.target() - before
                )
                if stalled:
                    return
                before = parts[0].bound
            part = heapq.heappop(parts)
            if part.bound >= self.target():
                closed = min(closed, part.bound)
                continue
            halves = self._halves(part)
            if halves is None:
                closed = min(closed, self._only(part))
                continue
            for forbidden in halves:
                self.messages.restore(part.messages)
                heapq.heappush(parts, self._bounded(forbidden, part.prices, part.bound, STEPS))
        tell(min([closed, *(part.bound for part in parts[:1])]))

    def _bounded(
        self, forbidden: np.ndarray, prices: np.ndarray, floor: float, steps: int
    ) -> Subproblem:
        """Raise the bound of a part until it is done with or stalls."""
        away = self.target() - floor if floor > -np.inf else 0.0
        ascent = Ascent(
            self.live, self.costs + PENALTY * away * forbidden, self.messages, self.offer
        )
        if away > 0:
            ascent.start(prices, FIRST_STEP * away / abs(self.target()))
        else:
            ascent.start(prices)
        saved = self.messages.saved()
        for _ in range(steps):
            target, before = self.target(), ascent.bound
            ascent.step(target)
            self.steps += 1
            if ascent.bound > before:
                saved = self.messages.saved()
            if ascent.bound >= target or ascent.stalled or self.over():
                break
        reduced = self.costs if ascent.last is None else ascent.last.reduced
        bound = max(floor, ascent.bound)
        return Subproblem(
            bound, next(self.numbers), forbidden, ascent.prices, reduced, ascent.shares, saved
        )

    def _only(self, part: Subproblem) -> float:
        """The cost of a part of one assignment; inf when it does not fit."""
        choices = self.live.choices_of(~part.forbidden)
        if not self.live.fits(choices):
            return np.inf
        self.offer(choices)
        return self.live.cost(choices)

    def _halves(self, part: Subproblem) -> tuple[np.ndarray, np.ndarray] | None:
        """What two parts of a part forbid; None when every node has one choice left."""
        torn = self._torn(part)
        if torn is not None:
            return torn
        starts, near = self.live.starts[:-1], CLOSE * (self.target() - part.bound)
        good = ~part.forbidden & (part.reduced <= near)
        rivals = np.add.reduceat(good.astype(int), starts)
        open_ = np.add.reduceat((~part.forbidden).astype(int), starts) > 1
        if not open_.any():
            return None
        node = int(np.where(open_, rivals, -1).argmax())
        mine = np.flatnonzero((self.owner == node) & ~part.forbidden)
        best = mine[part.reduced[mine].argmin()]
        one = np.zeros_like(part.forbidden)
        one[mine] = True
        one[best] = False
        other = part.forbidden.copy()
        other[best] = True
        return part.forbidden | one, other

    def _torn(self, part: Subproblem) -> tuple[np.ndarray, np.ndarray] | None:
        """The node whose price of memory differs most among the assignments last met, cut at its mean."""
        starts, paid = self.live.starts[:-1], self.live.table.priced(part.prices)
        shares = np.where(part.forbidden, 0.0, part.shares)
        whole = np.maximum(np.add.reduceat(shares, starts), TINY)
        mean = (np.add.reduceat(shares * paid, starts) / whole)[self.owner]
        spread = np.add.reduceat(shares * np.abs(paid - mean), starts)
        node = int(spread.argmax())
        if spread[node] <= TORN * abs(self.target() - part.bound):
            return None
        mine = self.owner == node
        large = mine & (paid > mean)
        return part.forbidden | large, part.forbidden | (mine & ~large)
