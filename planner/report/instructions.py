"""A plan as the instructions of one device: computations and collectives of its local program, ready to simulate.

The windows of a step (`windows.py`) follow each other, each in a few turns over all ops, as over groups of layers.
Computations run in program order on one stream, but for updates: each runs when its gradient is there and the device
has nothing else to do. What may hide (`hideable.py`) has a stream of its axes, which carries the first of the program
that is ready; what may not, holds up all that follows:

    parameters   come from the turn before on; what reads them waits
    gradients    go when they are made; the update waits
    tensor       go when they are made; the turn after the next waits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...ir.analysis.roles import roles
from ...ir.errors import PlanError
from ...ir.execution import OverlapKind
from ...ir.graph import Op
from ...ir.local.program import COLLECTIVES, ON_SHARDS, LocalOp
from ...ir.passes.localize import localize
from ...ir.plan import Collective, Plan
from ...ir.program import Program
from ...ir.rules.rule import Rule, Strategy
from ...ir.sharding import Sharding
from ..cost.model import CostModel
from ..intra.hideable import flow_of
from ..intra.layouts import Layouts
from ..intra.space import Space, build
from ..intra.windows import MANY, Windows, windows_of
from ..memory.ledger import Ledger
from ..memory.lifetimes import lifetimes
from ..memory.storage import storage_of
from ..pipeline.simulate import COMPUTE, SLOWDOWN, Run, Task, simulate
from .local_prices import LocalPrices
from .moves import sent_by, spoken

TURNS = 4  # of each window: what cannot hide before the first op and after the last is small


@dataclass(frozen=True)
class PlanDecisions:
    """The decisions of a plan, as `space.build` asks for them."""

    plan: Plan

    def strategy(self, op: Op, rule: Rule) -> Strategy:
        if op.tag not in self.plan.strategies:
            raise PlanError(
                f"the plan has no strategy for {op.kind} `{op.tag}`.",
                where="strategies",
                fix="plan again",
            )
        return Strategy(self.plan.strategies[op.tag])

    def order(self, op: Op) -> tuple[str, ...]:
        return ()

    def layout(self, tag: str, value: int) -> Sharding:
        if tag not in self.plan.slots:
            raise PlanError(f"the plan has no layout for `{tag}`.", where="slots", fix="plan again")
        return self.plan.slots[tag].sharding


@dataclass(frozen=True)
class Simulation:
    """One step of a plan on one device.

    `seconds` by windows, as plans are priced; those of the simulated `run` are its makespan. `serial` is what the step
    would be if nothing overlapped, `exposed` the seconds of communication that nothing hides in the run. `memory` are
    bytes at the peak by cause.
    """

    run: Run
    seconds: float
    serial: float
    compute: float
    communication: float
    memory: dict[str, float]
    collectives: tuple[Collective, ...]

    @property
    def exposed(self) -> float:
        return self.run.exposed(0)

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


def simulate_plan(
    plan: Plan, program: Program, cost: CostModel, overlap: tuple[OverlapKind, ...] | None = None
) -> Simulation:
    """Price a plan op by op with this cost model and run its instructions.

    Args:
        program: the graph of the plan, folded, prepared with the plan's recompute policy.
        overlap: kinds of communication that may hide; as the plan assumes if None.
    """
    overlap = plan.overlap if overlap is None else overlap
    layouts = Layouts(cost.collectives(plan.mesh))
    space = build(program, plan.microbatches, cost, layouts, PlanDecisions(plan), overlap=overlap)
    local = localize(program, plan)
    names = spoken(space)
    steps = _Reading(LocalPrices(local, space, cost, plan.strategies), names).run()
    tasks, collectives = _Issuing(space, steps, names, overlap).run()
    run = simulate(tasks, SLOWDOWN)
    compute = sum(task.seconds for task in tasks if task.stream == COMPUTE)
    moving = sum(task.seconds for task in tasks if task.stream != COMPUTE)
    choices = (0,) * len(space.nodes)
    storage = storage_of(program, cost.execution_model)
    known = roles(program.graph)
    ledger = Ledger(space, lifetimes(program, plan.microbatches, known, storage, overlap))
    _, moment = ledger.peak(ledger.local_bytes(choices))
    memory, seconds = ledger.by_cause(choices, moment), space.seconds(choices)
    return Simulation(run, seconds, compute + moving, compute, moving, memory, tuple(collectives))


@dataclass
class _Step:
    """All that a step runs of ops of one tag: repeats in other layers are done together.

    reads: what the op computes from, by name.
    sends: a collective; or what an op sends inside, after it has computed for `seconds`.
    """

    op: LocalOp
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    seconds: float = 0.0
    sends: list[Collective] = field(default_factory=lambda: [])


class _Reading:
    """Reads a local program: one step per name, in order.

    What is only cut, joined or passed into a loop keeps its name.
    """

    def __init__(self, prices: LocalPrices, names: Mapping[str, str]):
        self.prices, self.names = prices, names
        self.steps: dict[str, _Step] = {}
        self.known: dict[int, str] = {}  # value -> its name
        self.same: dict[int, int] = {}  # value -> the one that it is

    def run(self) -> list[_Step]:
        for op, runs in self.prices.runs():
            if op.regions:
                self._enter(op)
            elif op.kind in COLLECTIVES:
                self._collective(op, runs)
            elif op.kind in ON_SHARDS:
                self.prices.move(op)
                self.same[op.outputs[0]] = op.inputs[0]
            else:
                self._op(op, runs)
        return list(self.steps.values())

    def _enter(self, op: LocalOp) -> None:
        """Regions see operands; results are what the last of them leaves."""
        for region in op.regions:
            if len(region.inputs) == len(op.inputs):
                self.same.update(zip(region.inputs, op.inputs, strict=True))
        self.same.update(zip(op.outputs, op.regions[-1].outputs, strict=True))

    def _name(self, value: int) -> str:
        while value in self.same:
            value = self.same[value]
        return self.known.get(value, "")

    def _collective(self, op: LocalOp, runs: float) -> None:
        [value], [made] = op.inputs, op.outputs
        source = self._name(value)
        name = f"{op.source or source} {op.kind} {'·'.join(op.axes)} for {op.reader}"
        self.known[made] = name
        self._step(name, op, (source,), (name,), runs)

    def _op(self, op: LocalOp, runs: float) -> None:
        reads = tuple(name for v in op.inputs if (name := self._name(v)))
        makes = tuple(f"{op.tag}:{i}" for i in range(len(op.outputs)))
        self.known.update(zip(op.outputs, makes, strict=True))
        step = self._step(op.tag, op, reads, makes, runs)
        if self.prices.computes(op):
            step.seconds += runs * self.prices.compute(op)

    def _step(
        self, name: str, op: LocalOp, reads: tuple[str, ...], makes: tuple[str, ...], runs: float
    ) -> _Step:
        step = self.steps.setdefault(name, _Step(op, reads, makes))
        step.sends += sent_by(self.prices, op, runs, self.names)
        return step


class _Issuing:
    """Turns steps into tasks, window by window."""

    def __init__(
        self,
        space: Space,
        steps: Sequence[_Step],
        names: Mapping[str, str],
        overlap: tuple[OverlapKind, ...],
    ):
        self.steps, self.names = steps, names
        self.runs, outline = space.runs, space.frame.outline
        windows = windows_of(outline, space.microbatches, overlap)
        self.often = dict(zip(outline.runs, windows.ops, strict=True))
        self.passes = [
            w for w in range(MANY) if windows.ops[:, w].any() or windows.beside[:, w].any()
        ]
        self.arrivals = _arrivals(space, windows)
        self.moves = {name: s for s in steps if s.op.kind in COLLECTIVES for name in s.makes}
        self.tasks: list[Task] = []
        self.made: dict[str, int] = {}  # name -> the task that makes it
        self.hidden: dict[str, OverlapKind | None] = {}  # of what hides, which kind it is of
        self.fence: list[int] = []  # the last that was exposed: all that follows waits for it
        self.since: list[int] = []  # computations after it
        self.begun: list[int] = []  # the first computation of each turn
        self.passing: list[list[int]] = []  # by turn, what hides in it of its own pass
        self.window, self.early, self.share = 0, False, 1.0

    def run(self) -> tuple[list[Task], list[Collective]]:
        self._turn(MANY, 1.0, early=True)
        for window in self.passes:
            for _ in range(TURNS):
                self._turn(window, 1 / TURNS)
        self._turn(MANY, 1.0)
        return self.tasks, [entry for step in self.steps for entry in step.sends]

    def _turn(self, window: int, share: float, early: bool = False) -> None:
        """Part of all that runs in one window; outside of all windows, `early` is before them."""
        self.window, self.share, self.early = window, share, early
        self.begun.append(-1)
        self.passing.append([])
        for step in self.steps:
            if step.op.kind not in COLLECTIVES:
                self._op(step)
            elif arrival := self.arrivals.get((step.op.source, step.op.reader)):
                self._receive(step, arrival)
            elif part := self._part(step.op):
                self._settle(step, part)

    def _op(self, step: _Step) -> None:
        """Its part of this turn, if it has one, after what it reads."""
        op, part = step.op, self._part(step.op)
        found = [self._awaited(name) for name in step.reads]
        after = [n for waits, _ in found for n in waits]
        owed = [n for _, owed in found for n in owed]
        if part and step.seconds > 0:
            waits = after + owed if op.phase == "update" else after
            after = [*after, self._compute(op, part * step.seconds, waits)]
        if part:
            for entry in step.sends:
                after = [self._alone(entry, part, after)]
        if (after or owed) and (part or op.tag not in self.often):
            self.made.update(dict.fromkeys(step.makes, max(after + owed)))

    def _awaited(self, name: str) -> tuple[list[int], list[int]]:
        """What an op that reads this waits for, and what updates alone wait for."""
        number = [self.made[name]] if name in self.made else []
        if name not in self.moves:
            return number, []
        waits, owed = self._awaited(self.moves[name].reads[0])
        kind = self.hidden.get(name)
        if kind == "gradients":
            return waits, owed + number
        return (waits, owed) if kind == "tensor" else (waits + number, owed)

    def _part(self, op: LocalOp) -> float:
        """Which share of an op's runs this turn has."""
        outside = self.window == MANY and (op.phase == "prepare") != self.early
        if op.tag not in self.often or outside:
            return 0.0
        runs = self.often[op.tag]
        return float(runs[self.window] / runs.sum()) * self.share if runs.any() else 0.0

    def _compute(self, op: LocalOp, seconds: float, after: list[int]) -> int:
        waits = [*after, *self.fence]
        if self.begun[-1] < 0 and len(self.passing) > 2:
            waits += self.passing[-3]
        runs = self.runs.get(op.tag, 1)
        name = self.names.get(op.tag, op.kind) + (f" ×{runs}" if runs > 1 else "")
        number = self._task(name, COMPUTE, seconds, waits, op.phase, loose=op.phase == "update")
        self.since.append(number)
        if self.begun[-1] < 0:
            self.begun[-1] = number
        return number

    def _settle(self, step: _Step, part: float) -> None:
        """What an op made is made whole before anything else."""
        after, _ = self._awaited(step.reads[0])
        for entry in step.sends:
            after = [self._alone(entry, part, after)]
        if after:
            self.made.update(dict.fromkeys(step.makes, max(after)))

    def _receive(self, step: _Step, arrival: _Arrival) -> None:
        """A collective's part of this turn."""
        [name], [source] = step.makes, step.reads
        before = [self.made[source]] if source in self.made else []
        alone = float(arrival.alone[self.window]) * self.share
        beside = float(arrival.beside[self.window]) * self.share
        for entry in step.sends:
            if alone and (self.window < MANY or arrival.early == self.early):
                self.made[name] = self._alone(entry, alone, before)
            if beside:
                if not before and len(self.begun) > 1 and self.begun[-2] >= 0:
                    before = [self.begun[-2]]  # one turn ahead
                number = self._collective(entry, entry.seconds * beside, before, loose=True)
                self.made[name], self.hidden[name] = number, arrival.kind
                if arrival.kind == "tensor":
                    self.passing[-1].append(number)

    def _alone(self, entry: Collective, part: float, after: list[int]) -> int:
        """A collective that waits for all before it, and all after it for it."""
        number = self._collective(
            entry, entry.seconds * part, [*after, *self.fence, *self.since], loose=False
        )
        self.fence, self.since = [number], []
        return number

    def _collective(self, entry: Collective, seconds: float, after: list[int], loose: bool) -> int:
        name, stream = f"{entry.kind} {entry.what}", "·".join(entry.axes)
        return self._task(name, stream, seconds, after, "communication", loose)

    def _task(
        self, name: str, stream: str, seconds: float, after: list[int], kind: str, loose: bool
    ) -> int:
        self.tasks.append(Task(name, 0, stream, seconds, tuple(sorted(set(after))), kind, loose))
        return len(self.tasks) - 1


@dataclass(frozen=True)
class _Arrival:
    """Of what brings a reader one operand: which share of it runs in each window, hiding or not."""

    kind: OverlapKind | None
    early: bool  # before the passes
    beside: np.ndarray
    alone: np.ndarray


def _arrivals(space: Space, windows: Windows) -> dict[tuple[str, str], _Arrival]:
    """By the tags of a value and of what reads it."""
    found: dict[tuple[str, str], _Arrival] = {}
    flow, readings = flow_of(space.program), space.frame.outline.readings
    for ((source, reader, _), reading), beside, alone in zip(
        readings.items(), windows.beside, windows.alone, strict=True
    ):
        runs = float(beside.sum() + alone.sum()) or 1.0
        kind = flow.kind(source, reader, reading.phase)
        arrival = _Arrival(kind, reading.phase == "prepare", beside / runs, alone / runs)
        found.setdefault((source, reader), arrival)
    return found
