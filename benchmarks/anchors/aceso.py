"""Aceso's inputs: stages of operators, each split and replicated, with recomputation, under a limit of memory.

The search is over microbatches, cuts between any two operators, the devices of each stage, how it is split
over them, and what is recomputed. Operators of a stage are split differently where that moves no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from meshwright.planner.pipeline.partition import least_step

from . import neutral
from .aceso_profile import Counted, Recorded, Split, Stage
from .aceso_stages import Way

NEAR = 1.05  # plans up to this factor over the best have their cuts moved
MOST_GAINED = 0.1  # part of its slowest stage that a plan may gain so
WIDTH = 4  # furthest positions that are followed behind each stage
PER_MEGABYTE = (0.0, 0.3e-6, 1e-6, 3e-6)  # seconds that a mix of splits would give for a MB less


@dataclass(frozen=True)
class Found:
    """A plan: samples per microbatch over all replicas, and the stages."""

    batch: int
    stages: tuple[Stage, ...]


class Problem:
    """One model on so many devices with so many MB each."""

    def __init__(self, recorded: Recorded, devices: int, memory: float, global_batch: int) -> None:
        self.recorded, self.devices, self.memory, self.global_batch = (
            recorded,
            devices,
            memory,
            global_batch,
        )

    # ------------------------------------------------------------ a plan

    def counted(self, plan: Found) -> list[Counted]:
        return [Counted(self.recorded, stage, plan.batch) for stage in plan.stages]

    def seconds(self, plan: Found) -> float:
        """Aceso's prediction of a step: every microbatch through the slowest stage, and one through all."""
        each = [stage.seconds for stage in self.counted(plan)]
        return sum(each) + (self.global_batch // plan.batch - 1) * max(each)

    def fullest(self, plan: Found) -> float:
        """MB of the fullest device."""
        stages = self.counted(plan)
        return max(
            stage.memory(behind)
            for stage, behind in zip(stages, range(len(stages))[::-1], strict=True)
        )

    def simulated(self, plan: Found) -> float:
        """Seconds of a simulated step; what leaves a stage is sent beside computing."""
        stages = [neutral.Stage(s.forward, s.backward, s.leaving) for s in self.counted(plan)]
        return neutral.step_seconds(stages, self.global_batch // plan.batch)

    # ------------------------------------------------------------ the search

    def best(self) -> Found | None:
        """First with cuts between layers alone; the cuts of plans that come near the best then move by operators."""
        coarse = [found for batch in self._batches() if (found := self._between_layers(batch))]
        best: Found | None = None
        for found in sorted(coarse, key=self.seconds):
            if best is None or self.seconds(found) <= NEAR * self.seconds(best):
                found = min(found, _Cuts(self, found).moved(), key=self.seconds)
                best = min(best or found, found, key=self.seconds)
        return best

    def _batches(self) -> list[int]:
        most = max(size for size, _, _ in self.recorded.profiles) * self.devices
        return [batch for batch in range(1, most + 1) if self.global_batch % batch == 0][::-1]

    def _between_layers(self, batch: int) -> Found | None:
        """The best plan of one size of microbatch with whole layers in each stage."""
        recorded = self.recorded
        cuts = np.array(
            sorted({0, len(recorded.names), *(layer.start for layer in recorded.layers)})
        )
        a, b = np.triu_indices(len(cuts), 1)
        tables, taken = [], []
        for behind in range(self.devices):
            table = np.full((self.devices + 1, len(cuts), len(cuts)), np.inf)
            chosen = np.zeros(table.shape, int)
            for d in range(1, self.devices - behind + 1):
                for i, way in enumerate(self.ways(batch, d)):
                    seconds = way.seconds(cuts[a], cuts[b], behind, self.memory)
                    better = seconds < table[d, a, b]
                    table[d, a[better], b[better]], chosen[d, a[better], b[better]] = (
                        seconds[better],
                        i,
                    )
            tables.append(table)
            taken.append(chosen)
        found = least_step(tables, self.devices, self.global_batch // batch)
        if found is None:
            return None
        stages = []
        for behind, (first, last, d) in zip(range(len(found[1]))[::-1], found[1], strict=True):
            way = self.ways(batch, d)[taken[behind][d, first, last]]
            stages.append(way.stage(int(cuts[first]), int(cuts[last]), behind, self.memory)[1])
        return Found(batch, tuple(stages))

    @cache  # noqa: B019
    def ways(self, batch: int, devices: int) -> list[Way]:
        """How all operators may run on so many devices."""
        return list(self._ways(batch, devices))

    def _ways(self, batch: int, devices: int) -> Iterator[Way]:
        """How all operators may run on so many devices: all alike, or mixed where that moves nothing."""
        splits = [
            Split(tensor, devices // tensor, manner)
            for size, tensor, manner in self.recorded.profiles
            if devices % tensor == 0 and size * (devices // tensor) == batch
        ]
        units = len(self.recorded.names)
        free = devices == 1 or not self.recorded.moves_between_splits
        if splits and free and len(splits) > 1:
            profiles = [self.recorded.profiles[batch // s.data, s.tensor, s.manner] for s in splits]
            mixes = {
                tuple(
                    np.argmin(
                        [p.forward + p.backward + price * p.megabytes for p in profiles], axis=0
                    )
                )
                for price in PER_MEGABYTE
            }
            for mix in sorted(mixes):
                yield Way(self.recorded, batch, tuple(splits[i] for i in mix))
        yield from (
            Way(self.recorded, batch, (s,) * units) for s in splits if not free or len(splits) == 1
        )


class _Cuts:
    """The stages of a plan with other cuts, between any two operators: devices stay, how they are used may change."""

    def __init__(self, problem: Problem, plan: Found) -> None:
        self.problem, self.plan = problem, plan
        self.end = len(problem.recorded.names)

    def moved(self) -> Found:
        """The slowest stage is made faster by halving, until the plan no longer changes by much."""
        best, problem = self.plan, self.problem
        high = max(stage.seconds for stage in problem.counted(best))
        low = high * (1 - MOST_GAINED)
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            found = self._within(middle)
            if found is None:
                low = middle
            else:
                best = min(best, found, key=problem.seconds)
                high = min(middle, max(stage.seconds for stage in problem.counted(found)))
        return best

    def _within(self, slowest: float) -> Found | None:
        """Stages no slower than that, each to the furthest positions it can reach from those before it."""
        paths: dict[int, tuple[Stage, ...]] = {0: ()}
        stages = self.plan.stages
        for behind, stage in zip(range(len(stages))[::-1], stages, strict=True):
            reached: dict[int, tuple[Stage, ...]] = {}
            for first in sorted(paths)[::-1]:
                for own in self._reach(first, stage.devices, behind, slowest):
                    reached.setdefault(own.last, (*paths[first], own))
            paths = {last: reached[last] for last in sorted(reached)[-WIDTH:]}
        return Found(self.plan.batch, paths[self.end]) if self.end in paths else None

    def _reach(self, first: int, devices: int, behind: int, slowest: float) -> Iterator[Stage]:
        """The longest stages that begin there."""
        ways = self.problem.ways(self.plan.batch, devices)
        plain = np.min(
            [way.plain(first, np.arange(first + 1, self.end + 1)) for way in ways], axis=0
        )
        found = 0
        for last in (np.flatnonzero(plain <= slowest) + first + 1)[::-1] if behind else [self.end]:
            seconds, stage = self._stage(first, int(last), devices, behind)
            if stage and seconds <= slowest:
                yield stage
                found += 1
            if found == WIDTH:
                break

    @cache  # noqa: B019
    def _stage(
        self, first: int, last: int, devices: int, behind: int
    ) -> tuple[float, Stage | None]:
        ways = self.problem.ways(self.plan.batch, devices)
        return min(
            (way.stage(first, last, behind, self.problem.memory) for way in ways),
            key=lambda found: found[0],
        )
