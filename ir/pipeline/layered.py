"""A step whose stages hold equal layers, as one program that every stage runs on values of its own.

    cut       front | layers of stage 0 | layers of stage 1 | ... | back
    becomes   front, back    for all stages alike: embeddings, head and loss
              layers         stage 0's, in its numbers; `names` tell what they are on other stages

What a stage's layers take from the stage before is what they make for the next, under other numbers: a ring.
After the last microbatch the layers' parameters are updated by each stage on its own, all else by all alike;
where that needs scalars of the layers, as norms of gradients, they are gathered first: a new round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..analysis.alike import Names, names_of
from ..errors import LoweringError
from ..graph import Graph, Op
from ..passes.microbatch import TimeAxis
from ..program import Program
from .stages import Stages

STAGES = "program=stages, which runs any stages"


@dataclass(frozen=True)
class Round:
    """Ops after the last microbatch: first `gathered` scalars of all stages' layers, in stage 0's numbers;
    then what all stages run alike, then each its own."""

    gathered: tuple[int, ...]
    alike: tuple[Op, ...]
    own: tuple[Op, ...]


@dataclass(frozen=True)
class LayerPasses:
    """Ops of one microbatch through a part."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]


@dataclass(frozen=True)
class Layered:
    """The parts, and the values that go between them.

    Values of layers are in stage 0's numbers. `taken[i]` comes from the stage before, where it is `made[i]`;
    to stage 0 it comes from the front, under its own number. `wanted[i]` comes back from the stage after,
    where it is `returned[i]`; to the last stage it comes from the back. `fed` are values of the front that
    all layers read. `to_back` are results of the last stage's layers that the back reads, `to_front` what the
    front reads of stage 0's. `inputs` and `outputs` are positions of the step's, one per stage, of what each
    stage has of its own.
    """

    prepare: tuple[Op, ...]
    front: LayerPasses
    layers: LayerPasses
    back: LayerPasses
    names: tuple[Names, ...]
    taken: tuple[int, ...]
    made: tuple[int, ...]
    fed: tuple[int, ...]
    wanted: tuple[int, ...]
    returned: tuple[int, ...]
    to_back: tuple[int, ...]
    to_front: tuple[int, ...]
    rounds: tuple[Round, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.names)


def layered(program: Program, cut: Stages) -> Layered:
    """Find the one program of a step.

    Args:
        cut: the front, the layers of each of two or more stages, and the back.

    Raises:
        LoweringError: the layers differ, or hand on more than a ring can.
    """
    return _Layering(program, cut).run()


@dataclass
class _Layering:
    program: Program
    cut: Stages

    @property
    def graph(self) -> Graph:
        return self.program.graph

    @property
    def parts(self) -> range:
        """The numbers of the layers' parts; the front is 0, the back one more."""
        return range(1, self.cut.count - 1)

    def run(self) -> Layered:
        self.forward, self.backward = self._without_copies()
        late = self._late()
        own, alike = self._shares(late)
        lists = [[self._prepared(k), self.forward[k], self.backward[k], own[k]] for k in self.parts]
        self.names = [names_of(self.graph, lists[0], each, k) for k, each in enumerate(lists)]
        self.back = [{theirs: ours for ours, theirs in each.items()} for each in self.names]
        taken, fed = self._taken()
        wanted = self._wanted()
        made, returned = self._made(taken), self._returned(wanted)
        self._check_borders(fed)
        inputs = self._inputs(alike)
        last = self.cut.count - 1
        front, layers, back = (LayerPasses(self.forward[k], self.backward[k]) for k in (0, 1, last))
        return Layered(
            prepare=tuple(dict.fromkeys(op for k in (0, 1, last) for op in self._prepared(k))),
            front=front, layers=layers, back=back, names=tuple(self.names),
            taken=taken, made=made, fed=fed, wanted=wanted, returned=returned,
            to_back=tuple(self.back[-1][v] for v in self._reads(last) if self.maker[v] == last - 1),
            to_front=tuple(v for v in self._reads(0) if self.maker[v] == 1),
            rounds=self._rounds(alike, own[1]), inputs=inputs, outputs=self._outputs(inputs),
        )  # fmt: skip

    # ------------------------------------------------------------ passes

    def _prepared(self, part: int) -> tuple[Op, ...]:
        return self.cut.prepare[part].ops

    def _without_copies(self) -> tuple[list[tuple[Op, ...]], list[tuple[Op, ...]]]:
        """Passes of all parts. Layers do without copies of what comes from other parts: those of stage 0 may
        have one where others have none, as the front makes it by another op."""
        found = [f.ops for f in self.cut.forward], [f.ops for f in self.cut.backward]
        gates = self._gates(*found)
        for ops in found:
            ops[:] = [
                tuple(_renamed(op, gates) for op in each if op.outputs[0] not in gates)
                for each in ops
            ]
        for part in self.parts:
            mine = {v for ops in found for op in ops[part] for v in op.outputs}
            copies: dict[int, int] = {}
            for op in (op for ops in found for op in ops[part] if op.kind == "copy"):
                source = copies.get(op.inputs[0], op.inputs[0])
                if source in self.maker and source not in mine:
                    copies[op.outputs[0]] = source
            for ops in found:
                ops[part] = tuple(
                    _renamed(op, copies) for op in ops[part] if op.outputs[0] not in copies
                )
        return found

    def _gates(
        self, forward: list[tuple[Op, ...]], backward: list[tuple[Op, ...]]
    ) -> dict[int, int]:
        """Results of barriers that hold nothing in their part, and what they are of: what another part begins to
        compute again with. It has that in its hands only then, so nothing needs to be held back."""
        found: dict[int, int] = {}
        for ops in zip(forward, backward, strict=True):
            read = {v for each in ops for op in each for v in op.inputs}.union(self.graph.outputs)
            for op in (op for each in ops for op in each if op.kind == "optimization_barrier"):
                if read.isdisjoint(op.outputs):
                    found.update(zip(op.outputs, op.inputs, strict=True))
        return found

    @cached_property
    def maker(self) -> Mapping[int, int]:
        """Value of a microbatch -> the part that makes it; what is made of constants alone each makes for itself."""
        makers: dict[int, list[int]] = {}
        for passes in (self.cut.forward, self.cut.backward):
            for part, fragment in enumerate(passes):
                for v in (v for op in fragment.ops for v in op.outputs):
                    makers.setdefault(v, []).append(part)
        return {v: parts[0] for v, parts in makers.items() if len(set(parts)) == 1}

    def _reads(self, part: int) -> list[int]:
        """What the passes of a part read of other parts."""
        read = dict.fromkeys(
            v for op in (*self.forward[part], *self.backward[part]) for v in op.inputs
        )
        return [v for v in read if self.maker.get(v, part) != part]

    @cached_property
    def _of_forward(self) -> frozenset[int]:
        return frozenset(v for ops in self.forward for op in ops for v in op.outputs)

    def _taken(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stage 0's layers read of the front: what others take from the stage before, and what all read."""
        read = [v for v in self._reads(1) if self.maker[v] == 0 and v in self._of_forward]
        fed = tuple(v for v in read if all(names[v] == v for names in self.names))
        return tuple(v for v in read if v not in fed), fed

    def _made(self, taken: Sequence[int]) -> tuple[int, ...]:
        made = tuple(self.names[1][v] for v in taken)
        for v, source in zip(taken, made, strict=True):
            for stage in range(1, len(self.names)):
                self._check(
                    self.names[stage][v] == self.names[stage - 1].get(source),
                    self.names[stage][v],
                    stage,
                )
        return made

    def _wanted(self) -> tuple[int, ...]:
        """What comes back to stage 0's layers from the next stage."""
        return tuple(v for v in self._reads(1) if self.maker[v] == 2 and v not in self._of_forward)

    def _returned(self, wanted: Sequence[int]) -> tuple[int, ...]:
        for v in wanted:
            self._check(v in self.back[1], v, 0)
        returned = tuple(self.back[1][v] for v in wanted)
        for v, source in zip(wanted, returned, strict=True):
            for stage in range(len(self.names) - 1):
                self._check(
                    self.names[stage][v] == self.names[stage + 1].get(source),
                    self.names[stage][v],
                    stage,
                )
        return returned

    def _check_borders(self, fed: Sequence[int]) -> None:
        """All that parts read of others comes from a neighbour, and the same on each stage."""
        last = self.cut.count - 1
        for part in self.parts:
            for v in self._reads(part):
                ahead = self.maker[v] == part + 1 and v not in self._of_forward
                behind = self.maker[v] == part - 1 and v in self._of_forward
                self._check(ahead or behind or v in fed, v, part - 1)
        for part, neighbour in ((0, 1), (last, last - 1)):
            for v in self._reads(part):
                self._check(self.maker[v] in (0, last, neighbour), v, neighbour - 1)

    def _check(self, holds: bool, value: int, stage: int) -> None:
        if not holds:
            op = next((op for op in self.graph.ops if value in op.outputs), None)
            raise LoweringError(
                f"the layers of stage {stage} hand on {self.graph.types[value]} by another way than their neighbours'.",
                where=op.where if op else "", fix=STAGES,
            )  # fmt: skip

    # ------------------------------------------------------------ after the last microbatch

    def _late(self) -> dict[Op, set[int]]:
        """Ops after the last microbatch, in order, and the parts that run them."""
        found: dict[Op, set[int]] = {}
        for fragments in self.cut.updates:
            for part, fragment in enumerate(fragments):
                for op in fragment.ops:
                    found.setdefault(op, set()).add(part)
        position = {op.outputs: k for k, op in enumerate(self.graph.ops)}
        self._check_late(found)
        return {op: found[op] for op in sorted(found, key=lambda op: position[op.outputs])}

    def _check_late(self, late: Iterable[Op]) -> None:
        """Of the passes only what is summed over the microbatches is read afterwards."""
        time = self.program.time
        totals: Mapping[int, str] = time.totals if isinstance(time, TimeAxis) else {}
        read = {v: op.where for op in late for v in op.inputs} | dict.fromkeys(
            self.graph.outputs, ""
        )
        if found := [v for v in read if v in self.maker and v not in totals]:
            raise LoweringError(
                f"the step keeps {self.graph.types[found[0]]} of each microbatch.", where=read[found[0]],
                fix=f"{STAGES}, or results that are sums over the batch",
            )  # fmt: skip

    def _shares(self, late: dict[Op, set[int]]) -> tuple[dict[int, list[Op]], list[Op]]:
        """Late ops that only one stage's layers have, by part, and those that all stages run alike."""
        self.owner = {v: part for v, part in self.maker.items() if part in self.parts}
        for op, parts in late.items():
            owners = {self.owner[v] for v in op.inputs if v in self.owner}
            floats = not owners and all(self.graph.types[v].rank == 0 for v in op.inputs)
            mine = parts | owners
            if len(mine) == 1 and not mine.isdisjoint(self.parts) and not floats:
                self.owner |= dict.fromkeys(op.outputs, next(iter(mine)))
        readers: dict[int, list[Op]] = {}
        for op in reversed(late):
            if self._only_leads_to_what_is_alike(op, readers):
                for v in op.outputs:
                    self.owner.pop(v, None)
            for v in op.inputs:
                readers.setdefault(v, []).append(op)
        own = {k: [op for op in late if self.owner.get(op.outputs[0]) == k] for k in self.parts}
        return own, [op for op in late if op.outputs[0] not in self.owner]

    def _only_leads_to_what_is_alike(self, op: Op, readers: Mapping[int, Sequence[Op]]) -> bool:
        """Of an op on scalars: a running sum of norms is one stage's own in its first terms only."""
        after = [reader for v in op.outputs for reader in readers.get(v, ())]
        scalars = all(self.graph.types[v].rank == 0 for v in (*op.inputs, *op.outputs))
        return (
            scalars and bool(after) and all(reader.outputs[0] not in self.owner for reader in after)
        )

    def _rounds(self, alike: Sequence[Op], own: Sequence[Op]) -> tuple[Round, ...]:
        level: dict[int, int] = {}
        gathered: dict[int, dict[int, None]] = {}
        mine = {op.outputs for op in own}
        for op in sorted((*alike, *own), key=self._position):
            shared = op.outputs not in mine
            from_layers = [v for v in op.inputs if shared and v in self.owner]
            for v in from_layers:
                self._check(self.graph.types[v].rank == 0, v, self.owner[v] - 1)
            found = [level.get(v, 0) for v in op.inputs]
            found += [level.get(self._name(v), 0) + 1 for v in from_layers]
            level |= dict.fromkeys(op.outputs, max(found, default=0))
            for v in from_layers:
                gathered.setdefault(level[op.outputs[0]], {})[self._name(v)] = None

        def at(ops: Sequence[Op], k: int) -> tuple[Op, ...]:
            return tuple(op for op in ops if level[op.outputs[0]] == k)

        most = max(level.values(), default=0)
        return tuple(
            Round(tuple(gathered.get(k, ())), at(alike, k), at(own, k)) for k in range(most + 1)
        )

    def _name(self, value: int) -> int:
        """Stage 0's name of a value that is a stage's own."""
        return self.back[self.owner[value] - 1][value]

    def _position(self, op: Op) -> int:
        return self._positions[op.outputs]

    @cached_property
    def _positions(self) -> Mapping[tuple[int, ...], int]:
        return {op.outputs: k for k, op in enumerate(self.graph.ops)}

    # ------------------------------------------------------------ borders of the step

    def _inputs(self, alike: Sequence[Op]) -> tuple[tuple[int, ...], ...]:
        position = {v: k for k, v in enumerate(self.graph.inputs)}
        groups = [
            tuple(names[v] for names in self.names) for v in self.graph.inputs if v in self.names[0]
        ]
        groups = [each for each in groups if each[0] != each[1]]
        last = self.cut.count - 1
        shared = (
            *self.forward[0],
            *self.backward[0],
            *self.forward[last],
            *self.backward[last],
            *alike,
        )
        read = {v for op in (*shared, *self._prepared(0), *self._prepared(last)) for v in op.inputs}
        for each in groups:
            apart = len(set(each)) == len(each) and read.isdisjoint(each)
            self._check(apart and position.keys() >= set(each), each[0], 0)
        return tuple(tuple(position[v] for v in each) for each in groups)

    def _outputs(self, inputs: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """Positions of results that are a stage's own: state in the order of the inputs, then others."""
        after = dict(self.graph.state)
        found: list[list[int]] = []
        for part in self.parts:
            state = [after[each[part - 1]] for each in inputs if each[part - 1] in after]
            rest = [
                o
                for o, v in enumerate(self.graph.outputs)
                if self.owner.get(v) == part and o not in state
            ]
            found.append([*state, *rest])
        values = [[self.graph.outputs[o] for o in each] for each in found]
        for mine, names in zip(values, self.names, strict=True):
            same = len(mine) == len(values[0]) and mine == [names.get(v) for v in values[0]]
            self._check(same, (mine or values[0] or [self.graph.outputs[0]])[0], 0)
        return tuple(zip(*found, strict=True))


def _renamed(op: Op, names: Mapping[int, int]) -> Op:
    if names.keys().isdisjoint(op.inputs):
        return op
    return replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))
