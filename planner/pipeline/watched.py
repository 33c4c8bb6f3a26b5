"""The intra-operator problem of a pipeline's stages: one choice of layouts, the memory of several stages.

The first stages hold most microbatches, the last one has the largest results, so a few are watched; the cut
that follows checks all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from ...ir.pipeline.schedule import Schedule, in_flight
from ..intra.frame import Frame
from ..intra.layouts import Layouts
from ..intra.space import Space
from ..memory.aliases import Alias, aliases, extended
from ..memory.ledger import Ledger
from ..solver.live import Demand, Live
from ..solver.onehot import Edge
from .single import layer_runs, with_ends
from .stage_memory import Holdings, Runs
from .units import Units, runs_of


@dataclass(frozen=True)
class Watched:
    """A stage: its units of each kind, and how many microbatches it holds at most. Or several together, with the
    mean of the microbatches that their layers hold."""

    runs: Runs
    held: float
    stages: int = 1


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


def crowded_stages(units: Units, schedule: Schedule, layers: int) -> list[Watched]:
    """The first and last stage and the fullest one, where the last ones have so many layers and the others fewer the
    more microbatches they hold."""
    ranks, each = schedule.ranks, schedule.stages // schedule.ranks
    flying = [in_flight(schedule, s) / each for s in range(ranks)]
    have = [0] * ranks
    for _ in range(units.repeats):
        room = (s for s in range(ranks) if have[s] < layers)
        have[min(room, key=lambda s: (have[s] + 1) * flying[s])] += 1
    ends = [0, *(units.ends[last - 1] if last else 0 for last in accumulate(have))]
    ends[-1] = len(units)
    most = max(range(ranks), key=lambda s: have[s] * flying[s])
    watched = [s for s in sorted({0, most, ranks - 1}) if ends[s] < ends[s + 1]]
    return [Watched(runs_of(units, ends[s], ends[s + 1]), flying[s]) for s in watched]


class Limiting:
    """Puts spaces under the memory of watched stages, each of `limit` bytes.

    Spaces of one frame differ in seconds alone, so rows of memory are worked out once for all that come one after
    another.
    """

    def __init__(self, holdings: Holdings, watched: Sequence[Watched], limit: float):
        self.holdings, self.watched, self.limit = holdings, watched, limit
        self._known: _Rows | None = None

    def __call__(self, space: Space) -> Limited:
        """Seconds of a space, under that memory."""
        rows = self._known
        if rows is None or rows.frame is not space.frame or rows.layouts is not space.layouts:
            rows = self._known = self._rows(space)
        origins = {node: alias.choices() for node, alias in rows.copies.items()}
        costs = tuple(
            node.seconds[origins[n]] if n in origins else node.seconds
            for n, node in enumerate(space.nodes)
        )
        edges = tuple(Edge(a, b, table) for a, b, table in extended(space, rows.copies))
        return Limited(Live(costs, edges, rows.demands, rows.limits), origins)

    def _rows(self, space: Space) -> _Rows:
        found = aliases(space, self.holdings.lives)
        whole = Ledger(space, self.holdings.lives)
        demands: list[Demand] = []
        limits: list[np.ndarray] = []
        for stage in self.watched:
            ledger = whole.over(self.holdings.in_programs(stage.runs, stage.stages))
            shift = sum(each.size for each in limits)
            demands += [demand.later(shift) for demand in ledger.demands(found)]
            flying = self.holdings.demands(space, stage.runs, stage.held, shift)
            demands += [
                replace(d, nbytes=d.nbytes[found[d.node].choices()]) if d.node in found else d
                for d in flying
            ]
            limits.append(stage.stages * self.limit - ledger.fixed())
        return _Rows(space.frame, space.layouts, found, tuple(demands), np.concatenate(limits))


@dataclass(frozen=True)
class _Rows:
    """Memory of all spaces that have this frame on this mesh; `copies` may share that of what they are of."""

    frame: Frame
    layouts: Layouts
    copies: dict[int, Alias]
    demands: tuple[Demand, ...]
    limits: np.ndarray
