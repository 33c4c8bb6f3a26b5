"""What must hold of every local program, each law by its name.

fits                every value's dims divide over the axes that cut them, all of the mesh, none used twice, and over
                    the microbatches
defined-once        no value is defined twice
defined-before-use  an op reads only earlier values: of its own region, constants, and around `microbatches` all
moves               a collective or slice leaves its operand's shard as its kind says; all-reduces, all-gathers and
                    reduce-scatters may have several operands, of one element type
follows-rule        operands and results of an op lie as its cuts and its rule say, and share their partial sums
in-time             only inside `microbatches` is there a current microbatch
same-branch         what decides a branch or whether a loop goes on is whole, so that collectives inside meet
settled             nothing is partial at the end
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import GraphError
from ..ops import CONTROL_FLOW
from ..rules.rule import Dim, Rule
from ..sharding import ReshardStep, Sharding, moved_to, replicated
from .program import (
    BARRIER,
    JOINED,
    MICROBATCHES,
    ON_SHARDS,
    LocalOp,
    LocalProgram,
    LocalRegion,
    Shard,
)


def verify_local(program: LocalProgram, whole: bool = True) -> None:
    """Check a program.

    Args:
        whole: False for the pass of a stage, which runs in a microbatch and may hand on partial sums.

    Raises:
        GraphError: the first broken law, by name, with the value or op that breaks it.
    """
    _Check(program).run(whole)


class _Check:
    def __init__(self, program: LocalProgram):
        self.program, self.shards, self.mesh = program, program.shards, program.mesh
        self.constants = {c.value for c in program.constants}
        self.defined: set[int] = set()

    def run(self, whole: bool) -> None:
        for value, shard in self.shards.items():
            self._fits(value, shard)
        for value in (*self.program.inputs, *sorted(self.constants)):
            self._define([value], "the inputs")
        known = {*self.program.inputs, *self.constants}
        self._ops(self.program.ops, known, timed=not whole)
        for value in self.program.outputs:
            if value not in known:
                raise _broken("defined-before-use", f"%{value} is never made", "the outputs")
            if whole and self.shards[value].sharding.partial:
                raise _broken("settled", f"%{value} is partial", "the outputs")

    def _fits(self, value: int, shard: Shard) -> None:
        try:
            shard.sharding.check(shard.whole, self.mesh)
        except GraphError as error:
            raise _broken("fits", f"%{value}: {error.what}", "the values") from error
        time = shard.time
        if time is None:
            return
        size = shard.sharding.local_shape(shard.whole.shape, self.mesh)[time]
        if size % self.program.microbatches:
            what = f"dim {time} of %{value} has {size}, of {self.program.microbatches} microbatches"
            raise _broken("fits", what, "the values")

    def _define(self, values: Iterable[int], where: LocalOp | str) -> None:
        for value in values:
            if value not in self.shards:
                raise _broken("fits", f"%{value} has no shard", where)
            if value in self.defined:
                raise _broken("defined-once", f"%{value}", where)
            self.defined.add(value)

    def _ops(self, ops: Sequence[LocalOp], known: set[int], timed: bool) -> None:
        """`known` learns the results."""
        for op in ops:
            if missing := [v for v in op.inputs if v not in known]:
                raise _broken("defined-before-use", f"%{missing[0]}", op)
            for region in op.regions:
                self._region(op, region, known, timed)
            self._shape(op, timed)
            self._define(op.outputs, op)
            known.update(op.outputs)

    def _region(self, op: LocalOp, region: LocalRegion, known: set[int], timed: bool) -> None:
        body = op.kind == MICROBATCHES
        if body and timed:
            raise _broken("in-time", "microbatches within microbatches", op)
        self._define(region.inputs, op)
        inside = {*known} if body else {*region.inputs, *self.constants}
        self._ops(region.ops, inside, timed or body)
        if missing := [v for v in region.outputs if v not in inside]:
            raise _broken("defined-before-use", f"%{missing[0]}", op)

    def _shape(self, op: LocalOp, timed: bool) -> None:
        if not timed and (op.kind == "take_microbatch" or any(c.time for c in op.cuts)):
            raise _broken("in-time", "there is no current microbatch here", op)
        if op.kind in ON_SHARDS:
            self._moves(op)
        elif op.kind == BARRIER:
            if [self.shards[v] for v in op.inputs] != [self.shards[v] for v in op.outputs]:
                raise _broken("moves", "a barrier changes nothing", op)
        elif op.kind in CONTROL_FLOW:
            self._decides(op)
        elif op.kind != MICROBATCHES:
            self._follows(op)

    # ------------------------------------------------------------ what travels

    def _moves(self, op: LocalOp) -> None:
        many, kinds = len(op.inputs), {self.shards[v].whole.dtype for v in op.inputs}
        if many != len(op.outputs) or not many or (many > 1 and op.kind not in JOINED):
            raise _broken("moves", f"{op.kind} of {many} values gives {len(op.outputs)}", op)
        if len(kinds) > 1:
            raise _broken("moves", f"one {op.kind} of {' and '.join(sorted(kinds))}", op)
        for before, after in zip(op.inputs, op.outputs, strict=True):
            if self.shards[after] != self._moved(op, self.shards[before]):
                what = f"%{after} does not lie as {op.kind} of %{before} leaves it"
                raise _broken("moves", what, op)

    def _moved(self, op: LocalOp, held: Shard) -> Shard | None:
        """The operand afterwards; None if the op cannot take it."""
        layout, attrs = held.sharding, dict(op.attrs)
        match op.kind:
            case "take_microbatch" if held.time is None:
                return replace(held, time=op.integer("dim"))
            case "join_microbatches" if held.time == op.integer("dim") + 1 and not layout.dims[0]:
                whole = replace(held.whole, shape=held.whole.shape[1:])
                return Shard(whole, Sharding(layout.dims[1:], layout.partial), held.reduction)
            case "take_microbatch" | "join_microbatches":
                return None
            case "keep_first" if layout.partial.isdisjoint(op.axes) and held.reduction == "sum":
                return replace(held, sharding=replace(layout, partial=layout.partial | {*op.axes}))
            case "keep_first":
                return None
            case "all_reduce" if attrs["reduction"] != held.reduction:
                return None
            case "reduce_scatter" if held.reduction != "sum":
                return None
            case _:
                pass
        if op.kind in ("all_reduce", "reduce_scatter") and not layout.partial >= {*op.axes}:
            return None
        kind = "slice" if op.kind == "local_slice" else op.kind
        step = ReshardStep(kind, op.axes, attrs.get("dim", -1), attrs.get("to", -1))  # type: ignore[arg-type]
        if op.kind in ("all_gather", "all_to_all"):
            dim = layout.dims[step.dim]
            if dim[len(dim) - len(op.axes) :] != op.axes:
                return None
        after = moved_to(layout, step)
        return replace(held, sharding=after, reduction=held.reduction if after.partial else "sum")

    def _decides(self, op: LocalOp) -> None:
        deciding = op.inputs[:1] if op.kind == "cond" else op.regions[0].outputs
        for value in deciding if op.kind != "scan" else ():
            if self.shards[value].sharding != replicated(0):
                raise _broken("same-branch", f"%{value} is not whole on every device", op)

    # ------------------------------------------------------------ ops of the graph

    def _follows(self, op: LocalOp) -> None:
        rule = self.program.rule(op)
        sides = [
            *zip(op.inputs, rule.operands, strict=True),
            *zip(op.outputs, rule.results, strict=True),
        ]
        for value, dims in sides:
            shard = self.shards[value]
            wanted = tuple(self._axes(op, rule, dims, dim) for dim in dims)
            if shard.sharding.dims != wanted:
                shown = Sharding(wanted)
                raise _broken("follows-rule", f"%{value} lies as {shard.sharding}, not {shown}", op)
        for value, dims in zip(op.outputs, rule.results, strict=True):
            self._partial(op, rule, value, dims)

    def _axes(self, op: LocalOp, rule: Rule, dims: tuple[Dim, ...], dim: Dim) -> tuple[str, ...]:
        """The axes that cut a dim. One that cuts several factors together cuts the first that a tensor has."""
        here = {f for each in dims for f in each}
        cut: dict[str, list[int]] = {}
        for each in op.cuts:
            for axis in each.axes:
                cut.setdefault(axis, []).append(each.factor)
        order = {f: k for joint in rule.joints for k, f in enumerate(joint.factors)}
        found: list[str] = []
        for axis in self.mesh.names:
            factors = sorted(
                (f for f in cut.get(axis, ()) if f in here), key=lambda f: order.get(f, 0)
            )
            found += [axis] if factors and factors[0] in dim else []
        return tuple(found)

    def _partial(self, op: LocalOp, rule: Rule, value: int, dims: tuple[Dim, ...]) -> None:
        here, shard = {f for dim in dims for f in dim}, self.shards[value]
        reduced: dict[str, set[str]] = {}
        for each in op.cuts:
            by = rule.factors[each.factor].reduction
            if by not in ("", "inside") and each.factor not in here:
                reduced.setdefault(by, set()).update(each.axes)
        for joint in rule.joints:  # cut by one axis, two factors of which the result has one
            cut = {f: {*a.axes} for a in op.cuts for f in [a.factor] if f in joint.factors}
            if here & cut.keys() and reduced:
                shared = set[str]().union(*(axes for f, axes in cut.items() if f in here))
                reduced = {by: axes - shared for by, axes in reduced.items()}
        given = set[str]()
        for alternative in rule.linear:
            held = [self.shards[op.inputs[k]].sharding.partial for k in alternative]
            given |= set(held[0]).intersection(*held[1:]) if held else set()
        wanted = {axis for by, axes in reduced.items() if by == shard.reduction for axis in axes}
        others = {axis for by, axes in reduced.items() if by != shard.reduction for axis in axes}
        left = shard.sharding.partial - wanted
        if others or not shard.sharding.partial >= wanted or not left <= given:
            what = f"%{value} is partial over {sorted(shard.sharding.partial)}"
            raise _broken("follows-rule", f"{what}, its cuts leave {sorted(wanted | others)}", op)


def _broken(law: str, what: str, where: LocalOp | str) -> GraphError:
    place = where if isinstance(where, str) else f"{where.kind} {where.where or where.outputs}"
    return GraphError(f"a local program breaks `{law}`: {what}.", where=place)
