"""PipeDream's optimizer: stages replicated on machines within machines, the slowest stage as fast as can be.

Source: Narayanan et al., PipeDream, SOSP 2019, section 3.1, as its published optimizer does it: a stage
on m replicas takes (compute + synchronization) / m; where it does not begin the pipeline of its level,
also no less than its activations take to arrive and to leave. Seconds of an inner level's pipeline are
the compute of a stage one level up. Activations count, as in the anchor's published run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from meshwright.planner.pipeline.partition import BestCuts, best_cuts

from . import nearby
from .neutral import Evaluator, Stage, step_seconds

MICROBATCHES = 256  # of the simulated run


@dataclass(frozen=True)
class Part:
    """Units first to last - 1 on so many replicas, each a pipeline of the parts inside (or one machine)."""

    first: int
    last: int
    replicas: int
    inside: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """A stage with no parts inside: its replicas per level, innermost first, and the level of the cut behind it."""

    part: Part
    replicas: tuple[int, ...]
    cut: int


class Graph:
    """Units in an order that respects the graph: sums up to each position, and what crosses it.

    before[a, b]: whether a stage can lie between two positions.
    """

    def __init__(self, file: dict[str, Any]) -> None:
        states = file["antichain_states"]
        self.compute = np.array([0.0, *(s["cum_compute_ms"] * 1e-3 for s in states)])
        self.weights = np.array([0.0, *(s["cum_param"] for s in states)])
        self.crossing = np.array([0.0, *(s["out_act"] for s in states)])
        self.crossing[-1] = 0.0
        self.before = np.zeros((len(states) + 1,) * 2, bool)
        for b, state in enumerate(states, 1):
            self.before[[0, *(p + 1 for p in state["preds"])], b] = True
        forward = sum(node["fwd_ms"] for node in file["nodes"])
        self.forward = forward / (forward + sum(node["bwd_ms"] for node in file["nodes"]))

    @property
    def end(self) -> int:
        return len(self.compute) - 1


class Throughput:
    """Seconds of the slowest stage. Per level, innermost first: machines, bytes/s between them.

    straight: no stage is replicated.
    """

    def __init__(
        self, graph: Graph, machines: Sequence[int], bandwidths: Sequence[float], straight: bool
    ) -> None:
        self.graph, self.machines, self.bandwidths, self.straight = (
            graph,
            machines,
            bandwidths,
            straight,
        )
        self.within = [1, *machines]

    def synchronization(self, level: int, weights: Any, replicas: int) -> Any:
        return 4 * (replicas - 1) * weights / (self.bandwidths[level] * replicas)

    def stage(self, level: int, a: Any, b: Any, replicas: int, compute: Any, begins: bool) -> Any:
        """Seconds of a stage (or of arrays of stages) whose replica computes that long."""
        sync = self.synchronization(level, self.graph.weights[b] - self.graph.weights[a], replicas)
        if begins:
            return (compute + sync / self.within[level]) / replicas
        crossing = np.maximum(self.graph.crossing[a], self.graph.crossing[b])
        return np.maximum(
            (compute + sync) / replicas, 2 * crossing / (self.bandwidths[level] * replicas)
        )

    def of(self, parts: Sequence[Part], level: int | None = None) -> float:
        """Of a whole plan, or of the parts inside one of its parts."""
        level = len(self.machines) - 1 if level is None else level
        return max(
            float(self.stage(level, p.first, p.last, p.replicas, self._computing(p, level), i == 0))
            for i, p in enumerate(parts)
        )

    def _computing(self, part: Part, level: int) -> float:
        if level:
            return self.of(part.inside, level - 1)
        return float(self.graph.compute[part.last] - self.graph.compute[part.first])

    # ------------------------------------------------------------ search

    def best(self, latest: bool = False) -> tuple[Part, ...]:
        """The plan with the fastest slowest stage, on all machines; among equals, with late cuts or early ones."""
        end, cuts = self.graph.end, self.solve(latest)
        return self._parts(cuts, len(cuts) - 1, 0, end)

    def solve(self, latest: bool) -> list[list[BestCuts]]:
        """Per level, the best pipelines from each position (at the outermost level from the first)."""
        compute = self.graph.compute[None, :] - self.graph.compute[:, None]
        solved = []
        for level, machines in enumerate(self.machines):
            outermost = level == len(self.machines) - 1
            first, later = self._tables(level, compute)
            starts = range(1 if outermost else self.graph.end)
            solved.append(
                [best_cuts(start, first, later, machines, latest=latest) for start in starts]
            )
            if not outermost:
                compute = np.stack(
                    [
                        *(c.seconds[machines] for c in solved[-1]),
                        np.full(self.graph.end + 1, np.inf),
                    ]
                )
        return solved

    def _tables(self, level: int, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(self.graph.end + 1)
        a, b = positions[:, None], positions[None, :]
        possible = np.where(self.graph.before, compute, np.inf)
        shape = (self.machines[level] + 1, *possible.shape)
        first, later = np.full(shape, np.inf), np.full(shape, np.inf)
        for m in range(1, 2 if self.straight else self.machines[level] + 1):
            first[m] = self.stage(level, a, b, m, possible, True)
            later[m] = self.stage(level, a, b, m, possible, False)
        return first, later

    def _parts(
        self, solved: list[list[BestCuts]], level: int, start: int, end: int
    ) -> tuple[Part, ...]:
        return tuple(
            Part(a, b, m, self._parts(solved, level - 1, a, b) if level else ())
            for a, b, m in solved[level][start].pieces(end, self.machines[level])
        )

    # ------------------------------------------------------------ for the simulator

    def calm(self, slowest: float, pace: float) -> tuple[Part, ...] | None:
        """The plan whose cuts take least to cross, of those without an inner stage slower than that.

        pace: the same, in seconds per minibatch as they are simulated.
        """
        level = len(self.machines) - 1
        solved = self._calm(level, (), slowest, pace)
        if np.isinf(solved.cuts[0].seconds[self.machines[level], self.graph.end]):
            return None
        return self._calm_parts(solved, level, 0, self.graph.end)

    def _calm(self, level: int, outer: tuple[int, ...], slowest: float, pace: float) -> _Calm:
        """Per start, the least seconds in which a minibatch crosses all cuts; replicas of the levels above multiply."""
        graph, machines, times = self.graph, self.machines[level], int(np.prod(outer, initial=1))
        positions = np.arange(graph.end + 1)
        a, b = positions[:, None], positions[None, :]
        compute = np.where(graph.before, graph.compute[None, :] - graph.compute[:, None], np.inf)
        crossing = np.broadcast_to(
            2 * graph.crossing[:, None] / self.bandwidths[level], compute.shape
        )
        first = np.full((machines + 1, *compute.shape), np.inf)
        later, inside = first.copy(), {}
        for m in range(1, 2 if self.straight else machines + 1):
            if level:
                inside[m] = self._calm(level - 1, (m, *outer), slowest, pace)
                ends = [c.seconds[self.machines[level - 1]] for c in inside[m].cuts]
                first[m] = np.where(
                    graph.before, np.stack([*ends, np.full(graph.end + 1, np.inf)]), np.inf
                )
                later[m] = first[m] + crossing
                continue
            weights = graph.weights[None, :] - graph.weights[:, None]
            busy = compute + self._all_synchronization(weights, (m, *outer))
            sending = np.maximum(graph.crossing[a], graph.crossing[b]) / self.bandwidths[level]
            paced = np.maximum(busy, sending) / (m * times) <= pace
            for table, begins, cost in ((first, True, 0.0), (later, False, crossing)):
                fits = self.stage(level, a, b, m, compute, begins) <= slowest * times
                table[m] = np.where(paced & fits, cost, np.inf)
        outermost = level == len(self.machines) - 1
        starts = range(1 if outermost else graph.end)
        return _Calm([best_cuts(start, first, later, machines, np.add) for start in starts], inside)

    def _calm_parts(self, solved: _Calm, level: int, start: int, end: int) -> tuple[Part, ...]:
        return tuple(
            Part(a, b, m, self._calm_parts(solved.inside[m], level - 1, a, b) if level else ())
            for a, b, m in solved.cuts[start].pieces(end, self.machines[level])
        )

    def simulated(self, parts: Sequence[Part], evaluator: Evaluator = step_seconds) -> float:
        """Seconds per minibatch of a simulated run; replicas synchronize after each of their minibatches."""
        graph, stages = self.graph, []
        leaves = list(self.leaves(parts, len(self.machines) - 1, ()))
        for leaf in leaves:
            part = leaf.part
            compute = float(graph.compute[part.last] - graph.compute[part.first])
            weights = float(graph.weights[part.last] - graph.weights[part.first])
            sync = self._all_synchronization(weights, leaf.replicas)
            send = float(graph.crossing[part.last]) / self.bandwidths[leaf.cut]
            forward = compute * graph.forward
            stages.append(Stage(forward, compute - forward + sync, send, prod(leaf.replicas)))
        return evaluator(stages, MICROBATCHES) / MICROBATCHES

    def around(self, parts: Sequence[Part], level: int | None = None) -> Iterator[tuple[Part, ...]]:
        """Plans one step away: cuts and replicas of one level changed, the parts inside stretched to fit."""
        level = len(self.machines) - 1 if level is None else level
        stages = [nearby.Stage(part.first, part.last, part.replicas) for part in parts]
        widths = nearby.SINGLE if self.straight else nearby.SHARED
        for pipeline in nearby.neighbours(stages, self._between, widths):
            new = tuple(self._stretched(parts[s.like], s.first, s.last, s.width) for s in pipeline)
            if all(new):
                yield new
        if level:
            for i, part in enumerate(parts):
                for inside in self.around(part.inside, level - 1):
                    yield (*parts[:i], replace(part, inside=inside), *parts[i + 1 :])

    def _between(self, a: int, b: int) -> np.ndarray:
        before = self.graph.before
        return np.flatnonzero(before[a] & before[:, b])

    def _stretched(self, part: Part, first: int, last: int, replicas: int) -> Part | None:
        """Its first and last parts inside take the change; None where they cannot."""
        if not self.graph.before[first, last]:
            return None
        ends = [first, *(one.last for one in part.inside[:-1]), last]
        inside = [
            self._stretched(one, *span, one.replicas)
            for one, span in zip(part.inside, pairwise(ends), strict=False)
        ]
        return Part(first, last, replicas, tuple(inside)) if all(inside) else None

    def _all_synchronization(self, weights: Any, replicas: Sequence[int]) -> Any:
        """Seconds per minibatch of a replica, over the replicas of all levels."""
        return sum(
            self.synchronization(i, weights, r) / self.within[i] for i, r in enumerate(replicas)
        )

    def leaves(
        self, parts: Sequence[Part], level: int, outer: tuple[int, ...], cut: int = 0
    ) -> Any:
        for part, following in pairwise([*parts, None]):
            own = (part.replicas, *outer)
            behind = level if following else cut
            if level:
                yield from self.leaves(part.inside, level - 1, own, behind)
            else:
                yield Leaf(part, own, behind)


@dataclass(frozen=True)
class _Calm:
    """Per start, the best pipelines of a level; by replicas of a stage, those inside it."""

    cuts: list[BestCuts]
    inside: dict[int, _Calm]


def read_plan(stages: Sequence[dict[str, Any]], level: int) -> tuple[Part, ...]:
    """A published plan; parts of an inner level lie inside those of the next."""
    mine = [s for s in stages if s["level"] == level]
    parts = []
    for s in mine:
        inside = [
            t
            for t in stages
            if t["level"] < level and s["start"] <= t["start"] and t["end"] <= s["end"]
        ]
        parts.append(
            Part(
                s["start"],
                s["end"],
                s["replication"],
                read_plan(inside, level - 1) if level > 1 else (),
            )
        )
    return tuple(parts)
