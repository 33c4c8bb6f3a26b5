"""DAPPLE's planner: synchronous pipelines with replicated stages, by its formula for the seconds of a step.

    (M - 1) * slowest  +  one microbatch through all stages and cuts  +  all-reduce that nothing hides

Source: Fan et al., DAPPLE, PPoPP 2021, section 4, as its published planner does it. R pipelines side by
side share a batch; stages split a microbatch over their devices, and lie on consecutive ones. The planner
counts the first layer of the next stage among the weights that a stage all-reduces; so does this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from meshwright.planner.pipeline.partition import halved

from . import nearby, neutral

NEAR = 1e-9  # a limit falls by more than this part
STEP = 0.98  # and to this part at most


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
    """

    def __init__(
        self,
        file: dict[str, Any],
        batch: int,
        microbatch: int,
        machines: Sequence[int],
        network: Network,
    ) -> None:
        scale = batch / file["profile_batch"]
        layers = file["layers"]
        self.work = (
            np.concatenate([[0.0], np.cumsum([layer["compute_s"] for layer in layers])]) * scale
        )
        self.weights = np.concatenate([[0.0], np.cumsum([layer["param"] for layer in layers])])
        self.leaving = np.array([0.0, *(layer["out_activation"] for layer in layers)]) * scale
        self.batch, self.microbatch, self.machines, self.network = (
            batch,
            microbatch,
            machines,
            network,
        )

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
        many, slowest = self.microbatches(plan.pipelines), self.slowest(plan)
        return float(slowest * (many - 1) + self.through(plan) + self.exposed(plan, slowest))

    def through(self, plan: Plan) -> float:
        """Seconds of one microbatch through all stages and cuts."""
        return (
            (self.work[-1] + sum(self._cuts(plan)))
            / plan.pipelines
            / self.microbatches(plan.pipelines)
        )

    def exposed(self, plan: Plan, slowest: float) -> float:
        """Seconds of all-reduces that no stage's last microbatches hide, if the slowest stage takes so long."""
        return max(0.0, *(reduce - i * slowest for i, reduce in enumerate(self._reduces(plan))))

    def slowest(self, plan: Plan) -> float:
        """Seconds of the slowest stage or cut per microbatch.

        Cuts count both ways, except in one pipeline of two stages on all devices, which the planner
        searches for by itself.
        """
        halves = plan.pipelines == 1 and [n for _, _, n in plan.stages[:-1]] == [
            self.devices - plan.stages[-1][2]
        ]
        stages = [
            float(self.work[b] - self.work[a]) / n / plan.pipelines for a, b, n in plan.stages
        ]
        cuts = [cut * (1 if halves else 2) for cut in self._cuts(plan)]
        return max(stages + cuts) / self.microbatches(plan.pipelines)

    def _spans(self, plan: Plan) -> list[tuple[int, int]]:
        """The devices of each stage in all pipelines."""
        ends = np.cumsum([n * plan.pipelines for _, _, n in plan.stages])
        return [
            (int(end) - n * plan.pipelines, int(end))
            for end, (_, _, n) in zip(ends, plan.stages, strict=True)
        ]

    def _cuts(self, plan: Plan) -> list[float]:
        """Seconds in which all of a batch crosses each cut."""
        spans = self._spans(plan)
        pairs = zip(spans, spans[1:], plan.stages, strict=False)
        return [
            self.crossing(one, other) * float(self.leaving[stage[1]]) for one, other, stage in pairs
        ]

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

    def simulated(self, plan: Plan, evaluator: neutral.Evaluator = neutral.step_seconds) -> float:
        """Seconds of a simulated step: each pipeline's microbatches, then the all-reduces."""
        many = self.microbatches(plan.pipelines)
        stages = []
        for (a, b, n), cut, reduce in zip(
            plan.stages, [*self._cuts(plan), 0.0], self._reduces(plan), strict=True
        ):
            both = float(self.work[b] - self.work[a]) / n / plan.pipelines / many
            stages.append(
                neutral.Stage(both / 2, both / 2, cut / plan.pipelines / many, last=reduce)
            )
        return evaluator(stages, many)

    def around(self, plan: Plan) -> Iterator[Plan]:
        """Plans of as many pipelines on as many devices, one step away."""
        stages = [nearby.Stage(*stage) for stage in plan.stages]
        for pipeline in nearby.neighbours(stages, lambda a, b: range(a + 1, b), nearby.SHARED):
            yield Plan(plan.pipelines, tuple(stage[:3] for stage in pipeline))

    # ------------------------------------------------------------ search

    def plans(self) -> list[Plan]:
        """Plans whose stages lie on consecutive devices, the one with the least seconds first: all met on the way."""
        best = Plan(1, ((0, self.units, self.devices),))
        seen = {best: self.of(best)}
        searches = [_Search(self, 1, 2, 1, seen)]
        searches += [
            _Search(self, r, self.units, 2, seen)
            for r in range(1, self.devices + 1)
            if self.microbatches(r)
        ]
        fastest = [search.fastest() for search in searches]
        for search, plan in zip(searches, fastest, strict=True):
            if plan:
                search.fall(self.slowest(plan) * (1 - 1e-4))
        return sorted(seen, key=lambda plan: seen[plan])


class _Search:
    """Plans of so many pipelines side by side, by dynamic programs under falling limits.

    ways: how often a cut counts against the slowest stage; seen: every plan met, with its seconds.
    """

    def __init__(
        self, objective: Latency, pipelines: int, stages: int, ways: int, seen: dict[Plan, float]
    ) -> None:
        self.objective, self.pipelines, self.seen = objective, pipelines, seen
        self.devices, self.many = objective.devices // pipelines, objective.microbatches(pipelines)
        self.through = objective.work[-1] / pipelines / self.many
        self.most, self.ways = min(stages, self.devices, objective.units), ways
        counts = range(self.devices + 1)
        self.crossing = np.full((self.devices + 1,) * 3, np.inf)
        self.reducing = np.full((self.devices + 1,) * 2, np.inf)
        for g in counts:
            for n in range(1, self.devices - g + 1):
                span = (g * pipelines, (g + n) * pipelines)
                self.reducing[g, n] = objective.reducing(span)
                for before in range(1, g + 1):
                    self.crossing[g, before, n] = objective.crossing(
                        ((g - before) * pipelines, span[0]), span
                    )

    def fastest(self) -> Plan | None:
        """The plan whose slowest stage or cut is fastest; None where no plan could be the best."""
        low = self.through / self.objective.devices * self.pipelines
        if low * (self.many - 1) + self.through >= self.best:
            return None
        return halved(
            lambda limit: self._within(limit, np.inf),
            self.objective.slowest,
            low,
            2 * self.through,
            1e-4,
        )

    def fall(self, low: float) -> None:
        """Meet all plans that may be better than the best so far; no slowest stage is faster than `low`.

        For a limit on the slowest stage, the cuts cost least; then all-reduces may show less and less, at the
        cost of more cuts.
        """
        o, limit = self.objective, np.inf
        while True:
            limit = min(limit, (self.best - self.through) / max(self.many - 1, 1) * (1 - 1e-12))
            found = self._within(limit, np.inf)
            if found is None:
                return
            next_limit = max(o.slowest(found), limit * STEP) * (1 - NEAR)
            while found is not None and low * (self.many - 1) + o.through(found) < self.best:
                exposed = o.exposed(found, limit)
                found = self._within(limit, exposed * (1 - NEAR)) if exposed > 0 else None
            limit = next_limit

    @property
    def best(self) -> float:
        return min(self.seen.values())

    def _within(self, slowest: float, exposed: float) -> Plan | None:
        """The plan with the least cuts whose stages and cuts take no longer, and whose all-reduces show no more."""
        o, share = self.objective, 1 / self.pipelines / self.many
        at, before, ends = _least_cuts(
            o.work * share, o.leaving * share, o.weights, self.crossing, self.reducing,
            self.most, self.ways * self.pipelines, slowest, exposed,
        )  # fmt: skip
        if ends[0] < 0:
            return None
        (k, used, n), end, stages = ends, o.units, []
        for stage in range(k, -1, -1):
            first, own = int(at[stage, end, used, n]), int(n)
            n = before[stage, end, used, own]
            stages.append((first, end, own))
            end, used = first, used - own
        plan = Plan(self.pipelines, tuple(reversed(stages)))
        self.seen[plan] = o.of(plan)
        return plan


@numba.njit(cache=True)
def _least_cuts(work, leaving, weights, crossing, reducing, most, ways, slowest, exposed):
    """Where each stage begins, and the devices of the stage before it, by [stage, end, devices used, own devices]."""
    units, devices = len(work) - 1, len(reducing) - 1
    shape = (most, units + 1, devices + 1, devices + 1)
    cuts = np.full(shape, np.inf)
    at, before = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    for k in range(most):
        hidden = exposed + k * slowest
        for a in range(units):
            if (k == 0) != (a == 0):
                continue
            for used in range(devices):
                for n in range(1, devices - used + 1):
                    least, from_ = np.inf, 0
                    if k == 0 and used == 0:
                        least = 0.0
                    elif k > 0:
                        for own in range(1, used + 1):
                            cut = crossing[used, own, n] * leaving[a]
                            if ways * cut <= slowest and cuts[k - 1, a, used, own] + cut < least:
                                least, from_ = cuts[k - 1, a, used, own] + cut, own
                    if least == np.inf:
                        continue
                    for b in range(a + 1, units + 1):
                        reduce = reducing[used, n] * (weights[min(b + 1, units)] - weights[a])
                        if (work[b] - work[a]) / n > slowest or reduce > hidden:
                            break
                        if least < cuts[k, b, used + n, n]:
                            cuts[k, b, used + n, n] = least
                            at[k, b, used + n, n], before[k, b, used + n, n] = a, from_
    best, ends = np.inf, (-1, 0, 0)
    for k in range(most):
        for used in range(devices + 1):
            for n in range(1, devices + 1):
                if cuts[k, units, used, n] < best:
                    best, ends = cuts[k, units, used, n], (k, used, n)
    return at, before, ends


def read_plan(row: dict[str, Any], units: int) -> Plan:
    """A published plan; its last stage ends one unit early."""
    firsts = [int(first) for first, _, _ in row["stages"]]
    counts = [int(count) for _, _, count in row["stages"]]
    return Plan(row["replicas"], tuple(zip(firsts, [*firsts[1:], units], counts, strict=True)))
