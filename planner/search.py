"""Start here: from a folded graph, a cluster and a request to a proven plan.

    candidates   (mesh, recompute, microbatches)
    bound        each mesh first without a memory limit, no recompute, one microbatch:
                 everything else on that mesh does at least that work
    solve        candidates in order of their bounds, until no bound beats the incumbent
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from ..ir.blocks import Folded
from ..ir.cluster import Cluster
from ..ir.errors import InfeasibleError, PlanError
from ..ir.mesh import Mesh
from ..ir.microbatch import Refusal, TimeAxis
from ..ir.plan import Plan
from ..ir.program import Program, prepare
from ..ir.recompute import POLICIES, Policy
from ..ir.roles import roles
from ..ir.units import format_bytes
from .cost import CostModel, Roofline
from .layouts import Layouts
from .intra import Answer, problem_of, smallest_peak, solve_space
from .memory import Lifetimes, lifetimes
from .meshes import mesh_of, meshes
from .report import write_plan
from .solver import Solution, relax
from .space import Space, build

HEADROOM = 0.10  # of device memory kept free; runs above ~90 % lose speed to the allocator
MOST_MICROBATCHES = 64


@dataclass(frozen=True)
class Request:
    """What the user fixed or limited. None means: planned."""

    memory: float | None = None  # bytes per device that the plan may use
    headroom: float = HEADROOM
    mesh: tuple[int, ...] | None = None
    microbatches: int | None = None
    recompute: Policy | None = None
    time_limit: float = 60.0
    gap: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """One combination of discrete choices outside the ILP."""

    mesh: Mesh
    policy: Policy
    microbatches: int

    def __str__(self) -> str:
        return f"mesh {'×'.join(map(str, self.mesh.shape))}, recompute {self.policy}, microbatches {self.microbatches}"


@dataclass
class Best:
    """The incumbent and its evidence."""

    candidate: Candidate | None = None
    space: Space | None = None
    lives: Lifetimes | None = None
    answer: Answer | None = None

    @property
    def seconds(self) -> float:
        objective = self.answer.solution.objective if self.answer else None
        return inf if objective is None else objective


@dataclass
class Search:
    """State of one search; `run` fills it. `tell` hears one line per event."""

    folded: Folded
    cluster: Cluster
    request: Request
    cost: CostModel
    name: str
    fingerprint: str
    tell: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    best: Best = field(default_factory=Best)
    bounds: dict[Candidate, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    stopped_by: str = "proof"

    # ------------------------------------------------------------ frame

    def run(self) -> Plan:
        self._check()
        try:
            self._explore()
        except KeyboardInterrupt:
            self.stopped_by = "interrupt"
        if self.best.answer is None:
            raise self._infeasible()
        return write_plan(self)

    @property
    def limit(self) -> float:
        if self.request.memory is not None:
            return self.request.memory
        return self.cluster.memory_per_device * (1 - self.request.headroom)

    @property
    def deadline(self) -> float:
        return self.started + self.request.time_limit

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def lower_bound(self) -> float:
        """No candidate that was looked at can be faster than this."""
        return min((b for b in self.bounds.values()), default=0.0)

    def _note(self, line: str) -> None:
        self.log.append(line)
        self.tell(line)

    # ------------------------------------------------------------ candidates

    def _policies(self) -> tuple[Policy, ...]:
        return (self.request.recompute,) if self.request.recompute else POLICIES

    def _meshes(self) -> tuple[Mesh, ...]:
        if self.request.mesh is None:
            return meshes(self.cluster)
        return (mesh_of(self.request.mesh),)

    def _counts(self) -> tuple[int, ...]:
        axis = self.program("none").time
        if self.request.microbatches is not None:
            return (self.request.microbatches,)
        if isinstance(axis, Refusal):
            return (1,)
        return tuple(m for m in range(1, MOST_MICROBATCHES + 1) if axis.batch % m == 0 and _few_primes(m))

    def program(self, policy: Policy) -> Program:
        if policy not in self._programs:
            self._programs[policy] = prepare(self.folded.small, policy)
        return self._programs[policy]

    _programs: dict[Policy, Program] = field(default_factory=dict)
    _spaces: dict[Candidate, tuple[Space, Lifetimes]] = field(default_factory=dict)

    def _layouts_on(self, mesh: Mesh) -> Layouts:
        if mesh not in self._layouts:
            self._layouts[mesh] = Layouts(self.cost.collectives(mesh))
        return self._layouts[mesh]

    _layouts: dict[Mesh, Layouts] = field(default_factory=dict)

    def open(self, candidate: Candidate) -> tuple[Space, Lifetimes]:
        if candidate not in self._spaces:
            program = self.program(candidate.policy)
            space = build(program, candidate.microbatches, self.cost, self._layouts_on(candidate.mesh))
            lives = lifetimes(program, candidate.microbatches, roles(program.graph))
            self._spaces[candidate] = (space, lives)
        return self._spaces[candidate]

    # ------------------------------------------------------------ exploration

    def _explore(self) -> None:
        policy, count = self._policies()[0], self._counts()[0]
        roots = [Candidate(mesh, policy, count) for mesh in self._meshes()]
        for root in roots:
            self.bounds[root] = self._relaxed(root)
            if self.late():
                break
        for root in sorted(self.bounds, key=lambda c: self.bounds[c]):
            self._mesh(root)
            self._spaces.clear()

    def _relaxed(self, candidate: Candidate) -> float:
        space, lives = self.open(candidate)
        solution = relax(problem_of(space))
        self._offer(candidate, self._judged(space, lives, solution))
        return solution.lower_bound

    def _judged(self, space: Space, lives: Lifetimes, solution: Solution) -> Answer | None:
        """An answer, if the relaxed solution happens to fit."""
        from .memory import Ledger

        if solution.choices is None:
            return None
        ledger = Ledger(space, lives)
        peak, moment = ledger.peak(ledger.local_bytes(solution.choices))
        return Answer(solution, peak, moment, 0) if peak <= self.limit else None

    def _offer(self, candidate: Candidate, answer: Answer | None) -> None:
        if answer is None or answer.solution.objective is None or answer.solution.objective >= self.best.seconds:
            return
        space, lives = self.open(candidate)
        self.best = Best(candidate, space, lives, answer)
        self._note(f"{candidate}: {answer.solution.objective:.6g} s, {format_bytes(answer.peak)}")

    def _mesh(self, root: Candidate) -> None:
        """All (recompute, microbatches) of one mesh, cheapest kind first."""
        enough = self.best.seconds * (1 - self.request.gap)
        if self.bounds[root] >= enough:
            return
        if self.best.candidate is not None and self.best.candidate.mesh == root.mesh:
            return
        floor = inf
        for count in self._counts():
            for policy in self._policies():
                if self.late():
                    self.stopped_by = "time"
                    return
                floor = min(floor, self._try(Candidate(root.mesh, policy, count), root))
            if floor >= self.best.seconds * (1 - self.request.gap):
                break
        if floor < inf:
            self.bounds[root] = max(self.bounds[root], min(floor, self.best.seconds))

    def _try(self, candidate: Candidate, root: Candidate) -> float:
        """Solve one candidate; returns a bound on what it can reach."""
        space, lives = self.open(candidate)
        if smallest_peak(space, lives) > self.limit:
            self._note(f"{candidate}: does not fit")
            return inf
        cutoff = self.best.seconds
        answer = solve_space(
            space, lives, self.limit, deadline=self.deadline, gap=self.request.gap / 2, seed=self.request.seed, cutoff=cutoff
        )
        if answer.solution.status == "infeasible":
            self._note(f"{candidate}: does not fit ({answer.solution.reason})")
            return inf
        self._offer(candidate, answer if answer.solution.choices is not None else None)
        return answer.solution.lower_bound

    # ------------------------------------------------------------ refusals

    def _check(self) -> None:
        shape = self.request.mesh
        if shape is not None and mesh_of(shape).size != self.cluster.size:
            raise PlanError(
                f"mesh {'×'.join(map(str, shape))} has {mesh_of(shape).size} devices, the cluster has {self.cluster.size}.",
                where="request: mesh",
                fix=f"a mesh whose axes multiply to {self.cluster.size}",
            )
        self._check_microbatches()

    def _check_microbatches(self) -> None:
        count, axis = self.request.microbatches, self.program("none").time
        if count in (None, 1):
            return
        if isinstance(axis, Refusal):
            raise PlanError(f"{count} microbatches are not possible: {axis.reason}.", where=axis.where, fix="microbatches=1")
        assert isinstance(axis, TimeAxis)
        if count < 1 or axis.batch % count:
            near = [m for m in range(1, axis.batch + 1) if axis.batch % m == 0]
            raise PlanError(
                f"a batch of {axis.batch} cannot be cut into {count} microbatches.",
                where="request: microbatches",
                fix=f"a count dividing {axis.batch}: {', '.join(map(str, near[:12]))}",
            )

    def _infeasible(self) -> PlanError:
        if self.stopped_by != "proof":
            return PlanError(
                "no plan was found before the search was stopped.", where=f"stopped by {self.stopped_by}", fix="a longer --time-limit"
            )
        needs = {c: smallest_peak(*self.open(c)) for c in self._smallest_candidates()}
        least = min(needs, key=lambda c: needs[c])
        return InfeasibleError(
            f"no plan fits: {format_bytes(needs[least])} per device is the least any layout needs, {format_bytes(self.limit)} may be used.",
            where=str(least),
            origin=f"cluster {self.cluster.name}: {self.cluster.size} devices",
            fix="more devices, a smaller batch, or devices with more memory",
        )

    def _smallest_candidates(self) -> list[Candidate]:
        counts = self._counts()
        return [Candidate(m, p, k) for m in self._meshes() for p in self._policies() for k in {counts[0], counts[-1]}]


def _few_primes(m: int) -> bool:
    """Counts of the form 2^a or 3 * 2^a: enough choice, few solves."""
    while m % 2 == 0:
        m //= 2
    return m in (1, 3)


def search(
    folded: Folded, cluster: Cluster, request: Request, *, name: str, fingerprint: str,
    cost: CostModel | None = None, tell: Callable[[str], None] = lambda line: None,
) -> Plan:  # fmt: skip
    """Plan one step.

    Args:
        folded: the tagged graph and its small form.
        cluster: homogeneous; a heterogeneous one is refused.
        request: pins and limits.
        name, fingerprint: what the plan is for; kept in the plan.
        cost: prices; a roofline on the cluster's figures when None.
        tell: hears one line per event of the search.

    Raises:
        InfeasibleError: nothing fits, with the least memory any layout needs.
        PlanError: the request contradicts the graph or the cluster.
    """
    return Search(folded, cluster, request, cost or Roofline(cluster), name, fingerprint, tell).run()
