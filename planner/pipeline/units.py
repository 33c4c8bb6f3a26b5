"""The forward pass in units that a pipeline may be cut between: layers, and what is before and after.

    whole graph   embedding | layer | layer | layer | layer | layer | head
    small graph   embedding | layer | layer (stands for 3)  | layer | head
    kinds             0         1           2                   3      4

Units are found from the blocks of a folded graph; a stage is a run of them. Everything that a pipeline
costs is known per *kind*, so it does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ...ir.blocks import HEAVY, Block, Folded
from ...ir.errors import PlanError
from ...ir.graph import Graph, Op
from ...ir.program import Program
from ...ir.stages import Fragment, Stages, cut_stages

MANY = 1_000_003  # what a repeated layer is counted as, so that its share of a count can be told


@dataclass(frozen=True)
class Units:
    """`kinds[i]` is the kind of unit i of the whole graph, which begins at op `cuts[i]`;
    kind k begins at op `small_cuts[k]` of the small graph, is called `names[k]`, and `repeated[k]`
    says whether it stands for several units there."""

    kinds: tuple[int, ...]
    cuts: tuple[int, ...]
    small_cuts: tuple[int, ...]
    names: tuple[str, ...]
    repeated: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def words(self, first: int, last: int) -> str:
        """Units `first` up to, not including, `last`: "embedding, layers 1-6"."""
        layers = [i for i, kind in enumerate(self.kinds) if self.names[kind] == "layer"]
        inside = [layers.index(i) + 1 for i in layers if first <= i < last]
        ends = [self.names[kind] for i, kind in enumerate(self.kinds) if first <= i < last and i not in layers]
        text = f"layers {inside[0]}-{inside[-1]}" if len(inside) > 1 else f"layer {inside[0]}" if inside else ""
        before = [end for end in ends if end == "start"]
        return ", ".join([*before, *[text] * bool(text), *(end for end in ends if end != "start")])


def find_units(folded: Folded, program: Program) -> Units:
    """Cut places of a folded graph; `program` is its small graph, prepared without recomputation."""
    phase = {op.tag: name for op, name in zip(program.graph.ops, program.phases, strict=True)}
    layers = [b for b in folded.blocks if _is_layer(folded.whole, b, phase)]
    small_at = _small_positions(folded)
    found: list[tuple[int, int, str, bool]] = []  # position, stand-in's position, name, repeated
    at = 0
    for block in layers:
        if _does_something(folded.whole, range(at, block.start), phase):
            found.append((at, small_at[at], "between" if found else "start", False))
        for repeat in range(block.repeats):
            start, kept = block.start + repeat * block.period, block.start + block.kept(repeat) * block.period
            found.append((start, small_at[kept], "layer", block.count(block.kept(repeat)) > 1))
        at = block.start + block.period * block.repeats
    if layers and _does_something(folded.whole, range(at, len(folded.whole.ops)), phase):
        found.append((at, small_at[at], "end", False))
    if not found:
        return Units((0,), (0,), (0,), ("all",), (False,))
    numbers = {place: k for k, place in enumerate(dict.fromkeys(small for _, small, _, _ in found))}
    kinds = tuple(numbers[small] for _, small, _, _ in found)
    of = {numbers[small]: (name, repeated) for _, small, name, repeated in found}
    cuts = (0, *(position for position, _, _, _ in found[1:]))
    small_cuts = (0, *list(numbers)[1:])
    return Units(kinds, cuts, small_cuts, tuple(of[k][0] for k in of), tuple(of[k][1] for k in of))


def _is_layer(graph: Graph, block: Block, phase: Mapping[str, str]) -> bool:
    ops = graph.ops[block.start : block.start + block.period]
    return any(op.kind in HEAVY and phase.get(op.tag) == "forward" for op in ops)


def _does_something(graph: Graph, positions: range, phase: Mapping[str, str]) -> bool:
    return any(phase.get(graph.ops[i].tag) == "forward" for i in positions)


def _small_positions(folded: Folded) -> list[int]:
    """Of each op of the whole graph: how many ops of the small one come before it."""
    kept = [True] * len(folded.whole.ops)
    for block in folded.blocks:
        for repeat in range(block.repeats):
            first = block.start + repeat * block.period
            kept[first : first + block.period] = [block.kept(repeat) == repeat] * block.period
    return [0, *accumulate(kept)]


@dataclass(frozen=True, eq=False)
class Cut:
    """A prepared small program cut into its kinds of units, as if each were a stage."""

    units: Units
    program: Program
    stages: Stages

    @classmethod
    def of(cls, units: Units, program: Program, captured: Graph, microbatches: int) -> Cut:
        """Raises PlanError where the step cannot be pipelined."""
        stages = cut_stages(program, captured, units.small_cuts, microbatches, splits=True)
        return cls(units, program, stages)

    def fragments(self, kind: int) -> Iterator[Fragment]:
        """All that one kind of unit runs."""
        yield self.stages.prepare[kind]
        yield self.stages.forward[kind]
        yield self.stages.backward[kind]
        yield self.stages.weight[kind]
        yield from (fragments[kind] for fragments in self.stages.updates)

    @cached_property
    def owners(self) -> dict[int, frozenset[int]]:
        """Value -> the kinds of units that hold it."""
        found: dict[int, set[int]] = {}
        for kind in range(len(self.units.names)):
            for fragment in self.fragments(kind):
                for value in (v for op in fragment.ops for v in op.outputs):
                    found.setdefault(value, set()).add(kind)
        for value, homes in zip(self.program.graph.inputs, self.stages.homes, strict=True):
            found.setdefault(value, set()).update(homes)
        return {value: frozenset(kinds) for value, kinds in found.items()}

    @cached_property
    def unread(self) -> dict[int, list[Op]]:
        """Kind -> ops whose results only layers that are folded away read (norms of their gradients)."""
        placed = {op.outputs for k in range(len(self.units.names)) for f in self.fragments(k) for op in f.ops}
        found: dict[int, list[Op]] = {}
        owner = {value: max(kinds) for value, kinds in self.owners.items()}
        for op in self.program.graph.ops:
            if op.outputs not in placed and op.kind != "optimization_barrier":
                kind = next((owner[v] for v in op.inputs if v in owner), 0)
                owner.update(dict.fromkeys(op.outputs, kind))
                found.setdefault(kind, []).append(op)
        return found

    @cached_property
    def passes(self) -> dict[str, str]:
        """Op tag -> forward, backward (gradients of what comes in), weight, or once."""
        found: dict[str, str] = {}
        for kind in range(len(self.units.names)):
            for fragment in self.fragments(kind):
                name = fragment.kind if fragment.kind in ("forward", "backward", "weight") else "once"
                found.update((op.tag, name) for op in fragment.ops)
        return found

    def class_of(self, tag: str) -> tuple[str, bool]:
        """The pass of an op, and whether the layers that most units are run it."""
        return self.passes.get(tag, "once"), tag in self._layers

    @cached_property
    def _layers(self) -> frozenset[str]:
        middle = max(range(len(self.units.names)), key=self.units.kinds.count)
        return frozenset(op.tag for fragment in self.fragments(middle) for op in fragment.ops)

    def saved(self, kind: int) -> tuple[int, ...]:
        """Values of one microbatch that the forward pass of a unit leaves for later."""
        return self.stages.forward[kind].gives

    def received(self, kind: int) -> tuple[int, ...]:
        """Values of an earlier unit that a unit's backward pass reads again."""
        late = {v for name in ("backward", "weight") for v in self.stages.of(name, kind).takes}  # type: ignore[arg-type]
        sent = {v for fragment in self.stages.forward for v, to in fragment.sends if to == kind}
        return tuple(sorted(late & sent))

    def kept(self, kind: int) -> tuple[int, ...]:
        """Values that wait for the pass that makes the gradients of weights."""
        return self.stages.weight[kind].takes

    def crossing(self, kind: int) -> tuple[int, ...]:
        """Values that a unit hands to later ones, per microbatch."""
        return tuple(dict.fromkeys(v for v, _ in self.stages.forward[kind].sends))


def counted_as_many(graph: Graph, units: Units) -> Graph:
    """The small graph with its repeated layers counted as `MANY`."""

    def many(op: Op) -> Op:
        return replace(op, count=MANY) if op.count > 1 else op

    counts = tuple(MANY if count > 1 else 1 for count in graph.input_counts)
    return replace(graph, ops=tuple(map(many, graph.ops)), input_counts=counts)


def check_enough(units: Units, stages: int, devices: int) -> None:
    """Raises PlanError where there are fewer units than stages; the fix divides the devices."""
    if len(units) < stages:
        near = [n for n in range(1, len(units) + 1) if devices % n == 0][-3:]
        raise PlanError(
            f"the forward pass has {len(units)} parts to cut between, fewer than {stages} stages.",
            where="request: pp", fix=f"{' or '.join(map(str, near))} stages",
        )  # fmt: skip


def runs_of(units: Units, first: int, last: int) -> tuple[int, ...]:
    """How many units of each kind a stage of units `first` to `last` has."""
    found = [0] * len(units.names)
    for kind in units.kinds[first:last]:
        found[kind] += 1
    return tuple(found)
