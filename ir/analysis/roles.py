"""What each input is for, and where forward ends: by dataflow, with no markers.

The ops of one step, in program order, fall into four phases:

    prepare    sees no batch, feeds what does         casts of parameters, masks
    forward    from the batch to the loss
    backward   from the loss to the gradients         and what is recomputed for them
    update     everything that has left the batch     clipping, optimizer, metrics

The *body* is every op that touches a per-example value (`Examples`) or leads to one that
does. Values leave the body by an *exit*: contracted, and never met by an example again. An
exit that reaches the new value of a parameter is a gradient, any other is a loss or a
metric. An op of the body is backward when no loss lies between it and the first gradient
it reaches; in an op that makes both, the loss comes first. This holds because a program is
traced forward first, loss, then backward; it holds for several losses, recomputation,
unrolled and scanned layers alike. A step that does not return its loss has no such exit:
there backward begins at the cotangent, the last made operand of the first gradient.

Makers of per-example data out of nothing (dropout masks, zeros to scatter into) belong to
the phase of their first reader. The ops of a loop have its phase, except in a loop that
holds losses and gradients both (accumulation, several steps): it is looked at by itself.

Left out: a step that uses one gradient inside another forward pass (meta-learning,
sharpness-aware steps, a discriminator updated before the generator's loss) has only its
last pass told apart; states written by forward and read by it (fp8 scaling history).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Literal

from ..composites.bodies import BOTH
from ..graph import Graph, Op, Region
from ..ops import CONTRACTIONS
from ..rules import rule_of
from .batch import batch_dims
from .examples import Examples

Role = Literal["parameter", "optimizer", "batch", "constant", "other state"]
Phase = Literal["prepare", "forward", "backward", "update"]

_SUMS = CONTRACTIONS | {"reduce_sum", "scatter-add"}
_SCALING = {"mul", "neg", "div", "dot_general", "convert_element_type", "reshape"}


def roles(graph: Graph) -> dict[int, Role]:
    """Input position -> role.

    batch         not carried, has a batch dim
    constant      not carried, the same for every example: a learning rate, frozen weights
    parameter     carried floats that the forward pass reads
    optimizer     carried, read by the update only: moments, counters, averages
    other state   carried: random keys and counters that forward reads, running statistics
    """
    batch = batch_dims(graph)
    look = _look(graph, batch)
    new_value = {i: graph.outputs[o] for i, o in graph.state}
    found: dict[int, Role] = {}
    for position, value in enumerate(graph.inputs):
        if position not in new_value:
            found[position] = "batch" if position in batch else "constant"
        elif value in look.leads:
            is_float = _is_float(graph, value)
            found[position] = "parameter" if is_float else "other state"
        else:
            by_examples = new_value[position] in look.statistics
            found[position] = "other state" if by_examples else "optimizer"
    return found


def phases(graph: Graph, batch: Mapping[int, int]) -> tuple[Phase, ...]:
    """Phase of each op of `graph.visits`; `batch` gives input position -> batch dim."""
    return tuple(_spell(graph.ops, _look(graph, batch)))


def _spell(ops: Sequence[Op], look: _Look) -> list[Phase]:
    """Phases in walk order: ops of a loop after it."""
    found: list[Phase] = []
    for position, op in enumerate(ops):
        found.append(look.phases[position])
        for region in op.regions:
            if position in look.nested:
                found += _spell(region.ops, look.inside(position, region))
            else:
                found.extend(look.phases[position] for _ in range(_size(region.ops)))
    return found


def _size(ops: Sequence[Op]) -> int:
    return sum(1 + sum(_size(region.ops) for region in op.regions) for op in ops)


def _look(graph: Graph, batch: Mapping[int, int]) -> _Look:
    examples = Examples(graph.types)
    for position, dim in batch.items():
        value = graph.inputs[position]
        examples.dims[value] = {dim: graph.types[value].shape[dim]}
        examples.depends.add(value)
    examples.run(graph.ops)
    leads = leading_values(graph.ops, examples)
    goals = {
        graph.outputs[o]
        for i, o in graph.state
        if graph.inputs[i] in leads and _is_float(graph, graph.inputs[i])
    }
    return _Look(graph, graph.ops, examples, frozenset(goals))


def _is_float(graph: Graph, value: int) -> bool:
    return graph.types[value].dtype.startswith(("f", "bf", "c"))


def leading_values(ops: Sequence[Op], examples: Examples, wanted: Iterable[int] = ()) -> set[int]:
    """Values that reach an op which touches examples, and what reaches the `wanted` ones.

    What a loop hands from one round to the next does not count: the moments of an
    optimizer that runs inside a loop lead nowhere, as outside of one.
    """
    leads = set(wanted)
    for op in reversed(ops):
        if not op.regions:
            if examples.holds((*op.inputs, *op.outputs)) or not leads.isdisjoint(op.outputs):
                leads.update(op.inputs)
            continue
        lead = not leads.isdisjoint(op.outputs)
        for region in op.regions:
            ends = zip(op.outputs if region in op.returning else (), region.outputs, strict=False)
            decide = region.outputs if lead and region not in op.returning else ()
            inner = leading_values(
                region.ops, examples, (*(i for o, i in ends if o in leads), *decide)
            )
            leads |= inner
            if inner and op.kind == "cond":
                leads.add(op.inputs[0])
            pairs = zip(op.inputs, region.inputs, strict=True)
            leads.update(o for o, i in pairs if i in inner or i in examples.dims)
    return leads


def _earliest(read: Collection[Phase]) -> Phase:
    """The phase of the first of several readers."""
    if "forward" in read:
        return "forward"
    return "backward" if "backward" in read else "prepare"


@dataclass
class _Look:
    """One list of ops (a step, or a loop looked at by itself).

    `goals`: the values that gradients are for, new parameters or a loop's own results.
    """

    graph: Graph
    ops: Sequence[Op]
    examples: Examples
    goals: Collection[int]
    gradients: dict[int, None] = field(default_factory=lambda: {}, init=False)  # op positions
    losses: list[float] = field(default_factory=lambda: [], init=False)
    statistics: set[int] = field(default_factory=lambda: set(), init=False)

    def __post_init__(self) -> None:
        for position, op in enumerate(self.ops):
            self._find_exits(position, op)

    # ------------------------------------------------------------ body and exits

    @cached_property
    def leads(self) -> set[int]:
        return leading_values(self.ops, self.examples)

    @cached_property
    def body(self) -> list[bool]:
        return [
            self._in_body((*op.inputs, *op.outputs), op.outputs) or self._contracts(position, op)
            for position, op in enumerate(self.ops)
        ]

    def _in_body(self, near: Iterable[int], results: Iterable[int]) -> bool:
        return self.examples.holds(near) or not self.leads.isdisjoint(results)

    def _contracts(self, position: int, op: Op) -> bool:
        """Whether a gradient leaves here by a sum, though no dim shows it: of one sequence, what is dispatched to
        experts is in no order of its own."""
        return position in self.gradients and op.kind in _SUMS

    @cached_property
    def reaches(self) -> set[int]:
        """Values whose numbers enter a goal. A yes or no (are all gradients finite?) does not."""
        return self._reaching(self.goals)

    @cached_property
    def reaches_scalar(self) -> set[int]:
        return self._reaching({v for v in self.goals if self.graph.types[v].rank == 0})

    def _reaching(self, goals: Collection[int]) -> set[int]:
        reach = set(goals)
        if not reach:
            return reach
        for op in reversed(self.ops):
            if not reach.isdisjoint(op.outputs):
                reach.update(v for v in op.inputs if self.graph.types[v].dtype != "bool")
        return reach

    def _find_exits(self, position: int, op: Op) -> None:
        """Note results that have left the body, as gradients or as losses, and what follows losses."""
        examples = self.examples
        if op.kind == BOTH:
            self.losses.append(position - 0.5)  # the loss, before the gradients of the same op
        if not any(v in self._inside for v in op.inputs):
            if not self.statistics.isdisjoint(op.inputs):
                self.statistics.update(op.outputs)
            return
        for value in op.outputs:
            if value in examples.dims or value in self.leads or value not in examples.depends:
                continue
            if self._is_gradient(value):
                self.gradients[position] = None
            else:
                self.losses.append(position)
                self.statistics.add(value)

    @cached_property
    def _inside(self) -> set[int]:
        """Values of the body that depend on the batch."""
        return self.examples.dims.keys() | (self.leads & self.examples.depends)

    def _is_gradient(self, value: int) -> bool:
        scalar = self.graph.types[value].rank == 0
        return value in (self.reaches_scalar if scalar else self.reaches)

    # ------------------------------------------------------------ phases

    @cached_property
    def nested(self) -> frozenset[int]:
        """Loops that hold a forward and a backward pass: no loss before, or one of their own."""
        losses = set(self.losses)
        return frozenset(
            p
            for p in self.gradients
            if self.ops[p].regions
            and (
                p in losses
                or not (
                    self.ops[p].kind == "cond" or self._loss_before(p) or self._carries_examples(p)
                )
            )
        )

    def _loss_before(self, position: int) -> bool:
        return bool(self.losses) and self.losses[0] < position

    def _carries_examples(self, position: int) -> bool:
        return self.examples.holds(self._carried(self.ops[position]))

    def _carried(self, op: Op) -> tuple[int, ...]:
        consts, carry = op.loop_inputs
        return op.inputs[consts : consts + carry]

    def inside(self, position: int, region: Region) -> _Look:
        """A nested loop or branch by itself: its results that are gradients out here are the goals there."""
        op = self.ops[position]
        pairs = zip(op.outputs, region.outputs, strict=True) if region in op.returning else ()
        goals = {inner for outer, inner in pairs if self._is_gradient(outer)}
        return _Look(self.graph, region.ops, self.examples, frozenset(goals))

    @cached_property
    def phases(self) -> list[Phase]:
        backward = self._backward()
        found: list[Phase] = []
        late: set[int] = set()
        for position, op in enumerate(self.ops):
            if not self.body[position]:
                found.append("update")
            elif self._sees_no_batch(op):
                found.append("prepare")
            elif backward[position] or not late.isdisjoint(op.inputs):
                found.append("backward")
                late.update(op.outputs)
            else:
                found.append("forward")
        return self._place_makers(found)

    def _sees_no_batch(self, op: Op) -> bool:
        return self.examples.depends.isdisjoint((*op.inputs, *op.outputs))

    def _backward(self) -> list[bool]:
        """Whether no loss lies between each op and the first gradient that it reaches."""
        losses = self._boundaries()
        first: dict[int, float] = {}
        answer = [False] * len(self.ops)
        for position in range(len(self.ops) - 1, -1, -1):
            op = self.ops[position]
            reached = min((first.get(v, inf) for v in op.outputs), default=inf)
            if position in self.gradients:
                reached = position
            elif not self.body[position]:
                continue
            if reached == inf:
                continue
            for value in op.inputs:
                first[value] = min(first.get(value, inf), reached)
            at = bisect_left(losses, position)
            blocked = at < len(losses) and losses[at] < reached
            answer[position] = not blocked and (reached == position or reached not in self.nested)
        return answer

    def _boundaries(self) -> list[float]:
        """Losses in order; before the first gradient there is always one, made up if need be."""
        first = min(self.gradients, default=None)
        if first is None or first in self.nested or self._loss_before(first):
            return sorted(self.losses)
        return sorted([*self.losses, self._cotangent(first) - 1])

    def _cotangent(self, position: int) -> int:
        """Where the last made per-example operand of a gradient starts to be made: at the
        last number spread over the examples for it, which is the loss's own cotangent."""
        op = self.ops[position]
        operands = self._carried(op) if op.regions and op.kind != "cond" else op.inputs
        made = [self._made[v] for v in operands if v in self._per_example and v in self._made]
        last = max((p for p in made if p < position), default=position)
        return max((p for p in self._before(last) if self._spreads(p)), default=last)

    def _before(self, position: int) -> set[int]:
        """The op at this position and all that it depends on."""
        found, queue = {position}, [position]
        while queue:
            sources = {self._made[v] for v in self.ops[queue.pop()].inputs if v in self._made}
            queue.extend(sources - found)
            found |= sources
        return found

    def _spreads(self, position: int) -> bool:
        """Whether an op spreads one number over the examples, to be scaled by what follows."""
        op = self.ops[position]
        if op.kind != "broadcast_in_dim" or op.outputs[0] not in self._shaped:
            return False
        read = {reader.kind for reader in self.ops if op.outputs[0] in reader.inputs}
        return self.graph.types[op.inputs[0]].rank == 0 and not read.isdisjoint(_SCALING)

    @cached_property
    def _made(self) -> dict[int, int]:
        return {v: position for position, op in enumerate(self.ops) for v in op.outputs}

    # ------------------------------------------------------------ per-example data out of nothing

    @cached_property
    def _per_example(self) -> set[int]:
        return self.examples.dims.keys() | self._shaped.keys()

    @cached_property
    def _shaped(self) -> dict[int, set[int]]:
        """Values that see no batch but have its dims, by what reads them: value -> dims."""
        shaped: dict[int, set[int]] = {}
        for op in reversed(self.ops):
            sources = [v for v in op.inputs if v in self._made and v not in self.examples.depends]
            if not sources or op.regions:
                continue
            if not (
                self.examples.holds((*op.inputs, *op.outputs))
                or any(v in shaped for v in op.outputs)
            ):
                continue
            self._shape_sources(op, sources, shaped)
        return shaped

    def _shape_sources(self, op: Op, sources: list[int], shaped: dict[int, set[int]]) -> None:
        rule = rule_of(op, self.graph.types)
        if rule.opaque:
            return
        dims = self.examples.dims
        batch = set(self.examples.shares(op, rule))
        for value, layout in zip(op.outputs, rule.results, strict=True):
            batch.update(
                f for d in (*dims.get(value, ()), *shaped.get(value, ())) for f in layout[d]
            )
        batch = {f for f in batch if rule.factors[f].size > 1}
        for value, layout in zip(op.inputs, rule.operands, strict=True):
            if value in sources:
                here = {d for d, factors in enumerate(layout) if not batch.isdisjoint(factors)}
                if here:
                    shaped.setdefault(value, set()).update(here)

    def _place_makers(self, found: list[Phase]) -> list[Phase]:
        """Move makers of per-example data to the phase of their first reader.

        What sees no batch and is read by the body is prepared, a loop's zeros too.
        """
        reader: dict[int, Phase] = {}
        for position in range(len(self.ops) - 1, -1, -1):
            op = self.ops[position]
            if any(v in reader for v in op.outputs) and self._sees_no_batch(op):
                found[position] = "prepare"
            if found[position] == "prepare" and any(v in self._shaped for v in op.outputs):
                found[position] = _earliest([reader[v] for v in op.outputs if v in reader])
            if found[position] != "update":
                for value in op.inputs:
                    reader[value] = _earliest({found[position], reader.get(value, found[position])})
        return found
