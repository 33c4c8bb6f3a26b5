"""Deal units of the forward pass out to the stages of a pipeline, so that the slowest stage is as fast as can be.

Exact: for a given time of the slowest stage, where each stage may end follows from where the one before may;
the least such time is found by halving. A time that is too short tells the next one at which any stage reaches farther.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import inf

import numpy as np

Fits = Callable[[int, int, int], bool]  # (stage, first unit, one past the last)
Spans = Sequence[
    Sequence[float]
]  # seconds of units `first` up to, not including, `last`, at [first][last]

SLACK = 1e-12  # of seconds, for sums of floats
CLOSE = 10 * SLACK  # seconds that differ by no more are one

ANYWHERE: Fits = lambda stage, first, last: True  # noqa: E731


def deal(seconds: Sequence[Sequence[float]], fits: Fits = ANYWHERE) -> tuple[int, ...] | None:
    """The first unit of each stage; None where no stages of these units fit.

    Args:
        seconds: of each unit on each stage.
        fits: whether a stage has room for a run of units; a shorter run of a run that fits does too.
    """
    known = {id(each): added_up(each) for each in seconds}
    return deal_spans([known[id(each)] for each in seconds], len(seconds[0]), fits)


def added_up(seconds: Sequence[float]) -> Spans:
    """Of units that take so long one after another."""
    sums = np.concatenate([[0.0], np.cumsum(seconds)])
    return (sums[None, :] - sums[:, None]).tolist()


def deal_spans(spans: Sequence[Spans], units: int, fits: Fits = ANYWHERE) -> tuple[int, ...] | None:
    """The same by what each stage takes for a run of units, which a longer run never takes less than."""
    if units < len(spans):
        return None
    best, _ = _fill(spans, units, max(each[0][units] for each in spans), fits)
    if best is None:
        return None
    low, high = 0.0, _slowest(spans, units, best)
    while low * (1 + CLOSE) < high:
        found, farther = _fill(spans, units, (low + high) / 2, fits)
        if found is None:
            low = farther
        else:
            best, high = found, _slowest(spans, units, found)
    return best


def _slowest(spans: Sequence[Spans], units: int, firsts: Sequence[int]) -> float:
    return max(
        each[first][end]
        for each, first, end in zip(spans, firsts, (*firsts[1:], units), strict=True)
    )


def _fill(
    spans: Sequence[Spans], units: int, most: float, fits: Fits
) -> tuple[tuple[int, ...] | None, float]:
    """Stages of at most so many seconds, if there are any: where each stage may end, given where the one before may.
    And the least time with which some stage would reach farther.

    The farther a stage begins, the farther it reaches, so an end is looked up from the least
    beginning that reaches it.
    """
    stages, farther, most = len(spans), inf, most * (1 + SLACK)
    begins: list[dict[int, int]] = []  # of each stage: end -> beginning
    starts: list[int] = [0]
    for stage, each in enumerate(spans):
        found: dict[int, int] = {}
        last = units - (stages - stage - 1)
        end = 0
        for at in starts:
            if at > end:
                end = at
            row = each[at]
            reach = bisect_right(row, most, end, last + 1) - 1
            if reach < last and row[reach + 1] < farther:
                farther = row[reach + 1]
            while end < reach and (fits is ANYWHERE or fits(stage, at, end + 1)):
                end += 1
                found[end] = at
        if not found:
            return None, farther
        begins.append(found)
        starts = sorted(found)
    firsts, end = list[int](), units
    for found in reversed(begins):
        if end not in found:
            return None, farther
        end = found[end]
        firsts.append(end)
    return tuple(reversed(firsts)), farther
