"""Where the positions of a sequence go, and which of them attention keeps whole under context parallelism.

Scores [.., T, S] have positions of queries T and of keys S. The softmax tells them apart: it
reduces over keys. Cut are queries; keys stay whole there, and what attention's backward pass
sums over queries (gradients of keys and values) is cut again when it leaves.

    q [T*, H] · k [S*, H] -> scores [T*, S]      p [T*, S] · dO [T*, H] -> dV [S, H], owed, then [S*, H]

Attention as one op has the same operands and results; what it stands for tells which of their dims are keys.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from itertools import product

from ...ir.analysis.examples import Examples
from ...ir.graph import Graph, Op
from ...ir.ops import ATTENTION, CONTRACTIONS, REDUCTIONS
from ...ir.program import Program
from ...ir.rules import rule_of
from ...ir.rules.rule import Rule, cuttable
from ..cost.kernels import attention_values
from ..report.usage import followed, sequence_dims


class Positions(Examples):
    """Positions, where queries meet keys those of the queries alone.

    `summed` are results that lost their queries to a sum and keep positions of keys.
    """

    def __init__(self, graph: Graph):
        super().__init__(graph.types)
        self.both = followed(graph, sequence_dims(graph))
        self.queries = _query_dims(graph, self.both)
        self.summed: set[int] = set()
        for value in graph.inputs:
            if value in self.both.dims:
                self.dims[value] = self.both.dims[value]
                self.depends.add(value)
        self.run(graph.ops)

    def _simple(self, op: Op) -> None:
        super()._simple(op)
        for result in op.outputs:
            dims = self.dims.get(result, {})
            if len(dims) > 1:
                kept = self.queries.get(result, min(dims))
                self.dims[result] = {kept: dims[kept]}
            elif (
                not dims
                and op.kind in CONTRACTIONS
                and not self.queries.keys().isdisjoint(op.inputs)
            ):
                self._sum(result)

    def _composite(self, op: Op) -> None:
        super()._composite(op)
        rule = rule_of(op, self.types)
        for result, dims in zip(op.outputs, rule.results, strict=True):
            found = {f for d in self.dims.get(result, {}) for f in dims[d][:1]}
            if found and found.isdisjoint(cuttable(rule)):
                self._sum(result)

    def _sum(self, result: int) -> None:
        self.dims[result] = self.both.dims.get(result, {})
        self.summed.add(result)

    def factors(self, op: Op, rule: Rule) -> list[int]:
        """Factors that are positions, those of the results first; of scores, queries alone."""
        for result, dims in zip(op.outputs, rule.results, strict=True):
            if result in self.queries:
                return list(dims[self.queries[result]][:1])
        found: set[int] = set() if rule.opaque else set(self.shares(op, rule))
        for result, dims in zip(op.outputs, rule.results, strict=True):
            kept = () if result in self.summed else self.dims.get(result, {})
            found.update(factor for d in kept for factor in dims[d][:1])
        of_results = {f for dims in rule.results for dim in dims for f in dim}
        return sorted(found, key=lambda f: (f not in of_results, f))


def _query_dims(graph: Graph, both: Examples) -> dict[int, int]:
    """The dim of the queries, of every value that has queries and keys."""
    pairs = {v for v, dims in both.dims.items() if len(dims) == 2}
    ops = [op for op in graph.ops if not pairs.isdisjoint((*op.inputs, *op.outputs))]
    known: dict[int, int] = {}
    for op in ops:
        kept = (
            both.dims.get(op.outputs[0], {})
            if op.kind in REDUCTIONS and op.inputs[0] in pairs
            else ()
        )
        if len(kept) == 1:
            rule = rule_of(op, graph.types)
            factor = rule.results[0][next(iter(kept))][0]
            known[op.inputs[0]] = _dim_of(rule.operands[0], factor)
    size = -1
    while size < len(known):  # in both directions, until nothing new is learnt
        size = len(known)
        for op in (*ops, *reversed(ops)):
            _learn(op, graph, pairs, known)
    return known


def _learn(op: Op, graph: Graph, pairs: Collection[int], known: dict[int, int]) -> None:
    """Hand the queries of one side of an op to its other sides that have both."""
    if op.kind == "optimization_barrier":
        known.update(
            {v: known[u] for u, v in zip(op.inputs, op.outputs, strict=True) if u in known}
        )
        return
    rule = rule_of(op, graph.types)
    if rule.opaque:
        return
    named = list(zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True))
    factor = next((dims[known[v]][0] for v, dims in named if v in known and dims[known[v]]), None)
    if factor is None:
        return
    for value, dims in named:
        if value in pairs and value not in known and any(factor in dim for dim in dims):
            known[value] = _dim_of(dims, factor)


def _dim_of(dims: tuple[tuple[int, ...], ...], factor: int) -> int:
    return next(d for d, dim in enumerate(dims) if factor in dim)


class Attention:
    """Which ops belong to attention: those that are one, those on scores, and those on maxima and sums of a softmax."""

    def __init__(self, program: Program):
        self.graph, self.scores = program.graph, attention_values(program).keys()

    def __contains__(self, op: Op) -> bool:
        return (
            op.kind in ATTENTION
            or not self.scores.isdisjoint((*op.inputs, *op.outputs))
            or self._statistics.issuperset(op.outputs)
        )

    @cached_property
    def _statistics(self) -> frozenset[int]:
        """What cheap ops make of scores and hand back to them."""
        made, read = set(self.scores), set(self.scores)
        for op in self.graph.ops:
            made.update(v for u, v in _cheap_pairs(op) if u in made)
        for op in reversed(self.graph.ops):
            read.update(u for u, v in _cheap_pairs(op) if v in read)
        return frozenset(made & read)


def _cheap_pairs(op: Op) -> list[tuple[int, int]]:
    """Operand and result, where a result is made of an operand without a product."""
    if op.kind in CONTRACTIONS:
        return []
    if op.kind == "optimization_barrier":
        return list(zip(op.inputs, op.outputs, strict=True))
    return list(product(op.inputs, op.outputs))
