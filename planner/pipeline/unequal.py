"""Pipelines whose stages have unequal numbers of devices, all of one kind: where layers are few or unlike, a stage
of twice the work gets twice the devices, whichever way its mesh then cuts it (PipeDream replicates it).

    worth      a stage of the best equal pipeline takes longer than the mean, or the cluster is small
    estimate   for a few recompute policies and microbatch counts, an exact split of units and devices, every op as
               if cut evenly and nothing sent; scaled by how far the best equal pipeline is off that
    solve      per number of devices: layouts under the memory of its own stages; then the exact cut of units

Numbers of devices are powers of two within a host, and whole hosts, so that no stage straddles one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import inf

import numpy as np

from ...ir.errors import PlanError
from ...ir.passes.recompute import Policy
from ...ir.pipeline.schedule import in_flight
from ...ir.plan import Plan
from ...ir.units import format_bytes, format_seconds
from ..cost.least import least_work
from ..report.of_pipeline import (
    BESIDES,
    LEFT_OUT,
    Alternative,
    ProgramChoice,
    Rank,
    by_stages,
    write_pipeline,
)
from ..search.meshes import plane_meshes
from .choices import PipelineConfig
from .partition import Pace, StagePiece, near_least_step
from .priced import Place, Priced, Pricing
from .schedules import schedule_named
from .search import Pipelines
from .stage_layouts import StageLayouts
from .units import Units, runs_of
from .watched import Watched

SMALL = 64  # devices up to which unequal stages are always looked for
UNEVEN = 0.05  # what the slowest stage of the best equal pipeline takes above the mean, else
GRAINS = 32  # parts of the cluster that stages are made of, at most
PAIRS, LOOKS = (
    6,
    3,
)  # recompute policies with microbatch counts that are estimated; estimates that are solved
UNEQUAL = ("stages of unequal meshes, but for the most promising by an estimate", *BESIDES)


@dataclass(frozen=True)
class Split:
    """Stages in order, and the estimated seconds of a step."""

    pieces: tuple[StagePiece, ...]
    policy: Policy
    microbatches: int
    seconds: float

    def __str__(self) -> str:
        sizes = " ".join(str(piece.devices) for piece in self.pieces)
        return (
            f"stages on {sizes} devices, recompute {self.policy}, microbatches {self.microbatches}"
        )


@dataclass
class Unequal:
    """Looks for them after the equal ones; `best` seconds are to be beaten."""

    pipelines: Pipelines
    best: float = inf
    found: tuple[list[Rank], Pricing, Priced] | None = None
    left_out: tuple[str, ...] = LEFT_OUT  # of the search for equal and unequal stages together
    layouts: StageLayouts = field(init=False)

    def __post_init__(self) -> None:
        self.problem, self.trace = self.pipelines.problem, self.pipelines.trace
        self.choices = self.pipelines.choices
        self.layouts = StageLayouts(self.pipelines)

    @property
    def units(self) -> Units:
        return self.choices.units

    def explore(self, best: float) -> None:
        self.best = best
        if not self._worth():
            self._refuse_rest()
            return
        if self.trace.past_deadline() and self.best < inf:
            return
        self.left_out = UNEQUAL
        good = self.best * (1 - self.problem.request.good_enough)
        splits = sorted(self._splits(), key=lambda split: split.seconds)
        fitted = set[tuple[StagePiece, ...]]()  # and more recomputation only makes room
        for split in splits[:LOOKS]:
            if (
                split.seconds < good
                and split.pieces not in fitted
                and not self.trace.past_deadline()
                and self._look(split)
            ):
                fitted.add(split.pieces)
        self._reorder()

    def lower_bound(self) -> float:
        """No pipeline of unequal stages is faster."""
        return min(
            self._floor(policy, i) for policy in self._policies for i in range(len(self._counts))
        )

    def write(self, bound: float) -> Plan:
        assert self.found is not None
        if self.trace.stopped_by == "proof" and not self.trace.past_deadline():
            self.trace.stopped_by = "estimate"
        return write_pipeline(
            *self.found, self.problem.cluster, bound, self.trace, self.left_out, self._chosen
        )

    @property
    def dispatched(self) -> float:
        """Seconds of a step with the host's dispatch; inf where nothing was found."""
        return self._chosen.programs["stages"] if self.found else inf

    @property
    def alternative(self) -> Alternative:
        assert self.found is not None
        _, pricing, priced = self.found
        sizes = " ".join(str(place.devices) for place in pricing.places)
        return Alternative(
            f"stages on {sizes} devices, {priced.schedule.name}", priced.seconds, self.dispatched
        )

    @property
    def _chosen(self) -> ProgramChoice:
        assert self.found is not None
        why = (
            "stages have unequal numbers of devices."
            if self.problem.request.program is None
            else ""
        )
        return by_stages(*self.found[1:], self.problem.cost.execution_model, why)

    # ------------------------------------------------------------ whether, and which

    def _worth(self) -> bool:
        if (
            self.problem.request.mesh is not None
            or len(self.units) < 2
            or not self._names
            or not self.sizes
        ):
            return False
        return self.problem.cluster.size <= SMALL or self._alone or self._uneven > UNEVEN

    @property
    def _alone(self) -> bool:
        """Whether so many stages are asked for that they cannot be equal."""
        wanted = self.problem.request.pp
        return isinstance(wanted, int) and self.problem.cluster.size % wanted > 0

    def _refuse_rest(self) -> None:
        if self._alone:
            pp, schedule = self.problem.request.pp, self.problem.request.schedule
            raise PlanError(
                f"{self.problem.cluster.size} devices cannot be cut into {pp} equal stages, and {schedule} has several"
                " stages on a rank, which unequal ones cannot.",
                where="request: pp", fix="stages that divide the devices, or 1f1b, zb-h1, gpipe",
            )  # fmt: skip

    @property
    def _uneven(self) -> float:
        """How much longer than the mean the slowest rank of the best equal pipeline takes."""
        priced = self.pipelines.best.priced
        if priced is None:
            return 0.0
        schedule = priced.schedule
        passes = [stage.forward + stage.backward + stage.weight for stage in priced.stages]
        each = [
            many + once / schedule.microbatches
            for many, once in zip(passes, priced.once, strict=True)
        ]
        ranks = [sum(each[stage] for stage in held) for held in schedule.held]
        return max(ranks) * len(ranks) / sum(ranks) - 1

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Schedules with one stage per rank."""
        wanted = self.problem.request.schedule
        if wanted is None:
            return ("1f1b", "zb-h1")
        try:
            one = schedule_named(wanted, 2, 2)
        except PlanError:
            return ()
        return (wanted,) * (one.stages == one.ranks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of devices that a stage may have."""
        cluster = self.problem.cluster
        inside = [
            2**k for k in range(cluster.per_host.bit_length()) if cluster.per_host % 2**k == 0
        ]
        hosts = [cluster.per_host * 2**k for k in range(cluster.hosts.bit_length())]
        found = sorted({*inside, *hosts})
        grain = next(size for size in found if cluster.size <= GRAINS * size)
        return tuple(size for size in found if size >= grain and size < cluster.size)

    def _splits(self) -> Iterator[Split]:
        """The best by estimate of each pair of recompute and microbatch count."""
        grain, wanted = self.sizes[0], self.problem.request.pp
        pairs: list[tuple[Policy, int]] = [
            (policy, i) for policy in self._policies for i in range(len(self._counts))
        ]
        for policy, i in sorted(pairs, key=lambda pair: self._floor(*pair))[:PAIRS]:
            if self._floor(policy, i) * self._off >= self.best:
                return
            stages = wanted if isinstance(wanted, int) else None
            found = near_least_step(
                self._paces(policy, i), self.problem.cluster.size // grain, stages
            )
            if found is not None and len({piece.devices for piece in found[1]}) > 1:
                pieces = tuple(piece._replace(devices=piece.devices * grain) for piece in found[1])
                yield Split(pieces, policy, self._counts[i], self._off * found[0])

    @cached_property
    def _policies(self) -> tuple[Policy, ...]:
        best = self.pipelines.best.shape
        return (
            self.problem.policies
            if best is None or self.problem.cluster.size <= SMALL
            else (best.policy,)
        )

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """Around what the best equal pipeline has."""
        best, counts = self.pipelines.best.shape, self.choices.counts
        return tuple(
            m for m in counts if best is None or best.microbatches / 4 <= m <= best.microbatches * 4
        )

    @cached_property
    def _work(self) -> Mapping[Policy, Mapping[tuple[int, bool], np.ndarray]]:
        """Least seconds of (repeats of a unit, whether in passes), by size and microbatch count."""
        return {
            policy: least_work(
                self.problem.program(policy, in_stages=True), self.problem.cost, self.sizes,
                self._counts, self._class_of(policy),
            )
            for policy in self._policies
        }  # fmt: skip

    def _class_of(self, policy: Policy) -> Callable[[str], tuple[int, bool]]:
        cut = self.choices.cut(policy, max(self._counts))
        of: dict[str, tuple[int, bool]] = {}
        for kind, alike in enumerate(self.units.alike):
            for fragment in cut.fragments(kind):
                of |= {op.tag: (alike, cut.class_of(op.tag)[0] != "once") for op in fragment.ops}
        rest = self.units.alike[0], False
        return lambda tag: of.get(tag, rest)

    def _each(self, policy: Policy, count: int, passes: bool) -> np.ndarray:
        """Seconds of each unit, by size: shape (sizes, units)."""
        alike = [self.units.alike[kind] for kind in self.units.kinds]
        work = self._work[policy]
        nothing = np.zeros((len(self.sizes), len(self._counts)))
        return np.array(
            [work.get((one, passes), nothing)[:, count] / alike.count(one) for one in alike]
        ).T

    def _paces(self, policy: Policy, count: int) -> dict[int, Pace]:
        """By size, in grains; inf where what lasts does not fit even if it is cut evenly."""
        passes, once, many = (
            self._each(policy, count, True),
            self._each(policy, count, False),
            self._counts[count],
        )
        lasting = _runs(self._lasting(policy, many))
        found: dict[int, Pace] = {}
        for size, way, update in zip(self.sizes, passes, once, strict=True):
            first = np.where(lasting <= size * self.problem.limit, _runs(way), inf)
            found[size // self.sizes[0]] = Pace(first, _runs((many - 1) * way + update))
        return found

    def _lasting(self, policy: Policy, microbatches: int) -> list[float]:
        """Bytes of the step's inputs that each unit holds."""
        cut = self.choices.cut(policy, microbatches)
        graph, owners = cut.program.graph, cut.owners
        kinds = [0.0] * len(self.units.names)
        for value in graph.inputs:
            for kind in owners[value]:
                kinds[kind] += graph.types[value].nbytes
        return [kinds[kind] for kind in self.units.kinds]

    def _floor(self, policy: Policy, count: int) -> float:
        """Seconds of a step if all devices were busy with all of it evenly, by the speed of the smallest stage."""
        passes, once = (float(self._each(policy, count, each)[0].sum()) for each in (True, False))
        return (self._counts[count] * passes + once) * self.sizes[0] / self.problem.cluster.size

    @cached_property
    def _off(self) -> float:
        """How far the best equal pipeline is above its own estimate, as if it had one stage on each rank."""
        best, priced = self.pipelines.best.shape, self.pipelines.best.priced
        if best is None or priced is None or best.mesh.size not in self.sizes:
            return 1.0
        pace = self._paces(best.policy, self._counts.index(best.microbatches))[
            best.mesh.size // self.sizes[0]
        ]
        firsts = (
            priced.firsts if len(priced.firsts) == best.stages else self.units.evenly(best.stages)
        )
        stretches = list(zip(firsts, (*firsts[1:], len(self.units)), strict=True))
        estimate = sum(pace.once[each] for each in stretches) + max(
            pace.again[each] for each in stretches
        )
        return max(1.0, priced.seconds / float(estimate))

    # ------------------------------------------------------------ solving

    def _look(self, split: Split) -> bool:
        """Whether it fits; keeps it if it is better."""
        sizes = [piece.devices for piece in split.pieces]
        usual = schedule_named(self._names[0], len(sizes), split.microbatches)
        watched = [
            Watched(runs_of(self.units, piece.first, piece.last), in_flight(usual, stage))
            for stage, piece in enumerate(split.pieces)
        ]
        ranks: dict[int, Rank] = {}
        for size in set(sizes):
            mine = [each for each, own in zip(watched, sizes, strict=True) if own == size]
            meshes = plane_meshes(self.problem.cluster, size)
            shapes = (
                PipelineConfig(len(sizes), mesh, split.policy, split.microbatches)
                for mesh in meshes
            )
            rank = self.layouts.fastest(shapes, tuple(dict.fromkeys((mine[0], mine[-1]))))
            if rank is None:
                return False
            ranks[size] = rank
        pricing = Pricing(
            self.units, self._places([ranks[size] for size in sizes]), self.problem.cluster
        )
        for name in self._names:
            schedule = schedule_named(name, len(sizes), split.microbatches)
            firsts = tuple(piece.first for piece in split.pieces)
            for priced in (
                pricing.price(schedule, self.best),
                pricing.with_cut(schedule, firsts, self.best),
            ):
                if priced is not None and priced.seconds < self.best:
                    self.best, self.found = (
                        priced.seconds,
                        ([ranks[size] for size in sizes], pricing, priced),
                    )
                    self.trace.note(
                        f"{split}, {name}: {format_seconds(self.best)}, {format_bytes(max(priced.peaks))}"
                    )
        return True

    def _places(self, ranks: Sequence[Rank]) -> tuple[Place, ...]:
        """The largest first, so that none straddles a host."""
        firsts, free = [0] * len(ranks), 0
        for stage in sorted(range(len(ranks)), key=lambda stage: -ranks[stage].space.mesh.size):
            firsts[stage], free = free, free + ranks[stage].space.mesh.size
        return tuple(
            self.layouts.place(rank, first) for rank, first in zip(ranks, firsts, strict=True)
        )

    def _reorder(self) -> None:
        """A better order of passes, if none was asked for."""
        if (
            self.found is None
            or self.problem.request.schedule is not None
            or self.trace.past_deadline()
        ):
            return
        ranks, pricing, priced = self.found
        better = pricing.reordered(priced)
        if better is not None and better.seconds < self.best:
            self.best, self.found = better.seconds, (ranks, pricing, better)
            self.trace.note(
                f"passes reordered: {format_seconds(self.best)}, {format_bytes(max(better.peaks))}"
            )


def _runs(each: Sequence[float] | np.ndarray) -> np.ndarray:
    """Of units a to b - 1 together, at [a, b]; inf where there are none."""
    sums = np.array([0.0, *accumulate(each)])
    found = sums[None, :] - sums[:, None]
    return np.where(np.triu(np.ones(found.shape, bool), 1), found, inf)
