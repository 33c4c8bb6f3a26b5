"""DAPPLE's planner: synchronous pipelines with replicated stages, by its formula for the seconds of a step.

    (M - 1) * slowest  +  one microbatch through all stages and cuts  +  all-reduce that nothing hides

Source: Fan et al., DAPPLE, PPoPP 2021, section 4, as its published planner does it. R pipelines side by
side share a batch; stages split a microbatch over their devices, and lie on consecutive ones. The planner
counts the first layer of the next stage among the weights that a stage all-reduces; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import neutral


@dataclass(frozen=True)
class Plan:
    """Pipelines side by side; per stage the first unit, one past the last, and devices in each pipeline."""

    pipelines: int
    stages: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Network:
    """bytes/s: between two devices of a machine, between machines for one pair, and for all at once."""

    inside: float
    pair: float
    together: float


class Latency:
    """Seconds of a step.

    Args:
        machines: for each, one past its last device.
        both_ways: cuts count twice among the slowest stage (the planner does so unless it only cuts once).
    """

    def __init__(
        self, file: dict[str, Any], batch: int, microbatch: int, machines: Sequence[int], network: Network, both_ways: bool
    ) -> None:
        scale = batch / file["profile_batch"]
        layers = file["layers"]
        self.work = np.concatenate([[0.0], np.cumsum([layer["compute_s"] for layer in layers])]) * scale
        self.weights = np.concatenate([[0.0], np.cumsum([layer["param"] for layer in layers])])
        self.leaving = np.array([0.0, *(layer["out_activation"] for layer in layers)]) * scale
        self.batch, self.microbatch, self.machines, self.network = batch, microbatch, machines, network
        self.both_ways = both_ways

    @property
    def units(self) -> int:
        return len(self.work) - 1

    @property
    def devices(self) -> int:
        return self.machines[-1]

    def microbatches(self, pipelines: int) -> int:
        return self.batch // pipelines // self.microbatch

    def of(self, plan: Plan) -> float:
        """By the formula."""
        many = self.microbatches(plan.pipelines)
        cuts = self._cuts(plan)
        ways = 2 if self.both_ways else 1
        slowest = max(
            *((self.work[b] - self.work[a]) / n / plan.pipelines for a, b, n in plan.stages),
            *(ways * cut for cut in cuts), 0.0,
        ) / many  # fmt: skip
        through = (self.work[-1] + sum(cuts)) / plan.pipelines / many
        exposed = max(0.0, *(reduce - i * slowest for i, reduce in enumerate(self._reduces(plan))))
        return slowest * (many - 1) + through + exposed

    def _spans(self, plan: Plan) -> list[tuple[int, int]]:
        """The devices of each stage in all pipelines."""
        ends = np.cumsum([n * plan.pipelines for _, _, n in plan.stages])
        return [(int(end) - n * plan.pipelines, int(end)) for end, (_, _, n) in zip(ends, plan.stages, strict=True)]

    def _cuts(self, plan: Plan) -> list[float]:
        """Seconds in which all of a batch crosses each cut."""
        spans = self._spans(plan)
        pairs = zip(spans, spans[1:], plan.stages, strict=False)
        return [self.crossing(one, other) * float(self.leaving[stage[1]]) for one, other, stage in pairs]

    def _reduces(self, plan: Plan) -> list[float]:
        return [
            self.reducing(span) * float(self.weights[min(b + 1, self.units)] - self.weights[a])
            for span, (a, b, _) in zip(self._spans(plan), plan.stages, strict=True)
        ]

    def machine(self, device: int) -> int:
        return next(i for i, end in enumerate(self.machines) if device < end)

    def crossing(self, one: tuple[int, int], other: tuple[int, int]) -> float:
        """Seconds per byte from some devices to the next ones."""
        network, here = self.network, self.machine(other[0])
        if here != self.machine(other[1] - 1):
            return 1 / network.together
        away = sum(self.machine(device) != here for device in range(*one))
        return away / (one[1] - one[0]) / network.pair if away else 1 / network.inside

    def reducing(self, span: tuple[int, int]) -> float:
        """Seconds per byte of an all-reduce."""
        count = span[1] - span[0]
        if count == 1:
            return 0.0
        apart = self.machine(span[0]) != self.machine(span[1] - 1)
        rate = self.network.together if apart else self.network.inside * (count // 2)
        return 2 * (count - 1) / count / rate

    def simulated(self, plan: Plan) -> float:
        """Seconds of a simulated step: each pipeline's microbatches, then the all-reduces."""
        many = self.microbatches(plan.pipelines)
        stages = []
        for (a, b, n), cut, reduce in zip(plan.stages, [*self._cuts(plan), 0.0], self._reduces(plan), strict=True):
            both = float(self.work[b] - self.work[a]) / n / plan.pipelines / many
            stages.append(neutral.Stage(both / 2, both / 2, cut / plan.pipelines / many, last=reduce))
        return neutral.step_seconds(stages, many)


def read_plan(row: dict[str, Any], units: int) -> Plan:
    """A published plan; its last stage ends one unit early."""
    firsts = [int(first) for first, _, _ in row["stages"]]
    counts = [int(count) for _, _, count in row["stages"]]
    return Plan(row["replicas"], tuple(zip(firsts, [*firsts[1:], units], counts, strict=True)))
