"""A pipeline of given stages, priced: its schedule simulated, memory of each rank.

step = passes of the schedule, with sends      (simulated)
     + the longest update of a rank            (all begin together: clipping waits for every gradient)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from math import inf

import numpy as np

from ...ir.cluster.cluster import Cluster
from ...ir.errors import InfeasibleError
from ...ir.pipeline.schedule import Schedule, peak_held
from .dealing import ANYWHERE, Fits, Spans, added_up, deal_spans
from .limited import search_schedule
from .simulate import Run, StageSeconds, pipeline_tasks, simulate
from .stage_memory import Runs, StageMemory
from .tighten import ActivationMemory
from .unit_costs import UnitSeconds, seconds_of_runs, together
from .units import Units, runs_of

REORDER = 60_000  # passes that a search for a better order may schedule: a second or two
UNEVEN = 0.02  # of a step: what the longest update may be above the mean without stages being cut anew for it
LARGE = 20_000  # passes of one step from which no better order is searched


@dataclass(frozen=True)
class Priced:
    """`firsts[stage]` is its first unit, `once[stage]` what it does once per step; `held[rank]` microbatches'
    worth of forward results at most."""

    schedule: Schedule
    firsts: tuple[int, ...]
    stages: tuple[StageSeconds, ...]
    once: tuple[float, ...]
    peaks: tuple[float, ...]
    held: tuple[float, ...]
    run: Run
    seconds: float

    @property
    def in_any_order(self) -> float:
        """No order of the passes is faster: a rank does all of its own, and then what is done once per step."""
        busy = max(self.run.busy(rank) for rank in range(self.schedule.ranks))
        return busy + self.seconds - self.run.makespan

    def runs(self, units: Units, stage: int) -> Runs:
        ends = (*self.firsts[1:], len(units))
        return runs_of(units, self.firsts[stage], ends[stage])


@dataclass(frozen=True)
class Place:
    """The devices of one rank, and what each kind of unit costs there under one solution."""

    each: tuple[UnitSeconds, ...]
    memory: StageMemory
    limit: float  # bytes per device
    first: int  # of its devices, as the cluster numbers them
    devices: int

    @property
    def end(self) -> int:
        return self.first + self.devices


@dataclass(frozen=True)
class Pricing:
    """Everything that does not depend on the schedule: units, and a place for each rank."""

    units: Units
    places: tuple[Place, ...]
    cluster: Cluster

    @cached_property
    def hosts(self) -> frozenset[frozenset[int]]:
        """The ranks that have devices on a host, of all hosts; of hosts alike once."""
        found: dict[int, set[int]] = {}
        for rank, place in enumerate(self.places):
            first, last = map(self.cluster.host_of, (place.first, place.end - 1))
            for host in range(first, last + 1):
                found.setdefault(host, set()).add(rank)
        return frozenset(map(frozenset, found.values()))

    @property
    def serial(self) -> Pricing:
        """The same if nothing overlapped."""
        each = {id(place.each): tuple(unit.serial for unit in place.each) for place in self.places}
        places = tuple(replace(place, each=each[id(place.each)]) for place in self.places)
        return replace(self, places=places)

    def sending(self, nbytes: float, first: int, end: int) -> float:
        """Seconds that each device takes to send so much within a stretch of the cluster."""
        if not nbytes:
            return 0.0
        tier = self.cluster.tier_joining(first, end)
        return tier.latency + nbytes / tier.achieved

    def price(self, schedule: Schedule, cutoff: float = inf) -> Priced | None:
        """The better of two cuts for a schedule; None where nothing fits, or where it cannot beat `cutoff`."""
        best: Priced | None = None
        for firsts in self._cuts(schedule):
            found = self.with_cut(schedule, firsts, cutoff)
            if found is not None and (best is None or found.seconds < best.seconds):
                best, cutoff = found, min(cutoff, found.seconds)
        return best

    def with_cut(
        self, schedule: Schedule, firsts: tuple[int, ...], cutoff: float = inf
    ) -> Priced | None:
        """The same with given first units of the stages."""
        ends = (*firsts[1:], len(self.units))
        runs = [runs_of(self.units, first, end) for first, end in zip(firsts, ends, strict=True)]
        homes = [self.places[rank] for rank in schedule.homes]
        works = self._works(homes, firsts)
        stages = self._stages(homes, works, firsts, schedule.splits)
        once = tuple(work.once for work in works)
        tail = max(sum(once[s] for s in held) for held in schedule.held)
        if _at_least(schedule, stages) + tail >= cutoff:
            return None
        peaks, held = zip(
            *(self._peak(schedule, rank, runs) for rank in range(schedule.ranks)), strict=True
        )
        if any(peak > place.limit for peak, place in zip(peaks, self.places, strict=True)):
            return None
        run = simulate(pipeline_tasks(schedule, stages))
        return Priced(schedule, firsts, stages, once, peaks, held, run, run.makespan + tail)

    def reordered(self, priced: Priced) -> Priced | None:
        """The same stages, their passes in the best order found for their seconds and bytes; None where there are
        too many passes to search, or no order is found that fits."""
        old = priced.schedule
        if 3 * old.stages * old.microbatches > LARGE:
            return None
        runs = [priced.runs(self.units, stage) for stage in range(old.stages)]
        parts = (
            self.places[rank].memory.under(old, rank).parts(runs[stage])
            for stage, rank in enumerate(old.homes)
        )
        _, left, late = zip(*parts, strict=True)
        always = [peak - peak_held(old, rank, left, late) for rank, peak in enumerate(priced.peaks)]
        homes = [self.places[rank] for rank in old.homes]
        works = self._works(homes, priced.firsts)
        whole, apart = (
            self._stages(homes, works, priced.firsts, splits) for splits in (False, True)
        )
        limits = np.array([place.limit for place in self.places])
        room = limits
        for _ in range(2):
            try:
                held = ActivationMemory(left, late, room.tolist(), always)
                found = search_schedule(
                    apart, held, old.microbatches, work=REORDER, placement=old.held
                )
            except InfeasibleError:
                return None
            peaks, most = zip(
                *(self._peak(found.schedule, rank, runs) for rank in range(old.ranks)), strict=True
            )
            excess = np.maximum(
                0.0, np.array(peaks) - limits
            )  # passes that are split hold more than others
            if not excess.any():
                stages = apart if found.schedule.splits else whole
                run = simulate(pipeline_tasks(found.schedule, stages))
                seconds = priced.seconds - priced.run.makespan + run.makespan
                return replace(
                    priced,
                    schedule=found.schedule,
                    stages=stages,
                    peaks=peaks,
                    held=most,
                    run=run,
                    seconds=seconds,
                )
            room = limits - excess
        return None

    def _cuts(self, schedule: Schedule) -> Iterator[tuple[int, ...]]:
        """Even in what passes take; then, if updates are uneven by much, in what both take together."""
        homes, units = [self.places[rank] for rank in schedule.homes], len(self.units)
        fits = self._fits(schedule, homes) if schedule.stages == schedule.ranks else ANYWHERE
        firsts = deal_spans(self._spans(homes, 0.0), units, fits)
        if firsts is None:
            return
        yield firsts
        works = self._works(homes, firsts)
        once = [work.once for work in works]
        passes = sum(work.passes for work in works) / len(homes)
        if max(once) - sum(once) / len(once) > UNEVEN * schedule.microbatches * passes:
            again = deal_spans(self._spans(homes, 1 / schedule.microbatches), units, fits)
            if again is not None and again != firsts:
                yield again

    def _works(self, homes: Sequence[Place], firsts: Sequence[int]) -> list[UnitSeconds]:
        """All of each stage, with the seconds in which it hands things to others once per step."""
        found, ends = list[UnitSeconds](), (*firsts[1:], len(self.units))
        alike = {id(home.each): home.each for home in homes}
        handing = {key: [self._handing(unit) for unit in each] for key, each in alike.items()}
        for home, first, end in zip(homes, firsts, ends, strict=True):
            runs = runs_of(self.units, first, end)
            work, pairs = together(runs, home.each), zip(runs, handing[id(home.each)], strict=True)
            found.append(replace(work, apart=work.apart + sum(n * each for n, each in pairs)))
        return found

    def _spans(self, homes: Sequence[Place], share: float) -> list[Spans]:
        """Seconds of a run of units per microbatch on each stage, a share of what is done once included."""
        alike = {id(home.each): home for home in homes}
        found = {key: self._span(home, share) for key, home in alike.items()}
        return [found[id(home.each)] for home in homes]

    def _span(self, home: Place, share: float) -> Spans:
        each = [replace(u, apart=u.apart + self._handing(u)) for u in home.each]
        if not any(unit.hides for unit in each):
            per_kind = [u.passes + share * u.once for u in each]
            return added_up([per_kind[kind] for kind in self.units.kinds])
        return seconds_of_runs([each[kind] for kind in self.units.kinds], share).tolist()

    def _fits(self, schedule: Schedule, homes: Sequence[Place]) -> Fits:
        @cache
        def has_room(stage: int, runs: Runs) -> bool:
            peak, left, late = homes[stage].memory.under(schedule, stage).parts(runs)
            return peak + self._extra(schedule, stage, [left], [late]) <= homes[stage].limit

        @cache
        def fits(stage: int, first: int, last: int) -> bool:
            return has_room(stage, runs_of(self.units, first, last))

        return fits

    def _extra(
        self, schedule: Schedule, rank: int, left: Sequence[float], late: Sequence[float]
    ) -> float:
        """Bytes of forward results beyond those of one microbatch, which the peak of the lives has."""
        forward, kept = [0.0] * schedule.stages, [0.0] * schedule.stages
        for stage, size, waits in zip(schedule.held[rank], left, late, strict=True):
            forward[stage], kept[stage] = size, waits
        return max(0.0, peak_held(schedule, rank, forward, kept) - sum(left))

    def _peak(self, schedule: Schedule, rank: int, runs: Sequence[Runs]) -> tuple[float, float]:
        memory = self.places[rank].memory.under(schedule, rank)
        mine = [memory.parts(runs[stage]) for stage in schedule.held[rank]]
        together = tuple(
            map(sum, zip(*(runs[stage] for stage in schedule.held[rank]), strict=True))
        )
        left = [size for _, size, _ in mine]
        extra = self._extra(schedule, rank, left, [late for _, _, late in mine])
        return memory.parts(together)[0] + extra, 1 + (extra / sum(left) if sum(left) else 0.0)

    def _stages(
        self,
        homes: Sequence[Place],
        works: Sequence[UnitSeconds],
        firsts: Sequence[int],
        splits: bool,
    ) -> tuple[StageSeconds, ...]:
        """Seconds of the stages; of a backward pass with those of weights in it, weights have what they add."""
        borders = [self._between(homes, s - 1, first) for s, first in enumerate(firsts)]
        borders.append(0.0)
        found: list[StageSeconds] = []
        for work, back, send in zip(works, borders, borders[1:], strict=False):
            backward = work.backward.seconds
            weight = work.weight.seconds if splits else work.whole - backward
            found.append(StageSeconds(work.forward.seconds, backward, weight, send, back))
        return tuple(found)

    def _between(self, homes: Sequence[Place], stage: int, end: int) -> float:
        """Seconds of one microbatch's results from a stage, which ends there, to the next; of their gradients back."""
        if not 0 < end < len(self.units):
            return 0.0
        here, there, kind = homes[stage], homes[stage + 1], self.units.kinds[end - 1]
        most = max(here.each[kind].sent, there.each[kind].sent)
        return self.sending(most, min(here.first, there.first), max(here.end, there.end))

    def _handing(self, each: UnitSeconds) -> float:
        return self.sending(each.handed, 0, self.cluster.size)


def _at_least(schedule: Schedule, stages: Sequence[StageSeconds]) -> float:
    """Seconds that no order of these passes beats: a rank has all of its own to run, waits for the first microbatch to
    come through the stages before, and ends with a pass whose gradients go back through them, unless that is split."""
    there = back = 0.0
    ways = [0.0]
    for stage, following in pairwise(range(schedule.stages)):
        away = schedule.homes[stage] != schedule.homes[following]
        there += stages[stage].forward + away * stages[stage].send
        back += (
            stages[stage].backward
            + stages[stage].weight
            + away * stages[following].sending("backward")
        )
        ways.append(there + (0.0 if schedule.splits else back))
    return max(
        schedule.microbatches * sum(_passes(stages[s]) for s in held) + ways[min(held)]
        for held in schedule.held
    )


def _passes(stage: StageSeconds) -> float:
    return stage.forward + stage.backward + stage.weight
