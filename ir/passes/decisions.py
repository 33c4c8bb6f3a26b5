"""What a plan decides for each value of its step, and what a backend wants held."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

from ..errors import LoweringError
from ..graph import Graph, Op
from ..local.program import BARRIER
from ..mesh import Axis, Mesh
from ..ops import ADDITION
from ..plan import Layout
from ..program import Program
from ..rules import rule_of
from ..rules.rule import NONE, Strategy, result_sharding
from ..sharding import Sharding, replicated
from ..values import block_instances
from .gather_ties import Tie, ties
from .microbatch import TimeAxis, time_groups


def stacked(layout: Sharding) -> Sharding:
    """Of several values side by side, a new dim in front."""
    return Sharding(((), *layout.dims), layout.partial)


def end_tag(op: Op, k: int) -> str:
    """The slot in which a region leaves the k-th result of a loop or branch."""
    consts, carry = op.loop_inputs
    return f"{op.tag}/in{consts + k}" if k < carry else f"{op.tag}/out{k}"


class Decided(Protocol):
    """What was decided of a step: a plan, or the like of one."""

    @property
    def name(self) -> str: ...

    @property
    def mesh(self) -> Mesh: ...

    @property
    def microbatches(self) -> int: ...

    @property
    def strategies(self) -> Mapping[str, tuple[int, ...]]:
        """By op tag, what each axis of the mesh does."""
        ...

    @property
    def slots(self) -> Mapping[str, Layout]: ...


class Decisions:
    """A plan's decisions on a prepared program.

    Args:
        holds: let sums that blocks hand to each other, and gathers of each pass, be held by barriers.
        groups: into how many runs of neighbours the batch is dealt to microbatches, if not as the plan's mesh needs.
        orders: by op tag, the axes in the order in which they cut a dim there, major to minor, if not the mesh's.
    """

    def __init__(
        self, plan: Decided, program: Program, holds: bool = False, groups: int | None = None,
        orders: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    ):  # fmt: skip
        self.plan, self.program, self.holds, self.orders = plan, program, holds, orders
        self.graph: Graph = program.graph
        self.mesh, self.types, self.tags = plan.mesh, program.graph.types, program.value_tags
        self.time = (
            program.time if plan.microbatches > 1 and isinstance(program.time, TimeAxis) else None
        )
        self.groups = groups or (
            time_groups(self.time.parts, self.mesh, plan.microbatches) if self.time else 1
        )

    @property
    def split(self) -> Mapping[int, int]:
        """Values that exist once per microbatch, with the dim that is cut over time."""
        return self.time.split if self.time else {}

    # ------------------------------------------------------------ layouts

    def slot(self, tag: str) -> Sharding:
        if tag not in self.plan.slots:
            raise LoweringError(
                f"the plan has no layout for `{tag}`.", fix="plan this step again with this version"
            )
        return self.plan.slots[tag].sharding

    def cut(self, op: Op) -> tuple[Strategy, Mesh]:
        """An op's strategy, and the mesh, whose axes stand in the order in which they cut a dim of the op."""
        codes = self.plan.strategies.get(op.tag, (NONE,) * len(self.mesh.axes))
        if not (order := self.orders.get(op.tag)):
            return Strategy(codes), self.mesh
        by_axis = dict(zip(self.mesh.names, codes, strict=True))
        mesh = Mesh(tuple(Axis(name, self.mesh.sizes[name]) for name in order))
        return Strategy(tuple(by_axis[name] for name in order)), mesh

    def input_layouts(self) -> list[Sharding]:
        return [self.slot(self.tags[v]) for v in self.graph.inputs]

    def output_layouts(self) -> list[Sharding]:
        """Carried state leaves as it came in, the rest as its op left it, sums settled."""
        source = {o: self.graph.inputs[i] for i, o in self.graph.state}
        return [
            self.slot(self.tags[source[position]])
            if position in source
            else Sharding(self._left_as(value).dims)
            for position, value in enumerate(self.graph.outputs)
        ]

    @cached_property
    def _given(self) -> dict[int, Sharding]:
        """The layouts of inputs and constants."""
        layouts = dict(zip(self.graph.inputs, self.input_layouts(), strict=True))
        return layouts | {
            c.value: replicated(self.types[c.value].rank) for c in self.graph.constants
        }

    @cached_property
    def _made(self) -> dict[int, tuple[Op, int]]:
        """The op that makes a value, and which of its results it is."""
        return {v: (op, k) for op in self.graph.ops for k, v in enumerate(op.outputs)}

    def _left_as(self, value: int) -> Sharding:
        """The layout in which the step's inputs, constants and top-level ops leave a value."""
        if value in self._given:
            return self._given[value]
        op, k = self._made[value]
        held = op.inputs[k : k + 1] if op.kind == BARRIER else ()
        return self.leaves(op, k, {v: self._left_as(v) for v in held})

    def leaves(self, op: Op, k: int, layouts: Mapping[int, Sharding]) -> Sharding:
        """How an op leaves a result, from how its operands lie."""
        if op.kind == BARRIER:
            return layouts[op.inputs[k]]
        if not op.regions:
            return result_sharding(rule_of(op, self.types), *self.cut(op), k)
        end = self.slot(end_tag(op, k))
        return stacked(end) if op.kind == "scan" and k >= op.loop_inputs[1] else end

    # ------------------------------------------------------------ what XLA needs on CPUs

    @cached_property
    def held_values(self) -> frozenset[int]:
        """Values behind which a barrier goes, if the step `holds` any."""
        return self._handed_on | self._turned if self.holds else frozenset()

    @cached_property
    def _turned(self) -> frozenset[int]:
        """Gradients of weights that are nothing but transposed next.

        XLA's CPU backend takes a transpose into the product before it, which is then a slow one. Processor's time of a
        data-parallel step on 8 devices, before and after: gpt-tiny 176 -> 148 ms, vit-tiny 39 -> 36.5 (2
        cores with other work on them, jax 0.10.2); where the reduction lies between the two, nothing was slow.
        """
        readers: dict[int, list[Op]] = {}
        for op in self.graph.ops:
            for v in op.inputs:
                readers.setdefault(v, []).append(op)
        found = set[int]()
        for op in self.graph.ops:
            if op.kind == "dot_general" and self._of_weights(op):
                after = readers.get(op.outputs[0], [])
                while len(after) == 1 and after[0].kind == "copy":
                    after = readers.get(after[0].outputs[0], [])
                if after and all(each.kind == "transpose" for each in after):
                    found.update(op.outputs)
        return frozenset(found)

    def _of_weights(self, op: Op) -> bool:
        """Whether an op sums over the batch."""
        time = self.program.time
        if isinstance(time, TimeAxis):
            return op.outputs[0] in time.totals
        return bool(self.leaves(op, 0, {}).partial)

    @cached_property
    def _handed_on(self) -> frozenset[int]:
        """Sums that one block hands to another (the next layer, the backward pass).

        XLA's CPU backend fuses a chain of additions into every reader, so that each layer adds up
        what all layers before it made. gpt-bytes, six layers, 2 x 4 devices: 806 ms of processor
        time per core and step before, 454 after (2 cores, jax 0.10.2).
        """
        groups = block_instances(self.graph.ops)
        made = {
            v: group
            for op, group in zip(self.graph.ops, groups, strict=False)
            if group and op.kind in ADDITION
            for v in op.outputs
        }
        return frozenset(
            v
            for op, group in zip(self.graph.ops, groups, strict=False)
            for v in op.inputs
            if group and made.get(v, group) != group
        )

    @cached_property
    def ties(self) -> Mapping[int, Tie]:
        return ties(self.program) if self.holds else {}

    @cached_property
    def phases(self) -> Mapping[int, str]:
        """By first result of a top-level op."""
        pairs = zip(self.graph.ops, self.program.phases, strict=True)
        return {op.outputs[0]: phase for op, phase in pairs if op.outputs}
