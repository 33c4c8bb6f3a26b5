"""What each mesh axis does, told from the factors it cuts: batch, sequence, columns, sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ...ir.analysis.batch import batch_dims
from ...ir.analysis.examples import Examples
from ...ir.graph import Graph, Op
from ...ir.ops import CONTRACTIONS, LOSSES
from ...ir.plan import AxisUse
from ...ir.rules import rule_of
from ...ir.rules.rule import NONE, Rule
from ..cost.flop import flop
from ..intra.space import Space


def axis_uses(space: Space, choices: tuple[int, ...]) -> tuple[AxisUse, ...]:
    """One entry per axis of the mesh."""
    graph = space.program.graph
    examples, positions = (
        followed(graph, example_dims(graph)),
        followed(graph, sequence_dims(graph)),
    )
    shares = [defaultdict[str, float](float) for _ in space.mesh.axes]
    total = 0.0
    for visit in graph.visits:
        op = visit.op
        if op.kind not in CONTRACTIONS | LOSSES:
            continue
        rule = rule_of(op, graph.types)
        work = visit.times * flop(op, rule, graph.types)
        total += work
        strategy = space.strategies[op.tag][choices[space.op_node[op.tag]]]
        for share, code in zip(shares, strategy.axes, strict=True):
            if code != NONE:
                cut = rule.cut_by(code)[0] if code >= 0 else code
                share[_use(op, rule, cut, examples, positions)] += work
    return tuple(
        AxisUse(
            axis=axis.name,
            size=axis.size,
            **{
                use: round(share[use] / total, 4) if total else 0.0
                for use in ("batch", "sequence", "experts", "columns", "sums")
            },
        )
        for axis, share in zip(space.mesh.axes, shares, strict=True)
    )


def _use(op: Op, rule: Rule, code: int, examples: Examples, positions: Examples) -> str:
    if code < 0:
        return "sums"
    if code in examples.shares(op, rule) or _grows(op, rule, code, examples):
        return "batch"
    if code in positions.shares(op, rule):
        return "sequence"
    everywhere = all(any(code in dim for dim in dims) for dims in (*rule.operands, *rule.results))
    if everywhere and not all(v in examples.dims for v in (*op.inputs, *op.outputs)):
        return "experts"
    return "sums" if rule.factors[code].kind == "reduced" else "columns"


def _grows(op: Op, rule: Rule, code: int, examples: Examples) -> bool:
    """Whether the factor is a batch dim of the result (its operands do not say so)."""
    dims = examples.dims.get(op.outputs[0], {})
    return any(code in rule.results[0][d] for d in dims)


def followed(graph: Graph, dims: Mapping[int, int]) -> Examples:
    """Where these dims go, input position -> dim."""
    found = Examples(graph.types)
    for position, dim in dims.items():
        value = graph.inputs[position]
        found.dims[value] = {dim: graph.types[value].shape[dim]}
        found.depends.add(value)
    found.run(graph.ops)
    return found


def example_dims(graph: Graph) -> dict[int, int]:
    """Input position -> dim of the examples: the batch, but dim 0 where one example alone is cut along the next."""
    alone = {
        p
        for p, dim in batch_dims(graph).items()
        if dim == 1 and graph.types[graph.inputs[p]].shape[0] == 1
    }
    return {p: 0 if p in alone else dim for p, dim in batch_dims(graph).items()}


def sequence_dims(graph: Graph) -> dict[int, int]:
    """The other dim where the batch is two or more integer arrays of one shape [B, T]: tokens and targets."""
    batch = example_dims(graph)
    kinds = {position: graph.types[graph.inputs[position]] for position in batch}
    texts = {
        p: kind.shape
        for p, kind in kinds.items()
        if kind.dtype.startswith(("s", "u")) and kind.rank == 2
    }
    together = len(texts) > 1 and len(set(texts.values())) == 1
    return (
        {p: 1 - batch[p] for p in batch if kinds[p].rank > 1 and batch[p] < 2} if together else {}
    )
