"""What no pipeline of a shape can do without: seconds, by one solve without stages' own memory limits, and bytes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import TYPE_CHECKING

import numpy as np

from ...ir.recompute import Policy
from ..intra import live_of
from ..memory.ledger import least_bytes, least_peak
from ..memory.lives import Lifetimes
from ..overlapped import solve_overlapped
from ..solver.anytime import solve_live
from ..solver.live import Demand, Live
from ..solver.onehot import Solution
from ..space import Space, build
from .choices import Choices, Shape
from .stage_memory import Holdings, Runs
from .stage_windows import stage_windows
from .unit_costs import all_bytes
from .units import runs_of
from .watched import Watched, limited

if TYPE_CHECKING:
    from ..search import Search

Problem = Callable[[Space], Live]  # what is asked of a space at given prices
SOLVE_GAP = 0.5  # of the gap asked for: what one solve may leave open
ONE_SOLVE = 1.0  # seconds
ENOUGH = 1.1  # times what is to be beaten: bounds above say no more


@dataclass(eq=False)
class Bounds:
    """Bounds of one search, and what they share with its solves: spaces, and what units hold."""

    search: Search
    choices: Choices
    spaces: dict[Shape, Space] = field(default_factory=dict)

    def holdings(self, policy: Policy, microbatches: int) -> Holdings:
        overlap = self.search.request.execution.within
        key: tuple[Policy, int] = policy, microbatches
        if key not in self._holdings:
            alike = (
                h
                for (p, m), h in self._holdings.items()
                if p == policy and (m > 1) == (microbatches > 1)
            )
            cut, cluster = self.choices.cut(policy, microbatches), self.search.cluster
            self._holdings[key] = (
                next(alike, None) or Holdings.of(cut, microbatches, cluster, overlap)
            ).counted(microbatches)
        return self._holdings[key]

    _holdings: dict[tuple[Policy, int], Holdings] = field(default_factory=dict)

    def relaxed(self, shape: Shape, beat: float) -> tuple[float, float]:
        """The least seconds with any memory, which bound the count's multiples too, and those with no more than all
        stages have together; `beat`: of the best plan known. More microbatches need less memory, so the second say
        nothing of other counts."""
        if self._crowded(shape, self._least_held(shape, beat)):
            return 0.0, inf
        space, more = self.space(shape), self.choices.more(shape)
        found, start = self.bound(space, live_of, ENOUGH * beat - more)
        free, within = found.lower_bound + more, self._shared_memory(space, shape, beat)
        if free >= beat or (found.choices is not None and within.fits(found.choices)):
            return free, free
        with_memory = lambda priced: self._shared_memory(priced, shape, beat)  # noqa: E731
        solution, _ = self.bound(space, with_memory, ENOUGH * beat - more, start)
        return free, inf if solution.status == "infeasible" else max(
            free, solution.lower_bound + more
        )

    def by_cases(self, shape: Shape, enough: float) -> float:
        """The least seconds where the first stages have room for as many microbatches as they hold, which is more than
        the mean. Either no stage has more layers than the fullest has at least, so that the first ones have nearly
        that; or one has, and takes longer."""
        if self.search.request.program == "single" or not self._plain(shape):
            return 0.0
        space, more, least, start = self.space(shape), self.choices.more(shape), 0.0, None
        for problem in (
            self._first_stages,
            self._first_stage,
        ):  # the second sees more, and takes longer
            if least < enough and (live := problem(shape)) is not None:
                even, start = self.bound(space, live, ENOUGH * enough - more, start)
                least = max(least, inf if even.status == "infeasible" else even.lower_bound + more)
        crowded = self.weighted(shape, self.choices.crowded(shape))
        return min(least, self.bound(crowded, live_of, ENOUGH * enough, start)[0].lower_bound)

    def _first_stage(self, shape: Shape) -> Problem | None:
        """All that the first stage holds at any moment, with as many layers as it has at least where no stage has more
        than it must."""
        units, stages = self.choices.units, shape.stages
        most = ceil(units.repeats / stages)
        layers = most - (most * stages - units.repeats)
        ends = [
            k + 1
            for k, kind in enumerate(units.kinds)
            if units.alike[kind] == units.alike[units.middle]
        ]
        if layers < 1:
            return None
        watched = Watched(
            runs_of(units, 0, ends[layers - 1]), float(min(stages, shape.microbatches))
        )
        holdings = self.holdings(shape.policy, shape.microbatches)
        return lambda space: limited(space, holdings, [watched], self.search.limit).live

    def _first_stages(self, shape: Shape) -> Problem:
        """Layers of the first stages, as many as they have where no stage has more than it must, and what these hold:
        rank r at least as many microbatches as ranks from r on."""
        units, stages = self.choices.units, shape.stages
        holdings = self.holdings(shape.policy, shape.microbatches)
        most = ceil(units.repeats / stages)
        lacking = most * stages - units.repeats  # layers, over all stages
        some = min(stages, 1 + 4 * lacking)
        flying = [
            min(stages - rank, shape.microbatches) for rank in range(some) for _ in range(most)
        ][lacking:]
        if not flying:
            return live_of
        runs = tuple(int(kind == units.middle) for kind in range(len(units.names)))
        graph = self.search.program(shape.policy).graph
        inputs = dict(zip(graph.inputs, graph.input_counts, strict=True))
        weights = {
            v: many * float(sum(flying))
            for v, many in holdings.left(runs).items()
            if v not in inputs
        }
        weights |= {v: float(len(flying)) for v, many in inputs.items() if many >= units.repeats}

        def problem(space: Space) -> Live:
            base, (demands, fixed) = live_of(space), self._demands(space, weights)
            limit = np.array([some * self.search.limit - fixed])
            return Live(base.costs, base.edges, demands, limit)

        return problem

    def _demands(
        self, space: Space, weights: Mapping[int, float]
    ) -> tuple[tuple[Demand, ...], float]:
        """Bytes of so many of each value, all at one moment; those that nothing decides."""
        demands, fixed = [], 0.0
        for value, weight in weights.items():
            sizes, node = all_bytes(space, value)
            if node is None:
                fixed += weight * float(sizes[0])
            else:
                demands.append(Demand(node, 0, 1, weight * sizes))
        return tuple(demands), fixed

    def space(self, shape: Shape) -> Space:
        if shape not in self.spaces:
            self.spaces[shape] = self.weighted(shape, self.choices.weights(shape))
        return self.spaces[shape]

    def likely(self, shape: Shape) -> Space:
        """Not to bound a shape but to choose in it."""
        return self.weighted(shape, self.choices.likely(shape))

    def weighted(self, shape: Shape, weights: Mapping[str, float]) -> Space:
        """The space of a shape where ops count so often by tag, in the windows of its stages."""
        program, layouts = self.search.program(shape.policy), self.search.layouts_on(shape.mesh)
        space = build(program, shape.microbatches, self.search.cost, layouts, runs=weights)
        if overlap := self.search.request.execution.within:
            passes = self.choices.cut(shape.policy, shape.microbatches).passes
            outline = space.frame.outline
            space.windows = stage_windows(outline, passes, weights, shape.stages, overlap)
        return space

    def bound(
        self,
        space: Space,
        problem: Problem,
        cutoff: float = inf,
        start: np.ndarray | None = None,
    ) -> tuple[Solution, np.ndarray]:
        """A bound of a space under what a problem asks of it, with what overlaps, and the multipliers that gave it.

        Args:
            start: multipliers to begin with.
        """
        solve = lambda priced: self.solve(problem(priced), cutoff)  # noqa: E731
        # so near its bound, a shape slower than the best is ruled out
        enough = self.search.request.good_enough
        return solve_overlapped(space, solve, enough, cutoff, start)

    def hopeless(self, shape: Shape) -> bool:
        """Whether a shape fits in no way."""
        return self._crowded(shape, 1.0) or self._least_of_layers(shape) > self.search.limit

    def with_room(self, family: Shape) -> list[int]:
        """The microbatch counts of a family that are not hopeless: more microbatches never need more."""
        counts, limit = self.choices.counts, self.search.limit
        shapes = [replace(family, microbatches=many) for many in counts]
        first = bisect_left(shapes, True, key=lambda shape: not self._crowded(shape, 1.0))
        if first < len(counts) and self._least_of_layers(shapes[first]) > limit:
            first = bisect_left(
                shapes, True, first + 1, key=lambda shape: self._least_of_layers(shape) <= limit
            )
        return list(counts[first:])

    def least(self, shape: Shape) -> float:
        """Bytes per device that a shape needs at least, however everything lies."""
        return max(self._least_of_all(shape, 1.0), self._least_of_layers(shape))

    def _least_of_layers(self, shape: Shape) -> float:
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

    _stages: dict[tuple[Policy, int, Runs], Lifetimes] = field(default_factory=dict)

    def _crowded(self, shape: Shape, held: float) -> bool:
        """Whether all stages together have no room for so many microbatches, however everything lies."""
        return self._least_of_all(shape, held) > self.search.limit

    def _least_of_all(self, shape: Shape, held: float) -> float:
        """Of all stages together with so many microbatches, shared out evenly."""
        key = replace(shape, stages=1)
        if key not in self._leasts:
            self._leasts[key] = self._lasting_and_flying(shape)
        lasting, flying = self._leasts[key]
        return (lasting + held * flying) / shape.stages

    _leasts: dict[Shape, tuple[float, float]] = field(default_factory=dict)

    def _lasting_and_flying(self, shape: Shape) -> tuple[float, float]:
        """Least bytes of the step's inputs, and of what one microbatch leaves, in all stages."""
        holdings, mesh = self.holdings(shape.policy, shape.microbatches), shape.mesh
        graph, split = holdings.cut.program.graph, holdings.split if shape.microbatches > 1 else {}

        def least(value: int) -> float:
            return least_bytes(graph.types[value], split.get(value), shape.microbatches, mesh)

        lasting = sum(n * least(v) for v, n in zip(graph.inputs, graph.input_counts, strict=True))
        flying = holdings.left(runs_of(self.choices.units, 0, len(self.choices.units))).items()
        return lasting, sum(n * least(v) for v, n in flying)

    def _shared_memory(self, space: Space, shape: Shape, beat: float) -> Live:
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
        limit = np.array([shape.stages * self.search.limit - fixed])
        return Live(base.costs, base.edges, demands, limit)

    def _least_held(self, shape: Shape, beat: float) -> float:
        """Microbatches in flight of an average layer, at least, in any pipeline better than `beat`.

        With 1F1B the stages hold p, p - 1, ... 1. A stage with more layers than its share takes so much
        longer; so layers can crowd into the last stages only as far as `beat` allows.
        """
        if not self._plain(shape) or beat == inf:
            return 1.0
        crowd = max(1.0, beat / max(self.choices.floor(shape), 1e-30))
        return (min(shape.stages, shape.microbatches) / crowd + 1) / 2

    def _plain(self, shape: Shape) -> bool:
        """Whether ranks hold as much as with 1F1B at least."""
        known = ("1f1b", "gpipe", "interleaved", "looped-bfs", "zb-h1")
        return all(
            name in known for name, _ in self.choices.schedules(shape.stages, shape.microbatches)
        )

    def solve(self, live: Live, cutoff: float = inf) -> Solution:
        left = max(0.5, min(ONE_SOLVE, self.search.deadline - time.monotonic()))
        solution = solve_live(
            live,
            time_limit=left,
            gap=SOLVE_GAP * self.search.request.good_enough,
            seed=self.search.request.seed,
            cutoff=cutoff,
        )
        if solution.stopped_by == "interrupt":
            raise KeyboardInterrupt
        return solution
