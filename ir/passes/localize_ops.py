"""Writes the ops of a local program: what travels, what each device computes, microbatches, loops."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..attrs import Attr
from ..graph import Op, Region, TensorType
from ..local.program import (
    BARRIER,
    MICROBATCHES,
    FactorCut,
    LocalOp,
    LocalProgram,
    LocalRegion,
    Shard,
)
from ..ops import COMPOSITES, LOSSES
from ..rules import rule_of
from ..rules.rule import Rule, operand_sharding, result_sharding, settled_axes
from ..sharding import ReshardStep, Sharding, moved_to, replicated, reshard
from .decisions import Decisions, end_tag, stacked
from .microbatch import AVERAGED, ESTIMATED, TimeAxis, time_factor


@dataclass
class Scope:
    """By value of the graph, the value of the local program; `timed` inside the body of a microbatch."""

    names: dict[int, int] = field(default_factory=lambda: {})
    timed: bool = False


class Writer:
    """Writes one local program."""

    def __init__(self, decisions: Decisions):
        self.of = decisions
        self.plan, self.mesh, self.graph = decisions.plan, decisions.mesh, decisions.graph
        self.types, self.split = decisions.types, decisions.split
        self.shards: dict[int, Shard] = {}
        self.ops: list[LocalOp] = []
        self.known: dict[int, int] = {}  # constants of the graph

    def program(
        self, name: str, inputs: tuple[int, ...], outputs: Iterable[int], input_names: tuple[str, ...] = (),
        output_names: tuple[str, ...] = (),
    ) -> LocalProgram:  # fmt: skip
        constants = tuple(
            replace(c, value=self.known[c.value])
            for c in self.graph.constants
            if c.value in self.known
        )
        return LocalProgram(
            name, self.mesh, self.plan.microbatches, self.shards, inputs, tuple(self.ops), tuple(outputs),
            constants, input_names, output_names,
        )  # fmt: skip

    # ------------------------------------------------------------ values

    def new(self, shard: Shard) -> int:
        value = len(self.shards)
        self.shards[value] = shard
        return value

    def taken(self, value: int, layout: Sharding, timed: bool = False) -> int:
        """An input of the program: a value of the graph."""
        time = self.split.get(value) if timed else None
        return self.new(Shard(self.types[value], layout, time=time))

    def constants(self, scope: Scope) -> None:
        for constant in self.graph.constants:
            kind = self.types[constant.value]
            self.known[constant.value] = self.new(Shard(kind, replicated(kind.rank)))
        scope.names |= self.known

    def put(
        self,
        kind: str,
        inputs: Iterable[int],
        shards: Iterable[Shard],
        attrs: Mapping[str, Attr],
        op: LocalOp | None = None,
    ) -> tuple[int, ...]:
        """Write an op; `op` has what else is known of it."""
        outputs = tuple(map(self.new, shards))
        base = LocalOp("", (), ()) if op is None else op
        self.ops.append(
            replace(
                base,
                kind=kind,
                inputs=tuple(inputs),
                outputs=outputs,
                attrs=tuple(sorted(attrs.items())),
            )
        )
        return outputs

    @contextmanager
    def inside(self) -> Generator[list[LocalOp]]:
        """What is written meanwhile goes to a region."""
        outer, self.ops = self.ops, []
        inner = self.ops
        try:
            yield inner
        finally:
            self.ops = outer

    # ------------------------------------------------------------ layout changes

    def bring(self, value: int, target: Sharding, why: LocalOp) -> int:
        """Reshard. A sum that is wanted owed and comes settled (from another mesh) the first device has alone."""
        held = self.shards[value].sharding
        owed = target.partial & held.partial
        steps = reshard(held, Sharding(target.dims, owed))
        assert steps is not None
        for step in steps:
            value = self._move(value, step, why)
        if settled := sorted(target.partial - owed):
            shard = replace(self.shards[value], sharding=target)
            attrs = {"axes": tuple(settled)}
            [value] = self.put("keep_first", [value], [shard], attrs, why)
        return value

    def _move(self, value: int, step: ReshardStep, why: LocalOp) -> int:
        shard = self.shards[value]
        kind = "local_slice" if step.kind == "slice" else step.kind
        attrs: dict[str, Attr] = {"axes": step.axes}
        if step.kind == "all_reduce":
            attrs["reduction"] = shard.reduction
        else:
            attrs["dim"] = step.dim
        if step.kind == "all_to_all":
            attrs["to"] = step.to
        after = replace(shard, sharding=moved_to(shard.sharding, step))
        return self.put(kind, [value], [after], attrs, why)[0]

    def now(self, value: int, target: Sharding, dim: int | None, why: LocalOp) -> int:
        """The current microbatch's part of a value that is there for the whole batch."""
        if dim is None:
            return self.bring(value, target, why)
        near = target if self._groups(target, dim) else _uncut(target, dim)
        value = self.bring(value, near, why)
        shard = replace(self.shards[value], time=dim)
        attrs = {"dim": dim, "groups": self._groups(near, dim)}
        [value] = self.put("take_microbatch", [value], [shard], attrs, why)
        return self.bring(value, target, why)

    def joined(self, stack: int, dim: int, why: LocalOp) -> int:
        """What all microbatches made of a value, stacked in front, as one."""
        held = self.shards[stack]
        layout = Sharding(held.sharding.dims[1:], held.sharding.partial)
        near = layout if self._groups(layout, dim) else _uncut(layout, dim)
        stack = self.bring(stack, stacked(near), why)
        whole = TensorType(held.whole.dtype, held.whole.shape[1:])
        attrs = {"dim": dim, "groups": self._groups(near, dim)}
        shard = Shard(whole, near, held.reduction)
        return self.put("join_microbatches", [stack], [shard], attrs, why)[0]

    def _groups(self, layout: Sharding, dim: int) -> int:
        """How many groups of the batch a shard holds; 0 where it holds less than one."""
        ways = self.mesh.ways(layout.dims[dim])
        return 0 if self.of.groups % ways else self.of.groups // ways

    # ------------------------------------------------------------ ops

    def run(self, ops: Sequence[Op], scope: Scope, phase: str = "") -> None:
        for op in ops:
            here = phase or (self.of.phases.get(op.outputs[0], "") if op.outputs else "")
            if op.regions:
                _Loop(self, op, scope, here).write()
            elif op.kind == BARRIER:
                values = [scope.names[v] for v in op.inputs]
                scope.names |= zip(op.outputs, self.barrier(values, _told(op, here)), strict=True)
            elif op.kind == "copy":
                rule = rule_of(op, self.types)
                [scope.names[op.outputs[0]]] = self._operands(op, rule, scope, here)
            else:
                self._op(op, scope, here)

    def barrier(self, values: Sequence[int], op: LocalOp) -> tuple[int, ...]:
        return self.put(BARRIER, values, [self.shards[v] for v in values], {}, op)

    def _op(self, op: Op, scope: Scope, phase: str) -> None:
        rule, (strategy, mesh) = rule_of(op, self.types), self.of.cut(op)
        now = time_factor(op, rule, self.split) if scope.timed else None
        operands = self._operands(op, rule, scope, phase)
        shards = [
            Shard(
                self.types[value],
                result_sharding(rule, strategy, mesh, k),
                time=next((d for d, each in enumerate(rule.results[k]) if now in each), None),
            )
            for k, value in enumerate(op.outputs)
        ]
        told = _told(op, phase)
        attrs = dict(op.attrs)
        if op.kind in (ESTIMATED, AVERAGED):
            attrs["microbatches"] = self.plan.microbatches if scope.timed else 1
        settled = settled_axes(rule, strategy, mesh)
        partial = [_partial(shard, settled) for shard in shards]
        codes = dict(zip(mesh.names, strategy.axes, strict=True))
        cuts = replace(told, cuts=_cuts(rule, codes, now), joint=_joint(op, rule, codes))
        made = self.put(op.kind, operands, partial, attrs, cuts)
        for value, local, shard in zip(op.outputs, made, shards, strict=True):
            for reduction, axes in settled.items():
                attrs = {"axes": axes, "reduction": reduction}
                [local] = self.put("all_reduce", [local], [shard], attrs, told)
            if value in self.of.held_values:
                [local] = self.barrier([local], told)
            scope.names[value] = local

    def _operands(self, op: Op, rule: Rule, scope: Scope, phase: str) -> list[int]:
        cut = self.of.cut(op)
        wanted = [operand_sharding(rule, *cut, k) for k in range(len(op.inputs))]
        now = time_factor(op, rule, self.split) if scope.timed else None
        tied = self.tied(op, dict(zip(op.inputs, wanted, strict=True)), scope, phase)
        found, why = list[int](), for_reader(op.tag, phase, op.count)
        for k, value in enumerate(op.inputs):
            local = tied.get(value, scope.names[value])
            all_of_it = now is not None and value not in self.split
            if not all_of_it and self.shards[local].sharding == wanted[k]:
                found.append(local)
                continue
            told = replace(why, source=self.of.tags[value])
            if all_of_it:
                dim = next((d for d, each in enumerate(rule.operands[k]) if now in each), None)
                found.append(self.now(local, wanted[k], dim, told))
            else:
                found.append(self.bring(local, wanted[k], told))
        return found

    def tied(
        self, op: Op, wanted: Mapping[int, Sharding], scope: Scope, phase: str
    ) -> dict[int, int]:
        """What the op gathers of what was there before its pass, once what it reads beside that is there. Who reads
        that later reads it from the barrier, which is dropped if nobody does. An op that stands for its like in all
        layers reads other values than the one the tie is of."""
        tie = self.of.ties.get(op.outputs[0]) if op.outputs else None
        if tie is None or tie.beside not in scope.names or self.types[tie.beside].dtype == "key":
            return {}
        waiting = [v for v in tie.given if v in wanted and self._gathers(v, wanted[v], scope)]
        if not waiting:
            return {}
        held = [scope.names[v] for v in (*waiting, tie.beside)]
        *found, scope.names[tie.beside] = self.barrier(held, _told(op, phase))
        return dict(zip(waiting, found, strict=True))

    def _gathers(self, value: int, layout: Sharding, scope: Scope) -> bool:
        steps = reshard(self.shards[scope.names[value]].sharding, layout) or ()
        return self.types[value].dtype != "key" and any(step.kind == "all_gather" for step in steps)

    # ------------------------------------------------------------ the time axis

    def in_time(self, scope: Scope, time: TimeAxis) -> None:
        """Before the body once, the body per microbatch, after it once."""
        ops = self.graph.ops
        late = _late(ops, time)
        self.run([op for i, op in enumerate(ops) if i not in time.body and i not in late], scope)
        body = [op for i, op in enumerate(ops) if i in time.body]
        made = {v for op in body for v in op.outputs}
        outside = {v for i, op in enumerate(ops) if i not in time.body for v in op.inputs}
        read = sorted(made & (outside | set(self.graph.outputs)))
        totals = [v for v in read if v in time.totals]
        parts = [v for v in read if v in time.split]
        with self.inside() as region:
            inner = Scope(dict(scope.names), timed=True)
            for value in self.graph.inputs:
                if value in time.split:
                    held = inner.names[value]
                    layout = self.shards[held].sharding
                    why = for_reader(tag := self.of.tags[value], "forward", source=tag)
                    inner.names[value] = self.now(held, layout, time.split[value], why)
            self.run(body, inner)
        left = [inner.names[v] for v in (*totals, *parts)]
        shards = [replace(self.shards[inner.names[v]], time=None) for v in totals]
        shards += [self.shards[inner.names[v]].stacked(self.plan.microbatches) for v in parts]
        whole = LocalRegion((), tuple(region), tuple(left))
        attrs: dict[str, Attr] = {
            "groups": self.of.groups,
            "joins": tuple(time.totals[v] for v in totals),
        }
        results = self.put(MICROBATCHES, [], shards, attrs, LocalOp("", (), (), regions=(whole,)))
        scope.names |= zip((*totals, *parts), results, strict=True)
        for value in parts:
            why = for_reader(tag := self.of.tags[value], "update", source=tag)
            scope.names[value] = self.joined(scope.names[value], time.split[value], why)
        self.run([op for i, op in enumerate(ops) if i in late], scope)


class _Loop:
    """A loop or branch of the user. Operands and results of regions lie as the plan's slots say, in every region alike.

    What decides (the index of a branch, whether a loop goes on) is one number that is partial over no axis and comes
    from the same bits on every device: whole values are equal everywhere, since each comes out of the same program
    on whole values or out of a collective, whose result is one and the same for all. So all devices take the same
    branch and as many turns, and collectives inside meet.
    """

    def __init__(self, writer: Writer, op: Op, scope: Scope, phase: str):
        self.writer, self.op, self.scope, self.phase = writer, op, scope, phase
        self.consts, self.carry = op.loop_inputs
        slot = writer.of.slot
        self.layouts = [slot(f"{op.tag}/in{i}") for i in range(len(op.inputs))]
        self.ends = [slot(end_tag(op, k)) for k in range(len(op.outputs))]

    def write(self) -> None:
        writer, op = self.writer, self.op
        wanted = [
            stacked(layout) if self._is_row(i) else layout for i, layout in enumerate(self.layouts)
        ]
        tied = writer.tied(op, dict(zip(op.inputs, wanted, strict=True)), self.scope, self.phase)
        given = [self._given(i, target, tied) for i, target in enumerate(wanted)]
        if op.kind == "while":
            on = [writer.of.slot(f"{op.tag}/on")]
            regions = [
                self._region(op.regions[0], given, on),
                self._region(op.regions[1], given, self.ends),
            ]
        else:
            regions = [self._region(region, given, self.ends) for region in op.regions]
        told = replace(_told(op, self.phase), regions=tuple(regions))
        last = regions[-1].outputs
        shards = [self._result(k, writer.shards[left]) for k, left in enumerate(last)]
        results = writer.put(op.kind, given, shards, dict(op.attrs), told)
        self.scope.names |= zip(op.outputs, results, strict=True)

    def _is_row(self, i: int) -> bool:
        return i >= self.consts + self.carry

    def _result(self, k: int, left: Shard) -> Shard:
        rows = self.op.kind == "scan" and k >= self.carry
        kind = self.writer.types[self.op.outputs[k]]
        time = None if left.time is None else left.time + rows
        return Shard(kind, stacked(self.ends[k]) if rows else self.ends[k], time=time)

    def _given(self, i: int, target: Sharding, tied: Mapping[int, int]) -> int:
        """An operand as regions want it; in a microbatch, its part."""
        split, why = (
            self.writer.split,
            for_reader(
                f"{self.op.tag}/in{i}",
                self.phase,
                self.op.count,
                self.writer.of.tags[self.op.inputs[i]],
            ),
        )
        outside, inside, row = self.op.inputs[i], self.op.regions[0].inputs[i], self._is_row(i)
        held = tied.get(outside, self.scope.names[outside])
        if not self.scope.timed or inside not in split or outside in split:
            return self.writer.bring(held, target, why)
        return self.writer.now(held, target, split[inside] + row, why)

    def _region(
        self, region: Region, given: Sequence[int], ends: Sequence[Sharding]
    ) -> LocalRegion:
        writer = self.writer
        names = dict(writer.known)
        for i, (value, layout) in enumerate(zip(region.inputs, self.layouts, strict=True)):
            time = writer.shards[given[i]].time
            time = None if time is None else time - self._is_row(i)
            names[value] = writer.new(Shard(writer.types[value], layout, time=time))
        inputs = tuple(names[v] for v in region.inputs)
        with writer.inside() as ops:
            inner = Scope(names, self.scope.timed)
            writer.run(region.ops, inner, self.phase or "forward")
            left = [self._end(region, k, end, inner) for k, end in enumerate(ends)]
        return LocalRegion(inputs, tuple(ops), tuple(left))

    def _end(self, region: Region, k: int, end: Sharding, inner: Scope) -> int:
        """What a region leaves. Of what is the same for all microbatches (zeros, say) its part,
        where another region leaves one microbatch's."""
        op, split = self.op, self.writer.split
        value = region.outputs[k]
        returning = region in op.returning
        result, slot = (op.outputs[k], end_tag(op, k)) if returning else (value, f"{op.tag}/on")
        local, why = inner.names[value], for_reader(slot, self.phase, 1, self.writer.of.tags[value])
        if not inner.timed or value in split or op.kind != "cond" or result not in split:
            return self.writer.bring(local, end, why)
        return self.writer.now(local, end, split[result], why)


def _cuts(rule: Rule, codes: Mapping[str, int], now: int | None) -> tuple[FactorCut, ...]:
    """Which part of each factor a device has; `codes` are what each axis cuts, major to minor."""
    axes: dict[int, tuple[str, ...]] = {} if now is None else {now: ()}
    for name, code in codes.items():
        for factor in rule.cut_by(code):
            axes[factor] = (*axes.get(factor, ()), name)
    return tuple(FactorCut(f, names, f == now) for f, names in sorted(axes.items()))


def _joint(op: Op, rule: Rule, codes: Mapping[str, int]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Axes whose devices work out a composite together."""
    if op.kind not in COMPOSITES:
        return ()
    found: dict[str, tuple[str, ...]] = {}
    vocabulary = dict(op.attrs).get("vocabulary") if op.kind in LOSSES else None
    for name, code in codes.items():
        if (joint := rule.joint(code)) is not None:
            found[joint.how] = (*found.get(joint.how, ()), name)
        if vocabulary is not None and vocabulary in rule.cut_by(code):
            found["vocabulary"] = (*found.get("vocabulary", ()), name)
    return tuple(sorted(found.items()))


def _told(op: Op, phase: str) -> LocalOp:
    """What a local op says of the op of the graph it comes from."""
    return LocalOp("", (), (), phase=phase, where=op.where, tag=op.tag, count=op.count)


def for_reader(reader: str, phase: str, count: int = 1, source: str = "") -> LocalOp:
    """What a collective says of itself."""
    return LocalOp("", (), (), phase=phase, source=source, reader=reader, count=count)


def _partial(shard: Shard, settled: Mapping[str, tuple[str, ...]]) -> Shard:
    """A result before the op's own all-reduce."""
    for reduction, axes in settled.items():
        layout = Sharding(shard.sharding.dims, frozenset(axes))
        shard = replace(shard, sharding=layout, reduction=reduction)
    return shard


def _late(ops: Sequence[Op], time: TimeAxis) -> set[int]:
    """Positions of ops after the body: all but what the body needs, so that nothing else lives through it."""
    needed = {v for i, op in enumerate(ops) if i in time.body for v in op.inputs}
    late: set[int] = set()
    for i, op in reversed([*enumerate(ops)]):
        if i in time.body:
            continue
        if needed.isdisjoint(op.outputs):
            late.add(i)
        else:
            needed.update(op.inputs)
    return late


def _uncut(layout: Sharding, dim: int) -> Sharding:
    """The same layout with one dim whole."""
    dims = tuple(() if d == dim else axes for d, axes in enumerate(layout.dims))
    return Sharding(dims, layout.partial)
