"""Exact, anytime solver of the one-hot pairwise problem with memory rows.

1. `reductions`: drop choices that are impossible or dominated.
2. `messages`: a lower bound of the problem without rows, and assignments to repair.
3. `multipliers`: prices on the rows raise that bound; `descent` repairs every assignment met.
4. Choices and pairs whose bound exceeds the best assignment go; back to 2 while that helps.
5. `elimination` (no rows) or `mip` (rows) closes what is left.

At any moment there is a best assignment that fits and a valid lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from time import perf_counter

import numpy as np

from .descent import Neighbourhood
from .elimination import eliminate, elimination_order
from .messages import Messages, Pass
from .mip import solve_mip
from .multipliers import Prices
from .onehot import (
    Choices,
    Edge,
    MemoryRow,
    Problem,
    Solution,
    evaluate,
    fits,
    relative_gap,
    row_usage,
)
from .reductions import (
    Reduced,
    clip,
    drop_dominated,
    drop_impossible,
    drop_slack_rows,
    keep,
    reduced_from,
)

__all__ = [
    "Edge",
    "MemoryRow",
    "Problem",
    "Solution",
    "evaluate",
    "fits",
    "relative_gap",
    "relax",
    "row_usage",
    "solve",
]

MAX_ENTRIES = 400_000_000  # table entries of one elimination: about a second
MAX_TABLE = 20_000_000  # entries of its largest table: 160 MB
MAX_PAIRS = 400_000  # pair variables above which HiGHS does not get through its root


def solve(
    problem: Problem,
    *,
    time_limit: float = 10.0,
    gap: float = 1e-4,
    seed: int = 0,
    incumbent: Choices | None = None,
    cutoff: float = inf,
) -> Solution:
    """Choose for every node so that the seconds are least and every memory row holds.

    Args:
        time_limit: seconds of wall clock; the best assignment so far comes back then.
        gap: `optimal` means `objective - lower_bound <= gap * |objective|`.
        seed: same problem, seed and enough time: same answer.
        incumbent: an assignment to start from; ignored when it does not fit.
        cutoff: seconds of a solution known elsewhere; the search may stop once
            nothing here beats it by more than the gap.
    """
    search = Search(problem, gap, perf_counter() + time_limit, cutoff)
    try:
        if incumbent is not None:
            search.offer(incumbent)
        _run(search)
    except KeyboardInterrupt:
        return search.answer("interrupt")
    return search.answer("proof" if search.closed else "time")


def relax(problem: Problem, *, time_limit: float = 10.0, gap: float = 1e-4) -> Solution:
    """`solve` without the memory rows: a quick lower bound."""
    return solve(replace(problem, rows=()), time_limit=time_limit, gap=gap)


@dataclass
class Search:
    """The best assignment and the bound so far; the only state that changes."""

    problem: Problem
    gap: float
    deadline: float
    cutoff: float = inf
    choices: Choices | None = None
    objective: float = inf
    bound: float = -inf
    discarded: float = inf  # everything dropped so far costs at least this
    refuted: str = field(default="")  # why no assignment exists, once proven

    def offer(self, choices: Sequence[int]) -> None:
        """Take an assignment, recomputed on the original problem, when it fits and is better."""
        value = evaluate(self.problem, choices)
        if value < self.objective and fits(self.problem, choices):
            self.choices, self.objective = tuple(choices), value

    def raise_bound(self, bound: float) -> None:
        """Take a bound of what is left; what was dropped has its own."""
        self.bound = max(self.bound, min(bound, self.ceiling, self.discarded))

    @property
    def ceiling(self) -> float:
        """What a better assignment must stay below."""
        return min(self.objective, self.cutoff)

    @property
    def target(self) -> float:
        """Assignments from this cost on may go unseen: half the gap is spent here."""
        return self.ceiling - 0.5 * self.gap * abs(self.ceiling) if self.ceiling < inf else inf

    @property
    def closed(self) -> bool:
        met = self.ceiling < inf and relative_gap(self.ceiling, self.bound) <= self.gap
        return bool(self.refuted) or met

    @property
    def left(self) -> float:
        return self.deadline - perf_counter()

    @property
    def over(self) -> bool:
        return self.closed or self.left <= 0

    def answer(self, stopped_by) -> Solution:
        if self.refuted:
            return Solution("infeasible", "proof", None, None, inf, self.refuted)
        if self.choices is None:
            beaten = self.cutoff < inf and self.closed
            reason = "nothing here beats the cutoff" if beaten else "no assignment found yet"
            return Solution("feasible", stopped_by, None, None, self.bound, reason)
        proven = relative_gap(self.objective, self.bound) <= self.gap
        return Solution(
            "optimal" if proven else "feasible",
            stopped_by,
            self.choices,
            self.objective,
            min(self.bound, self.objective),
        )


@dataclass(frozen=True, slots=True)
class _Dual:
    """Prices of the rows, and the last pass of messages at these prices."""

    model: Reduced  # all tables finite
    messages: Messages
    prices: np.ndarray
    last: Pass

    @property
    def refund(self) -> float:
        """Seconds that the limits give back: prices . limits."""
        return float(self.prices @ self.model.limits)


def _run(search: Search) -> None:
    """Reduce, bound, prune, and close."""
    search.refuted = _oversized_row(search.problem)
    if search.refuted:
        return None
    model = drop_impossible(reduced_from(search.problem))
    if not all(model.sizes):
        return _exhaust(search, "some node has no choice that its neighbours and the rows allow")
    model = drop_dominated(drop_slack_rows(model))
    while True:
        dual = _bound(search, model)
        if search.over:
            return None
        smaller = _prune(search, model, dual)
        if smaller is None:
            return _exhaust(search, "no assignment meets all rows and forbidden pairs together")
        if sum(smaller.sizes) > 0.8 * sum(model.sizes):
            return _close(search, model, dual)
        model = smaller


def _exhaust(search: Search, reason: str) -> None:
    """Nothing is left below the target: with no target at all, nothing exists."""
    if search.ceiling < inf:
        search.raise_bound(search.target)
    else:
        search.refuted = reason


def _oversized_row(problem: Problem) -> str:
    """The first row that overflows even when every node takes its least there."""
    for row in problem.rows:
        least = sum(float(np.min(usage)) for usage in row.usage.values())
        if least > row.limit:
            return (
                f"row {row.name!r} needs at least {least:.6g} bytes, {least - row.limit:.6g} more"
                f" than its limit of {row.limit:.6g}"
            )
    return ""


def _bound(search: Search, model: Reduced) -> _Dual:
    """Raise the lower bound by messages, then by prices on the rows."""
    model = clip(model, search.ceiling if search.ceiling < inf else None)
    dual = _relaxed(search, model)
    used = Neighbourhood(model).usage_of(dual.last.choices)
    if search.over or not (used > model.limits).any():
        return dual
    return _priced(search, model, dual)


def _relaxed(search: Search, model: Reduced) -> _Dual:
    """Passes without prices until the bound stands still."""
    messages, local = Messages(model.costs, model.edges), Neighbourhood(model)
    bound, still = -inf, 0
    while True:
        last = messages.sweep(model.costs)
        search.raise_bound(last.bound)
        _offer(search, model, local, last.choices)
        still = still + 1 if last.bound <= bound + 0.1 * search.gap * abs(last.bound) else 0
        bound = last.bound
        if search.over or still >= 3:
            return _Dual(model, messages, np.zeros(model.limits.size), last)


def _offer(search: Search, model: Reduced, local: Neighbourhood, choices: Choices) -> None:
    fitting = local.descend(choices)
    if fitting is not None:
        search.offer(model.lift(fitting))


def _priced(search: Search, model: Reduced, dual: _Dual) -> _Dual:
    """Cutting planes on the prices, two passes of messages for each, while the bound grows."""
    messages, local = dual.messages, Neighbourhood(model)
    prices = Prices(model.limits.size, _highest_price(model))
    prices.observe(dual.prices, dual.last.bound)
    asked, last = dual.prices, dual.last
    for _ in range(100):
        _cut(search, model, local, prices, last.choices)
        asked, ceiling = prices.propose()
        if search.over or ceiling - prices.best_bound <= 0.1 * search.gap * abs(ceiling):
            break
        last, bound = _passes(model, messages, asked, 2)
        prices.observe(asked, bound)
        search.raise_bound(bound)
    last, bound = _passes(model, messages, prices.best, 6)
    search.raise_bound(bound)
    return _Dual(model, messages, prices.best, last)


def _cut(
    search: Search, model: Reduced, local: Neighbourhood, prices: Prices, choices: Choices
) -> None:
    """Add the cuts of an assignment and of its repaired neighbour."""
    fitting = local.descend(choices)
    for found in (choices, fitting):
        if found is not None:
            cost = sum(float(c[x]) for c, x in zip(model.costs, found, strict=True))
            cost += sum(float(e.costs[found[e.a], found[e.b]]) for e in model.edges)
            prices.add_cut(cost, local.usage_of(found) - model.limits)
    if fitting is not None:
        search.offer(model.lift(fitting))


def _passes(
    model: Reduced, messages: Messages, prices: np.ndarray, count: int
) -> tuple[Pass, float]:
    """Some passes at given prices, and the Lagrangian bound after them."""
    costs = _price(model, prices)
    last = [messages.sweep(costs) for _ in range(count)][-1]
    return last, last.bound - float(prices @ model.limits)


def _price(model: Reduced, prices: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(c + prices @ usage for c, usage in zip(model.costs, model.usage, strict=True))


def _highest_price(model: Reduced) -> float:
    """Seconds per whole row beyond which asking more cannot matter in practice."""
    tables = [*model.costs, *(edge.costs for edge in model.edges)]
    return sum(float(np.ptp(table)) for table in tables)


def _prune(search: Search, model: Reduced, dual: _Dual) -> Reduced | None:
    """Drop choices that no assignment below the target holds; None when that is all of a node's."""
    floor = dual.last.floor - dual.refund
    search.discarded = min(search.discarded, search.target)
    masks = [floor + reduced < search.target for reduced in dual.last.reduced]
    if not all(mask.any() for mask in masks):
        return None
    model = drop_impossible(keep(model, masks))
    return drop_dominated(drop_slack_rows(model)) if all(model.sizes) else None


def _close(search: Search, model: Reduced, dual: _Dual) -> None:
    """Solve what is left exactly, as far as time allows."""
    order = elimination_order(model.sizes, model.edges)
    small = order.entries <= MAX_ENTRIES and order.largest <= MAX_TABLE
    if not model.limits.size and small:
        value, choices = eliminate(model.costs, model.edges, order)
        if value == inf:
            return _exhaust(search, "every assignment takes a forbidden pair")
        search.offer(model.lift(choices))
        return search.raise_bound(value)
    return _close_by_mip(search, model, dual)


def _close_by_mip(search: Search, model: Reduced, dual: _Dual) -> None:
    """HiGHS on the choices and pairs that may still be part of something better."""
    bound = dual.last.bound - dual.refund
    search.discarded = min(search.discarded, search.target)
    allowed = [
        np.isfinite(edge.costs) & (bound + dual.messages.pair_costs(index, finite) < search.target)
        for index, (edge, finite) in enumerate(zip(model.edges, dual.model.edges, strict=True))
    ]
    found = solve_mip(
        dual.model,
        allowed,
        offset=search.objective if search.objective < inf else search.bound,
        gap=0.5 * search.gap,
        seconds=search.left,
    )
    if found.choices is not None:
        _offer(search, model, Neighbourhood(model), found.choices)
    search.raise_bound(found.bound)
    if found.infeasible:
        _exhaust(search, "no assignment meets all rows and forbidden pairs together")
