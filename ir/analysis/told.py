"""The batch as a user tells it, held against the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import PlanError
from ..graph import Batch, Graph, Op
from ..rules import rule_of
from ..rules.rule import Rule
from .dims import DimClasses, classes_of
from .summed import Summed

HOW = "batch_argnums=1, (1, 2), or {'x': 1} with the dim"


def tell_batch(graph: Graph, dims: Mapping[int, int]) -> Graph:
    """The graph with these batch dims, input position -> dim; negative dims count from the end.

    Raises:
        PlanError: a dim that an input lacks or that is 1 in size, sizes that differ, or a dim that
            the step contracts with a parameter.
    """
    found = {p: _dim(graph, p, dim) for p, dim in sorted(dims.items())}
    if not found:
        raise PlanError("batch_argnums names no array.", where="batch_argnums", fix=HOW)
    _check_sizes(graph, found)
    _check_use(graph, found)
    return replace(graph, batch=Batch(tuple(found.items())))


def _dim(graph: Graph, position: int, dim: int) -> int:
    kind = graph.types[graph.inputs[position]]
    if not -kind.rank <= dim < kind.rank:
        raise PlanError(
            f"{graph.input_name(position)} has no dim {dim}: it is {kind}.", where="batch_argnums",
            fix=f"a dim below {kind.rank}" if kind.rank else "None for it: it is the same for every example",
        )  # fmt: skip
    return dim % kind.rank


def _check_sizes(graph: Graph, dims: Mapping[int, int]) -> None:
    sizes = {p: graph.types[graph.inputs[p]].shape[d] for p, d in dims.items()}
    first = next(iter(sizes))
    for position, size in sizes.items():
        if size != sizes[first]:
            one, other = (
                f"dim {dims[p]} of {graph.input_name(p)} is {sizes[p]}" for p in (first, position)
            )
            raise PlanError(
                f"the batch cannot have two sizes: {one}, {other}.", where="batch_argnums",
                fix="another dim, or None, for one of them: batch_argnums={'name': {'key': None}}",
            )  # fmt: skip


def _check_use(graph: Graph, dims: Mapping[int, int]) -> None:
    """Refuse dims that state has too, as widths, and that a product contracts with it."""
    classes = classes_of(graph)
    told = {p: classes.of(graph.inputs[p], d) for p, d in dims.items()}
    features = Summed(graph, classes, set(told.values())).features
    for position, number in told.items():
        if number in features and (product := _contraction(graph, classes, number)) is not None:
            raise PlanError(
                f"dim {dims[position]} of {graph.input_name(position)} cannot be the batch: the step contracts it with "
                "a parameter.", where=product.where or product.kind, origin="batch_argnums",
                fix="the dim that counts examples",
            )  # fmt: skip


def _contraction(graph: Graph, classes: DimClasses, number: int) -> Op | None:
    """A product that contracts this class with state."""
    state = {graph.inputs[i] for i, _ in graph.state}
    others = set(graph.inputs) - state
    for op in graph.ops:
        if op.kind not in ("dot_general", "conv_general_dilated"):
            (state if state.issuperset(op.inputs) else others).update(op.outputs)
            continue
        others.update(op.outputs)
        rule = rule_of(op, graph.types)
        mine = [v in state for v in op.inputs]
        if any(mine) and not all(mine) and number in _contracted(op, rule, classes):
            return op
    return None


def _contracted(op: Op, rule: Rule, classes: DimClasses) -> set[int]:
    kept = {f for dims in rule.results for dim in dims for f in dim}
    return {
        classes.of(value, d)
        for value, dims in zip(op.inputs, rule.operands, strict=True)
        if value in classes.dims
        for d, dim in enumerate(dims)
        if dim and dim[0] not in kept
    }
