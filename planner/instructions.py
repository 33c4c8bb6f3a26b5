"""A plan as the instructions of one device: computations and collectives, ready to simulate.

Every op becomes a task on the compute stream and every layout change one on a stream of its
mesh axes. Computations run in program order, but for updates: each runs when its gradient is there and the device
has nothing else to do. Of the collectives that are ready, a link carries the first of the program. A task stands for
all runs of its op (layers and microbatches), so what can hide behind what is told per kind of op: gathers of weights
wait for nothing, reductions of gradients hold up the optimizer alone, sums inside a layer hold up the next op.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import PlanError
from ..ir.graph import Op
from ..ir.plan import Collective, Plan
from ..ir.program import Program
from ..ir.roles import roles
from ..ir.rule import Rule, Strategy
from ..ir.sharding import Sharding
from .cost.model import CostModel
from .layouts import Layouts
from .memory.ledger import Ledger
from .memory.lifetimes import lifetimes
from .memory.storage import as_xla
from .moves import moves, settlements, spoken
from .pipeline.simulate import COMPUTE, SLOWDOWN, Run, Task, simulate
from .space import Space, build


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
    """One simulated step of a plan on one device.

    `seconds` is the makespan; `serial` what it would be if nothing overlapped; `exposed` the
    seconds of communication that nothing hides. `memory` are bytes at the peak by cause.
    """

    run: Run
    serial: float
    compute: float
    communication: float
    memory: dict[str, float]
    collectives: tuple[Collective, ...]

    @property
    def seconds(self) -> float:
        return self.run.makespan

    @property
    def exposed(self) -> float:
        return self.run.exposed(0)

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


def simulate_plan(plan: Plan, program: Program, cost: CostModel) -> Simulation:
    """Price a plan op by op with this cost model and run its instructions.

    Args:
        program: the graph of the plan, folded, prepared with the plan's recompute policy.
    """
    space = build(
        program, plan.microbatches, cost, Layouts(cost.collectives(plan.mesh)), Chosen(plan)
    )
    tasks, collectives = _Issuing(space).run()
    run = simulate(tasks, SLOWDOWN)
    compute = sum(task.seconds for task in tasks if task.stream == COMPUTE)
    moving = sum(task.seconds for task in tasks if task.stream != COMPUTE)
    choices = (0,) * len(space.nodes)
    storage = as_xla(program, plan.cluster.device.kind)
    ledger = Ledger(space, lifetimes(program, plan.microbatches, roles(program.graph), storage))
    _, moment = ledger.peak(ledger.local_bytes(choices))
    return Simulation(
        run, compute + moving, compute, moving, ledger.by_cause(choices, moment), tuple(collectives)
    )


class _Issuing:
    def __init__(self, space: Space):
        self.space, self.tags = space, space.program.value_tags
        self.choices = (0,) * len(space.nodes)
        self.names = spoken(space)
        program = space.program
        self.phases = {op.tag: p for op, p in zip(program.graph.ops, program.phases, strict=True)}
        self.tasks: list[Task] = []
        self.collectives: list[Collective] = []
        self.made: dict[str, int] = {}  # value tag -> the task that makes it
        self.arriving: dict[str, list] = {}
        for item in space.transfers:
            self.arriving.setdefault(item.reader, []).append(item)
        self.inside: dict[str, list[Collective]] = {}
        for op, entry in settlements(space, self.choices):
            self.inside.setdefault(op.tag, []).append(entry)

    def run(self) -> tuple[list[Task], list[Collective]]:
        seen: set[str] = set()
        for visit in self.space.program.graph.visits:
            op = visit.op
            for region in op.regions:
                for k in range(len(region.inputs)):
                    self._alias(f"{op.tag}/in{k}", op.inputs[k])
            if op.tag not in seen:
                seen.add(op.tag)
                self._op(op)
        for tag in self.space.program.graph.input_tags:
            if tag in self.arriving:
                self._receive(tag)
        return self.tasks, self.collectives

    def _alias(self, tag: str, value: int) -> None:
        if self.tags[value] in self.made:
            self.made[tag] = self.made[self.tags[value]]

    def _op(self, op: Op) -> None:
        after = [self.made[self.tags[v]] for v in op.inputs if self.tags[v] in self.made]
        after += self._receive(op.tag)
        seconds = (
            float(self.space.own[op.tag][0]) * self.space.runs[op.tag]
            if op.tag in self.space.own
            else 0.0
        )
        extra = self.inside.get(op.tag, [])
        settled = sum(entry.seconds for entry in extra)
        if seconds - settled > 0:
            after = [self._task(self._name(op), COMPUTE, seconds - settled, after, self._kind(op))]
        for entry in extra:
            after = [self._collective(entry, after)]
        if after:
            last = max(after)
            self.made.update({self.tags[v]: last for v in op.outputs})

    def _receive(self, reader: str) -> list[int]:
        """The collectives that bring a reader its operands."""
        found = []
        for item in self.arriving.get(reader, ()):
            before = [self.made[item.source]] if item.source in self.made else []
            for entry in moves(self.space, self.choices, item, self.names):
                before = [self._collective(entry, before)]
                found += before
        return found

    def _collective(self, entry: Collective, after: list[int]) -> int:
        self.collectives.append(entry)
        return self._task(
            f"{entry.kind} {entry.what}",
            "·".join(entry.axes),
            entry.seconds,
            after,
            "communication",
        )

    def _task(self, name: str, stream: str, seconds: float, after: list[int], kind: str) -> int:
        loose = stream != COMPUTE or kind == "update"
        self.tasks.append(Task(name, 0, stream, seconds, tuple(sorted(set(after))), kind, loose))
        return len(self.tasks) - 1

    def _name(self, op: Op) -> str:
        runs = self.space.runs.get(op.tag, 1)
        return self.names.get(op.tag, op.kind) + (f" ×{runs}" if runs > 1 else "")

    def _kind(self, op: Op) -> str:
        return self.phases.get(op.tag, "forward")
