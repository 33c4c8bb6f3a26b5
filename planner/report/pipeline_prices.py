"""What the ranks of a pipeline run, priced op by op and simulated.

    pass     by its local program; what may hide beside computation apart, as the search prices stages
    move     latency, and the bytes that one device gives or gets; all that goes one way for a microbatch together
    step     passes and moves in the order of the ranks' programs, then what each rank does once

The search has tables of its own; both say the same of the passes of a plan (`tests/test_local_prices.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ...ir.execution import OVERLAPS, OverlapKind
from ...ir.local.pipeline import Move, PassProgram, PipelineProgram
from ...ir.local.pipeline import Run as PassRun
from ...ir.local.program import ON_SHARDS, Shard
from ...ir.local.turns import Turns
from ...ir.pipeline.schedule import Step
from ...ir.pipeline.staged import stage_plans
from ...ir.plan import Plan
from ...ir.program import Program
from ..cost.model import CostModel
from ..intra.hideable import flow_of
from ..intra.layouts import Layouts
from ..intra.space import Space, build
from ..pipeline.simulate import COMPUTE, Run, Task, simulate
from ..pipeline.unit_costs import Busy, UnitSeconds
from .instructions import PlanDecisions
from .local_prices import LocalPrices

Place = tuple[int, int, int | None]  # a value, the stage that has it, the microbatch it is of


@dataclass(frozen=True)
class PipelineSimulation:
    """One step of a pipeline: its tasks, each rank's update last; `serial` is the step if nothing overlapped."""

    run: Run
    serial: float

    @property
    def seconds(self) -> float:
        return self.run.makespan


def simulate_pipeline(
    plan: Plan, program: PipelineProgram, prepared: Program, cost: CostModel, overlap: Sequence[OverlapKind]
) -> PipelineSimulation:  # fmt: skip
    """Price what ranks run with this cost model, and run it.

    Args:
        program: of the plan, whose stages have programs of their own.
        prepared: the plan's step, folded, prepared for stages.
        overlap: kinds of communication that may hide.
    """
    prices = PipelinePrices(plan, program, prepared, cost, overlap)
    work = prices.stages()
    run = simulate(prices.tasks(work))
    serial = simulate(prices.tasks([each.serial for each in work]))
    return PipelineSimulation(run, serial.makespan)


@dataclass
class PipelinePrices:
    """Prices the passes and moves of ranks on one cluster; see `simulate_pipeline`."""

    plan: Plan
    program: PipelineProgram
    prepared: Program
    cost: CostModel
    overlap: Sequence[OverlapKind] = ()
    _spaces: dict[str, Space] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        assert self.plan.pipeline is not None
        self.first = self.plan.pipeline.first
        self.schedule = self.plan.pipeline.read(self.plan.microbatches)
        self.parts = stage_plans(self.plan)
        self.cluster = self.cost.collectives(self.plan.mesh).cluster

    def stages(self) -> list[UnitSeconds]:
        """Of each stage, its passes of one microbatch, and what it does once per step; moves are apart."""
        sums: dict[tuple[int, str], list[float]] = defaultdict(_none)
        for each in self.program.passes:
            kind = each.name.split()[0]
            row = sums[each.stage, "once" if kind in ("prepare", "update") else kind]
            for column, seconds in self._pass(each):
                row[column] += seconds
        found: list[UnitSeconds] = []
        for stage in range(len(self.parts)):
            once = sums[stage, "once"]
            early, late = (once[OVERLAPS.index(each)] for each in ("parameters", "gradients"))
            busy = [_busy(sums[stage, kind]) for kind in ("forward", "backward", "weight")]
            apart = sum(once) - early - late + self._once_moved(stage)
            found.append(UnitSeconds(*busy, apart=apart, early=early, late=late))
        return found

    def _pass(self, each: PassProgram) -> Iterator[tuple[int, float]]:
        """Seconds of its ops, each with the column it counts in: a kind of overlap, computing, or waiting."""
        part = self.parts[each.stage]
        prices = LocalPrices(each.program, self._space(part), self.cost, part.strategies)
        flow = flow_of(self.prepared) if self.overlap else None
        for op, runs in prices.runs():
            if op.kind in ON_SHARDS:
                kind = flow.kind(op.source, op.reader, op.phase) if flow and op.reader else None
                hides = kind is not None and kind in self.overlap
                yield OVERLAPS.index(kind) if hides else ALONE, runs * prices.move(op)
            elif prices.computes(op):
                yield COMPUTING, runs * prices.compute(op)
                yield ALONE, runs * sum(seconds for _, _, seconds in prices.inside(op))

    def _space(self, part: Plan) -> Space:
        """Of the stages that decide alike."""
        key = repr((part.mesh, part.strategies, part.slots))
        if key not in self._spaces:
            layouts, overlap = Layouts(self.cost.collectives(part.mesh)), tuple(self.overlap)
            decided = PlanDecisions(part)
            self._spaces[key] = build(
                self.prepared, part.microbatches, self.cost, layouts, decided, overlap=overlap
            )
        return self._spaces[key]

    # ------------------------------------------------------------ moves

    def moved(self, moves: Sequence[Move]) -> float:
        """Seconds in which one stage hands things to another."""
        here, there = moves[0].sender, moves[0].receiver
        given, got = (
            sum(self._held(move, stage, shard) for move, stage, shard in each)
            for each in (
                [(move, here, move.leaves) for move in moves],
                [(move, there, move.arrives) for move in moves],
            )
        )
        ends = [self._devices(stage) for stage in (here, there)]
        tier = self.cluster.tier_joining(min(a for a, _ in ends), max(b for _, b in ends))
        nbytes = max(given, got)
        return tier.latency + nbytes / tier.achieved if nbytes else 0.0

    def _held(self, move: Move, stage: int, shard: Shard) -> float:
        """Bytes that one device of a stage has of what moves."""
        kind = shard.local(self.program.meshes[stage], self.program.microbatches)
        return float(kind.nbytes * len(move.values))

    def _devices(self, stage: int) -> tuple[int, int]:
        first = self.first[self.schedule.homes[stage]]
        return first, first + self.program.meshes[stage].size

    def _once_moved(self, stage: int) -> float:
        """Seconds in which a stage hands things to others at the start and between updates."""
        return sum(
            self.moved(moves)
            for _, moves in self.turns
            if isinstance(moves, tuple)
            and (moves[0].sender, moves[0].microbatch) == (stage, None)
            and moves[0].kind == "send"
        )

    # ------------------------------------------------------------ tasks

    @cached_property
    def turns(self) -> list[tuple[int, PassRun | tuple[Move, ...]]]:
        return [*Turns(self.program.ranks)]

    def tasks(self, work: Sequence[UnitSeconds]) -> list[Task]:
        """What the ranks do, in order, where stages work so long."""
        return _Issuing(self, work).run()


class _Issuing:
    def __init__(self, prices: PipelinePrices, work: Sequence[UnitSeconds]):
        self.prices, self.work, self.schedule = prices, work, prices.schedule
        self.tasks: list[Task] = []
        self.made: dict[Place, int] = {}
        self.last: dict[int, int] = {}  # rank -> its last pass

    def run(self) -> list[Task]:
        for rank, op in self.prices.turns:
            if isinstance(op, tuple):
                if op[0].microbatch is not None:
                    self._moves(rank, op)
            elif op.microbatch is not None:
                self._pass(rank, op)
        ends = tuple(self.last.values())
        for rank, held in enumerate(self.schedule.held):
            once = sum(self.work[stage].once for stage in held)
            self.tasks.append(Task("update", rank, COMPUTE, once, ends, "update"))
        return self.tasks

    def _pass(self, rank: int, run: PassRun) -> None:
        each, m = self.prices.program.by_name[run.name], run.microbatch
        assert m is not None
        kind, work = run.name.split()[0], self.work[each.stage]
        seconds = getattr(work, kind).seconds
        step = Step(kind, each.stage, m)  # type: ignore[arg-type]
        here = [(v, each.stage, m) for v in each.takes]
        after = tuple(sorted({self.made[place] for place in here if place in self.made}))
        self.tasks.append(Task(str(step), rank, COMPUTE, seconds, after, kind))
        self.last[rank] = number = len(self.tasks) - 1
        self.made.update(((v, each.stage, m), number) for v in (*each.given, *each.sent))

    def _moves(self, rank: int, moves: tuple[Move, ...]) -> None:
        first = moves[0]
        number = self.last[rank]
        if first.kind != "copy":
            seconds = self.prices.moved(moves)
            name = f"send {first.phase} {first.sender} to {first.receiver} of {first.microbatch}"
            self.tasks.append(Task(name, rank, "send", seconds, (number,), "send"))
            number = len(self.tasks) - 1
        for value in (v for move in moves for v in move.values):
            self.made[value, first.receiver, first.microbatch] = number


COMPUTING, ALONE = len(OVERLAPS), len(OVERLAPS) + 1


def _none() -> list[float]:
    return [0.0] * (len(OVERLAPS) + 2)


def _busy(row: Sequence[float]) -> Busy:
    return Busy(row[COMPUTING], sum(row[:COMPUTING]), row[ALONE])
