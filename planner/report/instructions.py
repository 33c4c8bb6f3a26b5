"""A plan as the instructions of one device: computations and collectives, ready to simulate.

The windows of a step (`windows.py`) follow each other, each in a few turns over all ops, as over groups of layers.
Computations run in program order on one stream, but for updates: each runs when its gradient is there and the device
has nothing else to do. What may hide (`hideable.py`) has a stream of its axes, which carries the first of the program
that is ready; what may not, holds up all that follows:

    parameters   come from the turn before on; what reads them waits
    gradients    go when they are made; the update waits
    tensor       go when they are made; the turn after the next waits
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.analysis.roles import roles
from ...ir.errors import PlanError
from ...ir.execution import OverlapKind
from ...ir.graph import Op, Region
from ...ir.plan import Collective, Plan
from ...ir.program import Program
from ...ir.rules.rule import Rule, Strategy
from ...ir.sharding import Sharding
from ..cost.model import CostModel
from ..intra.hideable import flow_of
from ..intra.layouts import Layouts
from ..intra.space import Space, build
from ..intra.windows import MANY, phases_of, windows_of
from ..memory.ledger import Ledger
from ..memory.lifetimes import lifetimes
from ..memory.storage import storage_of
from ..pipeline.simulate import COMPUTE, SLOWDOWN, Run, Task, simulate
from .moves import moves, settlements, spoken

TURNS = 4  # of each window: what cannot hide before the first op and after the last is small


@dataclass(frozen=True)
class Chosen:
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
    space = build(program, plan.microbatches, cost, layouts, Chosen(plan), overlap=overlap)
    tasks, collectives = _Issuing(space, overlap).run()
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


@dataclass(frozen=True)
class _Arrival:
    """What brings a reader one operand, and which share of it runs in each window, hiding or not."""

    entries: list[Collective]
    source: str
    kind: OverlapKind | None
    early: bool  # before the passes
    beside: np.ndarray
    alone: np.ndarray


class _Issuing:
    def __init__(self, space: Space, overlap: tuple[OverlapKind, ...]):
        self.space, self.tags, outline = space, space.program.value_tags, space.frame.outline
        self.choices, self.names = (0,) * len(space.nodes), spoken(space)
        windows = windows_of(outline, space.microbatches, overlap)
        self.often = dict(zip(outline.runs, windows.ops, strict=True))
        self.passes = [w for w in range(MANY) if windows.ops[:, w].any()]
        self.phases = phases_of(space.program)
        self.tasks: list[Task] = []
        self.made: dict[str, int] = {}  # value tag -> the task that makes it
        self.needed: dict[str, list[int]] = defaultdict(
            list
        )  # by reader: what it waits for, of what hides
        self.owed: dict[str, list[int]] = defaultdict(list)  # what the update waits for instead
        self.fence: list[int] = []  # the last that was exposed: all that follows waits for it
        self.since: list[int] = []  # computations after it
        self.begun: list[int] = []  # the first computation of each turn
        self.passing: list[list[int]] = []  # by turn, what hides in it of its own pass
        self.arriving = self._arrivals(windows.beside, windows.alone)
        self.inside: dict[str, list[Collective]] = defaultdict(list)
        for op, entry in settlements(space, self.choices):
            self.inside[op.tag].append(entry)
        self.window, self.early, self.share = 0, False, 1.0

    def _arrivals(self, beside: np.ndarray, alone: np.ndarray) -> dict[str, list[_Arrival]]:
        found: dict[str, list[_Arrival]] = defaultdict(list)
        flow = flow_of(self.space.program)
        for item, hides, waits in zip(self.space.transfers, beside, alone, strict=True):
            if entries := moves(self.space, self.choices, item, self.names):
                runs = float(hides.sum() + waits.sum()) or 1.0
                kind = flow.kind(item.source, item.reader, item.phase)
                early = item.phase == "prepare"
                one = _Arrival(entries, item.source, kind, early, hides / runs, waits / runs)
                found[item.reader].append(one)
        return found

    def run(self) -> tuple[list[Task], list[Collective]]:
        ops = self.space.program.graph.ops
        self._turn(ops, MANY, 1.0, early=True)
        for window in self.passes:
            for _ in range(TURNS):
                self._turn(ops, window, 1 / TURNS)
        self._turn(ops, MANY, 1.0)
        arrivals = (arrival for group in self.arriving.values() for arrival in group)
        found = [entry for arrival in arrivals for entry in arrival.entries]
        return self.tasks, found + [entry for group in self.inside.values() for entry in group]

    def _turn(self, ops: Sequence[Op], window: int, share: float, early: bool = False) -> None:
        """Part of all that runs in one window; outside of all windows, `early` is before them."""
        self.window, self.share, self.early = window, share, early
        self.begun.append(-1)
        self.passing.append([])
        self._ops(ops, set(), "")
        for tag in self.space.program.graph.input_tags:
            self._receive(self.arriving.get(tag, ()), tag)

    def _ops(self, ops: Iterable[Op], seen: set[str], phase: str) -> None:
        """Ops of equal tag stand for one another."""
        for op in ops:
            if op.tag not in seen:
                seen.add(op.tag)
                here = phase or self.phases[op.tag]
                if op.regions:
                    self._loop(op, seen, here)
                else:
                    self._op(op, here)

    def _loop(self, op: Op, seen: set[str], phase: str) -> None:
        """What is read at its start, its ops, what is read at its end."""
        for i, value in enumerate(op.inputs):
            slot, source = f"{op.tag}/in{i}", self.tags[value]
            if source in self.made:
                self.made[slot] = self.made[source]
            self._receive([a for a in self.arriving.get(slot, ()) if a.source == source], slot)
        for region in op.regions:
            self._ops(region.ops, seen, phase)
        for region in op.returning:
            self._end(op, region)

    def _end(self, op: Op, region: Region) -> None:
        consts, carry = op.loop_inputs
        for i, (value, result) in enumerate(zip(region.outputs, op.outputs, strict=True)):
            source = self.tags[value]
            slot = f"{op.tag}/in{consts + i}" if i < carry else f"{op.tag}/out{i}"
            arrivals = [a for a in self.arriving.get(slot, ()) if a.source == source]
            last = self._receive(arrivals, slot) or [self.made.get(source, -1)]
            if max(last) >= 0:
                self.made[self.tags[result]] = max(last)

    def _op(self, op: Op, phase: str) -> None:
        """Its part of this turn, if it has one, after what it reads."""
        came = self._receive(self.arriving.get(op.tag, ()), op.tag)
        sources = [self.tags[v] for v in op.inputs]
        after = [self.made[source] for source in sources if source in self.made]
        part = self._part(op, phase)
        if part:
            after = self._work(op, part, after, phase)
        after += self.needed[op.tag] + self.owed[op.tag]
        if after and (part or came or op.tag not in self.often):
            self.made.update({self.tags[v]: max(after) for v in op.outputs})

    def _part(self, op: Op, phase: str) -> float:
        """Which share of an op's runs this turn has."""
        outside = self.window == MANY and (phase == "prepare") != self.early
        if op.tag not in self.often or outside:
            return 0.0
        runs = self.often[op.tag]
        return float(runs[self.window] / runs.sum()) * self.share if runs.any() else 0.0

    def _work(self, op: Op, part: float, after: list[int], phase: str) -> list[int]:
        """What an op computes, then what it settles inside."""
        inside = self.inside.get(op.tag, ())
        whole = float(self.space.own[op.tag][0]) * self.space.runs[op.tag]
        seconds = part * (whole - sum(entry.seconds for entry in inside))
        if seconds > 0:
            after = [self._compute(op, seconds, after, phase)]
        for entry in inside:
            after = [self._alone(entry, part, after)]
        return after

    def _compute(self, op: Op, seconds: float, after: list[int], phase: str) -> int:
        waits = [*after, *self.fence, *self.needed[op.tag]]
        if phase == "update":
            waits += self.owed[op.tag]
        if self.begun[-1] < 0 and len(self.passing) > 2:
            waits += self.passing[-3]
        runs = self.space.runs.get(op.tag, 1)
        name = self.names.get(op.tag, op.kind) + (f" ×{runs}" if runs > 1 else "")
        number = self._task(name, COMPUTE, seconds, waits, phase, loose=phase == "update")
        self.since.append(number)
        if self.begun[-1] < 0:
            self.begun[-1] = number
        return number

    def _receive(self, arrivals: Iterable[_Arrival], reader: str) -> list[int]:
        """The collectives of this turn that bring a reader its operands."""
        found = []
        for each in arrivals:
            before = [self.made[each.source]] if each.source in self.made else []
            if each.alone[self.window] and (self.window < MANY or each.early == self.early):
                for entry in each.entries:
                    before = [
                        self._alone(entry, float(each.alone[self.window]) * self.share, before)
                    ]
            if each.beside[self.window]:
                if not before and len(self.begun) > 1 and self.begun[-2] >= 0:
                    before = [self.begun[-2]]  # one turn ahead
                for entry in each.entries:
                    seconds = entry.seconds * float(each.beside[self.window]) * self.share
                    before = [self._collective(entry, seconds, before, loose=True)]
                self._waiting(each.kind, reader).extend(before)
            found += before
        return found

    def _waiting(self, kind: OverlapKind | None, reader: str) -> list[int]:
        """Among what something that hides is to be waited for."""
        if kind == "tensor":
            return self.passing[-1]
        return self.owed[reader] if kind == "gradients" else self.needed[reader]

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
