"""Plans near known ones, those that run fastest first: cuts, widths of stages and their number changed step by step.

A width is what a stage has: replicas or devices, or degrees of parallelism. What a planner's formula puts
first is seldom what the simulator finds fastest; this starts from there and asks the simulator itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple, TypeVar

Plan = TypeVar("Plan")


def fastest_near(
    starts: Iterable[Plan],
    around: Callable[[Plan], Iterable[Plan]],
    seconds: Callable[[Plan], float],
    patience: int,
) -> Plan:
    """The fastest plan met: the fastest one whose neighbours have not been looked at is always the next.

    Args:
        starts: one at least that is allowed; earlier ones win among equals.
        around: neighbours of a plan.
        seconds: inf where a plan is not allowed.
        patience: ends once so many plans have been tried since the last faster one.
    """
    starts = list(dict.fromkeys(starts))
    seen, since = set(starts), 0
    queue = sorted((seconds(plan), i, plan) for i, plan in enumerate(starts))
    best = queue[0]
    while queue and since < patience:
        for plan in around(heappop(queue)[-1]):
            if plan in seen:
                continue
            seen.add(plan)
            since += 1
            if (took := seconds(plan)) < inf:
                heappush(queue, (took, len(seen), plan))
                if took < best[0]:
                    best, since = queue[0], 0
            if since >= patience:
                break
    return best[-1]


class Stage(NamedTuple):
    """Between two positions, with a width. `like`: in a neighbour, the number of the stage that it came from."""

    first: Any
    last: Any
    width: Any
    like: int = 0


class Widths(NamedTuple):
    """How widths may change: of two stages at once, of one, when two become one, when one becomes two."""

    traded: Callable[[Any, Any], Iterable[tuple[Any, Any]]]
    changed: Callable[[Any], Iterable[Any]]
    joined: Callable[[Any, Any], Iterable[Any]]
    parted: Callable[[Any], Iterable[tuple[Any, Any]]]


# stages that share a fixed number of devices
SHARED = Widths(
    lambda one, other: ((one - k, other + k) for k in range(1, one)),
    lambda _: (),
    lambda one, other: (one + other,),
    lambda width: ((k, width - k) for k in range(1, width)),
)
# as many stages as devices
SINGLE = Widths(lambda *_: (), lambda _: (), lambda *_: (), lambda _: ())


def neighbours(
    stages: Sequence[Stage], between: Callable[[Any, Any], Sequence[Any]], widths: Widths
) -> Iterator[tuple[Stage, ...]]:
    """Pipelines one step away.

    Args:
        between: the positions at which units between two positions can be cut.
    """
    stages = [stage._replace(like=i) for i, stage in enumerate(stages)]
    for i, (one, other) in enumerate(pairwise(stages)):
        for cut in between(one.first, other.last):
            yield _put(stages, i, 2, one._replace(last=cut), other._replace(first=cut))
        for width in widths.joined(one.width, other.width):
            for like in (one, other):
                yield _put(stages, i, 2, Stage(one.first, other.last, width, like.like))
        yield from _elsewhere(stages, i, between)
    for i, one in enumerate(stages):
        for width in widths.changed(one.width):
            yield _put(stages, i, 1, one._replace(width=width))
        for pair in widths.parted(one.width):
            yield from _halves(stages, i, between, *pair)
        for j, other in enumerate(stages):
            for width, wider in widths.traded(one.width, other.width) if i != j else ():
                changed = _put(stages, i, 1, one._replace(width=width))
                yield _put(changed, j, 1, other._replace(width=wider))


def _put(stages: Sequence[Stage], at: int, many: int, *new: Stage) -> tuple[Stage, ...]:
    return (*stages[:at], *new, *stages[at + many :])


def _halves(
    stages: Sequence[Stage], i: int, between: Callable, early: Any, late: Any
) -> Iterator[tuple[Stage, ...]]:
    one = stages[i]
    for cut in between(one.first, one.last):
        yield _put(
            stages, i, 1, one._replace(last=cut, width=early), one._replace(first=cut, width=late)
        )


def _elsewhere(stages: Sequence[Stage], i: int, between: Callable) -> Iterator[tuple[Stage, ...]]:
    """One of two stages takes the units of both; the other takes a part of some stage's."""
    pair = stages[i : i + 2]
    for stays, goes in (pair, pair[::-1]) if pair[0].width != pair[1].width else (pair,):
        fewer = _put(stages, i, 2, Stage(pair[0].first, pair[1].last, stays.width, stays.like))
        for j, one in enumerate(fewer):
            yield from _halves(fewer, j, between, one.width, goes.width)
            if one.width != goes.width:
                yield from _halves(fewer, j, between, goes.width, one.width)
