"""On which stage of a pipeline each op of a step lies: by dataflow, with no markers.

    body    runs once per microbatch: forward ops by their position, backward ops where what they
            read was last read in the forward pass, or lower
    early   what the body reads that sees no microbatch: casts of parameters, masks
    late    what comes after the last microbatch: clipping, optimizer, metrics
    free    made of constants alone; every program that reads it makes its own

The rule for a backward op is the least stage of its operands. A gradient lies where it was made; a
forward value, or a parameter, at its `reach`, the last stage whose forward pass reads it. So the
weight gradient of a boundary falls on the later stage, which has both its factors, and the two
gradients of a tied embedding meet on the earlier one. Whatever the operands, gradients only flow
to equal or lower stages, which is all that a schedule needs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from ..analysis.batch import batch_dims
from ..analysis.examples import Examples
from ..graph import Graph, Op
from ..ops import CONTRACTIONS
from ..passes.copies import settles
from ..passes.microbatch import TimeAxis
from ..program import Program


@dataclass(frozen=True)
class Placed:
    """An op on a stage. A barrier may be several, each with the operands of its stage."""

    op: Op
    stage: int


class Classes:
    """The four classes of a program's ops, in program order."""

    def __init__(self, program: Program):
        self.program, self.graph = program, program.graph
        ops = list(enumerate(self.graph.ops))
        rest = [
            (i, op) for i, op in ops if i not in self._body and not set(op.outputs) <= self.free
        ]
        late, self.made = set[int](), set[int]()
        for i, op in ops:
            if i in self._body:
                self.made.update(op.outputs)
            elif not (self.made.isdisjoint(op.inputs) and late.isdisjoint(op.inputs)):
                late.update(op.outputs)
        leads = {v for i, op in ops if i in self._body for v in op.inputs}
        for _, op in reversed(rest):
            if not leads.isdisjoint(op.outputs):
                leads.update(op.inputs)
        self.early = [
            op for _, op in rest if not leads.isdisjoint(op.outputs) and late.isdisjoint(op.outputs)
        ]
        before = {op.outputs for op in self.early}
        self.late = [op for _, op in rest if op.outputs not in before]
        self.forward, self.backward = self._passes()

    @cached_property
    def free(self) -> frozenset[int]:
        """Values that depend on no input of the step."""
        found = set(self.graph.constant_ids)
        for op in self.graph.ops:
            if found.issuperset(op.inputs):
                found.update(op.outputs)
        return frozenset(found)

    @cached_property
    def _body(self) -> frozenset[int]:
        time = self.program.time
        return time.body if isinstance(time, TimeAxis) else self._between(self._of_batch())

    def _of_batch(self) -> set[int]:
        """Without a time axis: what the passes make of the batch."""
        dims = batch_dims(self.graph)
        examples = Examples(self.graph.types)
        for position in dims or range(len(self.graph.inputs)):
            examples.depends.add(self.graph.inputs[position])
        examples.run(self.graph.ops)
        passes = zip(self.graph.ops, self.program.phases, strict=True)
        return {
            i
            for i, (op, phase) in enumerate(passes)
            if phase in ("forward", "backward")
            and not examples.depends.isdisjoint((*op.inputs, *op.outputs))
        }

    def _between(self, body: set[int]) -> frozenset[int]:
        """Those ops, and what lies on a way from one to another."""
        after = _reached(self.graph.ops, body, lambda op: (op.inputs, op.outputs))
        flipped = {len(self.graph.ops) - 1 - i for i in body}
        before = _reached(self.graph.ops[::-1], flipped, lambda op: (op.outputs, op.inputs))
        return frozenset(body | {i for i in after if len(self.graph.ops) - 1 - i in before})

    def _passes(self) -> tuple[list[Op], list[Op]]:
        """The body's ops of the forward and of the backward pass."""
        forward, backward, gradients = list[Op](), list[Op](), set[int]()
        for i, op in enumerate(self.graph.ops):
            if i not in self._body:
                continue
            if self.program.phases[i] == "backward" or not gradients.isdisjoint(op.inputs):
                backward.append(op)
                gradients.update(op.outputs)
            else:
                forward.append(op)
        return forward, backward


def _reached(
    ops: Sequence[Op],
    start: Iterable[int],
    ends: Callable[[Op], tuple[tuple[int, ...], tuple[int, ...]]],
) -> set[int]:
    """Positions that one can come to from `start`, against or along the arrows."""
    first, found, values = set(start), set[int](), set[int]()
    for i, op in enumerate(ops):
        source, target = ends(op)
        if i in first or not values.isdisjoint(source):
            found.add(i)
            values.update(target)
    return found


class Places:
    """Where the ops of the body lie, and from which stage on a value is out of use in forward."""

    def __init__(self, classes: Classes, captured: Graph, cuts: Sequence[int]):
        self.classes, self.cuts = classes, cuts
        self._position = {v: i for i, op in enumerate(captured.ops) for v in op.outputs}
        self.forward = self._forward()
        self.stage_of = {v: placed.stage for placed in self.forward for v in placed.op.outputs}
        self.backward = self._backward()
        self.stage_of |= {v: placed.stage for placed in self.backward for v in placed.op.outputs}

    # ------------------------------------------------------------ forward

    def _forward(self) -> list[Placed]:
        """By position; a copy lies with its first reader, so that what crosses is not yet gathered."""
        stage_of: dict[int, int] = {}
        first: dict[int, int] = {}
        for op in reversed(self.classes.forward):
            stage = self._stage_at(op)
            if stage is None:
                stage = min(
                    (first[v] for v in op.outputs if v in first), default=len(self.cuts) - 1
                )
            stage_of[op.outputs[0]] = stage
            for v in op.inputs:
                first[v] = min(stage, first.get(v, stage))
        return [Placed(op, stage_of[op.outputs[0]]) for op in self.classes.forward]

    def _stage_at(self, op: Op) -> int | None:
        at = self._position.get(op.outputs[0])
        return None if at is None else max(0, bisect_right(self.cuts, at) - 1)

    @cached_property
    def reach(self) -> Mapping[int, float]:
        """The last stage whose forward pass reads a value, itself or what is prepared of it."""
        last: dict[int, float] = dict(self.stage_of)
        for placed in self.forward:
            for v in placed.op.inputs:
                last[v] = max(placed.stage, last.get(v, 0))
        for op in reversed(self.classes.early):
            below = [last[v] for v in op.outputs if v in last]
            for v in op.inputs if below else ():
                last[v] = max(*below, last.get(v, 0))
        for op in self.classes.early:
            above = min((last[v] for v in op.inputs if v in last), default=inf)
            last |= {v: last.get(v, above) for v in op.outputs}
        time = self.classes.program.time
        anywhere = (
            set(time.split) & set(self.classes.graph.inputs)
            if isinstance(time, TimeAxis)
            else set[int]()
        )
        return {
            v: stage
            for v, stage in last.items()
            if v not in self.classes.free and v not in anywhere
        }

    # ------------------------------------------------------------ backward

    def _backward(self) -> list[Placed]:
        level = self._levels()
        last: dict[int, int] = {}
        placed: list[Placed] = []
        for op in reversed(self.classes.backward):
            for part, stage in self._parts(op, level, last):
                placed.append(Placed(part, stage))
                for v in part.inputs:
                    last[v] = max(stage, last.get(v, 0))
        return placed[::-1]

    def _levels(self) -> dict[int, float]:
        """The highest stage that may read each value in the backward pass."""
        level: dict[int, float] = dict(self.reach)
        for op in self.classes.backward:
            if op.kind == "optimization_barrier":
                pairs = zip(op.inputs, op.outputs, strict=True)
                level |= {result: level.get(source, inf) for source, result in pairs}
            else:
                least = min((level.get(v, inf) for v in op.inputs), default=inf)
                level |= dict.fromkeys(op.outputs, least)
        return self._lower_sums(level)

    def _lower_sums(self, level: dict[int, float]) -> dict[int, float]:
        """A sum of gradients alone (a bias's, an embedding's) goes down to where else those gradients go,
        or to the parameter that it is for."""
        lowest: dict[int, float] = {}  # value -> least level of its readers in the body
        sums: list[Op] = []
        settling = [op for op in self.classes.backward if settles(op)]
        for op in reversed(self.classes.backward):
            if settles(op):
                continue
            read = any(v in lowest for v in op.outputs)
            if (
                not read
                and op.kind not in CONTRACTIONS
                and all(self._from_above(v, level) for v in op.inputs)
            ):
                sums.append(op)
                continue
            for source, least in self._reads(op, level, lowest):
                lowest[source] = min(least, lowest.get(source, inf))
        for op in sums:
            least = min(lowest.get(v, level.get(v, inf)) for v in op.inputs)
            goal = min((self._goals[v] for v in op.outputs if v in self._goals), default=inf)
            level |= dict.fromkeys(op.outputs, min(least, goal, level[op.outputs[0]]))
        return level | {op.outputs[0]: level[op.inputs[0]] for op in settling}

    @cached_property
    def _goals(self) -> Mapping[int, int]:
        """Value after the passes -> the first stage whose forward pass reads the parameter that it is for."""
        graph = self.classes.graph
        first: dict[int, int] = {}
        for placed in self.forward:
            for v in placed.op.inputs:
                first[v] = min(placed.stage, first.get(v, placed.stage))
        for op in reversed(self.classes.early):
            read = [first[v] for v in op.outputs if v in first]
            for v in op.inputs if read else ():
                first[v] = min(*read, first.get(v, read[0]))
        goals = {
            graph.outputs[o]: first[graph.inputs[i]]
            for i, o in graph.state
            if graph.inputs[i] in first
        }
        for op in reversed(self.classes.late):
            least = min((goals[v] for v in op.outputs if v in goals), default=None)
            if least is not None:
                goals |= {
                    v: min(least, goals.get(v, least)) for v in op.inputs if graph.types[v].rank
                }
        copies = [op for op in self.classes.backward if settles(op)]
        return goals | {
            op.inputs[0]: goals[op.outputs[0]] for op in copies if op.outputs[0] in goals
        }

    def _from_above(self, value: int, level: Mapping[int, float]) -> bool:
        return value in self._gradients or value in self.classes.free or level.get(value) == inf

    def _reads(
        self, op: Op, level: Mapping[int, float], lowest: Mapping[int, float]
    ) -> list[tuple[int, float]]:
        if op.kind == "copy":
            return [(op.inputs[0], lowest.get(op.outputs[0], inf))]
        return [(v, level[op.outputs[0]]) for v in op.inputs]

    @cached_property
    def _gradients(self) -> frozenset[int]:
        return frozenset(v for op in self.classes.backward for v in op.outputs)

    def _parts(
        self, op: Op, level: Mapping[int, float], last: Mapping[int, int]
    ) -> list[tuple[Op, int]]:
        """The op where it lies: at its level, or, where that is any stage, with its highest reader."""
        if op.kind != "optimization_barrier":
            stage = self._settle(level[op.outputs[0]], op, last)
            return [(op, stage)]
        stages = {v: self._settle(level[v], replace(op, outputs=(v,)), last) for v in op.outputs}
        return [
            (_portion(op, stages, stage, level), stage) for stage in sorted(set(stages.values()))
        ]

    def _settle(self, level: float, op: Op, last: Mapping[int, int]) -> int:
        readers = [last[v] for v in op.outputs if v in last]
        if readers and (level == inf or op.kind == "copy"):
            return max(readers)
        return len(self.cuts) - 1 if level == inf else int(level)


def _portion(op: Op, stages: Mapping[int, int], stage: int, level: Mapping[int, float]) -> Op:
    """A barrier's results on one stage, held back by what may be read there."""
    pairs = zip(op.inputs, op.outputs, strict=True)
    kept = [(source, result) for source, result in pairs if stages[result] == stage]
    return replace(op, inputs=tuple(s for s, _ in kept), outputs=tuple(r for _, r in kept))
