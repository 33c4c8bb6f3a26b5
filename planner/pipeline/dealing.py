"""Deal units of the forward pass out to the stages of a pipeline, so that the slowest stage is as fast as can be.

Exact: for a given time of the slowest stage, where each stage may end follows from where the one before may;
the least such time is found by halving.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

Fits = Callable[[int, int, int], bool]  # (stage, first unit, one past the last)
Spans = Sequence[
    Sequence[float]
]  # seconds of units `first` up to, not including, `last`, at [first][last]

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
    if (
        units < len(spans)
        or (best := _fill(spans, units, max(each[0][units] for each in spans), fits)) is None
    ):
        return None
    low, high = 0.0, _slowest(spans, units, best)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = _fill(spans, units, middle, fits)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, _slowest(spans, units, found))
    return best


def _slowest(spans: Sequence[Spans], units: int, firsts: Sequence[int]) -> float:
    return max(
        each[first][end]
        for each, first, end in zip(spans, firsts, (*firsts[1:], units), strict=True)
    )


def _fill(spans: Sequence[Spans], units: int, most: float, fits: Fits) -> tuple[int, ...] | None:
    """Stages of at most so many seconds: where each stage may end, given where the one before may.

    The farther a stage begins, the farther it reaches, so an end is looked up from the least
    beginning that reaches it.
    """
    stages = len(spans)
    begins: list[dict[int, int]] = []  # of each stage: end -> beginning
    starts: list[int] = [0]
    for stage, each in enumerate(spans):
        found: dict[int, int] = {}
        last = units - (stages - stage - 1)
        end = 0
        for at in starts:
            end = max(end, at)
            reach = bisect_right(each[at], most * (1 + 1e-12), end, last + 1) - 1
            while end < reach and (fits is ANYWHERE or fits(stage, at, end + 1)):
                end += 1
                found[end] = at
        if not found:
            return None
        begins.append(found)
        starts = sorted(found)
    firsts, end = [], units
    for found in reversed(begins):
        if end not in found:
            return None
        end = found[end]
        firsts.append(end)
    return tuple(reversed(firsts))
