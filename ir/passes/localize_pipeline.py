"""From a plan with a pipeline to what each rank runs: the programs of its passes, sends and receives between them.

A pass is a fragment of the step (`pipeline/stages.py`) with all that brings values into it and out of it. Ranks
come to their passes and moves in the common order of `pipeline/instructions.py`; updates go in rounds, each
with an exchange after it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..graph import Graph
from ..local.pipeline import (
    Move,
    MovePhase,
    PassProgram,
    PipelineProgram,
    RankOp,
    RankProgram,
    Run,
    StageInput,
)
from ..local.program import LocalProgram, Shard
from ..pipeline.borders import ProgramBorder, StageLayouts, borders
from ..pipeline.instructions import MOVES, PASSES, Event, events
from ..pipeline.schedule import Kind
from ..pipeline.staged import StagedStep, staged_step
from ..plan import Plan
from .decisions import Decisions
from .localize import leaving
from .localize_ops import Scope, Writer, for_reader


def localize_pipeline(plan: Plan, graph: Graph) -> PipelineProgram:
    """What each rank of a plan runs whose stages have programs of their own.

    Args:
        graph: of the step, composed and with its layers apart as planned.

    Raises:
        PlanError, LoweringError: as `staged_step`.
    """
    step = staged_step(plan, graph)
    layouts = [
        StageLayouts(Decisions(part, step.program, groups=step.groups)) for part in step.parts
    ]
    for stage, each in enumerate(layouts):
        each.know_inputs(step.inputs_of(stage))
    found = borders(layouts, step.cut, frozenset())
    passes = [
        localize_pass(layouts[border.fragment.stage], border, name)
        for border, name in zip(found, pass_names(found), strict=True)
    ]
    return pipeline_program(step, layouts, found, passes)


def pipeline_program(
    step: StagedStep, layouts: Sequence[StageLayouts], found: Sequence[ProgramBorder],
    passes: Sequence[PassProgram],
) -> PipelineProgram:  # fmt: skip
    """The same, of a step whose `borders` were found and whose passes were localized before."""
    useful = tuple(each for each in passes if each.program.outputs)
    named = {each.name: border for each, border in zip(passes, found, strict=True)}
    writer = _RankWriter(step, layouts, {each.name: each for each in useful}, named)
    meshes = tuple(part.mesh for part in step.parts)
    return PipelineProgram(
        step.plan.name, step.plan.microbatches, meshes, useful, tuple(writer.write())
    )


def pass_names(found: Sequence[ProgramBorder]) -> Iterator[str]:
    """`forward 0`, `update 1 0`: what the fragments of a step do, of updates the round, and their stage."""
    rounds = Counter[int]()
    for border in found:
        kind, stage = border.fragment.kind, border.fragment.stage
        if kind == "update":
            yield f"update {rounds[stage]} {stage}"
            rounds[stage] += 1
        else:
            yield f"{kind} {stage}"


# ---------------------------------------------------------------- passes


def localize_pass(layouts: StageLayouts, border: ProgramBorder, name: str) -> PassProgram:
    """What one device runs of a fragment."""
    fragment = border.fragment
    time = layouts.decisions.time
    return PassProgram(
        fragment.stage,
        _PassWriter(layouts, border).write(name),
        tuple(layouts.same.get(v, v) for v in fragment.takes),
        tuple(layouts.same.get(v, v) for v in fragment.takes if v in border.joins),
        tuple((v, time.totals[v]) for v in fragment.totals) if time else (),
        fragment.gives,
        border.sends,
        fragment.results,
    )


class _PassWriter:
    def __init__(self, layouts: StageLayouts, border: ProgramBorder):
        self.layouts, self.border, self.fragment = layouts, border, border.fragment
        self.of, self.into = layouts.decisions, Writer(layouts.decisions)
        self.graph, self.tags = self.of.graph, self.of.tags
        self.scope = Scope(timed=layouts.timed(border.fragment))
        self.phase = "backward" if self.fragment.kind == "weight" else self.fragment.kind

    def write(self, name: str) -> LocalProgram:
        into, fragment, names = self.into, self.fragment, self.scope.names
        inputs = {v: into.new(self._enters(v)) for v in fragment.takes}
        into.constants(self.scope)
        names |= {v: self._entered(v, local) for v, local in inputs.items()}
        into.run(fragment.ops, self.scope)
        kept = (*fragment.totals, *fragment.gives)
        outputs = [names[v] for v in kept]
        outputs += [self._leaves(v) for v in self.border.sends]
        outputs += [self._ends(position) for position in fragment.results]
        left = [self._name(v) for v in (*kept, *self.border.sends)]
        left += [self.graph.output_name(position) for position in fragment.results]
        taken = tuple(self._name(v) for v in fragment.takes)
        return into.program(name, tuple(inputs.values()), outputs, taken, tuple(left))

    def _name(self, value: int) -> str:
        return f"v{value} {self.tags[value]}"

    def _enters(self, value: int) -> Shard:
        """How a value comes: of a joined one what all microbatches made, of the batch all of the stage's part."""
        kind, layout, dim = self.of.types[value], self.layouts[value], self.of.split.get(value)
        if value in self.border.joins:
            return Shard(kind, layout, time=dim).stacked(self.of.plan.microbatches)
        made = self.scope.timed and value not in self.graph.inputs
        return Shard(kind, layout, time=dim if made else None)

    def _entered(self, value: int, local: int) -> int:
        """The value as the ops take it."""
        tag, dim = self.tags[value], self.of.split.get(value)
        why = for_reader(tag, self.phase, source=tag)
        if value in self.border.joins:
            assert dim is not None
            return self.into.joined(local, dim, why)
        if self.scope.timed and value in self.graph.inputs and dim is not None:
            return self.into.now(local, self.layouts[value], dim, why)
        return local

    def _leaves(self, value: int) -> int:
        tag = self.tags[value]
        why = for_reader(tag, self.phase, source=tag)
        return self.into.bring(self.scope.names[value], self.layouts.leaving[value], why)

    def _ends(self, position: int) -> int:
        made = self.scope.names[self.graph.outputs[position]]
        return self.into.bring(made, self.layouts.ends(position), leaving(self.of, position))


# ---------------------------------------------------------------- ranks

_PARTS: dict[str, tuple[str, ...]] = {  # instruction -> the passes it is
    "forward": ("forward",), "backward": ("backward", "weight"), "input-grad": ("backward",),
    "weight-grad": ("weight",),
}  # fmt: skip


@dataclass
class _RankWriter:
    step: StagedStep
    layouts: Sequence[StageLayouts]
    passes: Mapping[str, PassProgram]
    borders: Mapping[str, ProgramBorder]
    ops: dict[int, list[RankOp]] = field(default_factory=lambda: defaultdict(list))

    def write(self) -> Iterator[RankProgram]:
        schedule, stages = self.step.schedule, range(self.step.schedule.stages)
        self._start()
        for event in events(schedule, routes=self._routes()):
            self._event(event)
        for number in range(len(self.step.cut.updates)):
            for stage in stages:
                self._run(f"update {number} {stage}")
            for stage in stages:
                self._hand_on(f"update {number} {stage}", "update", stages)
        for rank, held in enumerate(schedule.held):
            inputs = tuple(each for stage in held for each in self._inputs(stage))
            yield RankProgram(inputs, tuple(self.ops[rank]))

    def _inputs(self, stage: int) -> Iterator[StageInput]:
        """What a stage has at the start: state that lies there, and all else that it reads."""
        graph, carried = self.step.program.graph, {i for i, _ in self.step.program.graph.state}
        for position, where in enumerate(self.step.cut.homes):
            if stage in (where[:1] if position in carried else where):
                value, name = graph.inputs[position], graph.input_name(position)
                yield StageInput(value, stage, self._input(value, stage), name)

    def _input(self, value: int, stage: int) -> Shard:
        return Shard(self.step.program.graph.types[value], self.layouts[stage][value])

    def _start(self) -> None:
        """State goes from where it lies to other stages that read it; then values are made that all passes read."""
        graph = self.step.program.graph
        for position, _ in graph.state:
            value, (home, *others) = graph.inputs[position], self.step.cut.homes[position]
            for stage in others:
                ends = self._input(value, home), self._input(value, stage)
                self._move("start", (value,), home, stage, *ends)
        for stage in range(self.step.schedule.stages):
            self._run(f"prepare {stage}")

    def _routes(self) -> dict[tuple[Kind, int], list[int]]:
        """The stages that take what a pass makes."""
        found: dict[tuple[Kind, int], list[int]] = {}
        for border in self.borders.values():
            kind, stage = border.fragment.kind, border.fragment.stage
            if kind in ("forward", "backward") and border.receivers:
                found[kind, stage] = border.receivers
        return found

    def _event(self, event: Event) -> None:
        rank, each = event[0]
        if each.what in PASSES:
            for kind in _PARTS[each.what]:
                self._run(f"{kind} {each.stage}", each.microbatch)
            if each.what != "weight-grad":
                phase: MovePhase = "forward" if each.what == "forward" else "backward"
                held = self.step.schedule.held[rank]
                self._hand_on(f"{phase} {each.stage}", phase, held, each.microbatch)
        elif each.what in MOVES:
            phase = "forward" if each.what == "send-activation" else "backward"
            self._hand_on(f"{phase} {each.stage}", phase, [each.other], each.microbatch)

    def _run(self, name: str, microbatch: int | None = None) -> None:
        """A pass, if it leaves anything."""
        if name in self.passes:
            rank = self.step.ranks[self.passes[name].stage]
            self.ops[rank].append(Run(name, microbatch))

    def _hand_on(
        self, name: str, phase: MovePhase, stages: Collection[int], microbatch: int | None = None
    ) -> None:
        """What a pass sends to some stages."""
        border = self.borders[name]
        for stage in (s for s in border.receivers if s in stages):
            for message in (m for m in border.messages if stage in m.arrivals):
                leaves = self.passes[name].sent[message.values[0]]
                arrives = replace(leaves, sharding=message.arrivals[stage])
                ends = border.fragment.stage, stage
                self._move(phase, message.values, *ends, leaves, arrives, microbatch)

    def _move(
        self, phase: MovePhase, values: tuple[int, ...], sender: int, receiver: int, leaves: Shard, arrives: Shard,
        microbatch: int | None = None,
    ) -> None:  # fmt: skip
        here, there = self.step.ranks[sender], self.step.ranks[receiver]
        send = Move("send", phase, values, sender, receiver, there, leaves, arrives, microbatch)
        if here == there:
            self.ops[here].append(replace(send, kind="copy", rank=None))
        else:
            self.ops[here].append(send)
            self.ops[there].append(replace(send, kind="receive", rank=here))
