"""The search over pipelines: stages × mesh of a stage × recompute × microbatches × schedule, best first.

    family      (stages, mesh, recompute): a bound by floating-point work, then one intra-operator solve
                without stages' memory limits, with as little bubble as any count leaves
    shape       a family with a microbatch count: the same with its own bubble, and the memory that the
                stages have all together
    solve       under the memory limits of the first, second and last stage; then the exact cut of layers
                into stages for every schedule, simulated

All stages have equal meshes. The bound of a shape assumes stages of exactly equal time, cut anywhere:

    step >= (microbatches + bubble) / stages * all layers' seconds of one microbatch + updates / stages
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice, zip_longest
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from ...ir.errors import InfeasibleError
from ...ir.pipeline.schedule import Schedule
from ...ir.plan import Plan
from ...ir.units import format_bytes, format_seconds
from ..intra.overlapped import solve_overlapped
from ..intra.space import Space
from ..problem import Problem
from ..report.of_pipeline import LEFT_OUT, ProgramChoice, Rank, write_pipeline
from ..request import PIPELINE_GAP
from ..search.meshes import finer_stages
from ..search.search import Prefetching
from ..solver.onehot import Solution
from ..trace import Trace
from .bounds import SOLVE_GAP, Bounds
from .choices import Choices, PipelineConfig
from .found import Found, with_program
from .inherited import InheritedBounds
from .points import Point
from .priced import Place, Priced, Pricing
from .single import price_single
from .stage_memory import StageMemory
from .unit_costs import together, unit_seconds
from .units import runs_of
from .watched import Limited, Limiting, Watched, crowded_stages, watched_stages

if TYPE_CHECKING:
    from ..search.candidates import Candidate

TRIES = 3  # solves of a shape: the solver does not see all of the memory, so its limit is drawn in
ORDER = 0.2  # of the time limit: the last part, in which whatever is best is tried in a better order at once
MUCH, ORDERS = (
    0.2,
    8,
)  # where another order may win so much of a step it is looked for at once, so often at most
BETTER = 0.002  # of a step: what meshes of more axes may win at least, to be solved


@dataclass
class Pipelines:
    """Explores pipelines; `workers` work out bounds ahead."""

    problem: Problem
    trace: Trace
    workers: Prefetching | None = None
    choices: Choices = field(init=False)
    bounds: Bounds = field(init=False)
    # with passes in the order of a schedule, until `reorder`; and the best of some time, in a better one
    best: Found = field(default_factory=Found)
    reordered: Found = field(default_factory=Found)
    # Bound, axes (finer first), number.
    open: list[tuple[float, int, int, PipelineConfig]] = field(default_factory=lambda: [])
    closed: float = inf  # least bound of the shapes looked at to their end
    looked: int = 0
    cutoff: float = inf  # seconds of a plan found elsewhere
    first: float = inf  # of the best when the usual choices were looked at
    besides: Sequence[
        Candidate
    ] = ()  # what else is looked at, which other processes may begin with
    points: list[Point] = field(default_factory=lambda: [])
    # Of families that were looked at.
    counts_left: dict[PipelineConfig, list[int]] = field(default_factory=lambda: {})
    inherited: InheritedBounds = field(init=False)

    def __post_init__(self) -> None:
        self.choices = Choices(self.problem)
        self.bounds = Bounds(self.problem, self.trace, self.choices)
        self.inherited = InheritedBounds(self.choices)

    # ------------------------------------------------------------ the search

    def explore(self, cutoff: float = inf) -> None:
        """Until no open family can beat the best by more than the gap, or time is up.

        Args:
            cutoff: seconds of a plan that is known.
        """
        self.begin()
        while self.promises(cutoff) < inf and not self.trace.past_deadline():
            self.step(cutoff)

    def begin(self) -> None:
        """All families are open; a few usual shapes are solved, to have something to beat."""
        for family in self.choices.families():
            self._push(self.choices.floor(family), family)
        first = self._first()
        while first and not self.trace.past_deadline():
            shape = first.pop(0)
            ruled_out = self.choices.floor(shape) >= self.best.seconds or self.bounds.cannot_fit(
                shape
            )
            if not ruled_out and self._bound(shape, first)[1] < self._enough(inf):
                self.solve_shape(shape)
        self.first = self.as_run()

    def promises(self, cutoff: float = inf) -> float:
        """The least bound of the open families; inf where none is worth a look."""
        least = self.open[0][0] if self.open else inf
        return least if least < self._enough(cutoff) else inf

    def step(self, cutoff: float = inf) -> None:
        """Look at the open family of the least bound; at the order of passes of what was found to begin with, and of
        whatever is best when time is nearly up."""
        if not self._looked_at:
            self._look_for_order(self.best, cutoff)
        self.hurry(cutoff)
        if self.promises(cutoff) == inf:
            return
        bound, _, _, family = heapq.heappop(self.open)
        try:
            self._advance(family, bound, cutoff)
        except KeyboardInterrupt:
            self._push(bound, family)  # what was left of it is open still
            raise
        self.trace.report_progress(self.beat, self.lower_bound(), self.looked, self._left(cutoff))

    def _advance(self, family: PipelineConfig, bound: float, cutoff: float) -> None:
        """Look at the family's microbatch counts, the least first; each bounds its multiples. A family whose
        bound has risen since it was pushed waits for its turn."""
        left, carried = self._counts_of(family), self._inherited(family)
        for many in list(left):
            if carried[many] >= self._enough(cutoff):
                left.remove(many)
                self.closed = min(self.closed, carried[many])
        now = min((carried[many] for many in left), default=inf)
        if now > bound:
            self._push(now, family)
        elif left:
            shape = replace(family, microbatches=left.pop(0))
            before, (free, own) = (
                carried[shape.microbatches],
                self._bound(shape, self._soon(cutoff)),
            )
            self.looked += 1
            self.inherited.add(family, shape.microbatches, max(before, free))
            own, layers = max(before, own), 0
            if own < self._enough(cutoff):
                by_cases, layers = self.bounds.by_cases(shape, self._enough(cutoff))
                own = max(own, by_cases)
            if own < self._enough(cutoff):
                self.solve_shape(shape, layers=layers)
            self.bounds.spaces.pop(shape, None)
            self.closed, carried = min(self.closed, own), self._inherited(family)
            self._push(min((carried[many] for many in left), default=inf), family)

    def _inherited(self, family: PipelineConfig) -> dict[int, float]:
        """By microbatch count, what is known of the family before any is looked at."""
        return dict(zip(self.choices.counts, self.inherited.bounds(family).tolist(), strict=True))

    def _bound(self, shape: PipelineConfig, soon: Iterable[PipelineConfig]) -> tuple[float, float]:
        """What `relaxed` gives; other processes begin with what comes soon."""
        workers = self.workers
        beat, found = self.beat, None
        if workers is not None:
            workers.prefetch(
                chain(
                    ((each, beat) for each in soon),
                    ((each, self.first) for each in self.besides),
                )
            )
            found = workers.result((shape, beat))
        return self.bounds.relaxed(shape, beat) if found is None else found

    def _soon(self, cutoff: float) -> Iterator[PipelineConfig]:
        """What will be looked at next if nothing better is found."""
        enough = self._enough(cutoff)
        for bound, _, _, family in sorted(self.open):
            if bound < enough and not self.inherited.finer(family):
                carried = self._inherited(family)
                left = (many for many in self._counts_of(family) if carried[many] < enough)
                yield from (replace(family, microbatches=many) for many in islice(left, 1))

    def _left(self, cutoff: float) -> int:
        """Shapes that can still be better, those of families not looked at yet taken as one each."""
        enough = self._enough(cutoff)
        return sum(
            len(self.counts_left.get(family, "?"))
            for bound, _, _, family in self.open
            if bound < enough
        )

    def _counts_of(self, family: PipelineConfig) -> list[int]:
        """Those not looked at yet, of counts with room."""
        if family not in self.counts_left:
            self.counts_left[family] = self.bounds.with_room(family)
        return self.counts_left[family]

    def lower_bound(self) -> float:
        """No pipeline of the searched ones is faster."""
        return min([self.beat, self.closed, *(bound for bound, *_ in self.open)])

    def as_run(self) -> float:
        """Seconds of the best with the host's dispatch, as programs of its stages."""
        return self._faster().as_run(self.problem.cost.execution_model)

    def _faster(self) -> Found:
        """The best pipeline, or one whose passes were reordered."""
        model, best, other = self.problem.cost.execution_model, self.best, self.reordered
        slow = other.shape != best.shape and other.as_run(model) >= best.as_run(model)
        return other if other.seconds < best.seconds and not slow else best

    @property
    def beat(self) -> float:
        """Seconds of the best plan known, which another has to beat."""
        return min(self.best.seconds, self.reordered.seconds)

    def _enough(self, cutoff: float) -> float:
        return min(self.beat, cutoff) * (1 - self.problem.request.good_enough)

    def _push(self, bound: float, shape: PipelineConfig) -> None:
        if bound < inf:
            heapq.heappush(self.open, (bound, -len(shape.mesh.axes), next(self._numbers), shape))

    _numbers: Iterator[int] = field(default_factory=count)

    def _first(self) -> list[PipelineConfig]:
        """For each number of stages a usual choice, to have something to beat."""
        policy = self.problem.policies[-2:][0]  # "selective", or what makes the same program
        pairs = [(n, mesh) for n in self.choices.stage_counts for mesh in self.choices.meshes(n)]
        usual = [
            (n, mesh) for n, mesh in pairs if mesh.shape[-1] > 2 or len(self.choices.meshes(n)) == 1
        ]
        usual = [
            (n, mesh)
            for n, mesh in usual
            if not self.inherited.finer(PipelineConfig(n, mesh, policy))
        ]
        found: list[PipelineConfig] = []
        for stages, mesh in sorted(usual, key=lambda pair: abs(pair[0] - 8)):
            wanted = max(1, self.choices.batch // mesh.shape[0])
            many = max(
                (c for c in self.choices.counts if c <= wanted), default=self.choices.counts[0]
            )
            found.append(PipelineConfig(stages, mesh, policy, many))
        return found

    # ------------------------------------------------------------ solving

    def solve_shape(
        self, shape: PipelineConfig, beat: float | None = None, layers: int = 0
    ) -> None:
        """Offer what fits of one shape; `beat`: seconds that it has to beat, by default those of the best; `layers`: of
        the fullest stage where the step may be fastest, if known."""
        space, beat = self.bounds.likely(shape), self.best.seconds if beat is None else beat
        single, schedules = self.problem.request.program == "single", self.choices.schedules_for
        most_to_least = list(schedules(shape))  # stages per rank, of which few hold more
        ends = dict.fromkeys((*most_to_least[:1], *most_to_least[-1:]))
        uneven = layers > self.choices.fullest_at_least(shape.stages)
        units = self.choices.units
        cuts = [crowded_stages(units, schedule, layers) for schedule in ends if uneven]
        cuts += [watched_stages(units, schedule, single) for schedule in ends]
        for watched in cuts:
            if self._solved(shape, space, watched, beat):
                return

    def _solved(
        self, shape: PipelineConfig, space: Space, watched: list[Watched], beat: float
    ) -> bool:
        """Offer layouts with which the watched stages fit or, on the way there, nearly fit: with stages cut otherwise
        or another schedule they may. Whether there are any."""
        found: dict[tuple[int, ...], StageMemory] = {}
        holdings = self.bounds.holdings(shape.policy, shape.microbatches)
        limiting = Limiting(holdings, watched, self.problem.limit)

        # A closer solve may end at layouts that are worse once stages are cut, so the usual one is tried too.
        asked = self.problem.request.good_enough
        for gap in dict.fromkeys((max(asked, PIPELINE_GAP), asked)):

            def solve(priced: Space, gap: float = gap) -> Solution:
                first, *_ = self._fitting(shape, space, limiting(priced), watched, beat, found, gap)
                return first

            solve_overlapped(space, solve, SOLVE_GAP * gap, beat)
        return bool(found)

    def _fitting(
        self, shape: PipelineConfig, space: Space, problem: Limited, watched: list[Watched], beat: float,
        known: dict[tuple[int, ...], StageMemory], gap: float,
    ) -> Iterator[Solution]:  # fmt: skip
        """Solutions at given prices, so near the best, the limit drawn in until one fits or is the best, or there is
        none; what they hold is `known` then."""
        before, live = self.best, problem.live
        for _ in range(TRIES):
            solution = self.bounds.solve(live, beat, gap)
            if solution.choices is None:
                yield solution
                return
            choices = problem.read(solution.choices)
            memory = known.get(choices) or self.offer(shape, space, choices)
            known[choices] = memory
            yield replace(solution, choices=choices)
            excess = (
                np.array([memory.held(each.runs, each.held) for each in watched])
                - self.problem.limit
            )
            if excess.max() <= 0 or self.best is not before:
                return
            unused = (
                (live.limits - live.used(solution.choices)).reshape(len(watched), -1).min(axis=1)
            )
            drawn = np.where(excess > 0, excess + unused, 0.0)
            live = replace(
                live, limits=live.limits - drawn.repeat(live.limits.size // len(watched))
            )

    def offer(self, shape: PipelineConfig, space: Space, choices: tuple[int, ...]) -> StageMemory:
        """Price layouts with every schedule, to be the best if they are; gives back what they hold."""
        holdings = self.bounds.holdings(shape.policy, shape.microbatches)
        units, overlap = self.choices.units, self.problem.request.execution.within
        each = unit_seconds(holdings.cut, space, choices, overlap)
        memory, every = StageMemory(holdings, space, choices), runs_of(units, 0, len(units))
        size, limit = shape.mesh.size, self.problem.limit
        places = tuple(
            Place(each, memory, limit, rank * size, size) for rank in range(shape.stages)
        )
        pricing, work = Pricing(units, places, self.problem.cluster), together(every, each)
        peak, left, _ = memory.parts(every)
        self.points.append(Point.of(space, choices, shape.policy, work, peak, left))
        much = shape.microbatches * work.passes / shape.stages < self._much(self.cutoff)
        best, fastest = inf if much else self.best.seconds, None
        for schedule in self._promising(shape, work.passes, best):
            if self.problem.request.program == "single":
                priced = self._single(pricing, shape.microbatches)
            else:
                priced = pricing.price(schedule, best)
            if priced is not None and priced.seconds < best:
                fastest, best = priced, priced.seconds
        if fastest is not None:
            found = Found(shape, space, choices, pricing, fastest)
            if fastest.seconds < self.best.seconds:
                self.best = found
                self.trace.note(
                    f"{shape}, {fastest.schedule.name}: {format_seconds(fastest.seconds)}, "
                    f"{format_bytes(max(fastest.peaks))}"
                )
            if fastest.in_any_order < self._much(self.cutoff) and len(self._looked_at) < ORDERS:
                self._look_for_order(found, self.cutoff)
        return memory

    def _much(self, cutoff: float) -> float:
        """Seconds that would be much better than what is known."""
        return min(self.beat, cutoff) * (1 - MUCH)

    def _promising(self, shape: PipelineConfig, passes: float, best: float) -> Iterator[Schedule]:
        """Schedules that would be better than the best if stages were equal; `passes`: seconds of one microbatch
        through all of them."""
        many, stages = shape.microbatches, shape.stages
        for schedule in self.choices.schedules_for(shape):
            waiting = (stages - 1) * stages / schedule.stages if schedule.stages > stages else 0.0
            if (many + waiting) * passes / stages < best:
                yield schedule

    def refine(self) -> None:
        """Try meshes of three axes that cut those of the best further, with as many microbatches and then, of one that
        is better, a few more or fewer."""
        first, counts = self.best.shape, self.choices.counts
        if (
            first is None
            or self.problem.request.mesh is not None
            or self.problem.request.program == "single"
        ):
            return
        for mesh in finer_stages(self.problem.cluster, first.mesh):
            self._try(replace(first, mesh=mesh))
        best = self.best.shape
        if best is not None and best != first:
            at = counts.index(best.microbatches)
            for many in (*counts[max(0, at - 1) : at], *counts[at + 1 : at + 2]):
                self._try(replace(best, microbatches=many))

    def _try(self, shape: PipelineConfig) -> None:
        before, enough = self.best, self.best.seconds * (1 - BETTER)
        ruled_out = (
            self.trace.past_deadline()
            or self.choices.floor(shape) >= enough
            or self.bounds.cannot_fit(shape)
        )
        if not ruled_out and self.bounds.relaxed(shape, enough)[1] < enough:
            self.solve_shape(shape)
        if self.best.seconds > enough:
            self.best = before
        self.bounds.spaces.pop(shape, None)

    def broaden(self, points: int) -> None:
        """Solve the best bounded shapes that were not solved, one of each mesh first, until so many points are known:
        for other numbers of devices they may be the best."""
        bounds = {
            replace(family, microbatches=many): bound
            for family, known in self.inherited.found.items() for many, bound in known.items() if bound < inf
        }  # fmt: skip
        solved = {(point.mesh, point.policy, point.microbatches) for point in self.points}
        ranked: dict[tuple[int, ...], list[PipelineConfig]] = {}
        for shape in sorted(bounds, key=bounds.__getitem__):
            if (shape.mesh.shape, shape.policy, shape.microbatches) not in solved:
                ranked.setdefault(shape.mesh.shape, []).append(shape)
        for shape in (
            each for turn in zip_longest(*ranked.values()) for each in turn if each is not None
        ):
            if len(self.points) >= points or self.trace.past_deadline():
                return
            self.solve_shape(shape, beat=inf)

    def reorder(self, cutoff: float = inf) -> None:
        """Keep the best pipeline's passes in a better order, if one is found and none was asked for; that of another
        pipeline only if the host's dispatch leaves it the faster one."""
        self._look_for_order(self.best, cutoff)
        self.best = self._faster()

    def _look_for_order(self, found: Found, cutoff: float) -> None:
        """Look for one, where some order can be faster than what is known."""
        if not self._order_is_open(found, cutoff) or self.trace.past_deadline():
            return
        assert found.pricing is not None and found.priced is not None
        self._looked_at.append(found)
        better = found.pricing.reordered(found.priced)
        if better is not None and better.seconds < self.beat:
            self.reordered = replace(found, priced=better)
            self.trace.note(
                f"{found.shape}, passes reordered: {format_seconds(better.seconds)}, {format_bytes(max(better.peaks))}"
            )

    def hurry(self, cutoff: float) -> None:
        """When time is nearly up, look for a better order of whatever is best by now: at the end it may be too late."""
        if self.trace.past_deadline(ORDER):
            self._look_for_order(self.best, cutoff)

    def _order_is_open(self, found: Found, cutoff: float) -> bool:
        """Whether its passes were not looked at, and some order of them can be faster than what is known."""
        request = self.problem.request
        if found.priced is None or found.pricing is None:
            return False
        if any(found is each for each in self._looked_at):
            return False
        if request.schedule is not None or request.program == "single":
            return False
        return found.priced.in_any_order < min(self.beat, cutoff)

    _looked_at: list[Found] = field(default_factory=lambda: [])  # whose passes were reordered

    def _single(self, pricing: Pricing, microbatches: int) -> Priced | None:
        """A single program for all stages; None where it does not fit."""
        try:
            return price_single(pricing, microbatches)
        except InfeasibleError:
            return None

    def choose_program(self) -> None:
        """Of the best pipeline: programs of its stages with the host's dispatch, or a single one where that is faster.

        Raises:
            PlanError: a single program was asked for, and the stages are not equal.
        """
        self.best = with_program(self.best, self.problem, self.trace)

    def write(self, bound: float, left_out: tuple[str, ...] = LEFT_OUT) -> Plan:
        """The plan of the best pipeline."""
        best = self.best
        assert best.space and best.pricing and best.priced
        ranks = [Rank(self.problem, best.space, best.choices)] * best.priced.schedule.ranks
        chosen = ProgramChoice(best.programs, best.why)
        return write_pipeline(
            ranks,
            best.pricing,
            best.priced,
            self.problem.cluster,
            bound,
            self.trace,
            left_out,
            chosen,
        )
