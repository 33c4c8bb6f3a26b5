"""Prices of memory at thousands of moments, by averaged subgradients of the message bound.

At fixed prices message passing gives a bound and an assignment; the bytes by which
the assignments of a few passes miss the limits say where to ask more and where less.

Source: Held, Wolfe & Crowder, "Validation of subgradient optimization",
Math. Programming 6, 1974 (step towards a target cost).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .flat import cost_of
from .live import Live
from .messages import Messages, Sweep
from .onehot import ROUNDING

PASSES = 2  # of messages at one set of prices; the second makes the bounds of choices
FIRST_STEP, LEAST_STEP = 0.02, 1e-7  # share of the target cost that one step may promise
RISEN, NOT_RISEN = 1.1, 0.93  # how the step changes with success
MEMORY = 0.5  # weight of older misses in the average
STALL, PROGRESS = (
    60,
    0.01,
)  # so many steps are a stall that win less than this share of the distance
PRESSED = 1.2  # how much more is asked while no assignment fits
RECENT = 0.02  # weight of one pass in the shares of choices
BACK = 0.1  # how far the prices are pulled back to the best ones


@dataclass
class Ascent:
    """The best bound so far with its prices; `offer` hears of each cheaper assignment that fits."""

    live: Live
    costs: np.ndarray
    messages: Messages
    offer: Callable[[np.ndarray], None]

    def __post_init__(self) -> None:
        self.prices = np.zeros(self.live.limits.size)
        self.bound = -np.inf
        self.cheapest = np.inf
        self.last: Sweep | None = None  # the pass that gave the bound
        self.shares = np.zeros(self.costs.size)  # of each choice, among the latest assignments met
        self.waited = 0  # steps since the bound came nearer to its target by much
        self._marked = -np.inf
        self._asked = self.prices
        self._missed: np.ndarray | None = None
        self._step = FIRST_STEP

    @property
    def settled(self) -> bool:
        return self._step < LEAST_STEP

    @property
    def stalled(self) -> bool:
        return self.waited > STALL

    def start(self, prices: np.ndarray, step: float = FIRST_STEP) -> None:
        """Begin at prices known from before, with a step that promises this share of the target."""
        self._asked, self._step = prices, step

    def choice_bounds(self) -> np.ndarray:
        """For every choice, counted through all nodes, a bound on the assignments that hold it."""
        if self.last is None:
            return np.full(self.costs.size, -np.inf)
        return self.last.floor - _refund(self.prices, self.live) + self.last.reduced

    @property
    def reached(self) -> float:
        """A cost near the bound, whatever the prices."""
        if self.last is None:
            return self.messages.sweep(self.costs + self.live.table.priced(self._asked)).bound
        return max(self.bound, self.last.bound)

    def press(self) -> None:
        """Ask more everywhere, so that assignments come nearer to fitting."""
        self._asked = self._asked * PRESSED
        self._step = max(self._step, FIRST_STEP)

    def step(self, target: float) -> None:
        """Ask the messages at the present prices, then move these towards `target`."""
        asked, limits = self._asked, self.live.limits
        costs = self.costs + self.live.table.priced(asked)
        misses = np.zeros(limits.size)
        found = self.messages.sweep(costs)
        for turn in range(PASSES):
            found = self.messages.sweep(costs) if turn else found
            self.shares *= 1 - RECENT
            self.shares[self.live.starts[:-1] + found.choices] += RECENT
            used = self.live.table.used(found.choices)
            if (used <= limits).all():
                cost = cost_of(self.messages.flat, self.costs, found.choices)
                if cost < self.cheapest:
                    self.cheapest = cost
                    self.offer(found.choices)
            misses += (used - limits) / PASSES
        bound = found.bound - _refund(asked, self.live)
        self._step *= RISEN if bound > self.bound else NOT_RISEN
        if bound > self.bound:
            self.bound, self.prices, self.last = bound, asked, found
        self.waited += 1
        if self.bound > self._marked + PROGRESS * (target - self.bound):
            self._marked, self.waited = self.bound, 0
        before = misses if self._missed is None else self._missed
        self._missed = MEMORY * before + (1 - MEMORY) * misses
        slope = np.where((asked > 0) | (self._missed > 0), self._missed, 0.0)
        steep = float(slope @ slope)
        length = self._step * abs(target) / steep if steep > 0 else 0.0
        centre = (1 - BACK) * asked + BACK * self.prices
        self._asked = np.maximum(0.0, centre + length * slope)


def _refund(prices: np.ndarray, live: Live) -> float:
    """What assignments that fit pay for memory at most, and what rounding may have added to the bound."""
    paid = float(prices @ live.limits)
    return paid + ROUNDING * abs(paid)
