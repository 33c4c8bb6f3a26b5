"""What no pipeline of a shape can do without: seconds, by one solve without stages' own memory limits, and bytes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf

import numpy as np

from ...ir.passes.recompute import Policy
from ..intra.overlapped import solve_overlapped
from ..intra.solve import live_of
from ..intra.space import Space, build
from ..memory.ledger import least_bytes, least_peak
from ..memory.lives import Lifetimes
from ..problem import Problem
from ..solver.anytime import solve_live
from ..solver.live import Demand, Live
from ..solver.onehot import Solution
from ..trace import Trace
from .choices import Choices, PipelineConfig
from .stage_memory import Holdings, Runs
from .stage_windows import stage_windows
from .unit_costs import all_bytes
from .units import runs_of
from .watched import Limited, Limiting, Watched

Asked = Callable[[Space], Limited]  # of a space at given prices
SOLVE_GAP = 0.5  # of the gap asked for: what one solve may leave open
ONE_SOLVE = 1.0  # seconds
ENOUGH = 1.1  # times what is to be beaten: bounds above say no more


@dataclass(eq=False)
class Bounds:
    """Bounds of one search, and what they share with its solves: spaces, and what units hold."""

    problem: Problem
    trace: Trace
    choices: Choices
    spaces: dict[PipelineConfig, Space] = field(default_factory=lambda: {})

    def holdings(self, policy: Policy, microbatches: int) -> Holdings:
        overlap = self.problem.request.execution.within
        key: tuple[Policy, int] = policy, microbatches
        if key not in self._holdings:
            alike = (
                h
                for (p, m), h in self._holdings.items()
                if p == policy and (m > 1) == (microbatches > 1)
            )
            cut, model = self.choices.cut(policy, microbatches), self.problem.cost.execution_model
            self._holdings[key] = (
                next(alike, None) or Holdings.of(cut, microbatches, model, overlap)
            ).counted(microbatches)
        return self._holdings[key]

    _holdings: dict[tuple[Policy, int], Holdings] = field(default_factory=lambda: {})

    def relaxed(self, shape: PipelineConfig, beat: float) -> tuple[float, float]:
        """The least seconds with any memory, which bound the count's multiples too, and those with no more than all
        stages have together; `beat`: of the best plan known. More microbatches need less memory, so the second say
        nothing of other counts."""
        if self._crowded(shape, self._least_held(shape, beat)):
            return 0.0, inf
        space, more = self.space(shape), self.choices.more(shape)
        found, start = self.bound(space, _free, ENOUGH * beat - more)
        free, within = found.lower_bound + more, self._shared_memory(space, shape, beat)
        if free >= beat or (found.choices is not None and within.fits(found.choices)):
            return free, free

        def with_memory(priced: Space) -> Limited:
            return Limited(self._shared_memory(priced, shape, beat), {})

        solution, _ = self.bound(space, with_memory, ENOUGH * beat - more, start)
        return free, inf if solution.status == "infeasible" else max(
            free, solution.lower_bound + more
        )

    def by_cases(self, shape: PipelineConfig, enough: float) -> tuple[float, int]:
        """The least seconds where stages have room for what they hold, which is more than the mean, by how many layers
        the fullest has: the more, the longer it takes, and the fewer the first one can have, which holds most
        microbatches. Of cases that bound below `enough` the lowest are told apart to a single number of layers, which
        is given too."""
        if self.problem.request.program == "single" or not self._plain(shape):
            return 0.0, 0
        least, most = self.choices.fullest(shape, enough)
        cases = [self._case(shape, least, least, enough)]
        if most > least:
            cases.append(self._case(shape, least + 1, most, enough))
        while True:
            bound, low, high = min(cases)
            if low == high or bound >= enough:
                return bound, low
            cases.remove((bound, low, high))
            middle = (low + high) // 2
            cases += [
                self._case(shape, *part, enough) for part in ((low, middle), (middle + 1, high))
            ]

    def _case(
        self, shape: PipelineConfig, low: int, high: int, enough: float
    ) -> tuple[float, int, int]:
        """The least seconds where the fullest stage has so many layers, first by time alone."""
        even = low == self.choices.fullest_at_least(shape.stages)
        least, start = 0.0, None
        if even:
            space, more = self.space(shape), self.choices.more(shape)
        else:
            space, more = self.weighted(shape, self.choices.crowded(shape, low)), 0.0
            found, start = self.bound(space, _free, ENOUGH * enough)
            least = found.lower_bound
        if least < enough and (problem := self._within(shape, low, high)) is not None:
            found, _ = self.bound(space, problem, ENOUGH * enough - more, start)
            least = max(least, inf if found.status == "infeasible" else found.lower_bound + more)
        return least, low, high

    def _within(self, shape: PipelineConfig, low: int, high: int) -> Limiting | None:
        """Seconds under the memory of stages at any moment, where the fullest has so many layers. None where gradients
        of weights may wait for passes of their own."""
        if any(
            name == "zb-h1" for name, _ in self.choices.schedules(shape.stages, shape.microbatches)
        ):
            return None
        watched = [*self._fullest(low), *self._ends(shape, high), *self._together(shape, high)]
        holdings = self.holdings(shape.policy, shape.microbatches)
        return Limiting(holdings, watched, self.problem.limit)

    def _fullest(self, layers: int) -> Iterator[Watched]:
        """The stage with so many layers, wherever it is."""
        if middle := self._middle(layers):
            yield Watched(self._layers(middle), 1.0)

    def _ends(self, shape: PipelineConfig, high: int) -> Iterator[Watched]:
        """The first and the last stage, with the layers that the others have no room for."""
        units, (layers,) = self.choices.units, self._first_layers(shape, high, 1)
        if layers:
            flying = float(min(shape.stages, shape.microbatches))
            yield Watched(runs_of(units, 0, units.ends[layers - 1]), flying)
        last = (
            units.ends[-layers] if layers else len(units)
        )  # the stage may begin at the unit before
        yield Watched(runs_of(units, last - 1, len(units)), 1.0)

    def _together(self, shape: PipelineConfig, high: int) -> Iterator[Watched]:
        """All stages, each with layers: rank r holds as many microbatches as there are ranks from r on."""
        layers, most = self._first_layers(shape, high, shape.stages), shape.microbatches
        if layers[0] and (middle := self._middle(sum(layers))):
            flying = sum(n * min(shape.stages - r, most) for r, n in enumerate(layers))
            others = (sum(layers) - middle) * min(shape.stages, most)
            yield Watched(self._layers(middle), (flying - others) / middle, shape.stages)

    def _middle(self, layers: int) -> int:
        """How many of so many layers are of the kind that most are, at least."""
        units = self.choices.units
        return max(0, layers - units.repeats + units.kinds.count(units.middle))

    def _layers(self, many: int) -> Runs:
        """A stage of so many of them."""
        units = self.choices.units
        return tuple(many * (kind == units.middle) for kind in range(len(units.names)))

    def _first_layers(self, shape: PipelineConfig, high: int, stages: int) -> list[int]:
        """How many more layers each of the first so many stages adds at least, where none has more than `high`."""
        repeats = self.choices.units.repeats
        have = [max(0, repeats - (shape.stages - s) * high) for s in range(1, stages + 1)]
        return [now - before for before, now in pairwise((0, *have))]

    def _demands(
        self, space: Space, weights: Mapping[int, float]
    ) -> tuple[tuple[Demand, ...], float]:
        """Bytes of so many of each value, all at one moment; those that nothing decides."""
        demands, fixed = list[Demand](), 0.0
        for value, weight in weights.items():
            sizes, node = all_bytes(space, value)
            if node is None:
                fixed += weight * float(sizes[0])
            else:
                demands.append(Demand(node, 0, 1, weight * sizes))
        return tuple(demands), fixed

    def space(self, shape: PipelineConfig) -> Space:
        if shape not in self.spaces:
            self.spaces[shape] = self.weighted(shape, self.choices.weights(shape))
        return self.spaces[shape]

    def likely(self, shape: PipelineConfig) -> Space:
        """Not to bound a shape but to choose in it."""
        return self.weighted(shape, self.choices.likely(shape))

    def weighted(self, shape: PipelineConfig, weights: Mapping[str, float]) -> Space:
        """The space of a shape where ops count so often by tag, in the windows of its stages."""
        program = self.problem.program(shape.policy, in_stages=True)
        layouts = self.problem.layouts_on(shape.mesh)
        space = build(program, shape.microbatches, self.problem.cost, layouts, runs=weights)
        if overlap := self.problem.request.execution.within:
            passes = self.choices.cut(shape.policy, shape.microbatches).passes
            outline = space.frame.outline
            space.windows = stage_windows(outline, passes, weights, shape.stages, overlap)
        return space

    def bound(
        self,
        space: Space,
        problem: Asked,
        cutoff: float = inf,
        start: np.ndarray | None = None,
    ) -> tuple[Solution, np.ndarray]:
        """A bound of a space under what a problem asks of it, with what overlaps, and the multipliers that gave it.

        Args:
            start: multipliers to begin with.
        """

        def solve(priced: Space) -> Solution:
            asked = problem(priced)
            found = self.solve(asked.live, cutoff)
            chosen = None if found.choices is None else asked.read(found.choices)
            return replace(found, choices=chosen)

        # so near its bound, a shape slower than the best is ruled out
        enough = self.problem.request.good_enough
        return solve_overlapped(space, solve, enough, cutoff, start)

    def cannot_fit(self, shape: PipelineConfig) -> bool:
        """Whether a shape fits in no way."""
        return self._crowded(shape, 1.0) or self._least_of_layers(shape) > self.problem.limit

    def with_room(self, family: PipelineConfig) -> list[int]:
        """The microbatch counts of a family that may fit: more microbatches never need more."""
        counts, limit = self.choices.counts, self.problem.limit
        shapes = [replace(family, microbatches=many) for many in counts]
        first = bisect_left(shapes, True, key=lambda shape: not self._crowded(shape, 1.0))
        if first < len(counts) and self._least_of_layers(shapes[first]) > limit:
            first = bisect_left(
                shapes, True, first + 1, key=lambda shape: self._least_of_layers(shape) <= limit
            )
        return list(counts[first:])

    def least_bytes(self, shape: PipelineConfig) -> float:
        """Bytes per device that a shape needs at least, however everything lies."""
        return max(self._least_of_all(shape, 1.0), self._least_of_layers(shape))

    def _least_of_layers(self, shape: PipelineConfig) -> float:
        """Of the stage with most layers, which has at least its share of them."""
        middle = self.choices.units.middle
        layers = self.choices.units.kinds.count(middle)
        runs = [0] * len(self.choices.units.names)
        runs[middle] = max(1, (layers - (len(self.choices.units) - layers)) // shape.stages)
        key = shape.policy, min(shape.microbatches, 2), tuple(runs)
        if key not in self._stages:
            self._stages[key] = self.holdings(shape.policy, shape.microbatches).of_stage(key[2])
        known, many = self._stages[key], shape.microbatches
        return least_peak(known if many == known.microbatches else known.counted(many), shape.mesh)

    _stages: dict[tuple[Policy, int, Runs], Lifetimes] = field(default_factory=lambda: {})

    def _crowded(self, shape: PipelineConfig, held: float) -> bool:
        """Whether all stages together have no room for so many microbatches, however everything lies."""
        return self._least_of_all(shape, held) > self.problem.limit

    def _least_of_all(self, shape: PipelineConfig, held: float) -> float:
        """Of all stages together with so many microbatches, shared out evenly."""
        key = replace(shape, stages=1)
        if key not in self._leasts:
            self._leasts[key] = self._lasting_and_flying(shape)
        lasting, flying = self._leasts[key]
        return (lasting + held * flying) / shape.stages

    _leasts: dict[PipelineConfig, tuple[float, float]] = field(default_factory=lambda: {})

    def _lasting_and_flying(self, shape: PipelineConfig) -> tuple[float, float]:
        """Least bytes of the step's inputs, and of what one microbatch leaves, in all stages."""
        holdings, mesh = self.holdings(shape.policy, shape.microbatches), shape.mesh
        graph = holdings.cut.program.graph
        split: Mapping[int, int] = holdings.split if shape.microbatches > 1 else {}

        def least(value: int) -> float:
            return least_bytes(graph.types[value], split.get(value), shape.microbatches, mesh)

        lasting = sum(n * least(v) for v, n in zip(graph.inputs, graph.input_counts, strict=True))
        flying = holdings.left(runs_of(self.choices.units, 0, len(self.choices.units))).items()
        return lasting, sum(n * least(v) for v, n in flying)

    def _shared_memory(self, space: Space, shape: PipelineConfig, beat: float) -> Live:
        """Parameters, sums and results in flight of all stages within the memory of all stages."""
        base, holdings = live_of(space), self.holdings(shape.policy, shape.microbatches)
        everything = runs_of(self.choices.units, 0, len(self.choices.units))
        inputs = dict(
            zip(space.program.graph.inputs, space.program.graph.input_counts, strict=True)
        )
        held = self._least_held(shape, beat)
        weights = {
            v: many * held for v, many in holdings.left(everything).items() if v not in inputs
        }
        weights |= {v: float(many) for v, many in inputs.items()}
        demands, fixed = self._demands(space, weights)
        limit = np.array([shape.stages * self.problem.limit - fixed])
        return Live(base.costs, base.edges, demands, limit)

    def _least_held(self, shape: PipelineConfig, beat: float) -> float:
        """Microbatches in flight of an average layer, at least, in any pipeline better than `beat`.

        With 1F1B the stages hold p, p - 1, ... 1. A stage with more layers than its share takes so much
        longer; so layers can crowd into the last stages only as far as `beat` allows.
        """
        if not self._plain(shape) or beat == inf:
            return 1.0
        crowd = max(1.0, beat / max(self.choices.floor(shape), 1e-30))
        return (min(shape.stages, shape.microbatches) / crowd + 1) / 2

    def _plain(self, shape: PipelineConfig) -> bool:
        """Whether ranks hold as much as with 1F1B at least."""
        known = ("1f1b", "gpipe", "interleaved", "looped-bfs", "zb-h1")
        return all(
            name in known for name, _ in self.choices.schedules(shape.stages, shape.microbatches)
        )

    def solve(self, live: Live, cutoff: float = inf, gap: float | None = None) -> Solution:
        """One solve; `gap` is what the search may leave open, as asked for if None."""
        gap = self.problem.request.good_enough if gap is None else gap
        left = max(0.5, min(ONE_SOLVE, self.trace.deadline - time.monotonic()))
        solution = solve_live(
            live,
            time_limit=left,
            gap=SOLVE_GAP * gap,
            seed=self.problem.request.seed,
            cutoff=cutoff,
        )
        if solution.stopped_by == "interrupt":
            raise KeyboardInterrupt
        return solution


def _free(space: Space) -> Limited:
    """All memory that there may be."""
    return Limited(live_of(space), {})
