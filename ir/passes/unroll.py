"""Scans over layers unrolled: a walk of the graph in which some values come in pieces.

    a scan that runs over pieces      one copy of its body per piece
    a scan that has pieces besides    the same loop, its body in pieces
    an op along the layers            one op per piece
    an op that adds up over them      one op per piece, and a chain of adds
    any other op                      on the pieces put together; a note says which

Always right; the last is the slow one. Laws of the new graph: `ir.verify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..graph import Graph, Op, Region, TensorType
from ..rules import rule_of
from ..rules.rule import Rule
from ..values import FreshIds
from . import narrow
from .pieces import PieceScope, Shared, Stack

Value = int | Stack
Env = dict[int, Value]
Place = tuple[int, int | None, int]
_COMBINE = {"sum": "add", "max": "max", "min": "min", "and": "and", "or": "or"}
_BARRIER = "optimization_barrier"


@dataclass(frozen=True)
class Unrolled:
    """A graph taken apart. `inputs[n]` is (old position, dim, row) of new input n; dim None: it
    is whole. `outputs` likewise. Names are left to the caller.

    `narrowed` knows the attributes that ops had before they lost a dim, by kind and new attributes."""

    graph: Graph
    narrowed: dict[tuple[str, narrow.Attrs], narrow.Attrs]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    notes: tuple[str, ...]


def unroll_layers(graph: Graph, axes: Mapping[int, int]) -> Unrolled:
    """Take input p apart along dim `axes[p]`, and unroll every scan over it or of one turn."""
    shared = Shared(FreshIds(graph), list(graph.constants))
    walk = _Walk(graph, PieceScope(shared))
    env: Env = {}
    for position, dim in axes.items():
        value = graph.inputs[position]
        pieces = walk.scope.like(_lost(graph.types[value], dim), graph.types[value].shape[dim])
        env[value] = Stack(dim, pieces)
    walk.run(graph.ops, env)
    starts = [env.get(value, value) for value in graph.inputs]
    ends = [walk.end(env, o, axes) for o in range(len(graph.outputs))]
    walk.scope.flush()
    inputs, outputs = _places(starts), _places(ends)
    after = {place: n for n, place in enumerate(outputs)}
    carried = dict(graph.state)
    made = Graph(
        types=shared.fresh.types,
        inputs=_flat(starts),
        ops=tuple(walk.scope.ops),
        outputs=_flat(ends),
        constants=tuple(shared.constants),
        state=tuple(
            (n, after[carried[p], dim, row])
            for n, (p, dim, row) in enumerate(inputs)
            if p in carried
        ),
        donated=frozenset(n for n, (p, _, _) in enumerate(inputs) if p in graph.donated),
    )
    return Unrolled(made, shared.narrowed, inputs, outputs, tuple(shared.notes))


def _flat(values: Sequence[Value]) -> tuple[int, ...]:
    return tuple(
        v for value in values for v in ((value,) if isinstance(value, int) else value.pieces)
    )


def _places(values: Sequence[Value]) -> tuple[Place, ...]:
    return tuple(
        place
        for p, value in enumerate(values)
        for place in (
            [(p, None, 0)]
            if isinstance(value, int)
            else [(p, value.dim, k) for k in range(len(value.pieces))]
        )
    )


class _Walk:
    """One scope's walk: old ops in, new ops out. `env` knows old values by their new ones."""

    def __init__(self, graph: Graph, scope: PieceScope):
        self.graph, self.scope, self.shared = graph, scope, scope.shared

    def end(self, env: Env, output: int, axes: Mapping[int, int]) -> Value:
        """An output, in pieces where it is in pieces or its input is."""
        old = self.graph.outputs[output]
        value = env.get(old, old)
        source = next((i for i, o in self.graph.state if o == output), -1)
        if source in axes:
            return self.scope.apart(value, axes[source], "the state handed back")
        return self.scope.whole(value, "the state handed back") if source >= 0 else value

    def run(self, ops: Sequence[Op], env: Env) -> None:
        for op in ops:
            operands = [env.get(v, v) for v in op.inputs]
            env.update(zip(op.outputs, self.op(op, operands, env), strict=True))

    def op(self, op: Op, operands: list[Value], env: Env) -> Sequence[Value]:
        if op.kind == "scan":
            if op.trips == 1 or self._runs_over_pieces(op, operands):
                return self._unrolled(op, operands, env)
            if any(isinstance(v, Stack) for v in operands):
                return self._inner(op, operands)
        elif op.regions and any(isinstance(v, Stack) for v in operands):
            return self._inner(op, operands)
        elif op.kind == _BARRIER:
            return self._barrier(op, operands)
        elif any(isinstance(v, Stack) for v in operands):
            return self._piecewise(op, operands) or self._whole(op, operands)
        return self._plain(op, [self.scope.whole(v, op.where) for v in operands])

    def _plain(self, op: Op, operands: Sequence[int]) -> Sequence[int]:
        names = dict(zip(op.inputs, operands, strict=True))
        clone = self.shared.fresh.clone(op, names, "", op.count)
        self.scope.emit(clone)
        return clone.outputs

    def _whole(self, op: Op, operands: Sequence[Value]) -> Sequence[int]:
        count = next(len(v.pieces) for v in operands if isinstance(v, Stack))
        self.shared.notes[
            f"{op.kind} at {op.where or 'no line'} needs all {count} layers at once"
        ] = None
        return self._plain(op, [self.scope.whole(v, op.where) for v in operands])

    # ------------------------------------------------------------ one op per piece

    def _piecewise(self, op: Op, operands: Sequence[Value]) -> Sequence[Value] | None:
        chosen = self._chosen(op, operands)
        if chosen is not None:
            return chosen
        rule = rule_of(op, self.graph.types)
        factor = _layer_factor(rule, operands)
        found = None if factor is None else narrow.places(rule, factor)
        if factor is None or found is None:
            return None
        ranks = tuple(self.graph.types[v].rank for v in op.inputs)
        narrowed = narrow.narrowed(op, ranks, *found)
        if narrowed is None or (
            rule.factors[factor].kind == "reduced" and any(d is not None for d in found[1])
        ):
            return None
        given = [
            self.scope.whole(v, op.where)
            if dim is None
            else self.scope.apart(v, dim, op.where).pieces
            for v, dim in zip(operands, found[0], strict=True)
        ]
        return self._spread(op, narrowed, given, found[1], rule, factor)

    def _spread(
        self, op: Op, attrs: narrow.Attrs, given: Sequence[int | Sequence[int]],
        dims: narrow.Places, rule: Rule, factor: int,
    ) -> Sequence[Value]:  # fmt: skip
        scope, count = self.scope, rule.factors[factor].size
        if ("axes", ()) in attrs:  # nothing but the layers is summed
            results = [given[0]] if not isinstance(given[0], int) else []
        else:
            kinds = [_lost(self.graph.types[v], d) for v, d in zip(op.outputs, dims, strict=True)]
            results = [scope.like(kind, count) for kind in kinds]
            self.shared.narrowed.setdefault((op.kind, attrs), op.attrs)
            scope.spread(op.kind, attrs, given, results, op.where)
        if rule.factors[factor].kind == "reduced":
            kind = _COMBINE[rule.factors[factor].reduction]
            return [scope.combined(kind, pieces, op.where) for pieces in results]
        return [
            Stack(dim, tuple(p)) for p, dim in zip(results, dims, strict=True) if dim is not None
        ]

    def _chosen(self, op: Op, operands: Sequence[Value]) -> Sequence[Value] | None:
        """Ops that only choose among the pieces: `slice` along them, and `squeeze` of a single one."""
        value = operands[0]
        if not isinstance(value, Stack) or op.kind not in ("slice", "squeeze"):
            return None
        if op.kind == "squeeze":
            return value.pieces if op.integers("dimensions") == (value.dim,) else None
        shape = self.graph.types[op.inputs[0]].shape
        result = self.graph.types[op.outputs[0]].shape
        d = value.dim
        if shape[d] == result[d] or (*shape[:d], *shape[d + 1 :]) != (
            *result[:d],
            *result[d + 1 :],
        ):
            return None
        step = op.integers("strides")[d] if op.has("strides") else 1
        start, limit = op.integers("start_indices")[d], op.integers("limit_indices")[d]
        return [Stack(d, value.pieces[start:limit:step])]

    def _barrier(self, op: Op, operands: Sequence[Value]) -> Sequence[Value]:
        """One barrier still: nothing behind it starts before all of it is there."""
        flat = _flat(operands)
        results = iter([self.shared.fresh.like(v) for v in flat])
        made: list[Value] = [
            next(results)
            if isinstance(v, int)
            else Stack(v.dim, tuple(next(results) for _ in v.pieces))
            for v in operands
        ]
        self.scope.emit(Op(_BARRIER, flat, _flat(made), op.attrs, where=op.where))
        return made

    # ------------------------------------------------------------ loops

    def _runs_over_pieces(self, op: Op, operands: Sequence[Value]) -> bool:
        rows = operands[sum(op.loop_inputs) :]
        return any(isinstance(v, Stack) and v.dim == 0 for v in rows)

    def _unrolled(self, op: Op, operands: Sequence[Value], env: Env) -> Sequence[Value]:
        region, (consts, carry) = op.regions[0], op.loop_inputs
        rows = [self.scope.apart(v, 0, op.where).pieces for v in operands[consts + carry :]]
        fixed = operands[:consts]
        state = [
            v if isinstance(v, Stack) else self.scope.carried(v, op.where)
            for v in operands[consts : consts + carry]
        ]
        made: list[list[int]] = [[0] * op.trips for _ in region.outputs[carry:]]
        turns = range(op.trips)
        for k in reversed(turns) if op.flag("reverse") else turns:
            ends = self._region(region, [*fixed, *state, *(row[k] for row in rows)], env)
            state = ends[:carry]
            for column, value in zip(made, ends[carry:], strict=True):
                column[k] = self.scope.whole(value, op.where)
        return [*state, *(Stack(0, tuple(column)) for column in made)]

    def _region(self, region: Region, inputs: Sequence[Value], env: Env) -> list[Value]:
        env.update(zip(region.inputs, inputs, strict=True))
        self.run(region.ops, env)
        return [env.get(v, v) for v in region.outputs]

    def _inner(self, op: Op, operands: Sequence[Value]) -> Sequence[Value]:
        """The loop or branch stays; what it is given in pieces, its regions see in pieces."""
        consts, carry = op.loop_inputs
        given = list(operands)
        while True:
            sides = [self._seen(region, given, consts + carry) for region in op.regions]
            last = sides[-1]
            if not carry or not self._become_stacks(op, given, last.inputs, last.ends):
                return self._rebuilt(op, given, sides)

    def _seen(self, region: Region, given: Sequence[Value], first_row: int) -> _Seen:
        inner = _Walk(self.graph, PieceScope(self.shared))
        inputs = [
            _inside(v, i >= first_row, inner.scope, self.graph.types[r])
            for i, (v, r) in enumerate(zip(given, region.inputs, strict=True))
        ]
        env: Env = {}
        return _Seen(inputs, inner._region(region, inputs, env), inner.scope)

    def _become_stacks(
        self, op: Op, given: list[Value], inputs: Sequence[Value], ends: Sequence[Value]
    ) -> bool:
        """Take apart the starts of carries that end in pieces; True if there was one."""
        consts, carry = op.loop_inputs
        late = False
        for i in range(carry):
            start, end = inputs[consts + i], ends[i]
            if isinstance(start, int) and isinstance(end, Stack):
                given[consts + i] = self.scope.apart(given[consts + i], end.dim, op.where)
                late = True
        return late

    def _rebuilt(self, op: Op, given: Sequence[Value], sides: Sequence[_Seen]) -> Sequence[Value]:
        consts, carry = op.loop_inputs
        returning = [
            side for side, region in zip(sides, op.regions, strict=True) if region in op.returning
        ]
        for i in range(len(op.outputs)):
            like = returning[0].inputs[consts + i] if i < carry else self._in_pieces(returning, i)
            if isinstance(like, Stack):
                for side in returning:
                    side.ends[i] = side.scope.apart(side.ends[i], like.dim, op.where)
        first = returning[0]
        rows = range(carry, len(op.outputs)) if op.kind == "scan" else ()
        results = [_outside(v, i in rows, op.trips, self.scope) for i, v in enumerate(first.ends)]
        attrs = dict(op.attrs)
        if op.kind != "cond":
            attrs["num_consts"] = len(_flat(first.inputs[:consts]))
            attrs["num_carry"] = len(_flat(first.inputs[consts : consts + carry]))
        regions = tuple(side.region() for side in sides)
        inputs, outputs = _flat(given), _flat(results)
        self.scope.emit(
            replace(op, inputs=inputs, outputs=outputs, attrs=tuple(attrs.items()), regions=regions)
        )
        return results

    def _in_pieces(self, sides: Sequence[_Seen], i: int) -> Value | None:
        """A result that some branch leaves in pieces, but others may not."""
        return next((side.ends[i] for side in sides if isinstance(side.ends[i], Stack)), None)


@dataclass
class _Seen:
    """A region walked with operands in pieces: its inputs and ends, and what it does."""

    inputs: list[Value]
    ends: list[Value]
    scope: PieceScope

    def region(self) -> Region:
        self.scope.flush()
        return Region(_flat(self.inputs), tuple(self.scope.ops), _flat(self.ends))


def _inside(value: Value, row: bool, scope: PieceScope, kind: TensorType) -> Value:
    """The region's own input for this operand."""
    if isinstance(value, int):
        return scope.like(kind, 1)[0]
    dim = value.dim - row
    return Stack(dim, scope.like(_lost(kind, dim), len(value.pieces)))


def _outside(value: Value, stacked: bool, trips: int, scope: PieceScope) -> Value:
    """The loop's result for this end of its region; rows are stacked in dim 0."""

    def kind(v: int) -> TensorType:
        inner = scope.types[v]
        return TensorType(inner.dtype, (trips, *inner.shape)) if stacked else inner

    if isinstance(value, int):
        return scope.like(kind(value), 1)[0]
    return Stack(value.dim + stacked, tuple(scope.like(kind(p), 1)[0] for p in value.pieces))


def _lost(kind: TensorType, dim: int | None) -> TensorType:
    return (
        kind if dim is None else TensorType(kind.dtype, (*kind.shape[:dim], *kind.shape[dim + 1 :]))
    )


def _layer_factor(rule: Rule, operands: Sequence[Value]) -> int | None:
    """The factor of the first operand in pieces, if the op may be done piece by piece."""
    for value, dims in zip(operands, rule.operands, strict=True):
        if isinstance(value, Stack):
            dim = dims[value.dim]
            return dim[0] if len(dim) == 1 and rule.factors[dim[0]].divisible else None
    return None
