"""Deal units of the forward pass out to the stages of a pipeline, so that the slowest stage is as fast as can be.

Exact: a stage that takes fewer units is never slower and never larger, so for a given time of the slowest
stage it is best to fill the stages one after another; the least such time is found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

Fits = Callable[[int, int, int], bool]  # (stage, first unit, one past the last)


def deal(seconds: Sequence[float], stages: int, fits: Fits = lambda stage, first, last: True) -> tuple[int, ...] | None:
    """The first unit of each stage; None where no stages of these units fit.

    Args:
        seconds: of each unit.
        fits: whether a stage has room for a run of units; a shorter run of a run that fits does too.
    """
    sums = [0.0, *accumulate(seconds)]
    if len(seconds) < stages or (best := _fill(sums, stages, sums[-1], fits)) is None:
        return None
    slowest = _slowest(sums, best)
    low, high = max(max(seconds), sums[-1] / stages), slowest
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = _fill(sums, stages, middle, fits)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, _slowest(sums, found))
    return best


def _slowest(sums: Sequence[float], firsts: Sequence[int]) -> float:
    ends = [*firsts[1:], len(sums) - 1]
    return max(sums[end] - sums[first] for first, end in zip(firsts, ends, strict=True))


def _fill(sums: Sequence[float], stages: int, most: float, fits: Fits) -> tuple[int, ...] | None:
    """Each stage takes as many units as it can, one for each stage behind left over."""
    units, firsts, at = len(sums) - 1, [], 0
    for stage in range(stages):
        firsts.append(at)
        end = at
        while end < units - (stages - stage - 1) and sums[end + 1] - sums[at] <= most * (1 + 1e-12):
            if not fits(stage, at, end + 1):
                break
            end += 1
        if end == at:
            return None
        at = end
    return tuple(firsts) if at == units else None
