"""The intra-operator problem of a pipeline's stages: one choice of layouts, the memory of several stages.

The first stages hold most microbatches, the last one has the largest results, so a few are watched; the cut
that follows checks all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...ir.schedule import Schedule, in_flight
from ..memory.aliases import aliases, extended
from ..memory.ledger import Ledger
from ..solver.live import Demand, Live
from ..solver.onehot import Edge
from ..space import Space
from .single import layer_runs, with_ends
from .stage_memory import Holdings, Runs
from .units import Units, runs_of


@dataclass(frozen=True)
class Watched:
    """A stage: its units of each kind, and how many microbatches it holds at most."""

    runs: Runs
    held: float


@dataclass(frozen=True)
class Limited:
    """A problem for the solver; `read` turns what it chose into choices of the space."""

    live: Live
    origins: Mapping[int, np.ndarray]

    def read(self, solved: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            int(self.origins[n][p]) if n in self.origins else p for n, p in enumerate(solved)
        )


def watched_stages(units: Units, schedule: Schedule, single: bool) -> list[Watched]:
    """The first, second and last stage, when each has as many units as the next, or as much work; of a single program,
    all of which have both ends, the first and the last."""
    if single:
        layers, both = layer_runs(units, schedule.stages)
        ticks = float(schedule.microbatches + schedule.stages - 1)
        return [Watched(with_ends(runs, both), ticks) for runs in (layers[0], layers[-1])]
    ranks, each = schedule.ranks, schedule.stages // schedule.ranks
    firsts = units.evenly(ranks)
    ends = [*firsts[1:], len(units)]
    return [
        Watched(runs_of(units, firsts[s], ends[s]), in_flight(schedule, s) / each)
        for s in sorted({0, min(1, ranks - 1), ranks - 1})
    ]


def limited(space: Space, holdings: Holdings, watched: Sequence[Watched], limit: float) -> Limited:
    """Seconds of a space, under the memory of each watched stage."""
    found = aliases(space, holdings.lives)
    demands: list[Demand] = []
    limits: list[np.ndarray] = []
    for stage in watched:
        ledger = Ledger(space, holdings.in_programs(stage.runs))
        shift = sum(each.size for each in limits)
        demands += [
            replace(d, first=d.first + shift, last=d.last + shift) for d in ledger.demands(found)
        ]
        flying = holdings.demands(space, stage.runs, stage.held, shift)
        demands += [
            replace(d, nbytes=d.nbytes[found[d.node].choices()]) if d.node in found else d
            for d in flying
        ]
        limits.append(limit - ledger.fixed())
    origins = {node: alias.choices() for node, alias in found.items()}
    costs = tuple(
        node.seconds[origins[n]] if n in origins else node.seconds
        for n, node in enumerate(space.nodes)
    )
    edges = tuple(Edge(a, b, table) for a, b, table in extended(space, found))
    return Limited(Live(costs, edges, tuple(demands), np.concatenate(limits)), origins)
