"""Piper's inputs: stages of a graph with tensor-parallel and data-parallel degrees, recomputation, limited memory.

Source: Tarnawski et al., Piper, NeurIPS 2021, section 3, and its published code: a stage's seconds per
sample are (compute + communication at its ends) / d, plus keeping d replicas alike once per batch. With
s the sum of data-parallel degrees from this stage to the last, it holds ceil(s / d) samples in flight.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import ceil, inf, prod
from operator import mul
from typing import Any, NamedTuple

from meshwright.planner.pipeline.ideals import closed_sets, members
from meshwright.planner.pipeline.partition import halved

from . import nearby, neutral

GIB = 1 << 30
BANDWIDTH = 25 * GIB  # of all published cases, bytes/s
SETS = 5000  # closed sets that are still searched
Width = tuple[int, int]  # of a stage: how many ways each unit is split, replicas


class Stage(NamedTuple):
    """Units (a set), how many ways each is split, replicas; which units are recomputed (a set)."""

    units: int
    tensor: int
    data: int
    recomputed: int


@dataclass(frozen=True)
class Unit:
    """One unit split in one way: seconds per sample, bytes of weights, bytes held: `a` per sample in flight and `b`.

    crossing: bytes each way, by the unit on the other side of an edge, if it is in another stage.
    """

    seconds: float
    weights: float
    a: float
    b: float
    crossing: dict[int, float]


class Graph:
    """Units by number; `ways[v][t]`: unit v split t ways, as it is and with its activations recomputed."""

    def __init__(self, file: dict[str, Any]) -> None:
        number = {node["id"]: i for i, node in enumerate(file["nodes"])}
        self.edges = [(number[e["sourceId"]], number[e["destId"]]) for e in file["edges"]]
        costs = {
            (number[e["sourceId"]], number[e["destId"]]): e["communicationCost"]
            for e in file["edges"]
        }
        self.ways = [
            {int(t): _unit(v, ways, number, costs) for t, ways in node["TMPCs"].items()}
            for v, node in enumerate(file["nodes"])
        ]
        # what is still to do when a pipeline's first stages are cut off: closed under "comes after"
        self.left = closed_sets(len(self.ways), [(b, a) for a, b in self.edges], SETS)


def _unit(
    v: int, ways: Sequence[dict[str, Any]], number: dict[int, int], costs: Any
) -> tuple[Unit, Unit]:
    found = {}
    for way in ways:
        crossing = {
            number[int(u)]: x + costs[number[int(u)], v] for u, x in way["syncTimeFw"].items()
        }
        crossing |= {
            number[int(w)]: x + costs[v, number[int(w)]] for w, x in way["syncTimeBw"].items()
        }
        found[way["id"]] = Unit(
            way["timePerSample"],
            way["parameterSize"],
            way["memoryUsageA"],
            way["memoryUsageB"],
            crossing,
        )
    return found["vanilla"], found.get("activation recomp", found["vanilla"])


class Throughput:
    """Seconds per sample of the slowest stage, on so many devices with so many bytes each."""

    def __init__(self, graph: Graph, devices: int, memory: float, batch: int) -> None:
        self.graph, self.devices, self.memory, self.batch = graph, devices, memory, batch
        self.degrees = [d for d in range(1, min(devices, batch) + 1) if batch % d == 0]

    def of(self, stages: Sequence[Stage]) -> float:
        """Seconds per sample of a whole plan; inf where it does not fit."""
        return max(
            self._priced(stage, held) for stage, held in zip(stages, self.held(stages), strict=True)
        )

    def held(self, stages: Sequence[Stage]) -> list[int]:
        """Samples in flight on each replica of each stage."""
        behind = [*accumulate(stage.data for stage in reversed(stages))][::-1]
        return [ceil(many / stage.data) for many, stage in zip(behind, stages, strict=True)]

    def _priced(self, stage: Stage, held: int) -> float:
        units = [
            self.graph.ways[v][stage.tensor][stage.recomputed >> v & 1]
            for v in members(stage.units)
        ]
        if sum(u.a * held + u.b for u in units) > self.memory:
            return inf
        weights = sum(u.weights for u in units)
        crossing = 2 * sum(
            x for u in units for w, x in u.crossing.items() if not stage.units >> w & 1
        )
        alike = 4 * (stage.data - 1) * weights / stage.data / self.batch
        return (crossing / stage.data + alike) / BANDWIDTH + sum(
            u.seconds for u in units
        ) / stage.data

    def simulated(
        self, stages: Sequence[Stage], evaluator: neutral.Evaluator = neutral.step_seconds
    ) -> float:
        """Seconds per sample of a simulated step; replicas take samples by turns and agree once, at the end."""
        found = []
        for i, stage in enumerate(stages):
            pairs = [
                (self.graph.ways[v][stage.tensor], stage.recomputed >> v & 1)
                for v in members(stage.units)
            ]
            later = sum(s.units for s in stages[i + 1 :])
            plain = sum(pair[0].seconds for pair, _ in pairs)
            again = sum(pair[1].seconds - pair[0].seconds for pair, twice in pairs if twice)
            send = (
                sum(x for pair, _ in pairs for w, x in pair[0].crossing.items() if later >> w & 1)
                / BANDWIDTH
            )
            alike = (
                4
                * (stage.data - 1)
                * sum(pair[0].weights for pair, _ in pairs)
                / stage.data
                / BANDWIDTH
            )
            found.append(neutral.Stage(plain / 3, plain * 2 / 3 + again, send, stage.data, alike))
        return evaluator(found, self.batch) / self.batch

    def around(self, stages: Sequence[Stage]) -> Iterator[tuple[Stage, ...]]:
        """Plans one step away, on no more devices; recomputed is what then lets each stage fit."""
        sets = list(accumulate((s.units for s in stages), int.__xor__, initial=self.graph.left[-1]))
        chain = [
            nearby.Stage(a, b, s[1:3]) for a, b, s in zip(sets, sets[1:], stages, strict=False)
        ]
        widths = nearby.Widths(self._traded, self._changed, self._joined, self._parted)
        for pipeline in nearby.neighbours(chain, self._between, widths):
            tensors, replicas = zip(*(s.width for s in pipeline), strict=True)
            if sum(map(mul, tensors, replicas)) > self.devices or sum(replicas) > self.batch:
                continue
            found = [Stage(s.first ^ s.last, *s.width, 0) for s in pipeline]
            held = self.held(found)
            pieces = [self._piece(s.units, s.tensor) for s in found]
            if all(pieces):
                again = [piece.fitted(many) for piece, many in zip(pieces, held, strict=True)]
                if all(more < inf for more, _ in again):
                    yield tuple(
                        s._replace(recomputed=units)
                        for s, (_, units) in zip(found, again, strict=True)
                    )

    @cache  # noqa: B019
    def _between(self, left: int, rest: int) -> list[int]:
        return [
            some
            for some in self.graph.left
            if some & left == some != left and some & rest == rest != some
        ]

    @cache  # noqa: B019
    def _piece(self, units: int, tensor: int) -> _Piece | None:
        return next((piece for piece in self._pieces(units) if piece.tensor == tensor), None)

    def _degrees_near(self, data: int) -> tuple[list[int], list[int]]:
        """The next lower one and the next higher one, where there are."""
        at = bisect_left(self.degrees, data)
        return self.degrees[max(0, at - 1) : at], self.degrees[at + 1 : at + 2]

    def _changed(self, width: Width) -> Iterator[Width]:
        tensor, data = width
        yield from ((tensor, d) for some in self._degrees_near(data) for d in some)
        yield from (
            (t, d)
            for t in (tensor // 2, tensor * 2)
            for d in {data, *self._degrees_near(data)[0]}
            if t
        )

    def _traded(self, one: Width, other: Width) -> Iterator[tuple[Width, Width]]:
        mine, theirs = (list(self._changed(width)) for width in (one, other))
        yield from (
            (a, b) for a in mine if prod(a) < prod(one) for b in theirs if prod(b) > prod(other)
        )

    def _joined(self, one: Width, other: Width) -> set[Width]:
        together = self._most(one[1] + other[1])
        return {one, other, (one[0], together), (other[0], together)}

    def _parted(self, width: Width) -> Iterator[tuple[Width, Width]]:
        tensor, data = width
        yield width, width
        yield from (((tensor, d), (tensor, self._most(data - d))) for d in self.degrees if d < data)

    def _most(self, data: int) -> int:
        """The largest degree of no more."""
        return self.degrees[bisect_right(self.degrees, data) - 1]

    def read(self, plan: Sequence[dict[str, int]]) -> tuple[Stage, ...]:
        """A published plan. It tells how many units each stage has; of the sets of so many, the fastest are meant."""
        reached: dict[int, tuple[float, tuple[Stage, ...]]] = {self.graph.left[-1]: (0.0, ())}
        for i, row in enumerate(plan):
            held = ceil(sum(r["dp"] for r in plan[i:]) / row["dp"])
            found: dict[int, tuple[float, tuple[Stage, ...]]] = {}
            for left, (slowest, before) in reached.items():
                for rest in self.graph.left:
                    units = left ^ rest
                    if rest & left != rest or units.bit_count() != row["layers"]:
                        continue
                    piece = _Piece(self, units, row["tp"], members(units))
                    stage = Stage(units, row["tp"], row["dp"], piece.fitted(held, prune=False)[1])
                    most = max(slowest, self._priced(stage, held))
                    if rest not in found or most < found[rest][0]:
                        found[rest] = most, (*before, stage)
            reached = found
        return reached[0][1]

    # ------------------------------------------------------------ search

    def best(self) -> tuple[Stage, ...] | None:
        """The plan with the fastest slowest stage; None where nothing fits."""
        ways = [[(t, u) for t, pair in ways.items() for u in pair] for ways in self.graph.ways]
        least = sum(min(t * u.seconds for t, u in some) for some in ways) / self.devices
        # everything in one stage, each unit in its slowest way, and all that can cross
        most = sum(
            max(
                u.seconds + (2 * sum(u.crossing.values()) + 4 * u.weights) / BANDWIDTH
                for _, u in some
            )
            for some in ways
        )
        return halved(self.within, self.of, least, most)

    def within(self, slowest: float, pace: float = inf) -> tuple[Stage, ...] | None:
        """A plan with no stage slower than that.

        pace: seconds per sample that a simulated run can keep at best, by each stage's time and by how long
        the samples in flight from it on are under way.

        From the last stage to the first: of pipelines of the same last units, those with the fewest devices
        and the smallest sum of replicas are kept. Each stage takes the fewest replicas that suffice.
        """
        sets, whole = self.graph.left, self.graph.left[-1]
        kept: dict[int, list[_Label]] = {0: [_Label(0, 0, 0.0, None, None)]}
        for some in sets[1:]:
            most = self.devices - self._least_devices(whole ^ some, slowest)
            labels = (
                label
                for done in kept
                if done & some == done
                for piece in self._pieces(some ^ done)
                for behind in kept[done]
                if (label := self._before(piece, behind, most, slowest, pace))
            )
            if own := _fewest(labels):
                kept[some] = own
        return kept[whole][0].stages if whole in kept else None

    @cache  # noqa: B019
    def _least_devices(self, units: int, slowest: float) -> int:
        """Devices without which these units cannot be done in time."""
        work = sum(
            min(t * w[0].seconds for t, w in self.graph.ways[v].items()) for v in members(units)
        )
        return ceil(work / slowest * (1 - 1e-9))

    @cache  # noqa: B019
    def _pieces(self, units: int) -> list[_Piece]:
        inside = members(units)
        degrees = set.intersection(*(set(self.graph.ways[v]) for v in inside))
        return [_Piece(self, units, t, inside) for t in sorted(degrees) if t <= self.devices]

    def _before(
        self, piece: _Piece, behind: _Label, most: int, slowest: float, pace: float
    ) -> _Label | None:
        """A stage of these units in front of a pipeline, on at most so many devices together."""
        for d in self.degrees[bisect_left(self.degrees, piece.fastest / slowest * (1 - 1e-12)) :]:
            devices = behind.devices + d * piece.tensor
            if devices > most or behind.replicas + d > self.batch:
                return None
            held = ceil(behind.replicas / d) + 1
            again, recomputed = piece.fitted(held)
            under_way = behind.under_way + piece.compute + again + piece.crossing / 2
            paced = max((piece.compute + again) / d, under_way / d / held) <= pace
            if piece.seconds(d) + again / d <= slowest and paced:
                stage = Stage(piece.units, piece.tensor, d, recomputed)
                return _Label(devices, behind.replicas + d, under_way, stage, behind)
        return None


class _Label(NamedTuple):
    """A pipeline of the last units: its devices, its sum of replicas, its first stage and the rest.

    under_way: seconds that a sample is between coming in and its gradient's going out.
    """

    devices: int
    replicas: int
    under_way: float
    stage: Stage | None
    behind: Any

    @property
    def stages(self) -> tuple[Stage, ...]:
        found, at = [], self
        while at.stage:
            found.append(at.stage)
            at = at.behind
        return tuple(found)


def _fewest(labels: Iterable[_Label]) -> list[_Label]:
    """Those than which none has both fewer devices and fewer replicas."""
    found: list[_Label] = []
    for label in sorted(labels, key=lambda one: one[:3]):
        if not found or label.replicas < found[-1].replicas:
            found.append(label)
    return found


class _Piece:
    """Units split alike: what does not depend on replicas is summed once."""

    def __init__(
        self, objective: Throughput, units: int, tensor: int, inside: Sequence[int]
    ) -> None:
        self.units, self.tensor, self.inside = units, tensor, inside
        self.memory, self.batch = objective.memory, objective.batch
        self.pairs = [objective.graph.ways[v][tensor] for v in inside]
        plain = [pair[0] for pair in self.pairs]
        self.weights = sum(u.weights for u in plain)
        self.a, self.b = sum(u.a for u in plain), sum(u.b for u in plain)
        self.compute = sum(u.seconds for u in plain)
        self.crossing = (
            2
            * sum(x for u in plain for w, x in u.crossing.items() if not units >> w & 1)
            / BANDWIDTH
        )
        self.fastest = self.compute + self.crossing

    def seconds(self, data: int) -> float:
        return self.fastest / data + 4 * (data - 1) * self.weights / data / self.batch / BANDWIDTH

    @cache  # noqa: B019
    def fitted(self, held: int, prune: bool = True) -> tuple[float, int]:
        """Seconds per sample to recompute what lets so many samples fit, and which units; inf where nothing does.

        The cheapest per byte first, as the anchor does it; prune: then without those that later ones made needless.
        """
        over = self.a * held + self.b - self.memory
        if over <= 0:
            return 0.0, 0
        saved = [(p.a - r.a) * held + p.b - r.b for p, r in self.pairs]
        more = [r.seconds - p.seconds for p, r in self.pairs]
        useful = [i for i in range(len(saved)) if saved[i] > 0]
        if sum(saved[i] for i in useful) < over:
            return inf, 0
        picked: list[int] = []
        for i in sorted(useful, key=lambda i: more[i] / saved[i]):
            picked.append(i)
            over -= saved[i]
            if over <= 0:
                break
        for i in sorted(picked, key=lambda i: -more[i]) if prune else []:
            if over + saved[i] <= 0:
                picked.remove(i)
                over += saved[i]
        return sum(more[i] for i in picked), sum(1 << self.inside[i] for i in picked)
