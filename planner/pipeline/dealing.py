"""Deal units of the forward pass out to the stages of a pipeline, so that the slowest stage is as fast as can be.

Exact: for a given time of the slowest stage, where each stage may end follows from where the one before may;
the least such time is found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

Fits = Callable[[int, int, int], bool]  # (stage, first unit, one past the last)

ANYWHERE: Fits = lambda stage, first, last: True  # noqa: E731


def deal(seconds: Sequence[Sequence[float]], fits: Fits = ANYWHERE) -> tuple[int, ...] | None:
    """The first unit of each stage; None where no stages of these units fit.

    Args:
        seconds: of each unit on each stage.
        fits: whether a stage has room for a run of units; a shorter run of a run that fits does too.
    """
    known: dict[int, list[float]] = {id(each): [0.0, *accumulate(each)] for each in seconds}
    sums = [known[id(each)] for each in seconds]
    if (
        len(seconds[0]) < len(seconds)
        or (best := _fill(sums, max(each[-1] for each in sums), fits)) is None
    ):
        return None
    low, high = 0.0, _slowest(sums, best)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = _fill(sums, middle, fits)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, _slowest(sums, found))
    return best


def _slowest(sums: Sequence[Sequence[float]], firsts: Sequence[int]) -> float:
    ends = [*firsts[1:], len(sums[0]) - 1]
    return max(each[end] - each[first] for each, first, end in zip(sums, firsts, ends, strict=True))


def _fill(sums: Sequence[Sequence[float]], most: float, fits: Fits) -> tuple[int, ...] | None:
    """Stages of at most so many seconds: where each stage may end, given where the one before may.

    The farther a stage begins, the farther it reaches, so an end is looked up from the least
    beginning that reaches it.
    """
    units, stages = len(sums[0]) - 1, len(sums)
    begins: list[dict[int, int]] = []  # of each stage: end -> beginning
    starts: list[int] = [0]
    for stage, each in enumerate(sums):
        found: dict[int, int] = {}
        last = units - (stages - stage - 1)
        end = 0
        for at in starts:
            end = max(end, at)
            while (
                end < last
                and each[end + 1] - each[at] <= most * (1 + 1e-12)
                and fits(stage, at, end + 1)
            ):
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
