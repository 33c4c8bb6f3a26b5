"""Cut a chain of units into pipeline stages on groups of devices: exact, by dynamic programs over tables.

A table holds seconds: `[d, a, b]` is a stage of units a to b - 1 on d devices, inf where there is none.
Positions of a graph that is no chain are sets of units closed under "comes before" (ideals, see
`ideals.py`) in any order that puts subsets first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

Plan = TypeVar("Plan")


class StagePiece(NamedTuple):
    """Units `first` up to, not including, `last`, on so many devices."""

    first: int
    last: int
    devices: int


@dataclass(frozen=True)
class BestCuts:
    """The best pipelines from one position: `seconds[d, b]` covers the units before b with exactly d devices.

    at, devices: where the last stage of the best pipeline begins, and how many devices it has.
    """

    start: int
    seconds: np.ndarray
    at: np.ndarray
    devices: np.ndarray

    def pieces(self, end: int, devices: int) -> tuple[StagePiece, ...]:
        """The stages of the best pipeline to `end`, in order."""
        found: list[StagePiece] = []
        while end > self.start:
            piece = StagePiece(int(self.at[devices, end]), end, int(self.devices[devices, end]))
            found.append(piece)
            end, devices = piece.first, devices - piece.devices
        return tuple(reversed(found))


def best_cuts(
    start: int,
    first: np.ndarray,
    later: np.ndarray,
    devices: int,
    join: np.ufunc = np.maximum,
    latest: bool = False,
) -> BestCuts:
    """The best pipelines from `start`: with the fastest slowest stage, or the least sum (join: `np.add`).

    Args:
        first: the table of stages that begin the pipeline.
        later: the table of all other stages.
        devices: at most, of the whole pipeline; tables may end with stages on fewer.
        latest: among equals, last stages begin as late as they can, else as early.
    """
    rows: int = first.shape[0]
    ends: int = first.shape[2]
    seconds = np.full((devices + 1, ends), np.inf)
    seconds[:rows] = first[:, start]
    at, own_devices = (
        np.full(seconds.shape, start),
        np.tile(np.arange(devices + 1)[:, None], (1, ends)),
    )
    columns = np.arange(ends - start)
    for total in range(2, devices + 1):
        for own in range(1, min(total, rows)):
            whole = join(seconds[total - own, start:, None], later[own, start:, start:])
            best = len(whole) - 1 - whole[::-1].argmin(axis=0) if latest else whole.argmin(axis=0)
            found = whole[best, columns]
            better = np.flatnonzero(found < seconds[total, start:])
            to = better + start
            seconds[total, to], at[total, to], own_devices[total, to] = (
                found[better],
                best[better] + start,
                own,
            )
    return BestCuts(start, seconds, at, own_devices)


def least_step(
    tables: Sequence[np.ndarray], devices: int, microbatches: int
) -> tuple[float, tuple[StagePiece, ...]] | None:
    """The pipeline of all units on exactly so many devices with the least

        sum of all stages' seconds  +  (microbatches - 1) * seconds of the slowest stage

    and those seconds; None where there is none.

    Args:
        tables: `tables[k]` is of stages with k stages behind them; as many stages
            as tables at most.

    The limit on the slowest stage falls from one best plan to the next, and stops where it allows none
    (Zheng et al., Alpa, OSDI 2022, section 5.2, from the other side).
    """
    best: tuple[float, tuple[StagePiece, ...]] | None = None
    limit = np.inf
    while (pieces := _least_sum(tables, devices, limit)) is not None:
        behind = range(len(pieces))[::-1]
        each = [
            float(tables[k][p.devices, p.first, p.last])
            for k, p in zip(behind, pieces, strict=True)
        ]
        step = sum(each) + (microbatches - 1) * max(each)
        if best is None or step < best[0]:
            best = step, pieces
        limit = np.nextafter(max(each), -np.inf)
    return best


def _least_sum(
    tables: Sequence[np.ndarray], devices: int, limit: float
) -> tuple[StagePiece, ...] | None:
    """The pipeline with the least sum of seconds and no stage slower than the limit."""
    units: int = tables[0].shape[1] - 1
    rows = np.arange(units + 1)
    behind = np.full((devices + 1, units + 1), np.inf)
    behind[0, units] = 0.0
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    best, stages = np.inf, 0
    for table in tables:
        allowed = np.where(table <= limit, table, np.inf)
        total = np.full_like(behind, np.inf)
        to, own = np.zeros(behind.shape, int), np.zeros(behind.shape, int)
        for used in range(1, devices + 1):
            for d in range(1, used + 1):
                if np.isinf(behind[used - d]).all():
                    continue
                whole = allowed[d] + behind[used - d]
                end = whole.argmin(axis=1)
                found = whole[rows, end]
                better = found < total[used]
                total[used, better], to[used, better], own[used, better] = (
                    found[better],
                    end[better],
                    d,
                )
        behind = total
        taken.append((to, own))
        if behind[devices, 0] < best:
            best, stages = behind[devices, 0], len(taken)
    if not stages:
        return None
    pieces, at = list[StagePiece](), 0
    for to, own in reversed(taken[:stages]):
        piece = StagePiece(at, int(to[devices, at]), int(own[devices, at]))
        pieces.append(piece)
        at, devices = piece.last, devices - piece.devices
    return tuple(pieces)


class Pace(NamedTuple):
    """Tables of stages on one number of devices, wherever in the pipeline: `[a, b]` has units a to b - 1."""

    once: np.ndarray  # seconds that each microbatch's way through the pipeline has from the stage
    again: (
        np.ndarray
    )  # seconds that the stage takes for all other microbatches, and for what is done once per step


def near_least_step(
    paces: Mapping[int, Pace], devices: int, stages: int | None = None, coarse: float = 0.01
) -> tuple[float, tuple[StagePiece, ...]] | None:
    """The pipeline of all units on exactly so many devices with nearly the least

        sum of all stages' `once`  +  the largest `again` of a stage

    and those seconds. As `least_step`, in a fraction of the time.

    Args:
        paces: by number of devices.
        stages: exactly so many; any number where None.
        coarse: by so much at least the limit on `again` falls from one best plan to the next, and so much of
            the second term may be lost.
    """
    best: tuple[float, tuple[StagePiece, ...]] | None = None
    limit = np.inf
    while (pieces := _least_sum_of(paces, devices, limit, stages)) is not None:
        first = sum(float(paces[p.devices].once[p.first, p.last]) for p in pieces)
        slowest = max(float(paces[p.devices].again[p.first, p.last]) for p in pieces)
        if best is not None and first >= best[0]:  # it only grows
            break
        if best is None or first + slowest < best[0]:
            best = first + slowest, pieces
        if not slowest:
            break
        limit = slowest * (1 - coarse)
    return best


def _least_sum_of(
    paces: Mapping[int, Pace], devices: int, limit: float, stages: int | None
) -> tuple[StagePiece, ...] | None:
    """The pipeline with the least sum of `once` and no stage whose `again` is above the limit."""
    allowed = {d: np.where(pace.again <= limit, pace.once, np.inf) for d, pace in paces.items()}
    units = len(next(iter(allowed.values()))) - 1
    rounds = range(1 if stages is None else stages)
    none = np.full((devices + 1, units + 1), np.inf)
    none[0, units] = 0.0
    behind, taken = none, list[tuple[np.ndarray, np.ndarray]]()
    for _ in rounds:
        total = none.copy() if stages is None else np.full_like(none, np.inf)
        source = (
            total if stages is None else behind
        )  # any number of stages: those found before count too
        to, own = np.zeros(total.shape, int), np.zeros(total.shape, int)
        for used in range(1, devices + 1):
            for d in (d for d in allowed if d <= used):
                if np.isfinite(source[used - d]).any():
                    whole = allowed[d] + source[used - d]
                    end = whole.argmin(axis=1)
                    found = np.take_along_axis(whole, end[:, None], axis=1)[:, 0]
                    better = found < total[used]
                    total[used, better], to[used, better], own[used, better] = (
                        found[better],
                        end[better],
                        d,
                    )
        behind = total
        taken.append((to, own))
    if np.isinf(behind[devices, 0]):
        return None
    pieces, at, left = list[StagePiece](), 0, devices
    while at < units:
        to, own = taken[-1] if stages is None else taken[stages - 1 - len(pieces)]
        piece = StagePiece(at, int(to[left, at]), int(own[left, at]))
        pieces.append(piece)
        at, left = piece.last, left - piece.devices
    return tuple(pieces)


def halved(
    within: Callable[[float], Plan | None],
    slowest: Callable[[Plan], float],
    low: float,
    high: float,
    gap: float = 1e-9,
) -> Plan | None:
    """The plan whose slowest stage is fastest, to a relative gap, by halving what a stage may take (its logarithm).

    Args:
        within: a plan with no stage slower than that, or None where there is none.
        low, high: no plan is faster than low (above 0); high is tried first.
    """
    if (best := within(high)) is None:
        return None
    high = slowest(best)
    while low < high * (1 - gap):
        # once near, only a little below: mostly the last plan is the best
        middle = high * (1 - gap) if high < low * (1 + 1e-3) else (low * high) ** 0.5
        found = within(middle)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, slowest(found))
    return best
