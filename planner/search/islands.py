"""Plans for clusters of several groups: unlike devices, or islands behind a slow link.

    alone       the best plan of every group, and of the whole where its devices are equal; what follows must beat it
    combination an order of the groups, stages in each, recompute, microbatches; looked at in the order of
                what they would take if every op were cut evenly and layers dealt out by speed
    solve       per group: layouts under the memory of its own stages; then the exact cut of layers

The bound needs no stages at all. Each class of ops is given to groups in any fractions, so for weights y that
add up to one (LP duality)

    step >= sum over classes of min over groups of y_g * w_gc,  y_g ~ 1 / sum over classes of w_gc

where w_gc is the least seconds that group g alone takes for class c.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations, product
from math import inf, prod

import numpy as np

from ...ir.analysis.blocks import Folded
from ...ir.cluster.cluster import Cluster
from ...ir.errors import InfeasibleError, PlanError
from ...ir.passes.recompute import Policy
from ...ir.pipeline.schedule import in_flight
from ...ir.plan import Plan
from ...ir.units import counted, format_bytes, format_seconds
from ..cost.least import least_work
from ..pipeline.choices import PipelineConfig
from ..pipeline.dealing import deal
from ..pipeline.priced import Place, Priced, Pricing
from ..pipeline.schedules import entry, schedule_named
from ..pipeline.search import Pipelines
from ..pipeline.stage_layouts import StageLayouts
from ..pipeline.units import Units, runs_of
from ..pipeline.watched import Watched
from ..problem import Problem, cost_of
from ..report.of_pipeline import BESIDES, Rank, by_stages, write_pipeline
from ..request import Request, check
from ..trace import Trace
from .meshes import plane_meshes

ORDERS = 12  # of so many groups that are tried: all of three
UNLIKE = (
    *BESIDES,
    "several stages on one rank, where groups are unlike",
    "different recompute, or meshes, for stages of one group",
)

Alone = Callable[[Problem, Trace], Plan]  # plans one group of equal devices


@dataclass(frozen=True)
class Combination:
    """`stages[i]` stages on group `order[i]`."""

    order: tuple[int, ...]
    stages: tuple[int, ...]
    policy: Policy
    microbatches: int
    estimate: float  # seconds


@dataclass
class Islands:
    """The search over one cluster of several groups."""

    folded: Folded
    cluster: Cluster
    request: Request
    name: str
    fingerprint: str
    tell: Callable[[str], None]
    now: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    best: float = inf
    found: tuple[list[Rank], Pricing, Priced] | None = None

    def run(self, alone: Alone) -> Plan:
        """The best of all: never worse than any group by itself, which `alone` plans."""
        roomy = max(self.problems, key=lambda problem: problem.cluster.device.memory)
        open_ = (
            self.request
            if self.request.pp == "auto"
            else replace(self.request, pp="auto", mesh=None)
        )
        check(open_, roomy.cluster, roomy.program("none").time)
        plans = list(self._alone(alone))
        single = min(plans, key=lambda plan: plan.estimate.step_seconds, default=None)
        self.best = single.estimate.step_seconds if single else inf
        try:
            self._explore()
            self._reorder()
        except KeyboardInterrupt:
            self._trace.stopped_by = "interrupt"
        if self.found is not None:
            chosen = by_stages(*self.found[1:], self.problems[0].cost.execution_model)
            bound = self.lower_bound()
            return write_pipeline(*self.found, self.cluster, bound, self._trace, UNLIKE, chosen)
        if single is None:
            raise InfeasibleError(
                "no plan fits, neither on one group of devices nor on all.", where=f"cluster {self.cluster.name}",
                origin=self.words, fix="more microbatches, recompute, a smaller batch or model, or more devices",
            )  # fmt: skip
        if single.cluster.size == self.cluster.size:
            return single
        left = self.cluster.size - single.cluster.size
        note = f"{counted(left, 'device')} {'is' if left == 1 else 'are'} left idle: no pipeline over all is faster"
        bound = min(single.proof.lower_bound, self.lower_bound())
        proof = {
            "lower_bound": bound,
            "left_out": UNLIKE,
            "status": "feasible",
            "searched": tuple(self._trace.log),
        }
        return single.model_copy(
            update={"notes": (*single.notes, note), "proof": single.proof.model_copy(update=proof)}
        )

    @property
    def words(self) -> str:
        return " and ".join(
            f"{counted(g.hosts, 'host')} of {g.per_host} {g.device}" for g in self.cluster.groups
        )

    @cached_property
    def problems(self) -> list[Problem]:
        """One per group; they share the prepared programs."""
        found: list[Problem] = []
        for index in range(len(self.cluster.groups)):
            part = self.cluster.only(index)
            most = part.device.memory
            share = (index + 1) / (
                len(self.cluster.groups) + 1
            )  # of the time, until this group is done
            request = replace(
                self.request, memory=self.request.memory and min(self.request.memory, most),
                time_limit=share * self.request.time_limit,
            )  # fmt: skip
            if found:
                found.append(found[0].on_cluster(part, request))
                continue
            cost = cost_of(part, request)
            found.append(Problem(self.folded, part, request, cost, self.name, self.fingerprint))
        return found

    @cached_property
    def traces(self) -> list[Trace]:
        """Of each group."""
        return [
            Trace(problem.request.time_limit, self.tell, self.now, self.started)
            for problem in self.problems
        ]

    @cached_property
    def pipelines(self) -> list[Pipelines]:
        return list(map(Pipelines, self.problems, self.traces))

    @cached_property
    def layouts(self) -> list[StageLayouts]:
        return list(map(StageLayouts, self.pipelines))

    @property
    def _trace(self) -> Trace:
        """Of the search over all groups together, which goes on where that of the first group ends."""
        return self.traces[0]

    @cached_property
    def units(self) -> Units:
        return self.pipelines[0].choices.units

    def _alone(self, alone: Alone) -> Iterator[Plan]:
        seen: set[str] = set()
        for problem, trace in [*self._equal(), *zip(self.problems, self.traces, strict=True)]:
            key = problem.cluster.fingerprint()
            if key in seen:
                continue
            seen.add(key)
            trace.note(f"on {problem.cluster.size} {problem.cluster.device.name} alone:")
            try:
                yield alone(problem, trace)
            except InfeasibleError:
                trace.note("no plan fits")
            except PlanError:
                trace.note("not with what is asked for")

    def _equal(self) -> list[tuple[Problem, Trace]]:
        """The whole cluster, where all its hosts are equal."""
        if not self.cluster.uniform:
            return []
        request = replace(self.request, time_limit=self.request.time_limit / 3)
        problem = self.problems[0].on_cluster(self.cluster, request)
        return [(problem, Trace(request.time_limit, self.tell, self.now))]

    # ------------------------------------------------------------ what there is to choose

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return self.pipelines[0].choices.counts

    def _options(self, group: int) -> list[int]:
        """Numbers of stages that a group may hold."""
        part = self.problems[group].cluster
        sizes = [d for d in range(1, part.per_host + 1) if part.per_host % d == 0]
        sizes += [part.per_host * h for h in range(2, part.hosts + 1) if part.hosts % h == 0]
        if self.request.mesh is not None:
            sizes = [d for d in sizes if d == prod(self.request.mesh)]
        return [part.size // d for d in sizes]

    @cached_property
    def _work(self) -> dict[tuple[int, Policy], dict[tuple[str, bool], np.ndarray]]:
        """Least seconds of one run, by (stages - option, microbatch count), of each class of ops."""
        found: dict[tuple[int, Policy], dict[tuple[str, bool], np.ndarray]] = {}
        for group, pipelines in enumerate(self.pipelines):
            problem, devices = (
                pipelines.problem,
                [pipelines.problem.cluster.size // n for n in self._options(group)],
            )
            for policy in problem.policies:
                of = pipelines.choices.cut(policy, 2).class_of
                program = problem.program(policy, in_stages=True)
                found[group, policy] = least_work(program, problem.cost, devices, self.counts, of)
        return found

    def _combinations(self) -> list[Combination]:
        """Cheapest estimate first."""
        found: list[Combination] = []
        passes = {key: _passes(work) for key, work in self._work.items()}
        chosen = [
            (some, stages)
            for some in self._subsets()
            for stages in product(*map(self._options, some))
        ]
        for order, stages in chosen:
            total = sum(stages)
            if not 1 < total <= len(self.units) or self.request.pp not in ("auto", total):
                continue
            rows = [self._options(group).index(n) for group, n in zip(order, stages, strict=True)]
            for policy in self.problems[0].policies:
                one = [
                    passes[group, policy][row] for group, row in zip(order, rows, strict=True)
                ]  # by count
                slowest = 1 / np.array(
                    [n / seconds for n, seconds in zip(stages, one, strict=True)]
                ).sum(axis=0)
                for i, many in enumerate(self.counts):
                    seconds = float((many + total - 1) * slowest[i])
                    found.append(Combination(order, stages, policy, many, seconds))
        return sorted(found, key=lambda each: each.estimate)

    def _subsets(self) -> list[tuple[int, ...]]:
        """Orders of two groups or more."""
        groups = range(len(self.cluster.groups))
        sizes = range(2, len(self.cluster.groups) + 1)
        return [order for size in sizes for order in list(permutations(groups, size))[:ORDERS]]

    def lower_bound(self) -> float:
        """No plan on any of the groups together is faster."""
        found: list[float] = []
        for policy in self.problems[0].policies:
            for i, many in enumerate(self.counts):
                each: list[
                    list[float]
                ] = []  # by group: seconds of each class with all devices of the group
                for group in range(len(self.cluster.groups)):
                    row = self._options(group).index(1) if 1 in self._options(group) else 0
                    scale = self._options(group)[row]
                    work = self._work[group, policy]
                    each.append(
                        [
                            float(work[c][row, i]) / scale * (1 if c[0] == "once" else many)
                            for c in work
                        ]
                    )
                totals = np.array(each).sum(axis=1)
                least = (np.array(each) / totals[:, None]).min(axis=0).sum()
                found.append(float(least / (1 / totals).sum()))
        return min(self.best, *found)

    # ------------------------------------------------------------ the search

    def _explore(self) -> None:
        if self._several_on_a_rank():
            return
        combinations = self._combinations()
        for looked, each in enumerate(combinations, 1):
            if each.estimate >= self.best * (1 - self.request.good_enough):
                return
            if time.monotonic() - self.started > self.request.time_limit:
                self._trace.stopped_by = "time"
                return
            self._look(each)
            left = sum(c.estimate < self.best for c in combinations[looked:])
            self._trace.report_progress(
                self.best, self.lower_bound(), looked, left, self.request.time_limit
            )

    def _several_on_a_rank(self) -> bool:
        """Whether the schedule asked for is one that stages over several groups cannot have.

        Raises:
            PlanError: it is, and no group by itself has a plan with it either.
        """
        name = self.request.schedule
        if name is None or entry(name).chunks == 1:
            return False
        if self.best < inf:
            return True
        raise PlanError(
            f"{entry(name).name} puts several stages on a rank, which is not planned for unlike devices.",
            where="request: schedule", fix="1f1b, zb-h1, gpipe",
        )  # fmt: skip

    def _look(self, each: Combination) -> None:
        try:
            usual = schedule_named(
                self.request.schedule or "1f1b", sum(each.stages), each.microbatches
            )
        except PlanError:
            return
        homes = [group for group, n in zip(each.order, each.stages, strict=True) for _ in range(n)]
        firsts = self._dealt(each, homes)
        if firsts is None:
            return
        ends = (*firsts[1:], len(self.units))
        ranks: list[Rank] = []
        for group, n in zip(each.order, each.stages, strict=True):
            mine = range(len(ranks), len(ranks) + n)
            watched = {
                s: Watched(runs_of(self.units, firsts[s], ends[s]), in_flight(usual, s))
                for s in mine
            }
            rank = self._layouts(group, n, each, (watched[mine[0]], watched[mine[-1]]))
            if rank is None:
                return
            ranks += [rank] * n
        pricing = Pricing(self.units, tuple(self._places(ranks, homes)), self.cluster)
        names = (self.request.schedule,) if self.request.schedule else ("1f1b", "zb-h1")
        for name in names:
            priced = pricing.price(schedule_named(name, len(ranks), each.microbatches), self.best)
            if priced is not None and priced.seconds < self.best:
                self._offer(each, ranks, pricing, priced)

    def _offer(
        self, each: Combination, ranks: list[Rank], pricing: Pricing, priced: Priced
    ) -> None:
        self.best, self.found = priced.seconds, (ranks, pricing, priced)
        devices = [self.problems[group].cluster.device.name for group in each.order]
        where = " then ".join(
            f"{n} on {device}" for n, device in zip(each.stages, devices, strict=True)
        )
        self._trace.note(
            f"stages {where}, recompute {each.policy}, microbatches {each.microbatches}, {priced.schedule.name}: "
            f"{format_seconds(priced.seconds)}, {format_bytes(max(priced.peaks))}"
        )

    def _reorder(self) -> None:
        """A better order of passes for the best, if none was asked for."""
        if self.found is None or self.request.schedule is not None:
            return
        ranks, pricing, priced = self.found
        better = pricing.reordered(priced)
        if better is not None and better.seconds < priced.seconds:
            self.best, self.found = better.seconds, (ranks, pricing, better)
            self._trace.note(
                f"passes reordered: {format_seconds(better.seconds)}, {format_bytes(max(better.peaks))}"
            )

    def _dealt(self, each: Combination, homes: Sequence[int]) -> tuple[int, ...] | None:
        """Units by speed, before anything is known of memory."""
        at, speeds = self.counts.index(each.microbatches), dict[int, float]()
        for group, n in zip(each.order, each.stages, strict=True):
            work, row = self._work[group, each.policy], self._options(group).index(n)
            speeds[group] = float(_passes(work)[row, at])
        shares = [self.units.work[kind] for kind in self.units.kinds]
        by_group = {
            group: [seconds * share / sum(shares) for share in shares]
            for group, seconds in speeds.items()
        }
        return deal([by_group[group] for group in homes])

    def _places(self, ranks: Sequence[Rank], homes: Sequence[int]) -> Iterator[Place]:
        """Groups are numbered as the cluster lists them, whatever their order in the pipeline."""
        sizes = [problem.cluster.size for problem in self.problems]
        free = [sum(sizes[:group]) for group in range(len(sizes))]
        for rank, group in zip(ranks, homes, strict=True):
            yield self.layouts[group].place(rank, free[group])
            free[group] += rank.space.mesh.size

    def _layouts(
        self, group: int, stages: int, each: Combination, watched: tuple[Watched, ...]
    ) -> Rank | None:
        """The fastest layouts of a group's stages that fit, over its meshes."""
        cluster = self.problems[group].cluster
        meshes = plane_meshes(cluster, cluster.size // stages, self.request.mesh)
        shapes = (PipelineConfig(stages, mesh, each.policy, each.microbatches) for mesh in meshes)
        return self.layouts[group].fastest(shapes, watched)


def _passes(work: Mapping[tuple[str, bool], np.ndarray]) -> np.ndarray:
    """Seconds of one microbatch's passes through all layers."""
    each: list[np.ndarray] = [seconds for (name, _), seconds in work.items() if name != "once"]
    return np.array(each).sum(axis=0)
