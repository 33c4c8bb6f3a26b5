"""What a search over pipelines leaves for the day when devices are lost or gained: decisions, and plans made of them.

    point       mesh of a stage, recompute, microbatches, and the layouts that a solve found there
    candidate   a point on stages of as many devices, or with another size of the first axis; any number of
                stages; microbatches near the point's; on as many hosts as they take, the rest stay spare
    replanned   first candidates on the point's own mesh, whose layouts hold as they are; then solves on the
                others', the most promising first, each priced as the search prices: cut, memory, schedule

No graph is captured and no space is searched, so this takes seconds. What it proves is weaker: no pipeline
on as many devices is faster than every op cut evenly over those of a stage, stages of equal time, nothing sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import ceil, inf, prod
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...ir.analysis.blocks import Folded
from ...ir.cluster.cluster import Cluster, Device
from ...ir.codec import dump_graph, load_graph, unsealed
from ...ir.errors import InfeasibleError, MeshwrightError, MismatchError, PlanError
from ...ir.files import MIB, FileKind, read_object, read_text
from ...ir.graph import Graph
from ...ir.passes.recompute import Policy
from ...ir.plan import Plan, PlannedBatch
from ...ir.units import counted, format_bytes
from ...ir.version import VERSION
from ..pipeline.choices import Choices, PipelineConfig
from ..pipeline.points import Point
from ..pipeline.search import Pipelines
from ..pipeline.units import Units
from ..problem import Problem, cost_of
from ..report.of_pipeline import LEFT_OUT
from ..request import Request, check_overlap
from ..trace import Trace
from .frontier_checks import check_frontier
from .meshes import mesh_of

LOOKS = (
    2  # candidates priced as they are, and half as many solved anew; more only while nothing fits
)
POINTS = 24  # kept of one search, the fastest
WIDE = 16  # that a search which keeps them tries to find
KNOWN = "meshes, recompute and microbatches unlike those that an earlier search met"
PINS = ("pp", "mesh", "recompute", "microbatches")  # of the first plan, kept
FILE = FileKind(
    "frontier", 64 * MIB, "a file from `meshwright plan --frontier`, as it was written", PlanError
)
NEAR = 4  # microbatches up to so many times more or fewer


class Frontier(BaseModel):
    """Everything that is needed to plan the same step again. `graph` is the small graph as text, `units` the fields
    of `Units`, `batch` that of the whole one, `recipe`, `unstacked` and `notes` as in plans; `work` the least work of
    each policy, on devices of this mark: a pass, a kind of unit, and seconds as `cost.least.summed` gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    meshwright: str
    name: str
    fingerprint: str
    request: dict[str, str | float | int | tuple[int, ...] | tuple[str, ...] | None]
    graph: str
    batch: PlannedBatch | None
    units: dict[str, tuple[int | float | str, ...]]
    points: tuple[Point, ...] = Field(min_length=1)
    device: str
    work: dict[Policy, tuple[tuple[str, int | None, float, float, float], ...]]
    recipe: dict[str, str | int | bool] = {}
    unstacked: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, pipelines: Pipelines) -> Frontier:
        """What a search that met some pipeline found."""
        points = sorted(
            pipelines.points, key=lambda point: point.passes * point.microbatches * prod(point.mesh)
        )
        problem = pipelines.problem
        return cls(
            meshwright=VERSION, name=problem.name, fingerprint=problem.fingerprint, request=asdict(problem.request),
            graph=dump_graph(problem.folded.small), batch=PlannedBatch.of(problem.folded.whole),
            units=asdict(pipelines.choices.units), points=tuple(points[:POINTS]),
            device=_mark(problem.cluster.device), work={
                policy: tuple((*key, *seconds.tolist()) for key, seconds in sums.items())
                for policy, sums in pipelines.choices.sums.items()
            },
        )  # fmt: skip

    def replanned(self, cluster: Cluster, looks: int = LOOKS) -> Plan:
        """A plan for another number of devices; the clock has no part in which.

        Args:
            looks: how many candidates to price as they are, and half as many to solve anew.

        Raises:
            InfeasibleError: nothing that is known fits there.
            PlanError: devices are unlike, or a single program was asked for.
        """
        if len(cluster.groups) > 1:
            raise PlanError(
                f"cluster `{cluster.name}` has {len(cluster.groups)} groups.", where="replan",
                fix="`meshwright plan --pp auto`, which searches pipelines over unlike devices",
            )  # fmt: skip
        if self.request.get("program") == "single":
            raise PlanError(
                "a single program was asked for, and only programs of stages are planned anew.", where="replan",
                fix="`meshwright plan --program single`",
            )  # fmt: skip
        small = load_graph(self.graph)
        try:
            return _Replanning(self, small, cluster, looks).run()
        except MeshwrightError:
            raise
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            raise PlanError(  # decisions and units that do not fit the graph show where they are used
                f"the frontier cannot be used: {type(error).__name__}: {error}.", where=f"frontier of {self.name:.80}",
                fix="`meshwright plan --frontier` again; if that helps not, please report it",
            ) from error  # fmt: skip


def _mark(device: Device) -> str:
    """Equal for devices of equal figures, whatever they are called."""
    return sha256(device.model_dump_json().encode()).hexdigest()[:16]


def load_frontier(path: Path) -> Frontier:
    """Read a frontier.

    Raises:
        PlanError: no such file, no frontier, or one that was changed.
        MismatchError: written by another version.
    """
    origin = str(path)
    data = read_object(read_text(path, FILE), FILE, origin)
    version = data.get("meshwright")
    if isinstance(version, str) and version != VERSION:
        told = f"the frontier is of meshwright {version}, this is {VERSION}."
        raise MismatchError(told, origin=origin, fix="plan again")
    found = unsealed(Frontier, data, "frontier", origin, FILE.fix)
    try:
        check_frontier(found)
    except PlanError as error:
        raise PlanError.at(error, None, origin) from error
    return found


@dataclass(frozen=True)
class CarriedPoint:
    """A point carried over to other stages; `same`: its decisions hold there as they are. `estimate` in seconds;
    `held`: bytes that the first stage's devices hold, about."""

    point: Point
    shape: PipelineConfig
    hosts: int
    estimate: float
    held: float

    @property
    def devices(self) -> int:
        return self.shape.stages * self.shape.mesh.size

    @property
    def same(self) -> bool:
        return (self.shape.mesh.shape, self.shape.microbatches) == (
            self.point.mesh,
            self.point.microbatches,
        )


@dataclass
class _Replanning:
    frontier: Frontier
    small: Graph
    cluster: Cluster
    looks: int
    searches: dict[int, Pipelines] = field(default_factory=lambda: {})  # by hosts used
    best: Pipelines | None = None
    tried: int = 0

    def run(self) -> Plan:
        whole = self._on(self.cluster.hosts)
        limit = whole.problem.limit
        candidates = sorted(
            self._candidates(whole), key=lambda each: (each.held > limit, each.estimate)
        )
        self._look([each for each in candidates if each.same], self.looks, solve=False)
        self._look(candidates, ceil(self.looks / 2), solve=True)
        self._look_at_more_devices(candidates)
        if self.best is None:
            raise self._refusal(whole, bool(candidates))
        return self._written(whole)

    def _refusal(self, whole: Pipelines, dealt: bool) -> InfeasibleError:
        """Memory is the reason only where some known solution can be dealt out to the devices."""
        pins = {name: getattr(whole.problem.request, name) for name in PINS}
        pins["mesh"] = pins["mesh"] and "x".join(map(str, pins["mesh"]))
        told = [f"{name}={value}" for name, value in pins.items() if value not in (None, "auto")]
        if dealt:
            what = f"fits {counted(self.cluster.size, 'device')}"
            told.append(f"{format_bytes(whole.problem.limit)} per device may be used")
        else:
            what = f"can be dealt out to {counted(self.cluster.size, 'device')}"
            told.append(
                "a pipeline has two stages at least, each of whole hosts or an equal part of one"
            )
        return InfeasibleError(
            f"none of {counted(len(self.frontier.points), 'known solution')} {what}.", where="; ".join(told),
            origin=f"cluster {self.cluster.name}", fix="`meshwright plan`, which searches anew",
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        return self.best.best.seconds if self.best else inf

    def _written(self, whole: Pipelines) -> Plan:
        assert self.best is not None
        self.best.trace.stopped_by = "estimate"
        self.best.choose_program()
        left_out = (each.split(", but for th")[0] for each in LEFT_OUT)  # neither is tried here
        found = self.best.write(min(self._bound(whole), self.seconds), (*left_out, KNOWN))
        told = (
            f"planned anew from {counted(len(self.frontier.points), 'known solution')},"
            f" {counted(self.tried, 'candidate')} priced; {self._used(self.best)}"
        )
        update: dict[str, object] = {
            "notes": (*found.notes, *self.frontier.notes, told),
            "recipe": self.frontier.recipe or None,
            "batch": self.frontier.batch,  # by inputs of the whole graph, of which the small one has fewer
        }
        if self.frontier.unstacked and found.pipeline is not None:
            update["pipeline"] = found.pipeline.model_copy(update={"unstacked": True})
        return found.model_copy(update=update)

    def _bound(self, whole: Pipelines) -> float:
        """No pipeline of equal stages is faster, whatever their number, which need not divide the devices."""
        choices, pinned = Choices(whole.problem), whole.problem.request.pp
        choices.take_cuts_of(whole.choices)
        most = min(len(choices.units), self.cluster.size)
        choices.stage_counts = (pinned,) if isinstance(pinned, int) else tuple(range(2, most + 1))
        one = mesh_of((1,))
        policies = whole.problem.policies
        return min(
            choices.floor(PipelineConfig(stages, one, policy))
            for stages in choices.stage_counts
            for policy in policies
        )

    def _used(self, best: Pipelines) -> str:
        """Which hosts, or which devices of one host, take part."""
        shape, hosts = best.best.shape, best.problem.cluster.hosts
        assert shape is not None
        size, all_hosts = shape.stages * shape.mesh.size, self.cluster.hosts
        if size < hosts * self.cluster.per_host:
            return (
                f"{size} of {self.cluster.size} devices are used, {self.cluster.size - size} spare"
            )
        if hosts < all_hosts:
            used = f"{hosts} of {counted(all_hosts, 'host')} {'is' if hosts == 1 else 'are'} used"
            return f"{used}, {all_hosts - hosts} spare"
        return "all hosts are used"

    def _on(self, hosts: int) -> Pipelines:
        """The search on the first so many hosts; programs, cuts and frames are shared."""
        if hosts not in self.searches:
            where = self.cluster if hosts == self.cluster.hosts else self.cluster.first(hosts)
            known = next(iter(self.searches.values()), None)
            request = Request(**{**self.frontier.request, "program": "stages"})  # type: ignore[arg-type]
            if known is None:
                check_overlap(request.execution.overlap, where, request.backend)
                folded = Folded(self.small, self.small, ())
                name, mark = self.frontier.name, self.frontier.fingerprint
                problem = Problem(folded, where, request, cost_of(where, request), name, mark)
            else:
                problem = known.problem.on_cluster(where, request)
            found = Pipelines(problem, Trace(request.time_limit))
            if known is None:
                found.choices.units = Units(**self.frontier.units)  # type: ignore[arg-type]
                if self.frontier.device == _mark(where.device):
                    for policy, sums in self.frontier.work.items():
                        found.choices.sums[policy] = {
                            (name, kind): np.array(each) for name, kind, *each in sums
                        }
            else:
                found.choices.take_cuts_of(known.choices)
            self.searches[hosts] = found
        return self.searches[hosts]

    def _candidates(self, whole: Pipelines) -> Iterator[CarriedPoint]:
        units, batch, per_host = (
            len(whole.choices.units),
            whole.choices.batch,
            self.cluster.per_host,
        )
        pinned, pinned_mesh = whole.problem.request.pp, whole.problem.request.mesh
        for point in self.frontier.points:
            size = prod(point.mesh[1:])
            for first in range(1, self.cluster.size // size + 1):
                devices = first * size
                if devices % per_host and per_host % devices:
                    continue
                mesh = mesh_of((first, *point.mesh[1:]))
                if pinned_mesh not in (None, mesh.shape):
                    continue
                for many in self._counts(whole, point):
                    uneven = first == point.mesh[0] and (batch // point.microbatches) % first
                    if (batch // many) % first and not uneven:
                        continue
                    most = min(units, self.cluster.size // devices)
                    for stages in range(max(2, most // 2), most + 1):
                        if (stages * devices) % per_host and stages * devices > per_host:
                            continue
                        if isinstance(pinned, int) and stages != pinned:
                            continue
                        shape = PipelineConfig(stages, mesh, point.policy, many)
                        hosts = ceil(stages * devices / per_host)
                        yield CarriedPoint(
                            point, shape, hosts, _estimate(point, shape, units), _held(point, shape)
                        )

    def _look_at_more_devices(self, candidates: list[CarriedPoint]) -> None:
        """Where the best leaves devices spare, the most promising of those that leave fewest: estimates take units
        as equal, so that 18 on 6 stages seem as good as on 8."""
        limit, best = self._on(self.cluster.hosts).problem.limit, self.best and self.best.best.shape
        if best is None:
            return
        fitting = [each for each in candidates if each.held <= limit]
        most = max((each.devices for each in fitting), default=0)
        if most > best.stages * best.mesh.size:
            fullest = [each for each in fitting if each.devices == most]
            same = [each for each in fullest if each.same]
            self._look(same or fullest, self.looks if same else 1, solve=not same, hopeful=True)

    @staticmethod
    def _counts(whole: Pipelines, point: Point) -> list[int]:
        near = range(ceil(point.microbatches / NEAR), point.microbatches * NEAR + 1)
        return [many for many in whole.choices.counts if many in near]

    def _look(
        self, candidates: list[CarriedPoint], looks: int, solve: bool, hopeful: bool = False
    ) -> None:
        """Price so many candidates as they are, or solve anew on their meshes, the most promising first; with
        `hopeful` whatever the estimate."""
        seen: set[PipelineConfig] = set()
        before = self.tried
        for candidate in candidates:
            if (self.tried - before >= looks and self.best) or (
                candidate.estimate >= self.seconds and not hopeful
            ):
                return
            if candidate.shape in seen:
                continue
            try:
                pipelines = self._on(candidate.hosts)
            except MeshwrightError:  # the fabric has no place for so few hosts
                continue
            self.tried += 1
            pipelines.cutoff = self.seconds
            if solve:
                seen.add(candidate.shape)
                pipelines.solve_shape(candidate.shape)
            else:
                space = pipelines.bounds.likely(candidate.shape)
                choices = candidate.point.choices_in(space)
                assert choices is not None  # the mesh and the count are those of the point
                pipelines.offer(candidate.shape, space, choices)
            if pipelines.best.seconds < self.seconds:
                self.best = pipelines


def _estimate(point: Point, shape: PipelineConfig, units: int) -> float:
    """Work shared out evenly, half the bubble of 1F1B (others have less), and that units are not cut."""
    devices = prod(point.mesh) / shape.mesh.size
    passes = (
        point.passes * point.microbatches / shape.microbatches * ceil(units / shape.stages) / units
    )
    return devices * (
        (shape.microbatches + (shape.stages - 1) / 2) * passes + point.once / shape.stages
    )


def _held(point: Point, shape: PipelineConfig) -> float:
    """As 1F1B's first stage, with layouts like the point's: state lies in as many parts or, on a smaller first axis,
    at most so many times fewer; results are cut by it and by the microbatches."""
    first, many = point.mesh[0] / shape.mesh.shape[0], point.microbatches / shape.microbatches
    flying = (min(shape.stages, shape.microbatches) - 1) * point.left * first * many
    return (point.peak * max(1.0, first) + flying) / shape.stages
