"""A local program run by jax on one device's shards, inside `jax.shard_map`.

`LocalStep` walks the program op by op and decides nothing: what travels is there as ops of its own
(`ir/passes/localize.py`). With microbatches the body runs under `lax.scan` and adds up the totals.
Shardy sees one manual computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.graph import Constant, Graph, Op, TensorType
from ...ir.local.program import ON_SHARDS, LocalOp, LocalProgram, LocalRegion
from ...ir.mesh import Mesh
from ...ir.ops import COMPOSITES, LOSSES
from ...ir.passes.contract import run_passes
from ...ir.passes.decisions import Decisions, stacked
from ...ir.passes.localize import Localizer
from ...ir.passes.order import PASSES
from ...ir.plan import Plan
from ...ir.program import Program
from ...ir.sharding import Sharding
from .collectives import run_on_shards, shard_index
from .dtypes import jax_dtype
from .emit import ShardPart, emit
from .emit_composite import run_composite
from .emit_loss import run_loss
from .emit_ring import run_ring
from .joins import JOIN, start
from .params import dtype_name
from .shard import Moment

__all__ = ["KnownValues", "LocalArray", "LocalStep", "stacked"]


@dataclass(frozen=True, slots=True)
class LocalArray:
    """A local shard and how the whole lies."""

    array: Any
    layout: Sharding


@dataclass
class KnownValues:
    """Values of the graph known so far; `moment` is the microbatch being run, None outside the body."""

    values: dict[int, LocalArray] = field(default_factory=dict)
    moment: Any = None


class LocalStep:
    """Callable on the local shards of the graph's inputs; returns those of its outputs. Pipelines run it in pieces.

    Args:
        bound: by kind and attributes of an op, the jax primitive and its parameters.
        arrays: constants of the graph that are arrays.
        holds: add the barriers that XLA needs on CPUs.
        groups: of neighbours that the batch is dealt out from, if not as the plan's mesh needs.
    """

    def __init__(
        self, plan: Plan, program: Program, bound: Mapping, arrays: Mapping[int, Any], holds: bool = False,
        groups: int | None = None, platform: str = "cpu",
    ):  # fmt: skip
        self.decisions = Decisions(plan, program, holds, groups)
        self.localizer = Localizer(self.decisions)
        self.platform, self.plan, self.bound, self.arrays = platform, plan, bound, arrays
        self.graph: Graph = program.graph
        self.mesh: Mesh = plan.mesh
        self.types, self.time = self.graph.types, self.decisions.time

    @cached_property
    def program(self) -> LocalProgram:
        """The whole step's, as it runs."""
        return run_passes(self.localizer.whole(), PASSES)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self.results(self.program, inputs, None)

    def results(self, program: LocalProgram, inputs: Sequence[Any], moment: Any) -> tuple[Any, ...]:
        """A program's results; `moment` is the microbatch, if it runs in one."""
        values = self._run(program, inputs, moment)
        return tuple(values[v] for v in program.outputs)

    def _run(self, program: LocalProgram, inputs: Sequence[Any], moment: Any) -> dict[int, Any]:
        constants = {
            here.value: self._constant(there)
            for there, here in zip(self.graph.constants, program.constants, strict=False)
        }
        values = constants | dict(zip(program.inputs, inputs, strict=True))
        self.running(program, moment, constants).ops(program.ops, values)
        return values

    def running(self, program: LocalProgram, moment: Any, constants: Mapping[int, Any]) -> Running:
        return Running(self, program, moment, constants)

    def _constant(self, constant: Constant) -> Any:
        dtype = jax_dtype(self.types[constant.value].dtype)
        known = self.arrays.get(constant.value)
        return jnp.asarray(constant.data, dtype) if known is None else known

    # ------------------------------------------------------------ pieces

    def run(self, ops: Sequence[Op], scope: KnownValues) -> None:
        """Some ops of the step on what the scope holds, which learns their results, and constants."""
        read = {v for op in ops for v in op.inputs}
        given = {v: scope.values[v] for v in sorted(read & scope.values.keys())}
        given = {v: held for v, held in given.items() if v not in self.graph.constant_ids}
        layouts = {v: held.layout for v, held in given.items()}
        piece = self.localizer.piece(ops, layouts, scope.moment is not None)
        program = run_passes(piece.program, PASSES, whole=False)
        found = self._run(program, [held.array for held in given.values()], scope.moment)
        shards = program.shards
        scope.values |= {
            v: LocalArray(found[local], shards[local].sharding) for v, local in piece.names.items()
        }

    def bring(self, held: LocalArray, target: Sharding) -> Any:
        """A value in another layout."""
        program = self.localizer.moved(self._kind(held), held.layout, target)
        return self.results(program, [held.array], None)[0]

    def now(self, held: LocalArray, target: Sharding, dim: int, scope: KnownValues) -> Any:
        """The current microbatch's part of a value that exists for the whole batch."""
        program = self.localizer.part(self._kind(held), held.layout, target, dim)
        return self.results(program, [held.array], scope.moment)[0]

    def _kind(self, held: LocalArray) -> TensorType:
        """The type of the whole value that a shard is part of."""
        cut = zip(held.array.shape, held.layout.dims, strict=True)
        shape = tuple(size * self.mesh.ways(axes) for size, axes in cut)
        return TensorType(dtype_name(held.array.dtype), shape)


@dataclass
class Running:
    """One run of a program: `moment` is the microbatch, None outside their loop."""

    step: LocalStep
    program: LocalProgram
    moment: Any
    constants: Mapping[int, Any]

    def ops(self, ops: Sequence[LocalOp], values: dict[int, Any]) -> None:
        for op in ops:
            with jax.named_scope(self._name(op)):
                found = self._op(op, [values[v] for v in op.inputs], values)
            values.update(zip(op.outputs, found, strict=True))

    def _name(self, op: LocalOp) -> str:
        """What profilers show: the phase and the tag of the op, or of what reads it."""
        name = op.tag or op.reader or op.kind
        return f"{op.phase}/{name}" if op.phase else name

    def _op(self, op: LocalOp, operands: list[Any], values: dict[int, Any]) -> Sequence[Any]:
        match op.kind:
            case kind if kind in ON_SHARDS:
                found = run_on_shards(op, operands, self.step.mesh, self._many, self.moment)
                return self._apart(found)
            case "optimization_barrier":
                return lax.optimization_barrier(tuple(operands))
            case "microbatches":
                return self._microbatches(op, values)
            case "scan":
                return self._scan(op, operands)
            case "while":
                return self._while(op, operands)
            case "cond":
                return self._cond(op, operands)
            case "scaled":
                return [_scaled(operands[0], operands[1], op.text("by") == "div")]
            case "estimated":
                return [operands[0] * op.integer("microbatches")]
            case "averaged":
                return [operands[0] / op.integer("microbatches")]
        return self.computed(op, operands)

    def _apart(self, found: list[Any]) -> list[Any]:
        """Results of one collective, cut out before they are read where XLA would be slow. Its CPU backend takes each
        cut into the fusion that reads it, so that layers alike share no kernel: gpt-tiny over 8 devices, 40 gradients
        in one all-reduce, takes 1.3 times as long to compile as before, 1.05 with the barrier (2 cores, jax 0.10.2).
        """
        several = len(found) > 1 and self.step.decisions.holds
        return list(lax.optimization_barrier(tuple(found))) if several else found

    @property
    def _many(self) -> int:
        return self.program.microbatches

    def computed(self, op: LocalOp, operands: Sequence[Any]) -> Sequence[Any]:
        """Results of an op of the graph on these shards, or its contribution to them."""
        whole, rule, cuts = op.whole, self.program.rule(op), self._cuts(op)
        if op.kind not in COMPOSITES:
            return emit(whole, self._primitive(whole), operands, rule, cuts)
        joint = dict(op.joint)
        if op.kind in LOSSES:
            sharing = joint.get("vocabulary", ())
            return run_loss(whole, self._primitive, operands, rule, cuts, sharing)
        if ring := joint.get("ring"):
            return run_ring(whole, self._primitive, operands, rule, cuts, ring)
        even, platform = joint.get("even", ()), self.step.platform
        return run_composite(whole, self._primitive, operands, rule, cuts, even, platform)

    def _primitive(self, op: Op) -> Any:
        return self.step.bound.get((op.kind, op.attrs))

    def _cuts(self, op: LocalOp) -> dict[int, ShardPart]:
        """Which part of each factor this shard has: device by device, then microbatch by microbatch."""
        mesh, found = self.step.mesh, dict[int, ShardPart]()
        for each in op.cuts:
            index, ways = shard_index(each.axes, mesh), mesh.ways(each.axes)
            if each.time:
                many, groups = self._many, self.step.decisions.groups
                moment = Moment(index, self.moment, many, groups)
                index, ways = index * many + self.moment, ways * many
                found[each.factor] = ShardPart(index, ways, moment)
            else:
                found[each.factor] = ShardPart(index, ways)
        return found

    # ------------------------------------------------------------ regions

    def _region(
        self, region: LocalRegion, given: Sequence[Any], known: Mapping[int, Any]
    ) -> list[Any]:
        values = {**known} | dict(zip(region.inputs, given, strict=True))
        self.ops(region.ops, values)
        return [values[v] for v in region.outputs]

    def _microbatches(self, op: LocalOp, known: dict[int, Any]) -> Sequence[Any]:
        [region], joins = op.regions, op.attr("joins")
        assert isinstance(joins, tuple) and self.moment is None
        totals = region.outputs[: len(joins)]

        def one(state: Sequence[Any], moment: Any) -> tuple[Any, Any]:
            found = self.step.running(self.program, moment, self.constants)._region(
                region, (), known
            )
            added = [
                JOIN[str(join)](total, part.astype(total.dtype))
                for join, total, part in zip(joins, state, found, strict=False)
            ]
            return added, found[len(joins) :]

        kinds = [self.program.local(v) for v in totals]
        zeros = [
            start(str(join), jax.ShapeDtypeStruct(kind.shape, jax_dtype(kind.dtype)))
            for join, kind in zip(joins, kinds, strict=True)
        ]
        sums, stacks = lax.scan(one, zeros, jnp.arange(self._many, dtype=jnp.int32))
        narrow = [a.astype(jax_dtype(k.dtype)) for a, k in zip(sums, kinds, strict=True)]
        return [*narrow, *stacks]

    def _scan(self, op: LocalOp, given: Sequence[Any]) -> Sequence[Any]:
        [region] = op.regions
        consts, carry = op.integer("num_consts"), op.integer("num_carry")
        first = consts + carry

        def body(state: Sequence[Any], rows: Sequence[Any]) -> tuple[Any, Any]:
            found = self._region(region, (*given[:consts], *state, *rows), self.constants)
            return tuple(found[:carry]), tuple(found[carry:])

        final, pieces = lax.scan(
            body, tuple(given[consts:first]), tuple(given[first:]),
            length=op.integer("length"), reverse=op.flag("reverse"),
        )  # fmt: skip
        return (*final, *pieces)

    def _while(self, op: LocalOp, given: Sequence[Any]) -> Sequence[Any]:
        whether, turn = op.regions
        consts = op.integer("num_consts")
        fixed = given[:consts]
        return lax.while_loop(
            lambda state: self._region(whether, (*fixed, *state), self.constants)[0],
            lambda state: tuple(self._region(turn, (*fixed, *state), self.constants)),
            tuple(given[consts:]),
        )

    def _cond(self, op: LocalOp, given: Sequence[Any]) -> Sequence[Any]:
        def branch(region: LocalRegion) -> Any:
            return lambda *found: tuple(self._region(region, found, self.constants))

        return lax.switch(given[0], [branch(r) for r in op.regions], *given)


def _scaled(total: jax.Array, number: jax.Array, divide: bool) -> jax.Array:
    """A total times a number, or divided by it; of short floats in float32."""
    wide = jnp.promote_types(total.dtype, jnp.float32)
    total, number, dtype = total.astype(wide), number.astype(wide), total.dtype
    return (total / number if divide else total * number).astype(dtype)
