"""Aceso's inputs: stages of operators, each split and replicated, with recomputation, under a limit of memory.

The search is over microbatches, cuts between any two operators, the devices of each stage, how it is split
over them, and what is recomputed. Operators of a stage are split differently where that moves no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.planner.pipeline.partition import least_step

from . import neutral
from .aceso_profile import Counted, Recorded, Split, Stage
from .aceso_stages import Way

PER_MEGABYTE = (0.0, 0.3e-6, 1e-6, 3e-6)  # seconds that a mix of splits would give for a MB less


@dataclass(frozen=True)
class Found:
    """A plan: samples per microbatch over all replicas, and the stages."""

    batch: int
    stages: tuple[Stage, ...]


class Problem:
    """One model on so many devices with so many MB each."""

    def __init__(self, recorded: Recorded, devices: int, memory: float, global_batch: int) -> None:
        self.recorded, self.devices, self.memory, self.global_batch = recorded, devices, memory, global_batch

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
        return max(stage.memory(behind) for stage, behind in zip(stages, range(len(stages))[::-1], strict=True))

    def simulated(self, plan: Found) -> float:
        """Seconds of a simulated step; what leaves a stage is sent beside computing."""
        stages = [neutral.Stage(s.forward, s.backward, s.leaving) for s in self.counted(plan)]
        return neutral.step_seconds(stages, self.global_batch // plan.batch)

    # ------------------------------------------------------------ the search

    def best(self) -> Found | None:
        """First with cuts between layers alone, then with all cuts that could still be better."""
        best: Found | None = None
        for cuts in (self._between_layers, range(len(self.recorded.names) + 1)):
            for batch in self._batches():
                found = self._with_batch(batch, np.array(cuts), self.seconds(best) if best else np.inf)
                if found and (best is None or self.seconds(found) < self.seconds(best)):
                    best = found
        return best

    @property
    def _between_layers(self) -> list[int]:
        return sorted({0, len(self.recorded.names), *(layer.start for layer in self.recorded.layers)})

    def _batches(self) -> list[int]:
        most = max(size for size, _, _ in self.recorded.profiles) * self.devices
        return [batch for batch in range(1, most + 1) if self.global_batch % batch == 0][::-1]

    def _with_batch(self, batch: int, cuts: np.ndarray, bound: float) -> Found | None:
        slowest = bound / (self.global_batch // batch)
        ways = {d: list(self._ways(batch, d)) for d in range(1, self.devices + 1)}
        windows = _Windows(ways, self.devices, slowest)
        shape = (self.devices + 1, len(cuts), len(cuts))
        tables = [np.full(shape, np.inf) for _ in range(self.devices)]
        taken = [np.zeros(shape, int) for _ in range(self.devices)]
        for behind, (table, chosen) in enumerate(zip(tables, taken, strict=True)):
            for d in range(1, self.devices - behind + 1):
                a, b = windows.stages(cuts, d, behind)
                for i, way in enumerate(ways[d]):
                    seconds = way.seconds(cuts[a], cuts[b], behind, self.memory, slowest)
                    better = seconds < table[d, a, b]
                    table[d, a[better], b[better]], chosen[d, a[better], b[better]] = seconds[better], i
        found = least_step(tables, self.devices, self.global_batch // batch)
        if found is None:
            return None
        stages = []
        for behind, (first, last, d) in zip(range(len(found[1]))[::-1], found[1], strict=True):
            way = ways[d][taken[behind][d, first, last]]
            stages.append(way.stage(int(cuts[first]), int(cuts[last]), behind, self.memory))
        return Found(batch, tuple(stages))

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
                tuple(np.argmin([p.forward + p.backward + price * p.megabytes for p in profiles], axis=0))
                for price in PER_MEGABYTE
            }
            for mix in sorted(mixes):
                yield Way(self.recorded, batch, tuple(splits[i] for i in mix))
        yield from (Way(self.recorded, batch, (s,) * units) for s in splits if not free or len(splits) == 1)


class _Windows:
    """Where stages can lie if none may be slower than some seconds: the devices before and behind must suffice."""

    def __init__(self, ways: dict[int, Sequence[Way]], devices: int, slowest: float) -> None:
        self.devices, self.slowest = devices, slowest
        work = np.min([d * way.each for d, some in ways.items() for way in some], axis=0)  # device-seconds
        self.before = np.concatenate([[0.0], np.cumsum(work)])

    def stages(self, cuts: np.ndarray, devices: int, behind: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (among the cuts) of all stages on so many devices with so many stages behind."""
        left = self.devices - devices
        before, after = self.before[cuts], self.before[-1] - self.before[cuts]
        starts = before <= self.slowest * (left - behind) if left > behind else before == 0
        ends = (after <= self.slowest * left) & (after > 0) if behind else cuts == cuts[-1]
        possible = starts[:, None] & ends[None, :] & (cuts[:, None] < cuts[None, :])
        return np.nonzero(possible & (before[None, :] - before[:, None] <= self.slowest * devices))
