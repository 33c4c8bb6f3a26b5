"""The search over plans without a pipeline.

candidates   (mesh, recompute, microbatches)
bound        each without a memory limit, from the smallest microbatch count that can fit:
             the counts that it divides cost at least that
solve        under the memory limit, in order of the bounds, until none beats the incumbent

`Request(search="mcmc")` walks the same candidates by FlexFlow's chains instead, in equal
shares of the time, and proves no more than the floor of all contractions (`walks.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, inf, log2
from typing import Any, Protocol

import numpy as np

from ...ir.analysis.roles import roles
from ...ir.errors import InfeasibleError, PlanError
from ...ir.mesh import Mesh
from ...ir.passes.microbatch import Refusal, TimeAxis
from ...ir.passes.recompute import Policy
from ...ir.units import counted, format_bytes, format_seconds
from ..cost.least import least_work
from ..intra.overlapped import solve_overlapped
from ..intra.solve import Answer, answer_of, live_of, solve_space
from ..intra.space import Space, build
from ..memory.ledger import Ledger, least_peak
from ..memory.lifetimes import lifetimes
from ..memory.lives import Lifetimes
from ..memory.storage import storage_of
from ..problem import Problem
from ..solver.anytime import solve_live
from ..solver.onehot import Solution
from ..trace import Trace
from .candidates import Best, Candidate, SearchResult
from .meshes import finest, mesh_of, meshes, other_groups

ONE_SOLVE = 0.8  # of the gap asked for: what one solve may leave open
PROBE = 1.0  # seconds' worth of work that a candidate gets at first


class Prefetching(Protocol):
    """Other processes that work out bounds ahead (`workers.py`)."""

    def prefetch(self, keys: Iterable[tuple[Any, float]]) -> None: ...
    def result(self, key: tuple[Any, float]) -> Any: ...


@dataclass
class Search:
    """State of one search over plans without a pipeline; `explore` fills it."""

    problem: Problem
    trace: Trace
    best: Best = field(default_factory=Best)
    cutoff: float = inf  # seconds of a plan found elsewhere, to be beaten
    bound_cutoff: float = (
        inf  # what bounds need not exceed: such seconds as known when others began to work them out
    )
    workers: Prefetching | None = None

    def result(self) -> SearchResult:
        """What was found, and what is proven of it.

        Raises:
            InfeasibleError: nothing fits.
            StoppedError: nothing was found before the search was stopped.
        """
        if self.best.answer is None:
            raise self.infeasible()
        return SearchResult(self.problem, self.best, self.lower_bound(), self.trace)

    # ------------------------------------------------------------ candidates

    def _meshes(self) -> tuple[Mesh, ...]:
        if self.problem.request.mesh is None:
            return meshes(self.problem.cluster)
        return (mesh_of(self.problem.request.mesh),)

    def _counts(self) -> tuple[int, ...]:
        axis = self.problem.program("none").time
        if self.problem.request.microbatches is not None:
            return (self.problem.request.microbatches,)
        if isinstance(axis, Refusal):
            return (1,)
        return tuple(m for m in range(1, axis.parts + 1) if axis.parts % m == 0)

    _spaces: dict[Candidate, Space] = field(default_factory=lambda: {})

    def space(self, candidate: Candidate) -> Space:
        if candidate not in self._spaces:
            program, layouts = (
                self.problem.program(candidate.policy),
                self.problem.layouts_on(candidate.mesh),
            )
            overlap = self.problem.request.execution.within
            self._spaces[candidate] = build(
                program, candidate.microbatches, self.problem.cost, layouts, overlap=overlap
            )
        return self._spaces[candidate]

    def open(self, candidate: Candidate) -> tuple[Space, Lifetimes]:
        return self.space(candidate), self._lives_of(candidate.policy, candidate.microbatches)

    # ------------------------------------------------------------ exploration

    def explore(self) -> None:
        """First an incumbent on a plain mesh, then best-first over the finest ones.

        A mesh with more axes can do whatever a coarser one can (its axes used together), so the finest meshes are
        searched for all. Where a plan is known, each begins with one microbatch, fit or not: that bounds all counts.
        """
        self.begin(self.cutoff < inf)
        while self.promises() < inf and not self.trace.past_deadline():
            self.step()
        self.end()

    def promises(self) -> float:
        """The least bound of the open candidates; inf where none is worth a look."""
        least = min(self.open_bounds.values(), default=inf)
        return least if least < self._enough() else inf

    def step(self) -> None:
        """Look at the most promising candidate."""
        self._advance(self._next())
        best, looked = min(self.best.seconds, self.cutoff), len(self._relaxed_bounds)
        self.trace.report_progress(best, self.lower_bound(), looked, len(self.open_bounds))

    def end(self) -> None:
        """Note why no more is looked at; groups of hosts of other sizes are tried where all else is done."""
        if self.promises() < inf:
            self.trace.stopped_by = "time"
        else:
            self._regroup()

    def _regroup(self) -> None:
        """Try groups of hosts of other sizes than those searched, next to that of the best plan."""
        best = self.best.candidate
        if (
            best is None
            or self.problem.request.mesh is not None
            or self.best.seconds >= self.cutoff
        ):
            return
        for mesh in other_groups(self.problem.cluster, best.mesh):
            if self.trace.past_deadline():
                return
            candidate = Candidate(mesh, best.policy, best.microbatches)
            if self.least_bytes(candidate) <= self.problem.limit:
                bound, fits = self.relaxed(candidate)
                if not fits and bound < self.best.seconds:
                    self._solve(candidate)
            self.forget(keep=self.best.candidate)

    def begin(self, known: bool) -> None:
        """All candidates are open, from one microbatch on or, where nothing is known to beat, from what can fit."""
        for root in self.roots():
            self._open(root if known else self.smallest_count(root))
        plain = min(self._meshes(), key=lambda m: (abs(len(m.axes) - 2), m.shape))
        if plain not in finest(self._meshes()) and not known:
            self._seed(plain)

    def roots(self) -> list[Candidate]:
        """The least microbatch count of every finest mesh and recompute policy."""
        first, found = self._counts()[0], finest(self._meshes())
        return [
            Candidate(mesh, policy, first) for policy in self.problem.policies for mesh in found
        ]

    def _next(self) -> Candidate:
        """The lowest bound; while nothing is found, the one with most room."""
        if self.best.answer is None and self.cutoff == inf:
            return min(self.open_bounds, key=self.least_bytes)
        return min(self.open_bounds, key=lambda c: self.open_bounds[c])

    def _seed(self, mesh: Mesh) -> None:
        """Plans on one plain mesh, to have something to beat."""
        first = self._counts()[0]
        for policy in self.problem.policies:
            root = self.smallest_count(Candidate(mesh, policy, first))
            if root is None:
                continue
            _, fits = self.relaxed(root)
            if self.trace.past_deadline() or (fits and root.microbatches == first):
                return
            if not fits:
                self._solve(root)
            self.forget(keep=self.best.candidate)

    def _advance(self, candidate: Candidate) -> None:
        """Look at one open candidate and replace it by what remains of it.

        It is relaxed, then solved under the memory limit, first for a moment: its bound
        then says when it is worth more time. The next count joins it. A candidate stays
        open to its end, so that an interrupt never leaves a bound too high.
        """
        if candidate in self._probed:
            self._close(candidate, self._solve(candidate))
        else:
            self._look(candidate)
        self.forget(keep=self.best.candidate)

    def _look(self, candidate: Candidate) -> None:
        relaxed, fits = self._worked_out(candidate) or self.relaxed(candidate)
        self._relaxed_bounds[candidate] = relaxed
        bound = self.open_bounds[candidate] = max(self.open_bounds[candidate], relaxed)
        self._probed.add(candidate)
        if candidate.microbatches > 1 or bound < self._enough():  # else it bounds all counts
            self._open(self.next_count(candidate))
        if bound < self._enough() and self.least_bytes(candidate) > self.problem.limit:
            bound = inf
        if not fits and bound < self._enough():
            bound = self.open_bounds[candidate] = max(bound, self._solve(candidate, PROBE))
        if bound >= self._enough():
            self._close(candidate, bound)

    def _worked_out(self, candidate: Candidate) -> tuple[float, bool] | None:
        """What `relaxed` gives, if another process has worked it out; others begin with what comes next."""
        if self.workers is None:
            return None
        beat = min(self.best.seconds, self.bound_cutoff)
        soon = sorted(
            self.open_bounds.keys() - self._probed - {candidate}, key=self.open_bounds.__getitem__
        )
        self.workers.prefetch((each, beat) for each in soon)
        return self.workers.result((candidate, beat))

    def _inherited(self, candidate: Candidate) -> float:
        """A bound for this microbatch count and all larger ones, from smaller ones without a memory limit.

        Cutting microbatches into equal parts never makes a step faster in this model, so a count
        is bounded by those that divide it.
        """
        counts = [c for c in self._counts() if c >= candidate.microbatches]
        floors = self.floors(candidate.policy)
        return min(max([floors[c], *self._divisor_bounds(candidate, c)]) for c in counts)

    def _divisor_bounds(self, family: Candidate, count: int) -> list[float]:
        smaller = (
            Candidate(family.mesh, family.policy, c) for c in self._counts() if count % c == 0
        )
        return [self._relaxed_bounds[c] for c in smaller if c in self._relaxed_bounds]

    def _close(self, candidate: Candidate, bound: float) -> None:
        self.closed_bound = min(self.closed_bound, max(self.open_bounds[candidate], bound))
        del self.open_bounds[candidate]

    def _open(self, candidate: Candidate | None) -> None:
        if candidate is not None:
            self.open_bounds[candidate] = self._inherited(candidate)

    open_bounds: dict[Candidate, float] = field(default_factory=lambda: {})
    closed_bound: float = inf  # of all candidates that were looked at to their end
    # Without a memory limit.
    _relaxed_bounds: dict[Candidate, float] = field(default_factory=lambda: {})
    _probed: set[Candidate] = field(default_factory=lambda: set())

    def lower_bound(self) -> float:
        """No plan of any candidate is faster than this."""
        return min([self.best.seconds, self.closed_bound, *self.open_bounds.values()])

    def _enough(self) -> float:
        """A bound this high cannot improve the incumbent by more than the gap asked for."""
        return min(self.best.seconds, self.cutoff) * (1 - self.problem.request.good_enough)

    def floors(self, policy: Policy) -> Mapping[int, float]:
        """By microbatch count: no plan is faster than every op cut evenly over all devices, nothing sent."""
        if policy not in self._floors:
            program, counts = self.problem.program(policy), self._counts()
            body = program.time.body if isinstance(program.time, TimeAxis) else frozenset[int]()
            inside = {program.graph.ops[i].tag for i in body}
            found = least_work(
                program, self.problem.cost, [self.problem.cluster.size], counts, inside.__contains__
            )
            once, each = (found.get(key, np.zeros((1, len(counts))))[0] for key in (False, True))
            self._floors[policy] = {m: float(once[i] + m * each[i]) for i, m in enumerate(counts)}
        return self._floors[policy]

    _floors: dict[Policy, Mapping[int, float]] = field(default_factory=lambda: {})

    def forget(self, keep: Candidate | None) -> None:
        """Spaces are large; keep only the incumbent's."""
        self._spaces = {c: s for c, s in self._spaces.items() if c == keep}

    def relaxed(self, candidate: Candidate) -> tuple[float, bool]:
        """Solve without a memory limit: a bound, and whether the answer fits all the same."""
        space, cutoff = self.space(candidate), min(self.best.seconds, self.bound_cutoff)
        gap = ONE_SOLVE * self.problem.request.good_enough

        def solve(priced: Space) -> Solution:
            left = min(10.0, max(1.0, self.trace.deadline - time.monotonic()))
            live = live_of(priced)
            return solve_live(
                live, time_limit=left, gap=gap, seed=self.problem.request.seed, cutoff=cutoff
            )

        solution = self._overlapped(candidate, space, solve, cutoff)
        if solution.stopped_by == "interrupt":
            raise KeyboardInterrupt
        if solution.choices is None:
            return solution.lower_bound, False
        ledger = Ledger(space, self._lives_of(candidate.policy, candidate.microbatches))
        peak, moment = ledger.peak(ledger.local_bytes(solution.choices))
        if peak <= self.problem.limit:
            self.offer(candidate, Answer(solution, peak, moment))
        return solution.lower_bound, peak <= self.problem.limit

    def _overlapped(
        self, candidate: Candidate, space: Space, solve: Callable[[Space], Solution], cutoff: float
    ) -> Solution:
        """The answer of as many solves as overlap asks for, beginning where the last ones of a candidate ended."""
        gap, start = self.problem.request.good_enough, self._multipliers.get(candidate)
        enough = cutoff * (1 - gap)
        found, self._multipliers[candidate] = solve_overlapped(space, solve, gap, enough, start)
        return found

    _multipliers: dict[Candidate, np.ndarray] = field(default_factory=lambda: {})

    def offer(self, candidate: Candidate, answer: Answer) -> None:
        objective = answer.solution.objective
        if objective is None or objective >= self.best.seconds:
            return
        space, lives = self.open(candidate)
        self.best = Best(candidate, space, lives, answer)
        self.trace.note(f"{candidate}: {format_seconds(objective)}, {format_bytes(answer.peak)}")

    def smallest_count(self, root: Candidate) -> Candidate | None:
        """The first microbatch count that is not ruled out by memory."""
        following = self._fit(root, self._counts())
        if following is None:
            self.trace.note(f"{root.family}: does not fit")
        return following

    def next_count(self, candidate: Candidate) -> Candidate | None:
        return self._fit(
            candidate, [count for count in self._counts() if count > candidate.microbatches]
        )

    def _fit(self, family: Candidate, counts: Sequence[int]) -> Candidate | None:
        for count in counts:
            candidate = Candidate(family.mesh, family.policy, count)
            if self.least_bytes(candidate) <= self.problem.limit:
                return candidate
        return None

    def least_bytes(self, candidate: Candidate) -> float:
        """Bytes that no layout of this candidate can do without."""
        return least_peak(self._lives_of(candidate.policy, candidate.microbatches), candidate.mesh)

    def _lives_of(self, policy: Policy, count: int) -> Lifetimes:
        """Lives differ between one microbatch and several; between several only in size."""
        if (policy, count) not in self._lives:
            known = next((c for p, c in self._lives if p == policy and c > 1), None)
            if known is not None and count > 1:
                found = self._lives[policy, known].counted(count)
            else:
                program = self.problem.program(policy)
                storage = storage_of(program, self.problem.cost.execution_model)
                overlap = self.problem.request.execution.within
                found = lifetimes(program, count, roles(program.graph), storage, overlap)
            self._lives[policy, count] = found
        return self._lives[policy, count]

    _lives: dict[tuple[Policy, int], Lifetimes] = field(default_factory=lambda: {})

    def _solve(self, candidate: Candidate, probe: float | None = None) -> float:
        """Solve one candidate under the memory limit; returns its own lower bound."""
        space, lives = self.open(candidate)
        cutoff = min(self.best.seconds, self.cutoff)

        def solve(priced: Space) -> Solution:
            left = max(1.0, self.trace.deadline - time.monotonic())
            share = 2.0 ** floor(log2(left / 2))  # rough, so that equal requests get equal shares
            return solve_space(
                priced, lives, self.problem.limit, time_limit=share, gap=ONE_SOLVE * self.problem.request.good_enough,
                seed=self.problem.request.seed, cutoff=cutoff, probe=probe,
            ).solution  # fmt: skip

        answer = answer_of(space, lives, self._overlapped(candidate, space, solve, cutoff))
        if answer.solution.status == "infeasible":
            self.trace.note(f"{candidate}: does not fit ({answer.solution.reason})")
            return inf
        if answer.solution.choices is not None:
            self.offer(candidate, answer)
        if answer.solution.stopped_by == "interrupt":
            raise KeyboardInterrupt
        return answer.solution.lower_bound

    def infeasible(self) -> PlanError:
        if self.trace.stopped_by != "proof":
            return self.trace.nothing_found()
        needs = {c: self.least_bytes(c) for c in self._all_candidates()}
        least = min(needs, key=lambda c: needs[c])
        return InfeasibleError(
            f"no plan fits: each needs at least {format_bytes(needs[least])} per device, "
            f"{format_bytes(self.problem.limit)} may be used.",
            where=f"the least is with {least}",
            origin=f"cluster {self.problem.cluster.name}: {counted(self.problem.cluster.size, 'device')}",
            fix="more devices, a smaller batch, or devices with more memory",
            needed_bytes=needs[least],
            limit_bytes=self.problem.limit,
        )

    def _all_candidates(self) -> list[Candidate]:
        return [
            Candidate(m, p, k)
            for m in self._meshes()
            for p in self.problem.policies
            for k in self._counts()
        ]
