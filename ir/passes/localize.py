"""From a plan to what one device runs.

Op by op: bring each operand to the layout that the plan wants, run the op on the shard, leave the result as its
strategy says. With microbatches, what the time axis calls the body becomes one `microbatches` op.

    %3 = dot_general %0 %1                  %4 = all_gather %1 (axes=('y',), dim=0)
                                            %5 = dot_general %0 %4  cut 0=x

`localize_ops.py` writes the ops; it is the only place that decides where a collective goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..graph import Op, TensorType
from ..local.program import LocalOp, LocalProgram, Shard
from ..plan import Plan
from ..program import Program
from ..sharding import Sharding
from .decisions import Decisions
from .localize_ops import Scope, Writer, for_reader

NOBODY = for_reader("", "")


def localize(program: Program, plan: Plan, holds: bool = False) -> LocalProgram:
    """The program of each device of the plan's mesh.

    Args:
        program: the plan's graph, prepared with its recompute policy; folded or whole.
        holds: add barriers that XLA needs on CPUs (see `Decisions`).

    Raises:
        LoweringError: the plan has no layout for a value.
    """
    return Localizer(Decisions(plan, program, holds)).whole()


@dataclass(frozen=True)
class LocalPiece:
    """Some ops of a step on one device; `names` are the local values of the graph's."""

    program: LocalProgram
    names: Mapping[int, int]


class Localizer:
    """Localizes a plan's step, whole or in pieces."""

    def __init__(self, decisions: Decisions):
        self.decisions = decisions
        self.plan, self.graph, self.types = decisions.plan, decisions.graph, decisions.types

    def whole(self) -> LocalProgram:
        """The whole step."""
        write = Writer(self.decisions)
        layouts = zip(self.graph.inputs, self.decisions.input_layouts(), strict=True)
        scope = Scope({v: write.taken(v, layout) for v, layout in layouts})
        inputs = tuple(scope.names.values())
        write.constants(scope)
        if self.decisions.time is None:
            write.run(self.graph.ops, scope)
        else:
            write.in_time(scope, self.decisions.time)
        outputs = [
            write.bring(scope.names[value], target, leaving(self.decisions, o))
            for o, (value, target) in enumerate(
                zip(self.graph.outputs, self.decisions.output_layouts(), strict=True)
            )
        ]
        names = (self.graph.input_names, self.graph.output_names)
        return write.program(self.plan.name, inputs, outputs, *names)

    def piece(self, ops: Sequence[Op], given: Mapping[int, Sharding], timed: bool) -> LocalPiece:
        """Ops on values that lie as `given`; if `timed`, in a microbatch."""
        write = Writer(self.decisions)
        constants = self.graph.constant_ids
        known = {v: layout for v, layout in given.items() if v not in constants}
        scope = Scope({v: write.taken(v, layout, timed) for v, layout in known.items()}, timed)
        inputs = tuple(scope.names.values())
        write.constants(scope)
        write.run(ops, scope)
        names = tuple(self.decisions.tags[v] for v in known)
        return LocalPiece(write.program(self.plan.name, inputs, (), names), scope.names)

    def moved(self, kind: TensorType, held: Sharding, target: Sharding) -> LocalProgram:
        """One value brought from one layout to another."""
        write = Writer(self.decisions)
        value = write.new(Shard(kind, held))
        return write.program(self.plan.name, (value,), [write.bring(value, target, NOBODY)])

    def part(self, kind: TensorType, held: Sharding, target: Sharding, dim: int) -> LocalProgram:
        """The current microbatch's part of a value that is there for the whole batch."""
        write = Writer(self.decisions)
        value = write.new(Shard(kind, held))
        return write.program(self.plan.name, (value,), [write.now(value, target, dim, NOBODY)])


def leaving(of: Decisions, position: int) -> LocalOp:
    """Who reads an output of the step: carried state goes back to the slot of its input."""
    graph, entries = of.graph, {o: i for i, o in of.graph.state}
    source = of.tags[graph.outputs[position]]
    if position not in entries:
        return for_reader(graph.output_name(position), "update", source=source)
    entry = entries[position]
    count = graph.input_counts[entry] if graph.input_counts else 1
    return for_reader(of.tags[graph.inputs[entry]], "update", count, source)
