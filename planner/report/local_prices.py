"""What a local program costs, op by op: seconds of what each device computes, and of every collective.

The search has tables of its own, for all choices at once. Both say the same of one plan (`tests/test_local_prices.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...ir.local.program import COLLECTIVES, MICROBATCHES, LocalOp, LocalProgram
from ...ir.ops import CONTROL_FLOW
from ...ir.rules.rule import Strategy
from ..cost.kernels import kernels_of
from ..cost.model import CostModel
from ..cost.ways import Ways
from ..intra.inside import Inside, Sent, may_send
from ..intra.outline import often
from ..intra.space import Space
from ..intra.uneven import ring_work, unevenness


class LocalPrices:
    """Seconds of one run of each op of a local program.

    Args:
        space: of the program's step on its mesh, from which its layouts were chosen.
        strategies: by op tag, as in plans.
    """

    def __init__(
        self, local: LocalProgram, space: Space, cost: CostModel, strategies: Mapping[str, tuple[int, ...]]
    ):  # fmt: skip
        self.local, self.space, self.cost, self.strategies = local, space, cost, strategies
        program = space.program
        self.graph_ops = {visit.op.tag: visit.op for visit in reversed(program.graph.visits)}
        self.types, self.prices = program.graph.types, space.layouts.collectives
        self.kernels = kernels_of(
            program, cost.fused_attention, cost.fusion, cost.execution_model.redone_inside
        )
        self.first: dict[int, int] = {}  # of what a resharding moves, what it began with

    def runs(self) -> Iterator[tuple[LocalOp, float]]:
        """Each op, and how often a step runs it."""
        return self._runs(self.local.ops, 1.0)

    def _runs(self, ops: Sequence[LocalOp], times: float) -> Iterator[tuple[LocalOp, float]]:
        for op in ops:
            here = times * op.count
            yield op, here
            for number, region in enumerate(op.regions):
                turns = (
                    self.local.microbatches
                    if op.kind == MICROBATCHES
                    else often(self.graph_ops[op.tag], number)
                )
                yield from self._runs(region.ops, here * turns)

    def computes(self, op: LocalOp) -> bool:
        """Whether an op of the graph is worked out here, and not only moved or shown."""
        return op.tag in self.space.own and op.kind not in (*COLLECTIVES, *CONTROL_FLOW)

    def nbytes(self, op: LocalOp) -> float:
        """Of a collective: of the larger of its operand and result. Of dims that do not divide, as of others."""
        return max(map(self._held_bytes, (*op.inputs, *op.outputs)))

    def _held_bytes(self, value: int) -> float:
        """What one device holds of a value."""
        shard = self.local.shards[value]
        many = self.local.microbatches if shard.time is not None else 1
        return self.prices.wire_bytes(shard.whole) / (shard.sharding.ways(self.local.mesh) * many)

    def move(self, op: LocalOp) -> float:
        """Of what brings a value to another layout; programs are read in order, as several steps may follow."""
        [value], [made] = op.inputs, op.outputs
        self.first[made] = self.first.get(value, value)
        if op.kind not in COLLECTIVES:
            return 0.0
        nbytes, line = self.nbytes(op), self.prices.line(op.kind, op.axes)
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
        return Strategy(self.strategies[op.tag])

    def compute(self, op: LocalOp) -> float:
        """Of what a device computes, sends apart."""
        graph_op, rule, mesh = self.graph_ops[op.tag], self.local.rule(op), self.local.mesh
        sides = [np.array([float(n)]) for n in self.ways(op)]
        axes = {axis for cut in op.cuts for axis in cut.axes}
        work = float(mesh.ways(tuple(axes))) * (
            self.local.microbatches if any(c.time for c in op.cuts) else 1
        )
        launches = 1.0
        if op.has("rows"):
            work /= unevenness(graph_op, rule, self.strategy(op), mesh)
        if op.has("ring"):
            more, launches = ring_work(graph_op, rule, self.strategy(op), mesh)
            work /= more
        many = len(op.inputs)
        ways = Ways(sides[:many], sides[many:], np.array([work]), np.array([launches]))
        found = self.cost.op_seconds(graph_op, rule, self.types, ways, self.kernels)
        return float(np.ravel(found)[0])

    def inside(self, op: LocalOp) -> list[tuple[Sent, float, float]]:
        """What a composite sends while it runs, its bytes and its seconds; the rest is there as ops."""
        if not may_send(self.graph_ops[op.tag], self.local.rule(op)):
            return []
        inside = self._inside(op)
        if not (sent := inside.sent()):
            return []
        pairs = zip(sent, inside.seconds(self.compute(op)), strict=True)
        shown = len(op.outputs) if self._settles(op) else 0
        return [(each, inside.nbytes(each), seconds) for each, seconds in list(pairs)[shown:]]

    def _inside(self, op: LocalOp) -> Inside:
        graph_op, rule = self.graph_ops[op.tag], self.local.rule(op)
        return self.space.inside(graph_op, rule, self.strategy(op), self.ways(op))

    def _settles(self, op: LocalOp) -> bool:
        return any(self.local.shards[v].reduction != "sum" for v in op.outputs)
