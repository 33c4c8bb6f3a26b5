"""The best plan of one space with communication beside computation: a few solves at prices that bound the step.

At first computation is taken to last longer in every window; where it does, the answer's step is its bound. Else
multipliers move to where the answers so far cost most. Every solve's bound holds for the step, so the best does;
plans are compared by what their step takes. What the pairwise solver does stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np

from ..solver.onehot import Solution, relative_gap
from .space import Space
from .windows import MANY, Timed, next_multipliers

SOLVES = 4  # of one space, at most
SAME = 1e-3  # multipliers that differ by less bound alike


def solve_overlapped(
    space: Space,
    solve: Callable[[Space], Solution],
    gap: float,
    cutoff: float = inf,
    start: np.ndarray | None = None,
) -> tuple[Solution, np.ndarray]:
    """The best of several answers, with what its step takes and a bound for any; the multipliers that bound best.

    Args:
        solve: of a space at given prices, where no step is faster than their sum.
        gap: good enough.
        cutoff: seconds from which on a bound rules all of the space out.
        start: multipliers to begin with, as another solve of this space ended; where computation lasts longer if None.
    """
    multipliers = np.zeros(MANY) if start is None else start
    if space.windows is None:
        return _with_host(solve(space), space.host_seconds), multipliers
    met: list[Timed] = []
    best: Solution | None = None
    bound, kept = -inf, multipliers
    for _ in range(SOLVES):
        found = solve(space.bounding(multipliers))
        if found.lower_bound > bound:
            bound, kept = found.lower_bound, multipliers
        if found.choices is None:
            best = best or found
            break
        timed = space.timed(found.choices)
        assert timed is not None
        met.append(timed)
        if best is None or best.objective is None or timed.seconds < best.objective:
            best = replace(found, objective=timed.seconds)
        assert best.objective is not None
        if relative_gap(best.objective, bound) <= gap or bound >= cutoff:
            break
        if found.stopped_by != "proof":
            break
        following = next_multipliers(met)
        if np.abs(following - multipliers).max() < SAME:
            break
        multipliers = following
    assert best is not None
    return _told(best, bound, gap), kept


def _with_host(found: Solution, host: float) -> Solution:
    """A step ends no sooner than the host has dispatched it."""
    seconds = None if found.objective is None else max(found.objective, host)
    return replace(found, objective=seconds, lower_bound=max(found.lower_bound, host))


def _told(best: Solution, bound: float, gap: float) -> Solution:
    """A solution with the bound of all solves."""
    if best.objective is None:
        return replace(best, lower_bound=max(bound, best.lower_bound))
    bound = min(bound, best.objective)
    closed = relative_gap(best.objective, bound) <= gap
    return replace(best, lower_bound=bound, status="optimal" if closed else "feasible")
