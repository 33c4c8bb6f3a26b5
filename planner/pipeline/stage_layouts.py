"""Layouts for the stages of a pipeline that share a mesh, where other stages have other meshes or devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..report.of_pipeline import Rank
from .choices import PipelineConfig
from .priced import Place
from .search import Pipelines
from .stage_memory import StageMemory
from .unit_costs import UnitSeconds, together, unit_seconds
from .watched import Limiting, Watched


@dataclass
class StageLayouts:
    """What one kind of device can do; solutions are kept."""

    pipelines: Pipelines
    solved: dict[tuple[PipelineConfig, tuple[Watched, ...]], Rank | None] = field(
        default_factory=lambda: {}
    )
    parts: dict[int, tuple[tuple[UnitSeconds, ...], StageMemory]] = field(
        default_factory=lambda: {}
    )

    def fastest(
        self, shapes: Iterable[PipelineConfig], watched: tuple[Watched, ...]
    ) -> Rank | None:
        """The layouts with which the slowest of the watched stages, which all must fit, is fastest."""
        best, least = None, float("inf")
        for shape in shapes:
            rank = self._on(shape, watched)
            if rank is None:
                continue
            each = self.costs(rank)[0]
            busy = max(together(stage.runs, each).passes for stage in watched)
            if busy < least:
                best, least = rank, busy
        return best

    def _on(self, shape: PipelineConfig, watched: tuple[Watched, ...]) -> Rank | None:
        if (shape, watched) not in self.solved:
            pipelines, problem = self.pipelines, self.pipelines.problem
            space = pipelines.bounds.likely(shape)
            holdings = pipelines.bounds.holdings(shape.policy, shape.microbatches)
            under = Limiting(holdings, watched, problem.limit)
            found = pipelines.bounds.bound(space, under)[0].choices
            self.solved[shape, watched] = None if found is None else Rank(problem, space, found)
        return self.solved[shape, watched]

    def costs(self, rank: Rank) -> tuple[tuple[UnitSeconds, ...], StageMemory]:
        """Seconds and bytes of units on a rank."""
        if id(rank) not in self.parts:
            policy = rank.problem.policy_of(rank.space.program)
            holdings = self.pipelines.bounds.holdings(policy, rank.space.microbatches)
            overlap = rank.problem.request.execution.within
            seconds = unit_seconds(holdings.cut, rank.space, rank.choices, overlap)
            self.parts[id(rank)] = seconds, StageMemory(holdings, rank.space, rank.choices)
        return self.parts[id(rank)]

    def place(self, rank: Rank, first: int) -> Place:
        """The rank on devices from `first` on."""
        return Place(*self.costs(rank), rank.problem.limit, first, rank.space.mesh.size)
