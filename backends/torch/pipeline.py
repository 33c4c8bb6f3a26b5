"""A pipelined step as one rank of a stage runs it: the runtime's driver on local programs.

steps = PipelineSteps(program, arrays, state, rank, meet, post)
steps.give(0, tensor)              # whole inputs, by position
steps.run()                        # results that are state are the next step's inputs
steps.result(3)                    # the part of a result that this rank holds, None on ranks of other stages
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.driver import PipelineDriver
from ..runtime.programs import StageDevices, StageProgram
from . import held
from .collectives import Communicator
from .dtypes import torch_dtype
from .handover import Post, RankMesh
from .held import Shard
from .local_step import JOIN, LocalStep, start
from .lower import arrays_in
from .lower_pipeline import StagedProgram, StagePart, StagePass
from .runtime import Held, RankDevices

Tensor = torch.Tensor


class PipelineSteps:
    """Step after step on one rank.

    Args:
        arrays: constants of the graph that are arrays.
        state: positions of inputs, and of the outputs that take their place in the next step.
        rank: of all stages' ranks.
        meet: how this rank meets others of a mesh that it belongs to.
        post: how ranks hand values to each other.

    Raises:
        LoweringError: torch has no such op or element type.
    """

    def __init__(
        self, program: StagedProgram, arrays: Mapping[int, Tensor], state: Sequence[tuple[int, int]], rank: int,
        meet: Callable[[RankMesh], Communicator], post: Post,
    ):  # fmt: skip
        self.program, self.state, self.rank = program, tuple(state), rank
        self._next = dict(state)
        self.leaves: list[Any] = [None] * len(program.graph.inputs)
        self._results: list[Held] = []
        self.driver = PipelineDriver(
            RankDevices(rank, program.rank_count, post), program.schedule, program.ranks, program.graph, program.cut,
            [_stage_devices(stage) for stage in program.stages],
            {each.program.name: _stage_program(program, each, arrays, rank, meet) for each in program.passes},
            in_turn=False,
        )  # fmt: skip

    def give(self, position: int, whole: Tensor) -> None:
        """A whole input, which this rank keeps if one of its stages reads it."""
        self.leaves[position] = whole if self._reads(position) else None

    def held(self, position: int) -> Shard | None:
        """The part of an input of the next step that this rank holds, if it holds any."""
        leaf = self.leaves[position]
        if not isinstance(leaf, Held):
            return None if leaf is None else held.whole(leaf)
        if leaf.part is None:
            return None
        layout = self.program.outputs[self._next[position]][1]
        return held.held(leaf.part, layout, leaf.ranks.mesh, self.rank - leaf.ranks.first)

    def room(self, position: int) -> Shard | None:
        """A place for what this rank is to hold of an input: state where the step leaves it, other inputs whole."""
        graph = self.program.graph
        kind = graph.types[graph.inputs[position]]
        if position not in self._next:
            return held.place(kind) if self._reads(position) else None
        ranks, layout = self.program.outputs[self._next[position]]
        if self.rank not in ranks.ranks:
            return None
        return held.room(kind, layout, ranks.mesh, self.rank - ranks.first)

    def put(self, position: int, shard: Shard | None) -> None:
        """An input as `room` said, filled."""
        part = None if shard is None else shard.tensor
        if position in self._next:
            ranks, _ = self.program.outputs[self._next[position]]
            self.leaves[position] = Held(ranks, part)
        else:
            self.leaves[position] = part

    def _reads(self, position: int) -> bool:
        """Whether a stage of this rank reads an input; one that no stage reads is kept by the first."""
        return any(self.driver.here[stage] for stage in self.program.cut.homes[position] or (0,))

    def run(self) -> None:
        """One step.

        Raises:
            ProcessError: another rank ended, or did not come by the deadline; with the instruction that waited.
        """
        found = self.driver.run(self.leaves)
        places = zip(self.program.outputs, found, strict=True)
        self._results = [Held(ranks, part) for (ranks, _), part in places]
        for into, out in self.state:
            self.leaves[into] = self._results[out]

    def result(self, position: int) -> Tensor | None:
        """The part of an output of the last step that this rank holds."""
        return self._results[position].part

    def living(self) -> list[Tensor]:
        """What is there between two steps."""
        parts = [x.part if isinstance(x, Held) else x for x in (*self.leaves, *self._results)]
        return [x for x in parts if isinstance(x, Tensor)]


def _stage_devices(stage: StagePart) -> StageDevices:
    def zeros() -> list[Tensor]:
        return [
            start(join, kind.shape, torch_dtype(kind.dtype)) for join, kind in stage.totals.values()
        ]

    return StageDevices(stage.ranks, stage.inputs, stage.same, tuple(stage.totals), zeros)


def _stage_program(
    program: StagedProgram, part: StagePass, arrays: Mapping[int, Tensor], rank: int,
    meet: Callable[[RankMesh], Communicator],
) -> StageProgram:  # fmt: skip
    """A fragment as the driver calls it; on a rank of another stage, which is never called, nothing."""
    border, stage = part.border, program.stages[part.border.fragment.stage]
    call: Callable[..., Any] = _elsewhere
    if rank in stage.ranks.ranks:
        number = rank - stage.ranks.first
        call = _Pass(program, part, arrays, number, meet(stage.ranks)).call
    return StageProgram(
        border.fragment, border.donates, border.keeps, border.joins, border.messages, call
    )


def _elsewhere(*_: object) -> Any:
    raise AssertionError("a pass of a stage that is not here")


@dataclass(eq=False)
class _Pass:
    program: StagedProgram
    part: StagePass
    arrays: Mapping[int, Tensor]
    rank: int
    communicator: Communicator
    steps: dict[int | None, LocalStep] = field(default_factory=dict[Any, LocalStep])

    def call(
        self, moment: int, given_up: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Any, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """See `StageProgram`. Nothing is given up but the totals so far."""
        part, found = self.part.program, iter(self._run(moment, kept))
        totals = [
            JOIN[join](total, next(found).to(total.dtype))
            for (_, join), total in zip(part.totals, given_up, strict=True)
        ]
        gives = [next(found) for _ in part.gives]
        sent = [
            _together([next(found) for _ in message.values])
            for message in self.part.border.messages
        ]
        return (), totals, gives, sent, list(found)

    def _run(self, moment: int, kept: Sequence[Any]) -> Sequence[Tensor]:
        """What the local program leaves, looked up once for each microbatch."""
        at = moment if self.part.timed else None
        if at not in self.steps:
            local = self.part.program.program
            arrays = arrays_in(local, self.program.graph, self.arrays)
            self.steps[at] = LocalStep(
                local, arrays, self.rank, self.communicator, at, self.program.groups
            )
        taken = zip(self.part.border.keeps, kept, strict=True)
        return self.steps[at](*(self._taken(value, held) for value, held in taken))

    def _taken(self, value: int, held: Any) -> Tensor:
        """A value as the program takes it: what microbatches left side by side, totals in their own type."""
        held = torch.stack(list(held)) if value in self.part.border.joins else held
        return held.to(torch_dtype(self.program.graph.types[value].dtype))


def _together(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars))
