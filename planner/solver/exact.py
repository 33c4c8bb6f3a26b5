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
from typing import Literal

import numpy as np

from .descent import Neighbourhood
from .elimination import eliminate, elimination_order, min_marginals
from .messages import Messages
from .mip import solve_mip
from .multipliers import Prices
from .onehot import (
    Choices,
    Edge,
    MemoryRow,
    OneHotProblem,
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
    "OneHotProblem",
    "Solution",
    "evaluate",
    "fits",
    "relative_gap",
    "row_usage",
    "solve",
]

MAX_ENTRIES = 1_000_000_000  # table entries of one elimination: a few seconds
MAX_ENTRIES_EARLY = 300_000_000  # the same while pruning still helps
MAX_TABLE = 20_000_000  # entries of its largest table: 160 MB
ENTRIES_PER_SECOND = 5e7  # all min-marginals; measured 1.4e8 on a Xeon core, 1/3 of that when busy
KERNEL_ENTRIES = 1_000_000
KERNEL_COUNTS = (64, 40, 24, 16, 12, 8, 6, 4)
MAX_PRICE_STEPS = 60
SLOW = 1e-3  # relative rise of the bound per pass below which messages stop


def solve(
    problem: OneHotProblem,
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
        seed: kept for the caller's record; the search draws no random numbers, so the
            same problem and enough time give the same answer.
        incumbent: an assignment to start from; ignored when it does not fit.
        cutoff: seconds of a solution known elsewhere; the search may stop once
            nothing here beats it by more than the gap.
    """
    search = SearchState(problem, gap, perf_counter() + time_limit, cutoff)
    try:
        if incumbent is not None:
            search.offer(incumbent)
        _run(search)
    except KeyboardInterrupt:
        return search.answer("interrupt")
    return search.answer("proof" if search.closed else "time")


@dataclass
class SearchState:
    """The best assignment and the bound so far; the only state that changes."""

    problem: OneHotProblem
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

    def answer(self, stopped_by: Literal["proof", "time", "interrupt"]) -> Solution:
        if self.refuted:
            return Solution("infeasible", "proof", None, None, inf, self.refuted)
        if self.choices is None:
            beaten = self.cutoff < inf and self.closed
            reason = "nothing here beats the cutoff" if beaten else "no assignment found yet"
            return Solution("feasible", stopped_by, None, None, self.bound, reason)
        objective = evaluate(self.problem, self.choices)
        proven = relative_gap(objective, self.bound) <= self.gap
        status = "optimal" if proven else "feasible"
        return Solution(status, stopped_by, self.choices, objective, min(self.bound, objective))


@dataclass(frozen=True, slots=True)
class _View:
    """A finite model at some prices of its rows, with what each choice leads to.

    `nodes[i][p]` and `pairs[edge][p, q]` are lower bounds on every fitting
    assignment that holds them; `bound` on all of them.
    """

    model: Reduced
    bound: float
    nodes: tuple[np.ndarray, ...]
    pairs: tuple[np.ndarray, ...]
    exact: bool


def _run(search: SearchState) -> None:
    """Reduce; then in turns bound, price the rows and prune; close when little changes."""
    search.refuted = _oversized_row(search.problem)
    if search.refuted:
        return None
    if not search.problem.costs:  # nothing to decide
        search.offer(())
        return search.raise_bound(search.objective)
    model = drop_impossible(reduced_from(search.problem))
    if not all(model.sizes):
        return _exhaust(search, "some node has no choice that its neighbours and the rows allow")
    model = drop_dominated(drop_slack_rows(model))
    prices = np.zeros(len(search.problem.rows))
    view = _look_by_messages(search, _finite(search, model), prices)
    entries = MAX_ENTRIES_EARLY
    while not search.over:
        gap, size = relative_gap(search.objective, search.bound), sum(model.sizes)
        prices = _price_on_kernel(search, view, prices)
        pruned = _prune(search, model, view)
        if pruned is None:
            return _exhaust(search, "no assignment meets all rows and forbidden pairs together")
        model, finite = pruned, _finite(search, pruned)
        exact = _look_exactly(search, finite, prices, entries)
        if search.over:
            return None
        view = exact or _look_by_messages(search, finite, prices)
        better = relative_gap(search.objective, search.bound) < 0.7 * gap
        if not (better or sum(model.sizes) < 0.8 * size):
            if view.exact or entries == MAX_ENTRIES:
                return _close_by_mip(search, model, view)
            entries = MAX_ENTRIES
    return None


def _exhaust(search: SearchState, reason: str) -> None:
    """Nothing is left below the target: with no target at all, nothing exists."""
    if search.ceiling < inf:
        search.raise_bound(search.target)
    else:
        search.refuted = reason


def _oversized_row(problem: OneHotProblem) -> str:
    """The first row that overflows even when every node takes its least there."""
    for row in problem.rows:
        least = float(sum(usage.min() for usage in row.usage.values()))
        if least > row.limit:
            return (
                f"row {row.name!r} needs at least {least:.6g} bytes, {least - row.limit:.6g} more"
                f" than its limit of {row.limit:.6g}"
            )
    return ""


def _finite(search: SearchState, model: Reduced) -> Reduced:
    return clip(model, search.ceiling if search.ceiling < inf else None)


def _offer(search: SearchState, local: Neighbourhood, choices: Choices) -> None:
    """Repair and improve an assignment, and take it when it is the best."""
    fitting = local.descend(choices)
    if fitting is not None:
        search.offer(local.model.lift(fitting))


def _priced_costs(model: Reduced, prices: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(c + prices @ u for c, u in zip(model.costs, model.usage, strict=True))


def _look_by_messages(search: SearchState, model: Reduced, prices: np.ndarray) -> _View:
    """Passes of messages until the bound stands still; the assignments met are repaired."""
    asked = prices[model.rows]
    costs, refund = _priced_costs(model, asked), float(asked @ model.limits)
    messages, local = Messages(model.sizes, model.edges), Neighbourhood(model)
    flat = np.concatenate(costs)
    _offer(search, local, _listed(messages.sweep(flat).choices))
    last, still = messages.sweep(flat), 0
    while still < 3 and not search.over:
        before, last = last.bound, messages.sweep(flat)
        search.raise_bound(last.bound - refund)
        still = still + 1 if last.bound - before <= SLOW * abs(before) else 0
    _offer(search, local, _listed(last.choices))
    floor, bound = last.floor - refund, last.bound - refund
    pairs = tuple(bound + messages.pair_costs(k, edge) for k, edge in enumerate(model.edges))
    nodes = np.split(floor + last.reduced, np.cumsum(model.sizes)[:-1])
    return _View(model, bound, tuple(nodes), pairs, exact=False)


def _listed(choices: np.ndarray) -> Choices:
    return tuple(int(x) for x in choices)


def _look_exactly(
    search: SearchState, model: Reduced, prices: np.ndarray, entries: int
) -> _View | None:
    """All min-marginals at these prices by elimination, when its tables are small enough."""
    order = elimination_order(model.sizes, model.edges)
    affordable = min(entries, ENTRIES_PER_SECOND * search.left)
    if order.entries > affordable or order.largest > MAX_TABLE:
        return None
    asked = prices[model.rows]
    costs, refund = _priced_costs(model, asked), float(asked @ model.limits)
    value, choices = eliminate(costs, model.edges, order)
    search.raise_bound(value - refund)
    _offer(search, Neighbourhood(model), choices)
    if search.over:
        return None
    found = min_marginals(costs, model.edges, order)
    nodes = tuple(node - refund for node in found.nodes)
    pairs = tuple(pair - refund for pair in found.pairs)
    return _View(model, value - refund, nodes, pairs, exact=True)


def _price_on_kernel(search: SearchState, view: _View, prices: np.ndarray) -> np.ndarray:
    """Prices that are best for the few most promising choices of each node."""
    kernel = _kernel(search, view)
    order = elimination_order(kernel.sizes, kernel.edges)
    if order.entries > 4 * KERNEL_ENTRIES:
        return prices
    local = Neighbourhood(kernel)
    asked, whole = prices[kernel.rows], sum(kernel.sizes) == sum(view.model.sizes)
    bundle = Prices(asked, -inf)
    for _ in range(MAX_PRICE_STEPS):
        value, choices = eliminate(_priced_costs(kernel, asked), kernel.edges, order)
        bound = value - float(asked @ kernel.limits)
        if whole:
            search.raise_bound(bound)
        if bundle.observe(asked, bound):
            _offer(search, local, choices)
        if not kernel.limits.size or search.over:
            break
        bundle.add_cut(local.cost(choices), local.usage_of(choices) - kernel.limits)
        proposed = bundle.propose(search.objective, 0.1 * search.gap * abs(bundle.bound))
        if proposed is None:
            break
        asked = proposed
    found = prices.copy()
    found[kernel.rows] = bundle.centre
    return found


def _kernel(search: SearchState, view: _View) -> Reduced:
    """The best choices of each node, as many as elimination can take in milliseconds."""
    known = view.model.lower(search.choices) if search.choices else None
    kernels = (_best_choices(view, count, known) for count in KERNEL_COUNTS)
    for kernel in kernels:
        if elimination_order(kernel.sizes, kernel.edges).entries <= KERNEL_ENTRIES:
            return kernel
    return _best_choices(view, KERNEL_COUNTS[-1], known)


def _best_choices(view: _View, count: int, known: Choices | None) -> Reduced:
    """The `count` choices of each node with the lowest bounds, and those of a known assignment."""
    masks: list[np.ndarray] = []
    for node, bounds in enumerate(view.nodes):
        rank = min(count, bounds.size) - 1
        mask = bounds <= np.partition(bounds, rank)[rank]
        if known is not None:
            mask[known[node]] = True
        masks.append(mask)
    return keep(view.model, masks)


def _prune(search: SearchState, model: Reduced, view: _View) -> Reduced | None:
    """Drop choices and pairs that nothing below the target holds; None when nothing is left."""
    search.discarded = min(search.discarded, search.target)
    masks = [nodes < search.target for nodes in view.nodes]
    if not all(mask.any() for mask in masks):
        return None
    edges = tuple(
        Edge(e.a, e.b, np.where(pairs < search.target, e.costs, inf))
        for e, pairs in zip(model.edges, view.pairs, strict=True)
    )
    smaller = drop_impossible(keep(replace(model, edges=edges), masks))
    if not all(smaller.sizes):
        return None
    much = sum(smaller.sizes) < 0.8 * sum(model.sizes)
    return drop_dominated(drop_slack_rows(smaller)) if much else drop_slack_rows(smaller)


def _close_by_mip(search: SearchState, model: Reduced, view: _View) -> None:
    """HiGHS on the choices and pairs that may still be part of something better."""
    search.discarded = min(search.discarded, search.target)
    allowed = [
        np.isfinite(edge.costs) & (pairs < search.target)
        for edge, pairs in zip(model.edges, view.pairs, strict=True)
    ]
    found = solve_mip(
        view.model,
        allowed,
        scale=search.objective if search.objective < inf else search.bound,
        gap=0.5 * search.gap,
        seconds=search.left,
    )
    if found.choices is not None:
        search.offer(view.model.lift(found.choices))
        _offer(search, Neighbourhood(view.model), found.choices)
    search.raise_bound(found.bound)
    if found.infeasible:
        _exhaust(search, "no assignment meets all rows and forbidden pairs together")
