"""Phases of ops and parts of inputs, by dataflow; the user's function carries no markers.

    prepare    needs no batch and feeds what does (casts of parameters)
    forward    works on the batch, before the first cotangent
    backward   the first cotangent and what follows from it, up to the gradients
    update     everything after: clipping, optimizer, metrics

The first cotangent is found at the first product that contracts the batch: a
weight gradient multiplies an activation by a cotangent, and the cotangent is
the one computed later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from .graph import Graph, Op, Visit
from .rule import Rule
from .rules import rule_of

Phase = Literal["prepare", "forward", "backward", "update"]
Role = Literal["parameter", "optimizer", "batch", "input"]
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


def phases(graph: Graph, batch: Mapping[int, int]) -> tuple[Phase, ...]:
    """The phase of every op in walk order; ops of a loop's body take the loop's.

    Args:
        batch: input position -> batch dim (see `microbatch.batch_dims`).
    """
    carrying = batch_carriers(graph, batch)
    top = _settle(graph, _seen(graph, carrying))
    outer = [visit for visit in graph.visits if not visit.parents]
    phase_at: dict[int, Phase] = {
        visit.index: phase for visit, phase in zip(outer, top, strict=True)
    }
    return tuple(phase_at[_outermost(visit)] for visit in graph.visits)


def roles(graph: Graph) -> dict[int, Role]:
    """The part that each input plays: state that the passes read is a parameter,
    state that only the update reads is the optimizer's."""
    from .microbatch import batch_dims

    batch = batch_dims(graph)
    found = phases(graph, batch)
    read = {
        value
        for visit in graph.visits
        if found[visit.index] != "update" and not visit.parents
        for value in visit.op.inputs
    }
    carried = {position for position, _ in graph.state}
    return {
        position: ("parameter" if value in read else "optimizer")
        if position in carried
        else ("batch" if position in batch else "input")
        for position, value in enumerate(graph.inputs)
    }


def _outermost(visit: Visit) -> int:
    return visit.parents[0] if visit.parents else visit.index


# ---------------------------------------------------------------- who carries the batch


def batch_carriers(graph: Graph, batch: Mapping[int, int]) -> dict[int, int]:
    """Value -> the dim that is the batch. Unlike the time axis this never refuses:
    an op that mixes examples simply ends the trail."""
    carrying = {graph.inputs[position]: dim for position, dim in batch.items()}
    for op in graph.ops:
        _carry(op, graph, carrying)
    return carrying


def _carry(op: Op, graph: Graph, carrying: dict[int, int]) -> None:
    if not any(value in carrying for value in op.inputs):
        return
    if op.kind == "scan":
        _carry_loop(op, graph, carrying)
    elif op.kind == "optimization_barrier":
        pairs = zip(op.inputs, op.outputs, strict=True)
        carrying.update(
            {result: carrying[source] for source, result in pairs if source in carrying}
        )
    else:
        rule = rule_of(op, graph.types)
        number = batch_factor(op, rule, carrying)
        for dims, result in zip(rule.results, op.outputs, strict=True):
            dim = next((d for d, factors in enumerate(dims) if number in factors), None)
            if dim is not None:
                carrying[result] = dim


def _carry_loop(op: Op, graph: Graph, carrying: dict[int, int]) -> None:
    region, consts, carry = op.regions[0], _number(op, "num_consts"), _number(op, "num_carry")
    for _ in range(2):  # what the carry becomes after one trip, it is on the next
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            dim = carrying.get(outside, -1) - (1 if i >= consts + carry else 0)
            if outside in carrying and dim >= 0:
                carrying[inside] = dim
        for inner in region.ops:
            _carry(inner, graph, carrying)
        for start, end in zip(region.inputs[consts:], region.outputs[:carry], strict=False):
            if end in carrying:
                carrying[start] = carrying[end]
    for i, (result, inside) in enumerate(zip(op.outputs, region.outputs, strict=True)):
        if inside in carrying:
            carrying[result] = carrying[inside] + (0 if i < carry else 1)


def _number(op: Op, name: str) -> int:
    return int(op.attr(name))  # type: ignore[arg-type]


def batch_factor(op: Op, rule: Rule, carrying: Mapping[int, int]) -> int | None:
    """The factor of an op that is the batch."""
    for value, dims in zip(op.inputs, rule.operands, strict=True):
        if value in carrying:
            return next((f for f in dims[carrying[value]] if rule.factors[f].size > 1), None)
    return None


# ---------------------------------------------------------------- phases


def _seen(graph: Graph, carrying: Mapping[int, int]) -> list[Phase | None]:
    """Forward and backward where ops carry the batch; None elsewhere."""
    cotangents = _first_cotangents(graph, carrying)
    backward: set[int] = set()
    found: list[Phase | None] = []
    for op in graph.ops:
        if not any(value in carrying for value in op.inputs):
            found.append(None)
            continue
        late = not backward.isdisjoint(op.inputs) or not cotangents.isdisjoint(op.outputs)
        if late or id(op) in cotangents:
            backward.update(op.outputs)
        found.append("backward" if late or id(op) in cotangents else "forward")
    return found


def _first_cotangents(graph: Graph, carrying: Mapping[int, int]) -> set[int]:
    """The first cotangent value; or the identity of the first loop that holds a weight gradient."""
    made = {value: i for i, op in enumerate(graph.ops) for value in op.outputs}
    for op in graph.ops:
        if _contracts_batch(op, graph, carrying):
            return {max(op.inputs, key=lambda value: made.get(value, -1))}
        if any(_contracts_batch(o, graph, carrying) for r in op.regions for o in r.ops):
            return {id(op)}
    return set()


def _contracts_batch(op: Op, graph: Graph, carrying: Mapping[int, int]) -> bool:
    if op.kind not in PRODUCTS or sum(value in carrying for value in op.inputs) < 2:
        return False
    rule = rule_of(op, graph.types)
    number = batch_factor(op, rule, carrying)
    return number is not None and rule.factors[number].kind == "reduced"


def _settle(graph: Graph, seen: Sequence[Phase | None]) -> list[Phase]:
    """Give the other ops the phase they serve, from the last op to the first."""
    depends = _depends_on_batch(graph, seen)
    serves: dict[int, set[Phase]] = {}
    found: list[Phase] = ["update"] * len(graph.ops)
    for position in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[position]
        readers = set().union(*(serves.get(value, set()) for value in op.outputs))
        phase = seen[position] or _served(readers, depends[position])
        found[position] = phase
        for value in op.inputs:
            serves.setdefault(value, set()).add(phase)
    return found


def _served(readers: set[Phase], on_batch: bool) -> Phase:
    if on_batch:  # batch statistics serve the pass that reads them
        return (
            "forward" if "forward" in readers else "backward" if "backward" in readers else "update"
        )
    return "prepare" if readers - {"update"} else "update"


def _depends_on_batch(graph: Graph, seen: Sequence[Phase | None]) -> list[bool]:
    made: set[int] = set()
    found = []
    for op, phase in zip(graph.ops, seen, strict=True):
        depends = phase is not None or not made.isdisjoint(op.inputs)
        if depends:
            made.update(op.outputs)
        found.append(depends)
    return found
