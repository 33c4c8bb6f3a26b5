"""The search's tables and local programs say the same: priced either way, a plan costs as much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isclose

import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import composed
from meshwright.ir.errors import InfeasibleError
from meshwright.ir.graph import Op
from meshwright.ir.local.program import COLLECTIVES, MICROBATCHES, ON_SHARDS, LocalOp, LocalProgram
from meshwright.ir.ops import CONTROL_FLOW
from meshwright.ir.passes.localize import localize
from meshwright.ir.plan import Plan
from meshwright.ir.program import prepare
from meshwright.ir.rules.rule import Strategy
from meshwright.models import build
from meshwright.planner.cost.kernels import kernels_of
from meshwright.planner.cost.model import Roofline
from meshwright.planner.cost.ways import Ways
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.outline import often
from meshwright.planner.intra.space import Space
from meshwright.planner.intra.space import build as build_space
from meshwright.planner.intra.uneven import ring_work, unevenness
from meshwright.planner.report.instructions import Chosen
from meshwright.planner.request import Request


def runs_of(
    local: LocalProgram, ops: Sequence[LocalOp], loops: dict[str, Op], times: float = 1.0
) -> Iterator[tuple[LocalOp, float]]:
    """Each op, and how often a step runs it."""
    for op in ops:
        here = times * op.count
        yield op, here
        for number, region in enumerate(op.regions):
            inner = local.microbatches if op.kind == MICROBATCHES else often(loops[op.tag], number)
            yield from runs_of(local, region.ops, loops, here * inner)


class Priced:
    """A local program's seconds, op by op."""

    def __init__(self, local: LocalProgram, space: Space, cost: Roofline, plan: Plan):
        self.local, self.space, self.cost, self.plan = local, space, cost, plan
        program = space.program
        self.graph_ops = {visit.op.tag: visit.op for visit in reversed(program.graph.visits)}
        self.types, self.prices = program.graph.types, space.layouts.collectives
        self.kernels = kernels_of(program, cost.fused_attention, cost.fusion, cost.redone_inside)
        self.first: dict[int, int] = {}  # of what a resharding moves, what it began with

    def seconds(self) -> tuple[float, float]:
        """Of communication, and of computation."""
        moved = computed = 0.0
        for op, runs in runs_of(self.local, self.local.ops, self.graph_ops):
            if op.kind in ON_SHARDS:
                moved += runs * self.move(op)
            elif op.tag in self.space.own and op.kind not in CONTROL_FLOW:
                inside = self.inside(op)
                moved += runs * inside
                computed += runs * self.compute(op)
        return moved, computed

    def move(self, op: LocalOp) -> float:
        [value], [made] = op.inputs, op.outputs
        self.first[made] = self.first.get(value, value)
        if op.kind not in COLLECTIVES:
            return 0.0
        larger = max((value, made), key=lambda v: self.local.local(v).size)
        nbytes = self.prices.wire_bytes(self.local.local(larger))
        line = self.prices.line(op.kind, op.axes)
        source = self.local.shards[self.first[made]].sharding
        joins = bool(op.reader) and self.prices.joins(op.kind, op.phase, source)
        return (0.0 if joins or not nbytes else line.fixed) + line.slope * nbytes

    def ways(self, op: LocalOp) -> list[float]:
        """Into how many parts each side is cut, over devices and time."""
        shards = [self.local.shards[v] for v in (*op.inputs, *op.outputs)]
        many = self.local.microbatches
        return [
            s.sharding.ways(self.local.mesh) * (many if s.time is not None else 1) for s in shards
        ]

    def strategy(self, op: LocalOp) -> Strategy:
        return Strategy(self.plan.strategies[op.tag])

    def compute(self, op: LocalOp) -> float:
        graph_op, rule, mesh = self.graph_ops[op.tag], self.local.rule(op), self.local.mesh
        sides = [np.array([float(n)]) for n in self.ways(op)]
        axes = {axis for cut in op.cuts for axis in cut.axes}
        work = float(mesh.ways(tuple(axes))) * (
            self.local.microbatches if any(c.time for c in op.cuts) else 1
        )
        launches = 1.0
        if "rows" in dict(op.attrs):
            work /= unevenness(graph_op, rule, self.strategy(op), mesh)
        if "ring" in dict(op.attrs):
            more, launches = ring_work(graph_op, rule, self.strategy(op), mesh)
            work /= more
        many = len(op.inputs)
        ways = Ways(sides[:many], sides[many:], np.array([work]), np.array([launches]))
        found = self.cost.op_seconds(graph_op, rule, self.types, ways, self.kernels)
        return float(np.ravel(found)[0])

    def inside(self, op: LocalOp) -> float:
        """What composites send while they run; the rest is there as ops."""
        graph_op, rule = self.graph_ops[op.tag], self.local.rule(op)
        inside = self.space.inside(graph_op, rule, self.strategy(op), self.ways(op))
        pairs = zip(inside.sent(), inside.seconds(self.compute(op)), strict=True)
        shown = len(op.outputs) if self.settles(op) else 0
        return sum(seconds for k, (_, seconds) in enumerate(pairs) if k >= shown)

    def settles(self, op: LocalOp) -> bool:
        return any(self.local.shards[v].reduction != "sum" for v in op.outputs)


NAMES = (
    "gpt-tiny",
    "gpt-tiny-scan",
    "llama-tiny",
    "mixtral-tiny",
    "deepseek-tiny",
    "vit-tiny",
    "dlrm-tiny",
    "wrn-tiny",
)
CASES = [
    pytest.param(
        *(name, mesh, microbatches, squeezed),
        marks=[pytest.mark.slow]
        * (len(mesh) < 3 or (name != "gpt-tiny" and not (squeezed and microbatches == 4))),
        id=f"{name}-{'x'.join(map(str, mesh))}-{microbatches}-{'squeezed' if squeezed else 'free'}",
    )
    for name in NAMES
    for mesh in ((8,), (4, 2), (2, 2, 2))
    for microbatches in ((1,) if name == "wrn-tiny" else (1, 4))  # batch norm
    for squeezed in (False, True)
]


@pytest.mark.parametrize("name, mesh, microbatches, squeezed", CASES)
def test_tables_and_programs_cost_the_same(name, mesh, microbatches, squeezed):
    example = build(name)
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    attention = "fused" if squeezed else "plain"
    request = Request(mesh=mesh, microbatches=microbatches, attention=attention, overlap="none")
    plan = plan_captured(captured, "8xh100", request, name)
    if squeezed:
        tight = replace(request, memory=0.55 * plan.estimate.peak_bytes)
        with suppress(InfeasibleError):
            plan = plan_captured(captured, "8xh100", tight, name)
    cost = Roofline(Cluster.parse("8xh100"))
    program = prepare(fold(composed(captured.graph, attention, plan.cluster)).small, plan.recompute)
    layouts = Layouts(cost.collectives(plan.mesh))
    space = build_space(program, plan.microbatches, cost, layouts, Chosen(plan))
    choices = (0,) * len(space.nodes)
    by_tables = sum(
        float(seconds[0] - (space.settled[tag][0] if tag in space.settled else 0.0))
        * space.runs[tag]
        for tag, seconds in space.own.items()
    )
    moved, computed = Priced(localize(program, plan), space, cost, plan).seconds()
    assert isclose(computed, by_tables, rel_tol=1e-9)
    assert isclose(moved + computed, space.serial(choices), rel_tol=1e-9)
