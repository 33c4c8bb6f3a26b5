"""Anytime search for problems too large to solve outright: memory over time, 10^5 choices.

1. `contraction` and `live.tighten` reduce exactly.
2. `ascent` prices the moments and raises a lower bound; assignments that fit are kept.
3. `tree_moves` walk from the best assignment; `region` solves neighbourhoods of it.
4. Choices whose bound exceeds the best assignment go; contract again.
5. What is small enough is split by `branch` and goes to the `exact` solver; else back to 2.

At any moment there is a best assignment that fits, recomputed on the original problem,
and a valid lower bound.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from time import perf_counter

import numpy as np

from .ascent import PASSES, Ascent
from .branch import Branching
from .contraction import Contracted, contract
from .exact import solve
from .live import Live, finite, memory_rows, restrict, tighten
from .messages import Messages
from .onehot import Choices, OneHotProblem, Solution, Stop, relative_gap
from .region import LEAST_SECONDS, RegionSearch
from .tree_moves import TreeMoves
from .walker import Walker

Report = Callable[[float, float], None]  # objective, bound

# Shares of the time are counted as work, so that equal seeds give equal answers.
RATE = 5e8  # table entries per second, of messages and moves; measured 2e8 to 1e9 on a Xeon core
ASCENT_SHARE, BRANCH_SHARE, EXACT_SHARE = 0.12, 0.3, 0.25  # of the time limit, per round
FIRST_MOVES_SHARE, MOVES_SHARE = 0.04, 0.25
LEAST_STEPS = 100  # of the ascent
SLICE = 6.0  # seconds after which walks and neighbourhoods start from the best again
SMALL = 2000  # choices up to which the exact solver comes first; after messages to beat a cutoff without limits
PRESSES = 100  # times that all prices are raised while nothing fits
EXACT_CHOICES = 20_000  # choices from which on the exact solver is not tried
EXACT_MOMENTS, MOMENTS_MORE = 200, 10  # memory rows at first; added when an answer breaks others
EXACT_ROUNDS = 50


def solve_live(
    live: Live,
    *,
    time_limit: float = 60.0,
    gap: float = 1e-6,
    seed: int = 0,
    cutoff: float = inf,
    probe: float | None = None,
    report: Report | None = None,
) -> Solution:
    """Choose for every node so that the cost is least and no moment is over its limit.

    Args:
        time_limit: seconds of wall clock; the best assignment so far comes back then.
        gap: `optimal` means `objective - lower_bound <= gap * |objective|`.
        seed: of the moves. On machines with as many cores, equal seeds give equal answers when
            the search ends by proof, unless HiGHS was cut off by the clock on the way.
        cutoff: cost of a solution known elsewhere; the search may stop once nothing here
            beats it by more than the gap.
        probe: make one round only, with shares of so many seconds instead of the time limit.
        report: hears of every better objective and bound.

    Ctrl-C ends the search like the time limit does.
    """
    search = Anytime(
        live, gap, perf_counter() + time_limit, probe or time_limit, seed, cutoff, report
    )
    search.rounds = 1 if probe else None
    try:
        search.run()
    except KeyboardInterrupt:
        return search.answer("interrupt")
    return search.answer("proof" if search.closed else "time")


@dataclass
class _Core:
    """The problem as far as it is reduced, and how to get back."""

    live: Live
    steps: tuple[Contracted, ...]

    def lift(self, choices: np.ndarray) -> Choices:
        found: Choices | np.ndarray = choices
        for step in reversed(self.steps):
            found = step.lift(found)
        return tuple(int(x) for x in found)

    def lower(self, choices: Choices) -> np.ndarray | None:
        found: np.ndarray | None = np.asarray(choices)
        for step in self.steps:
            found = None if found is None else step.lower(tuple(found))
        return found


@dataclass
class Anytime:
    """One search; `answer` may be asked for at any moment, from another thread too."""

    live: Live
    gap: float
    deadline: float
    effort: float  # seconds that shares are taken of
    seed: int
    cutoff: float = inf
    report: Report | None = None
    choices: Choices | None = None
    objective: float = inf
    bound: float = -inf
    discarded: float = inf  # every assignment dropped so far costs at least this
    refuted: str = ""
    rounds: int | None = None  # made at most; None: until the end

    def __post_init__(self) -> None:
        cores = min(4, os.cpu_count() or 1)
        self.walkers = [Walker(self.seed * 64 + k) for k in range(max(1, cores - 1))]
        self.region = RegionSearch(np.random.default_rng(self.seed))

    # ------------------------------------------------------------ state

    @property
    def left(self) -> float:
        return self.deadline - perf_counter()

    @property
    def closed(self) -> bool:
        return bool(self.refuted) or relative_gap(self.ceiling, self.bound) <= self.gap

    @property
    def over(self) -> bool:
        return self.closed or self.left <= 0

    @property
    def ceiling(self) -> float:
        """What a better assignment must stay below."""
        return min(self.objective, self.cutoff)

    @property
    def target(self) -> float:
        """Assignments from this cost on may go unseen: half the gap is spent here."""
        return self.ceiling - 0.5 * self.gap * abs(self.ceiling) if self.ceiling < inf else inf

    def offer(self, choices: Choices) -> None:
        """Take an assignment of the original problem when it fits and is better."""
        value = self.live.cost(choices)
        if value < self.objective and self.live.fits(choices):
            self.choices, self.objective = choices, value
            self._tell()

    def raise_bound(self, bound: float) -> None:
        """Take a bound of what is left; what was dropped has its own."""
        bound = min(bound, self.ceiling, self.discarded)
        if bound > self.bound:
            self.bound = bound
            self._tell()

    def _tell(self) -> None:
        if self.report:
            self.report(self.objective, self.bound)

    def stop(self) -> None:
        """End soon: whatever looks at its clock finds it run out."""
        self.deadline = 0.0
        for walker in self.walkers:
            walker.stopped = True

    def answer(self, stopped_by: Stop) -> Solution:
        choices = self.choices
        if self.refuted:
            return Solution("infeasible", "proof", None, None, inf, self.refuted)
        if choices is None:
            beaten = self.cutoff < inf and self.closed
            reason = "nothing here beats the cutoff" if beaten else "no assignment found yet"
            return Solution("feasible", stopped_by, None, None, self.bound, reason)
        objective, bound = self.live.cost(choices), self.bound
        status = "optimal" if relative_gap(objective, bound) <= self.gap else "feasible"
        return Solution(status, stopped_by, choices, objective, bound)

    # ------------------------------------------------------------ search

    def run(self) -> None:
        self.refuted = _least_refutes(self.live)
        if self.refuted:
            return
        core = self._reduce(_Core(self.live, ()))
        if core is None:
            self.refuted = "no assignment meets all forbidden choices and pairs"
            return
        prices, tried = np.zeros(self.live.limits.size), inf
        if core.live.sizes.sum() <= SMALL:
            if (
                not core.live.limits.size and self.cutoff < inf
            ):  # messages alone come near, sooner than reductions
                self._price(core, prices)
            if not self.over:
                self._solve_core(core, prices)
        while not self.over and self.rounds != 0:
            self.rounds = None if self.rounds is None else self.rounds - 1
            prices, bounds = self._price(core, prices)
            self._improve(core, prices, bounds, first=tried == inf)
            smaller = None if self.over else self._prune(core, bounds)
            if smaller is None:
                return
            core = smaller
            count = int(core.live.sizes.sum())
            if count < 0.9 * tried:
                tried = count
                if count <= EXACT_CHOICES:
                    self._branch(core, prices)
                if count <= EXACT_CHOICES and not self.over:
                    self._solve_core(core, prices)

    def _reduce(self, core: _Core) -> _Core | None:
        """Contract and tighten; None when nothing is left."""
        step = contract(core.live)
        return None if step is None else _Core(tighten(step.live), (*core.steps, step))

    def _price(self, core: _Core, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raise the bound for a share of the time; the best prices and the choices' bounds."""
        live = finite(core.live, self.ceiling)
        costs = np.concatenate(live.costs)
        ascent = Ascent(
            live, costs, Messages(live.sizes, live.edges), lambda x: self.offer(core.lift(x))
        )
        ascent.start(prices[core.live.moments])
        steps = LEAST_STEPS + int(self._work(ASCENT_SHARE) / (PASSES * live.entries))
        for _ in range(steps):
            if self.over or ascent.settled or ascent.stalled:
                break
            ascent.step(self.ceiling if self.ceiling < inf else 2 * abs(ascent.reached))
            self.raise_bound(ascent.bound)
        best = ascent.prices
        for _ in range(PRESSES):  # ask more until an assignment fits
            if self.choices is not None or self.over:
                break
            ascent.press()
            ascent.step(2 * abs(ascent.reached))
            self.raise_bound(ascent.bound)
        found = np.zeros(prices.size)
        found[core.live.moments] = best
        return found, ascent.choice_bounds()

    def _work(self, share: float) -> float:
        """Table entries that fit into a share of the effort."""
        return share * self.effort * RATE

    def _improve(self, core: _Core, prices: np.ndarray, bounds: np.ndarray, first: bool) -> None:
        """From the best assignment: walks on all cores but one, neighbourhoods by MIP on that.

        The first time walks alone: how many programs HiGHS ends in a given time is never the same.
        """
        live = finite(core.live, self.objective)
        costs = np.concatenate(live.costs)
        moves = TreeMoves(live, Messages(live.sizes, live.edges).flat, costs)
        asked = prices[core.live.moments]
        share = FIRST_MOVES_SHARE if first else MOVES_SHARE
        seconds = share * self.effort
        slices = max(1, round(seconds / SLICE))
        with ThreadPoolExecutor(len(self.walkers)) as pool:
            for _ in range(slices):
                if self.over or not self.choices:
                    return
                start = core.lower(self.choices)
                assert start is not None  # pruning keeps it
                work = self._work(share / slices)
                walks = [
                    pool.submit(w.run, moves, start, asked, work, self.deadline)
                    for w in self.walkers
                ]
                try:
                    pause = 0.0 if first else seconds / slices
                    near = self._near(core.live, bounds, start, pause, walks)
                    for found in (near, *(walk.result() for walk in walks)):
                        self.offer(core.lift(found))
                except KeyboardInterrupt:
                    for walker in self.walkers:
                        walker.stopped = True
                    raise

    def _near(
        self,
        live: Live,
        bounds: np.ndarray,
        start: np.ndarray,
        seconds: float,
        walks: list[Future[np.ndarray]],
    ) -> np.ndarray:
        """Better and better by one neighbourhood after another, while the walks last."""
        until = perf_counter() + min(seconds, self.left)
        best = start
        while perf_counter() < until - LEAST_SECONDS and not all(walk.done() for walk in walks):
            found = self.region.solve(live, bounds, best, until - perf_counter())
            best = best if found is None else found
        return best

    def _prune(self, core: _Core, bounds: np.ndarray) -> _Core | None:
        """Drop choices that nothing below the target holds; None when nothing is left."""
        if self.ceiling == inf:
            return core
        keep = bounds < self.target
        known = core.lower(self.choices) if self.choices else None
        if known is not None:
            keep[core.live.starts[:-1] + known] = True
        masks = np.split(keep, core.live.starts[1:-1])
        if keep.all():
            return core
        self.discarded = min(self.discarded, self.target)
        smaller = None
        if all(mask.any() for mask in masks):
            smaller = self._reduce(_Core(restrict(core.live, masks), (*core.steps, _kept(masks))))
        if smaller is None:
            self.raise_bound(self.target)
        return smaller

    def _branch(self, core: _Core, prices: np.ndarray) -> None:
        """Split the core where memory tears it, for a share of the time."""
        live = finite(core.live, self.ceiling)
        most = LEAST_STEPS + self._work(BRANCH_SHARE) / (PASSES * live.entries)
        branching = Branching(
            live,
            lambda choices: self.offer(core.lift(choices)),
            lambda: self.target,
            lambda: self.over or branching.steps > most,
        )
        branching.run(prices[core.live.moments], self.raise_bound)

    def _solve_core(self, core: _Core, prices: np.ndarray) -> None:
        """The exact solver on the moments that matter, more of them as its answers break them."""
        live = core.live
        until = perf_counter() + EXACT_SHARE * self.effort
        active = prices[live.moments] > 0
        active[np.argsort(live.limits - live.table.extremes()[1])[:EXACT_MOMENTS]] = True
        known = core.lower(self.choices) if self.choices else None
        for _ in range(EXACT_ROUNDS):
            problem = OneHotProblem(live.costs, live.edges, memory_rows(live, active))
            found = solve(
                problem,
                time_limit=max(0.1, min(until - perf_counter(), self.left)),
                gap=0.5 * self.gap,
                incumbent=None if known is None else tuple(int(x) for x in known),
                cutoff=self.ceiling,
            )
            if found.stopped_by == "interrupt":
                raise KeyboardInterrupt
            self.raise_bound(found.lower_bound)
            if found.status == "infeasible" and self.discarded == inf:
                self.refuted = (
                    "no assignment meets all limits, forbidden choices and pairs together"
                )
            if found.choices is None or perf_counter() > until or self.over:
                return
            over = live.used(found.choices) - live.limits
            if not (over > 0).any():
                self.offer(core.lift(np.array(found.choices)))
                return
            active[np.argsort(-over)[:MOMENTS_MORE]] = True


def _kept(masks: list[np.ndarray]) -> Contracted:
    """The step back over dropped choices."""
    origins = tuple({k: np.flatnonzero(mask)} for k, mask in enumerate(masks))
    return Contracted(Live((), (), (), np.zeros(0)), origins)


def _least_refutes(live: Live) -> str:
    """Why nothing fits, when a moment overflows even if every node takes its least there."""
    least = live.table.extremes()[0]
    over = least - live.limits
    if not over.size or over.max() <= 0:
        return ""
    t = int(over.argmax())
    return (
        f"moment {live.labels[t] if live.labels else t} needs at least {least[t]:.6g} bytes, {over[t]:.6g} more"
        f" than its limit of {live.limits[t]:.6g}"
    )
