"""Which dims of a step's inputs run over the layers of a scan.

    scan over w: f32[12, 64, 64]         dim 0 of w, of its gradient, and, through the
    w - rate * momentum                  update, of its momentum: one class of dims

Dims that share a factor of some op's rule are one class, and so are the rows of everything
that a scan takes or stacks. A class is of layers when a scan runs over it and it holds a dim
of the carried state. A scan over time that also reads a table by position is none: its
class holds a further dim of the batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from ..graph import Graph, Op, Region
from ..rules import rule_of


def layer_axes(graph: Graph) -> dict[int, int]:
    """Input position -> the first of its dims that runs over layers, for inputs that have one."""
    classes = _Classes()
    if all(visit.op.kind != "scan" for visit in graph.visits):
        return {}
    for visit in graph.visits:
        for same in _same_dims(graph, visit.op):
            classes.join(same)
    layers = _layer_classes(graph, classes)
    found: dict[int, int] = {}
    for position, value in enumerate(graph.inputs):
        dims = (d for d in range(graph.types[value].rank) if classes.of((value, d)) in layers)
        if (dim := next(dims, None)) is not None:
            found[position] = dim
    return found


def scans_left(graph: Graph) -> Iterator[Op]:
    """Scans of the step itself that take rows of something made of carried state alone: layers
    that could not be taken apart, say of parameters that are reshaped before."""
    state = {graph.inputs[i] for i, _ in graph.state}
    own = state | graph.constant_ids
    for op in graph.ops:
        rows = op.inputs[sum(op.loop_inputs) :] if op.kind == "scan" else ()
        if not state.isdisjoint(rows):
            yield op
        if op.inputs and own.issuperset(op.inputs):
            own.update(op.outputs)
            if not state.isdisjoint(op.inputs):
                state.update(op.outputs)


def _layer_classes(graph: Graph, classes: _Classes) -> set[Hashable]:
    carried = {i for i, _ in graph.state}
    held: set[Hashable] = set()
    batch: set[Hashable] = set()
    for position, value in enumerate(graph.inputs):
        for d in range(graph.types[value].rank):
            if position in carried:
                held.add(classes.of((value, d)))
            elif d > 0:
                batch.add(classes.of((value, d)))
    scans = [visit.op for visit in graph.visits if visit.op.kind == "scan"]
    return {classes.of(_rows(op)) for op in scans} & held - batch


def _rows(op: Op) -> Hashable:
    return ("rows", op.outputs)


def _same_dims(graph: Graph, op: Op) -> Iterator[Sequence[Hashable]]:
    """Groups of dims that are the same thing in this op."""
    if op.regions:
        for region in op.regions:
            yield from _dims_of_region(graph, op, region)
        return
    rule = rule_of(op, graph.types)
    groups: dict[int, list[Hashable]] = {}
    described = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
    for value, dims in described:
        for d, dim in enumerate(dims):
            if len(dim) == 1:
                groups.setdefault(dim[0], []).append((value, d))
    yield from groups.values()


def _dims_of_region(graph: Graph, op: Op, region: Region) -> Iterator[Sequence[Hashable]]:
    consts, carry = op.loop_inputs
    first_rows = consts + carry
    if op.kind != "scan":
        ends = zip(op.outputs, region.outputs, strict=True) if region in op.returning else ()
        for outer, inner in (*zip(op.inputs, region.inputs, strict=True), *ends):
            yield from _pairs(graph, outer, inner)
        for start, end in zip(region.inputs[consts:first_rows], op.outputs, strict=False):
            yield from _pairs(graph, start, end)
        return
    stacked = [*op.inputs[first_rows:], *op.outputs[carry:]]
    yield [_rows(op), *((v, 0) for v in stacked)]
    for outer, inner in zip(op.inputs[:first_rows], region.inputs, strict=False):
        yield from _pairs(graph, outer, inner)
    for outer, inner in zip(op.outputs[:carry], region.outputs, strict=False):
        yield from _pairs(graph, outer, inner)
    for start, end in zip(region.inputs[consts:first_rows], region.outputs[:carry], strict=True):
        yield from _pairs(graph, start, end)
    inside = [*region.inputs[first_rows:], *region.outputs[carry:]]
    for outer, inner in zip(stacked, inside, strict=True):
        yield from ([(outer, d + 1), (inner, d)] for d in range(graph.types[inner].rank))


def _pairs(graph: Graph, one: int, other: int) -> Iterator[Sequence[Hashable]]:
    return ([(one, d), (other, d)] for d in range(graph.types[one].rank))


class _Classes:
    """Disjoint sets, joined one group at a time (Tarjan 1975, with path halving)."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def of(self, node: Hashable) -> Hashable:
        above = self._above
        while (up := above.get(node, node)) != node:
            above[node] = above.get(up, up)
            node = above[node]
        return node

    def join(self, group: Sequence[Hashable]) -> None:
        first = self.of(group[0])
        for node in group[1:]:
            self._above[self.of(node)] = first
