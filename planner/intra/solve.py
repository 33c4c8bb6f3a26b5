"""One intra-operator solve: a program on a mesh with a microbatch count under a memory limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from ...ir.analysis.batch import batch_dims
from ...ir.sharding import Sharding
from ..memory.aliases import aliases, extended
from ..memory.ledger import Ledger
from ..memory.lives import Lifetimes
from ..solver.anytime import solve_live
from ..solver.live import Live
from ..solver.mcmc import walk
from ..solver.onehot import Choices, Edge, Solution
from .space import Space


@dataclass(frozen=True)
class Answer:
    """A solve's result. `peak` and `moment` say where the answer's memory is highest."""

    solution: Solution
    peak: float = inf
    moment: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Model:
    """The space as the solver's problem; choice p of node n is the space's `origins[n][p]`."""

    live: Live
    # Only of nodes that differ.
    origins: Mapping[int, np.ndarray] = field(default_factory=lambda: {})

    def lift(self, solution: Solution) -> Solution:
        """The solver's answer in the space's choices."""
        if solution.choices is None:
            return solution
        found = (
            int(self.origins[n][p]) if n in self.origins else p
            for n, p in enumerate(solution.choices)
        )
        return replace(solution, choices=tuple(found))


def live_of(space: Space) -> Live:
    """The space as the solver's problem when nobody asks for memory."""
    edges = tuple(Edge(a, b, matrix) for (a, b), matrix in sorted(space.edges.items()))
    return Live(tuple(node.seconds for node in space.nodes), edges, (), np.zeros(0))


def model_of(space: Space, ledger: Ledger, limit: float) -> Model:
    """The space as the solver's problem under a memory limit.

    The moments are the ticks of the step twice: as the first and as the last of the
    layers that a tick stands for runs.
    """
    found = aliases(space, ledger.lives)
    origins = {node: alias.choices() for node, alias in found.items()}
    costs = tuple(
        node.seconds[origins[n]] if n in origins else node.seconds
        for n, node in enumerate(space.nodes)
    )
    edges = tuple(Edge(a, b, table) for a, b, table in extended(space, found))
    return Model(Live(costs, edges, tuple(ledger.demands(found)), limit - ledger.fixed()), origins)


def solve_space(
    space: Space,
    lives: Lifetimes,
    limit: float,
    *,
    time_limit: float,
    gap: float,
    seed: int = 0,
    cutoff: float = inf,
    probe: float | None = None,
) -> Answer:
    """Minimise predicted seconds with memory at every moment at most `limit`; see `solve_live`."""
    ledger = Ledger(space, lives)
    model = model_of(space, ledger, limit)
    solution = model.lift(
        solve_live(
            model.live, time_limit=time_limit, gap=gap, seed=seed, cutoff=cutoff, probe=probe
        )
    )
    return answer_of(space, lives, solution, ledger)


def answer_of(
    space: Space, lives: Lifetimes, solution: Solution, ledger: Ledger | None = None
) -> Answer:
    """A solution with where its memory is highest."""
    if solution.choices is None:
        return Answer(solution)
    ledger = ledger or Ledger(space, lives)
    return Answer(solution, *ledger.peak(ledger.local_bytes(solution.choices)))


def walk_space(
    space: Space, lives: Lifetimes, limit: float, *, time_limit: float, seed: int = 0
) -> Answer:
    """The same problem by FlexFlow's Markov chains, from data parallelism on: no proof."""
    ledger = Ledger(space, lives)
    model = model_of(space, ledger, limit)
    solution = model.lift(walk(model.live, data_parallel(space), time_limit=time_limit, seed=seed))
    return answer_of(space, lives, solution, ledger)


def data_parallel(space: Space) -> Choices:
    """The batch cut over all devices, as far as it divides, and all state whole on each.

    Every other node, in program order, then takes what costs least after those before it.
    """
    graph = space.program.graph
    batch = {graph.input_tags[position]: dim for position, dim in batch_dims(graph).items()}
    pinned = {
        space.homes[tag].node: _whole_but(space, tag, batch.get(tag)) for tag in graph.input_tags
    }
    before: list[list[tuple[int, np.ndarray]]] = [[] for _ in space.nodes]
    for (a, b), matrix in space.edges.items():
        before[b].append((a, matrix))
    chosen: list[int] = []
    for number, node in enumerate(space.nodes):
        seconds = node.seconds + sum((table[chosen[a]] for a, table in before[number]), 0.0)
        chosen.append(pinned.get(number, int(np.argmin(seconds))))
    return tuple(chosen)


def _whole_but(space: Space, tag: str, dim: int | None) -> int:
    """The layout of an input that cuts `dim` most and nothing else."""
    node = space.homes[tag].node
    assert node is not None
    ways: list[int] = []
    for layout in space.nodes[node].choices:
        assert isinstance(layout, Sharding)
        whole = all(not axes for d, axes in enumerate(layout.dims) if d != dim)
        ways.append(layout.ways(space.mesh) if whole else 0)
    return int(np.argmax(ways))
