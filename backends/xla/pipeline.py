"""Run a step as a pipeline of stages, each on devices of its own, from one process.

    running = lower_pipeline(plan, captured)
    results = running.jitted(*leaves)

Each fragment of each stage is a program of its own (`fragments`). The driver dispatches them in an
order that keeps every rank's schedule; jax runs programs of different devices side by side, and a
program starts when its operands have arrived. A forward result lives until the last pass that reads
it; gradients are added up on the devices; the optimizer runs once, in rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ...ir.blocks import fold
from ...ir.errors import LoweringError
from ...ir.microbatch import TimeAxis, time_groups
from ...ir.plan import Pipeline, Plan, Stage
from ...ir.program import Program as Prepared
from ...ir.program import prepare
from ...ir.schedule import Schedule, Step, check, needs
from ...ir.stages import Stages, cut_stages
from .capture import Captured
from .devices import device_mesh, on_cpus, used_devices
from .fragments import Program, StagePrograms, link
from .spmd import LocalStep
from .unstack import Unstacked

Watch = Callable[[int, Step, Sequence[Any], Any], None]
Store = dict[int, Any]


@dataclass(eq=False)
class LoweredPipeline:
    """A pipelined step on flat leaves; each result lies on the devices of its stage.

    `peaks[rank]` is how many forward results a rank held at most in the last run, counted per stage
    and microbatch. `watch(rank, step, taken, token)` is told of each pass when it is dispatched, with
    what it takes of its microbatch; the token is ready when the pass is done.
    """

    plan: Plan
    captured: Captured
    schedule: Schedule
    cut: Stages
    stages: Sequence[StagePrograms]
    passes: Mapping[tuple[str, int], Program]
    rounds: Sequence[Sequence[Program]]
    watch: Watch | None = None
    apart: Unstacked | None = None  # how the user's leaves were taken apart, layer by layer
    peaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = merged(self.schedule)
        self.moments = [
            [jax.device_put(np.int32(m), stage.replicated) for m in range(self.schedule.microbatches)]
            for stage in self.stages
        ]
        self.totals = [
            {kind: p.fragment.totals for (kind, s), p in self.passes.items() if s == stage}
            for stage in range(self.cut.count)
        ]
        self.zeros = [
            stage.zeros([v for values in totals.values() for v in values])
            for stage, totals in zip(self.stages, self.totals, strict=True)
        ]

    # ------------------------------------------------------------ as `Lowered`

    @property
    def by_tree(self) -> None:
        """There is no single program that jax could dispatch."""
        return None

    @property
    def compiled(self) -> Callable[..., Any]:
        """The step; its programs are compiled when they first run."""
        return self.jitted

    @property
    def input_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each leaf lies first; other stages that read it get copies."""
        graph = self.stages[0].local.graph
        homes = zip(graph.inputs, self.cut.homes, strict=True)
        return tuple(self.stages[where[0]].sharding_of(v) for v, where in homes)

    @property
    def output_shardings(self) -> tuple[NamedSharding, ...]:
        return tuple(self.stages[s].sharding(self.stages[s].ends(o)) for o, s in enumerate(self.cut.ends))

    def jitted(self, *leaves: Any) -> tuple[Any, ...]:
        """One step; donated leaves are given up."""
        return _Run(self, self._placed(leaves)).step()

    def _placed(self, leaves: Sequence[Any]) -> list[Store]:
        """Per stage the inputs that it reads, on its devices."""
        graph = self.stages[0].local.graph
        homes = enumerate(zip(graph.inputs, self.cut.homes, strict=True))
        wanted = [(stage, v, k) for k, (v, where) in homes for stage in where]
        goals = [self.stages[stage].sharding_of(v) for stage, v, _ in wanted]
        arrays = jax.device_put([leaves[k] for _, _, k in wanted], goals)
        stores: list[Store] = [{} for _ in self.stages]
        for (stage, value, _), array in zip(wanted, arrays, strict=True):
            stores[stage][value] = array
        return stores


apart = jax.jit(list)  # a vector as scalars, on the same devices


@dataclass
class _Run:
    """One step on its way: `steady` lives for the step, `flight` for one microbatch on one stage."""

    lowered: LoweredPipeline
    steady: list[Store]

    def __post_init__(self) -> None:
        low = self.lowered
        self.flight = [[Store() for _ in range(low.schedule.microbatches)] for _ in low.stages]
        self.pieces: list[dict[int, list[Any]]] = [{} for _ in low.stages]
        self.begun: list[set[tuple[int, int]]] = [set() for _ in low.schedule.orders]
        self.sums: list[Store] = [self._zeros(s) for s in range(len(low.stages))]
        low.peaks = [0] * low.schedule.ranks

    def _zeros(self, stage: int) -> Store:
        values = [v for vs in self.lowered.totals[stage].values() for v in vs]
        return dict(zip(values, self.lowered.zeros[stage](), strict=True)) if values else {}

    def step(self) -> tuple[Any, ...]:
        low = self.lowered
        for stage in range(len(low.stages)):
            self._prepare(stage)
        for rank, step in low.order:
            self._pass(rank, step)
        self._settle()
        results: list[Any] = [None] * len(low.cut.ends)
        for programs in low.rounds:
            for program in programs:
                self._update(program, results)
        return tuple(results)

    def _prepare(self, stage: int) -> None:
        program, store = self.lowered.passes["prepare", stage], self.steady[stage]
        if program.fragment.gives:
            _, _, gives, _, _ = program.call(self.lowered.moments[stage][0], [], [store[v] for v in program.keeps])
            store |= zip(program.fragment.gives, gives, strict=True)
        store |= {v: store[source] for v, source in self.lowered.stages[stage].same.items()}

    def _pass(self, rank: int, step: Step) -> None:
        """Dispatch a pass, then let go of what it was the last to read."""
        program, flight = self.lowered.passes[step.kind, step.stage], self.flight[step.stage][step.microbatch]
        if program.fragment.ops:
            self._dispatch(program, rank, step)
        for value in program.fragment.drops:
            flight.pop(value, None)
        self._count(rank, step)

    def _dispatch(self, program: Program, rank: int, step: Step) -> None:
        low, (_, stage, m), fragment = self.lowered, step, program.fragment
        flight, sums, store = self.flight[stage][m], self.sums[stage], self.steady[stage]
        taken = [flight[v] if v in flight else store[v] for v in program.keeps]
        totals = [sums.pop(v) for v in fragment.totals]
        token, totals, gives, sent, _ = program.call(low.moments[stage][m], totals, taken)
        sums |= zip(fragment.totals, totals, strict=True)
        if low.watch is not None:
            low.watch(rank, step, [flight[v] for v in program.keeps if v in flight], token)
        flight |= zip(fragment.gives, gives, strict=True)
        self._send(program, sent, lambda s: self.flight[s][m])

    def _send(self, program: Program, sent: Sequence[Any], store: Callable[[int], Store]) -> None:
        ways = [(k, stage) for k, parcel in enumerate(program.parcels) for stage in parcel.arrivals]
        if not ways:
            return
        goals = [program.parcels[k].arrivals[stage] for k, stage in ways]
        for (k, stage), array in zip(ways, jax.device_put([sent[k] for k, _ in ways], goals), strict=True):
            values = program.parcels[k].values
            store(stage).update(zip(values, [array] if len(values) == 1 else apart(array), strict=True))

    def _count(self, rank: int, step: Step) -> None:
        begun = self.begun[rank]
        if step.kind == "forward":
            begun.add((step.stage, step.microbatch))
        elif not self.flight[step.stage][step.microbatch]:
            begun.discard((step.stage, step.microbatch))
        self.lowered.peaks[rank] = max(self.lowered.peaks[rank], len(begun))

    def _settle(self) -> None:
        """What the passes leave for the updates: totals, and values of each microbatch."""
        for stage, (steady, sums) in enumerate(zip(self.steady, self.sums, strict=True)):
            steady |= sums
            sums.clear()
            for flight in self.flight[stage]:
                for value, array in flight.items():
                    self.pieces[stage].setdefault(value, []).append(array)
                flight.clear()
            steady |= {v: arrays[-1] for v, arrays in self.pieces[stage].items()}

    def _update(self, program: Program, results: list[Any]) -> None:
        fragment, stage = program.fragment, program.fragment.stage
        store, programs = self.steady[stage], self.lowered.stages[stage]
        if not (fragment.ops or fragment.results or program.parcels):
            return
        kept = [self.pieces[stage][v] if programs.joins(fragment, v) else store[v] for v in program.keeps]
        given_up = [store[v] for v in program.donates]
        for value in fragment.drops:
            store.pop(value, None)
        _, _, gives, sent, made = program.call(self.lowered.moments[stage][0], given_up, kept)
        store |= zip(fragment.gives, gives, strict=True)
        self._send(program, sent, lambda s: self.steady[s])
        for position, array in zip(fragment.results, made, strict=True):
            results[position] = array


def merged(schedule: Schedule) -> list[tuple[int, Step]]:
    """All passes in one order that keeps each rank's: rank by rank, as long as none has to wait."""
    left = [list(reversed(order)) for order in schedule.orders]
    done: set[Step] = set()
    found: list[tuple[int, Step]] = []
    while any(left):
        for rank, order in enumerate(left):
            if order and done.issuperset(needs(schedule, order[-1])):
                done.add(order[-1])
                found.append((rank, order.pop()))
    return found


# ---------------------------------------------------------------- lowering


def lower_pipeline(plan: Plan, captured: Captured, devices: Sequence[Any] | None = None) -> LoweredPipeline:
    """The programs of a plan with a pipeline, made for this very graph.

    Raises:
        PlanError: cuts, microbatches or orders that cannot be.
        LoweringError: too few devices, a stage on several ranks, or a decision that is missing.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    schedule = pipeline.read(plan.microbatches)
    check(schedule)
    program = prepare(fold(captured.graph).whole, plan.recompute)  # type: ignore[arg-type]
    cuts = [stage.cut for stage in pipeline.stages]
    cut = cut_stages(program, captured.graph, cuts, plan.microbatches, schedule.splits)
    stages = _stages(plan, pipeline, schedule, program, captured, devices)
    for stage, programs in enumerate(stages):
        homes = zip(program.graph.inputs, cut.homes, strict=True)
        programs.know_inputs(v for v, where in homes if stage in where)
    donated = frozenset(program.graph.inputs[k] for k in captured.graph.donated)
    passes, rounds = link(stages, cut, donated)
    return LoweredPipeline(plan, captured, schedule, cut, stages, passes, rounds)


def _stages(
    plan: Plan, pipeline: Pipeline, schedule: Schedule, program: Prepared, captured: Captured, devices: Any
) -> list[StagePrograms]:
    held = [[rank for rank, stages in enumerate(schedule.held) if s in stages] for s in range(schedule.stages)]
    if spread := [s for s, ranks in enumerate(held) if len(ranks) != 1]:
        raise LoweringError(
            f"stage {spread[0]} lies on {len(held[spread[0]])} ranks.",
            where=f"schedule {pipeline.schedule}",
            fix="a schedule in which each stage lies on one rank",
        )
    ends = [pipeline.first[ranks[0]] + stage.mesh.size for ranks, stage in zip(held, pipeline.stages, strict=True)]
    used = used_devices(plan, devices, plan.device_count, f"pipeline of {len(ends)} stages")
    arrays = {v: _anywhere(array) for v, array in captured.binding.arrays.items()}
    groups = _groups(plan, pipeline, program)
    found = []
    for stage, end in zip(pipeline.stages, ends, strict=True):
        mesh = device_mesh(stage.mesh, used[end - stage.mesh.size : end])
        part = plan.model_copy(update=own_decisions(stage))
        local = LocalStep(part, program, captured.binding.ops, arrays, on_cpus(mesh), groups)
        found.append(StagePrograms(local, mesh))
    return found


def _anywhere(array: Any) -> Any:
    """A constant that is bound to no device."""
    return array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)


def _groups(plan: Plan, pipeline: Pipeline, program: Prepared) -> int | None:
    """A microbatch must have the same rows on every stage's mesh."""
    time = program.time
    if not isinstance(time, TimeAxis) or plan.microbatches == 1:
        return None
    return lcm(*(time_groups(time.batch, stage.mesh, plan.microbatches) for stage in pipeline.stages))


def own_decisions(stage: Stage) -> dict[str, Any]:
    """What a stage decides for itself, of the fields of a plan."""
    given = {"strategies": stage.strategies, "slots": stage.slots}
    return {"mesh": stage.mesh, **{name: value for name, value in given.items() if value}}
