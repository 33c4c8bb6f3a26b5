"""What a search over plans without a pipeline chooses among, and the best that it has found."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ...ir.mesh import Mesh
from ...ir.passes.recompute import Policy
from ..intra.solve import Answer
from ..intra.space import Space
from ..memory.lives import Lifetimes
from ..problem import Problem
from ..trace import Trace


@dataclass(frozen=True)
class Candidate:
    """One combination of discrete choices outside the ILP."""

    mesh: Mesh
    policy: Policy
    microbatches: int

    def __str__(self) -> str:
        return f"{self.family}, microbatches {self.microbatches}"

    @property
    def family(self) -> str:
        return f"mesh {'×'.join(map(str, self.mesh.shape))}, recompute {self.policy}"


@dataclass
class Best:
    """The incumbent and its evidence."""

    candidate: Candidate | None = None
    space: Space | None = None
    lives: Lifetimes | None = None
    answer: Answer | None = None

    @property
    def seconds(self) -> float:
        objective = self.answer.solution.objective if self.answer else None
        return inf if objective is None else objective


@dataclass(frozen=True)
class SearchResult:
    """What a search has found: the plan of `best`, and that none of its candidates is faster than `lower_bound`."""

    problem: Problem
    best: Best
    lower_bound: float  # seconds
    trace: Trace
