"""What a search over pipelines may choose, and the least that each choice costs whatever is decided in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

import numpy as np

from ...ir.errors import PlanError
from ...ir.mesh import Mesh
from ...ir.passes.microbatch import Refusal
from ...ir.passes.recompute import Policy
from ...ir.pipeline.schedule import Schedule
from ..cost.least import spread, summed
from ..problem import Problem
from ..search.meshes import mesh_of, plane_meshes, stage_sizes
from .schedules import entry, schedule_named
from .single import can_be_even, even_firsts
from .units import Cut, Units, check_enough, find_units

Choice = tuple[str, int]  # a schedule and its stages per rank
Work = tuple[str, int | None]  # a pass and a kind of unit
FEW = 8  # stages that there should be layers for where their number is open
ANY = 8  # stages per rank up to which layers need not be shared out evenly among them
SAVED = 0.002  # of a step: what more stages per rank save at least, to be looked at
ENDS = 0.1  # weight of what is not layers in a bound that counts the layers of the fullest stage


@dataclass(frozen=True)
class PipelineConfig:
    """One combination of discrete choices; `microbatches` 0: any, the family as a whole."""

    stages: int
    mesh: Mesh
    policy: Policy
    microbatches: int = 0

    def __str__(self) -> str:
        mesh = "×".join(map(str, self.mesh.shape))
        count = f", microbatches {self.microbatches}" if self.microbatches else ""
        return f"{self.stages} stages of mesh {mesh}, recompute {self.policy}{count}"


@dataclass(frozen=True)
class Floor:
    """Least seconds of a step; of these so many beyond what ops take; `mean`: see `Choices.share`."""

    seconds: float
    more: float
    mean: float


@dataclass(eq=False)
class Choices:
    """The space of one search."""

    problem: Problem

    @cached_property
    def units(self) -> Units:
        wanted = self.problem.request.pp
        stages = wanted * self._chunks if isinstance(wanted, int) else FEW
        return find_units(self.problem.folded, self.problem.program("none"), stages)

    @cached_property
    def batch(self) -> int:
        axis = self.problem.program("none").time
        return 1 if isinstance(axis, Refusal) else axis.parts

    @cached_property
    def stage_counts(self) -> tuple[int, ...]:
        cluster, wanted = self.problem.cluster, self.problem.request.pp
        if isinstance(wanted, int):
            check_enough(self.units, wanted, cluster.size)
            if self.problem.request.program == "single":
                even_firsts(self.units, wanted)
            return self._with_schedule([wanted] if cluster.size % wanted == 0 else [])
        found = sorted(
            cluster.size // n for n in stage_sizes(cluster) if cluster.size // n <= len(self.units)
        )
        if self.problem.request.program == "single":
            found = [stages for stages in found if can_be_even(self.units, stages)]
        return self._with_schedule(found)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Microbatches: divisors of the batch."""
        if self.problem.request.microbatches is not None:
            return (self.problem.request.microbatches,)
        least = 2 if self.problem.request.program == "single" and self.batch > 1 else 1
        return tuple(m for m in range(least, self.batch + 1) if self.batch % m == 0)

    def schedules(self, stages: int, microbatches: int = 0) -> tuple[Choice, ...]:
        """What may be tried for so many stages: interleaving where there are layers enough, else zero bubble."""
        request = self.problem.request
        if request.program == "single":
            return (("gpipe", 1),)
        if request.schedule is None:
            looped = tuple(("interleaved", chunks) for chunks in self._loops(stages, microbatches))
            return (("1f1b", 1), *(looped or (("zb-h1", 1),)))
        found = entry(request.schedule)
        if found.chunks is None and request.chunks is None:
            return tuple((found.name, chunks) for chunks in self._loops(stages, microbatches))
        return ((found.name, self._chunks),)

    def _loops(self, stages: int, microbatches: int) -> Iterator[int]:
        """Stages per rank that may be worth while: up to a few each, and those that share layers out evenly; of
        those, the ones that save something of the bubble, the even ones beside the even ones before."""
        uneven = microbatches < stages or microbatches % (microbatches // stages)
        if microbatches and uneven and self.problem.request.schedule is None:
            return
        before, even_before = 1, 1
        for chunks in range(2, len(self.units) // stages + 1):
            even = 0 in (
                self.units.repeats % (chunks * stages),
                len(self.units) % (chunks * stages),
            )
            last = even_before if even else before
            saved = (1 / last - 1 / chunks) * (stages - 1)
            if (chunks <= ANY or even) and (last == 1 or saved >= SAVED * microbatches):
                yield chunks
                before, even_before = chunks, chunks if even else even_before

    @cached_property
    def _chunks(self) -> int:
        """Stages per rank of the schedule that is asked for, at least."""
        request = self.problem.request
        return (
            1 if request.schedule is None else entry(request.schedule).chunks or request.chunks or 2
        )

    def _with_schedule(self, stage_counts: Sequence[int]) -> tuple[int, ...]:
        """Those for which there is a schedule as it is asked for.

        Raises:
            PlanError: there are none; why not for the least.
        """
        found = {stages: self._lacking(stages) for stages in stage_counts}
        able = tuple(stages for stages, error in found.items() if error is None)
        if not able and (errors := [error for error in found.values() if error is not None]):
            raise errors[0]
        return able

    def _lacking(self, stages: int) -> PlanError | None:
        """Why the schedule that is asked for cannot be for so many ranks; None where it can, or none is."""
        request, chunks = self.problem.request, self._chunks
        if request.schedule is None:
            return None
        name = entry(request.schedule).name
        if chunks * stages > len(self.units):
            most = len(self.units) // stages
            told = (
                f"at most {most} stages per rank"
                if most > 1
                else f"at most {len(self.units) // 2} ranks"
            )
            return PlanError(
                f"{name} cuts {stages} ranks into {chunks * stages} stages; the forward pass has"
                f" {len(self.units)} parts to cut between.",
                where=f"request: {'schedule' if request.chunks is None else 'chunks'}",
                fix=f"{told}, or another schedule",
            )  # fmt: skip
        try:
            for many in () if request.microbatches is None else (request.microbatches,):
                schedule_named(name, stages, many, None if chunks == 1 else chunks)
        except PlanError as error:
            return error
        return None

    def schedules_for(self, shape: PipelineConfig) -> Iterator[Schedule]:
        """Those with most stages per rank first."""
        for name, chunks in sorted(
            self.schedules(shape.stages, shape.microbatches), key=lambda each: -each[1]
        ):
            if found := self.schedule(shape, name, chunks):
                yield found

    def schedule(self, shape: PipelineConfig, name: str, chunks: int) -> Schedule | None:
        """None where there is none of so many microbatches, or there are too few layers."""
        if chunks * shape.stages > len(self.units):
            return None
        try:
            return schedule_named(
                name, shape.stages, shape.microbatches, None if chunks == 1 else chunks
            )
        except PlanError:
            return None

    def meshes(self, stages: int) -> tuple[Mesh, ...]:
        return plane_meshes(
            self.problem.cluster, self.problem.cluster.size // stages, self.problem.request.mesh
        )

    def families(self) -> Iterator[PipelineConfig]:
        for stages in self.stage_counts:
            for mesh in self.meshes(stages):
                for policy in self.problem.policies:
                    yield PipelineConfig(stages, mesh, policy)

    def bubble(self, shape: PipelineConfig, name: str) -> float:
        """How many passes of one kind ("forward", "backward", "weight") of the slowest stage the best schedule
        waits for at least. Zero-bubble ones fill what is idle with gradients of weights."""
        shares: list[float] = []
        for schedule, chunks in self.schedules(shape.stages, shape.microbatches):
            if schedule.startswith(("zb", "v-")) or "zero" in schedule:
                shares.append(-1.0 if name == "weight" else 1.0 if schedule == "zb-h1" else 0.0)
            else:
                shares.append(1.0 if chunks == 1 or schedule == "gpipe" else 1 / chunks)
        return (shape.stages - 1) * min(shares, default=0.0)

    def floor(self, shape: PipelineConfig) -> float:
        """No layouts of a shape take less: every op cut evenly over the devices of a stage, nothing sent."""
        if shape.microbatches:
            return self._floors(shape.stages, shape.policy)[shape.microbatches].seconds
        return float(self.floors(shape).min())

    def floors(self, family: PipelineConfig) -> np.ndarray:
        """The same by microbatch count."""
        return np.array(
            [floor.seconds for floor in self._floors(family.stages, family.policy).values()]
        )

    def more(self, shape: PipelineConfig) -> float:
        """Seconds of a step beyond those that ops take as often as `share` says, at least."""
        return self._floors(shape.stages, shape.policy)[shape.microbatches].more

    def _floors(self, stages: int, policy: Policy) -> Mapping[int, Floor]:
        """By microbatch count, that which says most."""
        if (stages, policy) not in self._known_floors:
            work, found = self._work_of(stages, policy), list[list[Floor]]()
            for mean in (1.0,) if self.problem.request.program == "single" else (1.0, ENDS):
                shares = {
                    key: self._shares(stages, key[0], key[1] == self.units.middle, mean)
                    for key in work
                }
                more = (1 - mean) * (np.array(self.counts) - 1) * self._on_top(stages, work)
                seconds = sum((shares[key] * each for key, each in work.items()), more)
                found.append(
                    [
                        Floor(*each, mean)
                        for each in zip(seconds.tolist(), more.tolist(), strict=True)
                    ]
                )
            most = (max(each, key=lambda floor: floor.seconds) for each in zip(*found, strict=True))
            self._known_floors[stages, policy] = dict(zip(self.counts, most, strict=True))
        return self._known_floors[stages, policy]

    _known_floors: dict[tuple[int, Policy], Mapping[int, Floor]] = field(default_factory=lambda: {})

    def _on_top(self, stages: int, work: Mapping[Work, np.ndarray]) -> np.ndarray:
        """What the fullest stage runs besides its share of layers, at least, per microbatch, by count: where all have
        equally many, the longest of the ends, and one that has more, at least one layer more."""
        none = np.zeros(len(self.counts))
        if self.units.repeats % stages:
            return none
        each: dict[int | None, np.ndarray] = {}
        for (name, kind), seconds in work.items():
            if name != "once" and kind is not None:
                each[kind] = each.get(kind, none) + seconds / self.units.repeats_of(kind)
        layer = each.pop(self.units.middle, none)
        return np.minimum(layer, np.max([none, *each.values()], axis=0))

    def _work_of(self, stages: int, policy: Policy) -> Mapping[Work, np.ndarray]:
        """Least seconds of one run of every class of ops, by microbatch count."""
        if policy not in self.sums:
            program = self.problem.program(policy, in_stages=True)
            known = self.cut(policy, self.counts[-1])

            def of(tag: str) -> Work:
                return known.passes.get(tag, "once"), known.kind_of(tag)

            self.sums[policy] = summed(program, self.problem.cost, of)
        spread_out = spread(self.sums[policy], [self.problem.cluster.size // stages], self.counts)
        return {key: seconds[0] for key, seconds in spread_out.items()}

    sums: dict[Policy, Mapping[Work, np.ndarray]] = field(default_factory=lambda: {})  # `summed`

    def take_cuts_of(self, other: Choices) -> None:
        """Use the cuts of another cluster's search for the same step, and the work where devices are alike."""
        self.units, self._cuts = other.units, other._cuts
        if self.problem.cluster.device == other.problem.cluster.device:
            self.sums = other.sums

    def cut(self, policy: Policy, microbatches: int) -> Cut:
        """The step in units, each as if it were a stage; all counts above one share it."""
        key = policy, microbatches > 1
        if key not in self._cuts:
            many = (
                next((m for m in range(2, self.batch + 1) if self.batch % m == 0), 1)
                if key[1]
                else 1
            )
            program = self.problem.program(policy, in_stages=True)
            self._cuts[key] = Cut.of(self.units, program, self.problem.folded.small, many)
        return self._cuts[key]

    _cuts: dict[tuple[Policy, bool], Cut] = field(default_factory=lambda: {})

    def weights(self, shape: PipelineConfig) -> Mapping[str, float]:
        """By op tag, how often the seconds of an op of one layer count in the step, at least; "" for results."""
        cut = self.cut(shape.policy, shape.microbatches)
        shares = {each: self.share(shape, *each) for each in set(map(cut.class_of, cut.passes))}
        return {**{tag: shares[cut.class_of(tag)] for tag in cut.passes}, "": 1 / shape.stages}

    def likely(self, shape: PipelineConfig) -> Mapping[str, float]:
        """The same as it will be: the fullest stage has `imbalance` times its share of layers or, where all have
        equally many, the ends on top."""
        cut, single = (
            self.cut(shape.policy, shape.microbatches),
            self.problem.request.program == "single",
        )
        on_top = (
            (shape.microbatches - 1)
            * (1 - 1 / shape.stages)
            * (self.units.repeats % shape.stages == 0)
        )
        found = {"": 1 / shape.stages}
        for tag in cut.passes:
            name, layer = cut.class_of(tag)
            found[tag] = self._share(shape, name, layer, 1.0)
            if name == "once" or single:
                continue
            if layer:
                found[tag] *= self.imbalance(shape.stages)
            elif self.units.repeats_of(cut.kind_of(tag)) < shape.stages:
                found[tag] += on_top
        return found

    def crowded(self, shape: PipelineConfig, layers: int) -> Mapping[str, float]:
        """As `weights`, where some stage has so many layers, wherever the ends are: of that stage, or the mean of all
        where that says more."""
        cut, found = self.cut(shape.policy, shape.microbatches), {"": 1 / shape.stages}
        extra = layers - self.fullest_at_least(shape.stages)
        full, more = self._least_seconds(shape, 0.0), self._least_seconds_more(shape)
        mean = float(self._least_seconds(shape, 1.0) > full + extra * more)
        on_top = (1 - mean) * extra * self._extra(shape)
        for tag in cut.passes:
            name, layer = cut.class_of(tag)
            found[tag] = self._share(shape, name, layer, mean) + on_top * (layer and name != "once")
        return found

    def fullest(self, shape: PipelineConfig, enough: float) -> tuple[int, int]:
        """How many layers the fullest stage has at least, and at most where a step takes less than `enough` seconds."""
        least, more = self.fullest_at_least(shape.stages), self._least_seconds_more(shape)
        room = (enough - self._least_seconds(shape, 0.0)) / max(more, 1e-30)
        return least, least + int(min(max(room, 0.0), self.units.repeats - least))

    def _least_seconds(self, shape: PipelineConfig, mean: float) -> float:
        """Of a step, nothing sent, with shares of this `mean`."""
        work, at = self._work_of(shape.stages, shape.policy), self.counts.index(shape.microbatches)
        shares = (
            (self._share(shape, name, kind == self.units.middle, mean), float(seconds[at]))
            for (name, kind), seconds in work.items()
        )
        return sum(share * seconds for share, seconds in shares)

    def _least_seconds_more(self, shape: PipelineConfig) -> float:
        """Of a step, for every layer more in the fullest stage."""
        work, at = self._work_of(shape.stages, shape.policy), self.counts.index(shape.microbatches)
        passes = (
            float(seconds[at])
            for (name, kind), seconds in work.items()
            if name != "once" and kind == self.units.middle
        )
        return self._extra(shape) * sum(passes)

    def _extra(self, shape: PipelineConfig) -> float:
        """How often more the seconds of layers' passes count with every layer more in the fullest stage."""
        return (shape.microbatches - 1) / self.units.repeats

    def fullest_at_least(self, stages: int) -> int:
        """How many layers some stage has at least, as layers are not cut."""
        return ceil(self.units.repeats / stages)

    def share(self, shape: PipelineConfig, name: str, layer: bool) -> float:
        """How often the seconds of a pass count in the step, at least.

            (microbatches + bubble) / stages                      if all stages took equally long
            ((microbatches - 1) * imbalance + 1 + bubble) / stages    for layers, if the ends took nothing but `more`

        A step takes the longer of the two, so any mean of them is a bound. What is done once counts
        1 / stages. In a single program the ends are run side by side, for a share of the microbatches each.
        """
        return self._share(
            shape, name, layer, self._floors(shape.stages, shape.policy)[shape.microbatches].mean
        )

    def _share(self, shape: PipelineConfig, name: str, layer: bool, mean: float) -> float:
        """`mean`: weight of what all stages would take if equally long."""
        return float(
            self._shares(shape.stages, name, layer, mean)[self.counts.index(shape.microbatches)]
        )

    def _shares(self, stages: int, name: str, layer: bool, mean: float) -> np.ndarray:
        """The same by microbatch count."""
        many = np.array(self.counts, float)
        if name == "once":
            return np.full(len(many), 1 / stages)
        bubble = self.bubbles(stages, name)
        if self.problem.request.program == "single":
            return (many + (bubble if layer else 0.0)) / stages
        full = (many - 1) * self.imbalance(stages) + 1 + bubble if layer else 0.0
        return np.maximum(1e-9, mean * (many + bubble) + (1 - mean) * full) / stages

    def bubbles(self, stages: int, name: str) -> np.ndarray:
        """`bubble` by microbatch count, on any mesh."""
        if (stages, name) not in self._known_bubbles:
            shapes = (PipelineConfig(stages, mesh_of((1,)), "none", many) for many in self.counts)
            self._known_bubbles[stages, name] = np.array(
                [self.bubble(shape, name) for shape in shapes]
            )
        return self._known_bubbles[stages, name]

    _known_bubbles: dict[tuple[int, str], np.ndarray] = field(default_factory=lambda: {})

    def imbalance(self, stages: int) -> float:
        """How much more than its share of layers some stage has, as layers are not cut."""
        return self.fullest_at_least(stages) * stages / self.units.repeats
