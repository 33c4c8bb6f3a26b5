"""The sharded step as one local program per device.

`LocalStep` walks the graph op by op on local shards: bring each operand to the
layout the plan wants (an explicit collective), run the op on the shard, leave
the result as the plan says. With microbatches the body of the time axis runs
under `lax.scan` and adds up the totals. Shardy sees one manual computation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.bodies import KINDS, LOSSES
from ...ir.errors import LoweringError
from ...ir.graph import Graph, Op
from ...ir.mesh import Mesh
from ...ir.microbatch import AVERAGED, ESTIMATED, TimeAxis, time_factor, time_groups
from ...ir.plan import Plan
from ...ir.program import Program
from ...ir.rule import NONE, Rule, Strategy, operand_sharding, result_sharding, settled_axes
from ...ir.rules import rule_of
from ...ir.sharding import Sharding, replicated, reshard
from ...ir.values import block_instances
from .collectives import join_microbatches, move, shard_index, take_microbatch
from .dtypes import jax_dtype
from .emit import Cut, emit
from .emit_composite import run_composite
from .emit_loss import run_loss
from .emit_ring import run_ring
from .joins import JOIN, settle, start
from .loops import end_tag, run_regions
from .scope import Held, Scope, stacked
from .shard import Moment
from .ties import Tie, ties


class LocalStep:
    """Callable on the local shards of the graph's inputs; returns those of its outputs."""

    def __init__(
        self, plan: Plan, program: Program, bound: Mapping, arrays: Mapping[int, Any], holds: bool = False,
        groups: int | None = None, platform: str = "cpu",
    ):  # fmt: skip
        self.platform = platform
        self.plan, self.program, self.bound, self.arrays, self.holds = (
            plan,
            program,
            bound,
            arrays,
            holds,
        )
        self.graph: Graph = program.graph
        self.mesh: Mesh = plan.mesh
        self.types = self.graph.types
        self.tags = program.value_tags
        self.time = (
            program.time if plan.microbatches > 1 and isinstance(program.time, TimeAxis) else None
        )
        self.groups = groups or (
            time_groups(self.time.parts, self.mesh, plan.microbatches) if self.time else 1
        )

    # ------------------------------------------------------------ layouts at the border

    def input_layouts(self) -> list[Sharding]:
        return [self.slot(self.tags[v]) for v in self.graph.inputs]

    def output_layouts(self) -> list[Sharding]:
        """Carried state leaves as it came in, the rest as its op left it, sums settled."""
        source = {o: self.graph.inputs[i] for i, o in self.graph.state}
        return [
            self.slot(self.tags[source[position]])
            if position in source
            else Sharding(self._left_as[value].dims)
            for position, value in enumerate(self.graph.outputs)
        ]

    @cached_property
    def _left_as(self) -> dict[int, Sharding]:
        """The layout in which the step's inputs, constants and top-level ops leave each value."""
        layouts = dict(zip(self.graph.inputs, self.input_layouts(), strict=True))
        layouts |= {c.value: replicated(self.types[c.value].rank) for c in self.graph.constants}
        for op in self.graph.ops:
            for k, value in enumerate(op.outputs):
                layouts[value] = self.leaves(op, k, layouts)
        return layouts

    def leaves(self, op: Op, k: int, layouts: Mapping[int, Sharding]) -> Sharding:
        if op.kind == "optimization_barrier":
            return layouts[op.inputs[k]]
        if not op.regions:
            return result_sharding(rule_of(op, self.types), self.strategy(op), self.mesh, k)
        end = self.slot(end_tag(op, k))
        return stacked(end) if op.kind == "scan" and k >= op.loop_inputs[1] else end

    def slot(self, tag: str) -> Sharding:
        if tag not in self.plan.slots:
            raise LoweringError(
                f"the plan has no layout for `{tag}`.", fix="plan this step again with this version"
            )
        return self.plan.slots[tag].sharding

    # ------------------------------------------------------------ the whole step

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        scope = Scope()
        for value, array, layout in zip(
            self.graph.inputs, inputs, self.input_layouts(), strict=True
        ):
            scope.values[value] = Held(array, layout)
        for constant in self.graph.constants:
            scope.values[constant.value] = self.constant(constant.value, constant.data)
        if self.time is None:
            self.run(self.graph.ops, scope)
        else:
            self._run_in_time(scope, self.time)
        return self._results(scope)

    def constant(self, value: int, data: Any) -> Held:
        kind = self.types[value]
        array = (
            self.arrays[value] if value in self.arrays else jnp.asarray(data, jax_dtype(kind.dtype))
        )
        return Held(array, replicated(kind.rank))

    def _results(self, scope: Scope) -> tuple[Any, ...]:
        return tuple(
            self.bring(scope.values[value], target)
            for value, target in zip(self.graph.outputs, self.output_layouts(), strict=True)
        )

    def bring(self, held: Held, target: Sharding) -> Any:
        """Reshard. A sum that is wanted owed and comes settled (from another mesh) the first device owes alone."""
        owed = target.partial & held.layout.partial
        steps = reshard(held.layout, Sharding(target.dims, owed))
        assert steps is not None
        array = move(held.array, steps, self.mesh)
        if settled := sorted(target.partial - owed):
            return jnp.where(shard_index(settled, self.mesh) == 0, array, jnp.zeros_like(array))
        return array

    # ------------------------------------------------------------ ops

    def run(self, ops: Sequence[Op], scope: Scope) -> None:
        for op in ops:
            with jax.named_scope(self._names.get(op.tag, op.tag)):
                if op.regions:
                    run_regions(self, op, scope)
                elif op.kind == "optimization_barrier":
                    self._barrier(op, scope)
                else:
                    self._simple(op, scope)

    @cached_property
    def _names(self) -> dict[str, str]:
        """By tag, what profilers show of an op outside loops: its phase and its tag."""
        return {
            op.tag: f"{phase}/{op.tag}"
            for op, phase in zip(self.graph.ops, self.program.phases, strict=True)
        }

    def strategy(self, op: Op) -> Strategy:
        return Strategy(self.plan.strategies.get(op.tag, (NONE,) * len(self.mesh.axes)))

    def _simple(self, op: Op, scope: Scope) -> None:
        rule, strategy = rule_of(op, self.types), self.strategy(op)
        now = self._time_factor(op, rule) if scope.moment is not None else None
        wanted = {
            v: operand_sharding(rule, strategy, self.mesh, k) for k, v in enumerate(op.inputs)
        }
        tied = self.tied(op, wanted, scope)
        operands = [
            self._operand(op, k, rule, strategy, now, scope, tied) for k in range(len(op.inputs))
        ]
        if op.kind == "copy":
            results = operands
        elif op.kind == "scaled":
            results = [_scaled(operands[0], operands[1], op.attr("by") == "div")]
        elif op.kind in (ESTIMATED, AVERAGED):
            many = 1 if scope.moment is None else self.plan.microbatches
            results = [operands[0] * many if op.kind == ESTIMATED else operands[0] / many]
        elif op.kind in KINDS:
            results = self._composite(op, operands, rule, self._cuts(rule, strategy, now, scope))
        else:
            cuts = self._cuts(rule, strategy, now, scope)
            results = emit(op, self._primitive(op), operands, rule, cuts)
        for k, (value, array) in enumerate(zip(op.outputs, results, strict=True)):
            for reduction, axes in settled_axes(rule, strategy, self.mesh).items():
                array = settle(array, reduction, axes)
            if value in self._held_sums:
                array = lax.optimization_barrier(array)
            scope.values[value] = Held(array, result_sharding(rule, strategy, self.mesh, k))

    @cached_property
    def _held_sums(self) -> frozenset[int]:
        """Sums that one block hands to another (the next layer, the backward pass), if the step `holds` them.

        XLA's CPU backend fuses a chain of additions into every reader, so that each layer adds up
        what all layers before it made. gpt-bytes, six layers, 2 x 4 devices: 806 ms of processor
        time per core and step before, 454 after (2 cores, jax 0.10.2).
        """
        groups = block_instances(self.graph.ops) if self.holds else []
        made = {
            v: group
            for op, group in zip(self.graph.ops, groups, strict=False)
            if group and op.kind in ("add", "add_any")
            for v in op.outputs
        }
        return frozenset(
            v
            for op, group in zip(self.graph.ops, groups, strict=False)
            for v in op.inputs
            if group and made.get(v, group) != group
        )

    @cached_property
    def _ties(self) -> Mapping[int, Tie]:
        return ties(self.program) if self.holds else {}

    def tied(self, op: Op, wanted: Mapping[int, Sharding], scope: Scope) -> dict[int, Held]:
        """What the op gathers of what was there before its pass, once what it reads beside that is there. Who reads
        that later reads it from the barrier, which is dropped if nobody does. An op that stands for its like in all
        layers reads other values than the one the tie is of."""
        tie = self._ties.get(op.outputs[0]) if op.outputs else None
        if tie is None or tie.beside not in scope.values or self.types[tie.beside].dtype == "key":
            return {}
        waiting = [v for v in tie.given if v in wanted and self._gathers(v, wanted[v], scope)]
        if not waiting:
            return {}
        held = [scope.values[v] for v in (*waiting, tie.beside)]
        arrays = lax.optimization_barrier(tuple(each.array for each in held))
        *found, beside = (
            Held(array, each.layout) for array, each in zip(arrays, held, strict=True)
        )
        scope.values[tie.beside] = beside
        return dict(zip(waiting, found, strict=True))

    def _gathers(self, value: int, layout: Sharding, scope: Scope) -> bool:
        steps = reshard(scope.values[value].layout, layout) or ()
        return self.types[value].dtype != "key" and any(step.kind == "all_gather" for step in steps)

    def _primitive(self, op: Op) -> Any:
        return self.bound.get((op.kind, op.attrs))

    def _operand(
        self,
        op: Op,
        k: int,
        rule: Rule,
        strategy: Strategy,
        now: int | None,
        scope: Scope,
        tied: Mapping[int, Held],
    ) -> Any:
        value, target = op.inputs[k], operand_sharding(rule, strategy, self.mesh, k)
        held = tied.get(value, scope.values[value])
        if now is None or op.inputs[k] in self.split:
            return self.bring(held, target)
        dim = next((d for d, factors in enumerate(rule.operands[k]) if now in factors), None)
        return self.now(held, target, dim, scope)

    def now(self, held: Held, target: Sharding, dim: int | None, scope: Scope) -> Any:
        """The current microbatch's part of a value that exists for the whole batch."""
        if dim is None:
            return self.bring(held, target)
        near = target if self._groups(target, dim) else _uncut(target, dim)
        part = take_microbatch(
            self.bring(held, near), dim, scope.moment, self.plan.microbatches,
            self._groups(near, dim),
        )  # fmt: skip
        return self.bring(Held(part, near), target)

    def _groups(self, layout: Sharding, dim: int) -> int:
        """How many groups of the batch a shard holds; 0 where it holds less than one."""
        ways = self.mesh.ways(layout.dims[dim])
        return 0 if self.groups % ways else self.groups // ways

    @property
    def split(self) -> Mapping[int, int]:
        """Values that exist once per microbatch, with the dim that is cut over time."""
        return self.time.split if self.time else {}

    def _time_factor(self, op: Op, rule: Rule) -> int | None:
        """The factor that is cut over time, for an op that reads or makes the current microbatch."""
        return time_factor(op, rule, self.split)

    def _cuts(
        self, rule: Rule, strategy: Strategy, now: int | None, scope: Scope
    ) -> dict[int, Cut]:
        """Which part of each factor this shard has: device by device, then microbatch by microbatch."""
        axes: dict[int, list[str]] = {}
        for name, code in zip(self.mesh.names, strategy.axes, strict=True):
            for factor in rule.cut_by(code):
                axes.setdefault(factor, []).append(name)
        cuts = {
            f: Cut(shard_index(names, self.mesh), self.mesh.ways(tuple(names)))
            for f, names in axes.items()
        }
        if now is not None:
            parts, before = self.plan.microbatches, cuts.get(now, Cut(0, 1))
            moment = Moment(before.index, scope.moment, parts, self.groups)
            cuts[now] = Cut(before.index * parts + scope.moment, before.ways * parts, moment)
        return cuts

    def _composite(
        self, op: Op, operands: Sequence[Any], rule: Rule, cuts: Mapping[int, Cut]
    ) -> list[jax.Array]:
        """With axes whose devices exchange rows for equal work, or pass keys round."""
        codes, joined = self.strategy(op).axes, defaultdict[str, tuple[str, ...]](tuple)
        for name, code in zip(self.mesh.names, codes, strict=True):
            if (joint := rule.joint(code)) is not None:
                joined[joint.how] = (*joined[joint.how], name)
        if op.kind in LOSSES:
            return run_loss(op, self._primitive, operands, rule, cuts, self._sharing(op, rule))
        if ring := joined["ring"]:
            return run_ring(op, self._primitive, operands, rule, cuts, ring)
        return run_composite(
            op, self._primitive, operands, rule, cuts, joined["even"], self.platform
        )

    def _sharing(self, op: Op, rule: Rule) -> tuple[str, ...]:
        """Axes whose devices share the vocabulary of a loss."""
        free = dict(op.attrs).get("vocabulary")
        pairs = zip(self.mesh.names, self.strategy(op).axes, strict=True)
        return tuple(name for name, code in pairs if free is not None and free in rule.cut_by(code))

    def _barrier(self, op: Op, scope: Scope) -> None:
        held = [scope.values[v] for v in op.inputs]
        results = lax.optimization_barrier(tuple(h.array for h in held))
        for value, before, array in zip(op.outputs, held, results, strict=True):
            scope.values[value] = Held(array, before.layout)

    # ------------------------------------------------------------ the time axis

    def _run_in_time(self, scope: Scope, time: TimeAxis) -> None:
        """Before the body once, the body per microbatch, after it once."""
        ops = self.graph.ops
        late = self._late(time)
        self.run([op for i, op in enumerate(ops) if i not in time.body and i not in late], scope)
        body = [op for i, op in enumerate(ops) if i in time.body]
        made = {v for op in body for v in op.outputs}
        outside = {v for i, op in enumerate(ops) if i not in time.body for v in op.inputs} | set(
            self.graph.outputs
        )
        totals = [v for v in made & outside if v in time.totals]
        parts = [v for v in made & outside if v in time.split]
        layouts: dict[int, Sharding] = {}

        def run_body(moment):
            inner = Scope(dict(scope.values), moment)
            for value in self.graph.inputs:
                if value in time.split:
                    held = inner.values[value]
                    part = self.now(held, held.layout, time.split[value], inner)
                    inner.values[value] = Held(part, held.layout)
            self.run(body, inner)
            layouts.update({v: inner.values[v].layout for v in (*totals, *parts)})
            return [inner.values[v].array for v in totals], [inner.values[v].array for v in parts]

        def one(state, moment):
            sums, pieces = run_body(moment)
            joined = [
                JOIN[time.totals[v]](a, s.astype(a.dtype))
                for v, a, s in zip(totals, state, sums, strict=True)
            ]
            return joined, pieces

        shapes, _ = jax.eval_shape(run_body, jax.ShapeDtypeStruct((), jnp.int32))
        zeros = [start(time.totals[v], s) for v, s in zip(totals, shapes, strict=True)]
        sums, pieces = lax.scan(one, zeros, jnp.arange(self.plan.microbatches, dtype=jnp.int32))
        for value, array in zip(totals, sums, strict=True):
            scope.values[value] = Held(
                array.astype(jax_dtype(self.types[value].dtype)), layouts[value]
            )
        for value, array in zip(parts, pieces, strict=True):
            scope.values[value] = self.joined(array, layouts[value], time.split[value])
        self.run([op for i, op in enumerate(ops) if i in late], scope)

    def joined(self, pieces: jax.Array, layout: Sharding, dim: int) -> Held:
        """Results of all microbatches, stacked in front, as one value."""
        near = layout if self._groups(layout, dim) else _uncut(layout, dim)
        arrays = self.bring(Held(pieces, stacked(layout)), stacked(near))
        return Held(join_microbatches(arrays, dim, self._groups(near, dim)), near)

    def _late(self, time: TimeAxis) -> set[int]:
        """Positions of ops that need something the body made."""
        made: set[int] = set()
        late: set[int] = set()
        for i, op in enumerate(self.graph.ops):
            if i in time.body:
                made.update(op.outputs)
            elif not made.isdisjoint(op.inputs):
                late.add(i)
                made.update(op.outputs)
        return late


def _uncut(layout: Sharding, dim: int) -> Sharding:
    """The same layout with one dim whole."""
    dims = tuple(() if d == dim else axes for d, axes in enumerate(layout.dims))
    return Sharding(dims, layout.partial)


def _scaled(total: jax.Array, number: jax.Array, divide: bool) -> jax.Array:
    """A total times a number, or divided by it; of short floats in float32."""
    wide = jnp.promote_types(total.dtype, jnp.float32)
    total, number, dtype = total.astype(wide), number.astype(wide), total.dtype
    return (total / number if divide else total * number).astype(dtype)
