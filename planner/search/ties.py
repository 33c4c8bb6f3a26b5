"""Which of several plans that are as good as each other is taken: the plainest, in the fewest bytes.

1. Naive data parallelism, if it is within the gap that is good enough: what wins less than the
   search would leave open is not worth a layout that nobody expects.
2. Where a layout of an input costs the same seconds as another, the one that holds fewer bytes:
   a batch that is read in parts is not held whole.

Seconds are summed anew after either, so objective and bound claim no more than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, prod

import numpy as np

from ...ir.analysis.batch import batch_dims
from ...ir.rules.rule import Strategy
from ...ir.sharding import Sharding
from ..intra.solve import Answer, answer_of, data_parallel
from ..intra.space import Space
from ..memory.lives import Lifetimes
from ..request import Request
from ..solver.onehot import Choices, Solution, relative_gap
from .candidates import Best, Candidate, SearchResult
from .search import Search

NEAR = 3  # how far from a batch input its readers are looked at
ALL_THE_SAME = 1e-6  # of a step: what all such layouts together may add
SAME = 1e-9  # seconds of two layouts that differ by less than this share of a step are the same


def settled(search: Search) -> SearchResult:
    """What the search has found, or what is as good and plainer, in the fewest bytes.

    Raises:
        PlanError: it has found nothing.
    """
    found = search.result()
    return in_fewest_bytes(replace(found, best=_plainer(search) or found.best))


def in_fewest_bytes(found: SearchResult) -> SearchResult:
    """The same plan with inputs in the fewest bytes that cost no more seconds."""
    best = found.best
    assert best.answer is not None and best.space is not None and best.lives is not None
    choices = best.answer.solution.choices
    assert choices is not None
    leaner = fewer_bytes(_priced_at(best.space, choices), choices)
    answer = _answer(best.space, best.lives, best.answer.solution, leaner)
    seconds = answer.solution.objective or 0.0
    fits = leaner != choices and answer.peak <= max(best.answer.peak, found.problem.limit)
    fits &= seconds <= best.seconds * (1 + ALL_THE_SAME)
    return replace(found, best=replace(best, answer=answer)) if fits else found


def _priced_at(space: Space, choices: Choices) -> Space:
    """The space at prices whose sum is what the step takes under choices, and at most that under others."""
    timed = space.timed(choices)
    return space if timed is None else space.bounding(timed.multipliers)


def _answer(space: Space, lives: Lifetimes, solution: Solution, choices: Choices) -> Answer:
    return answer_of(
        space, lives, replace(solution, choices=choices, objective=space.seconds(choices))
    )


def offer_naive(search: Search) -> None:
    """Begin the search with naive data parallelism, where it fits, so that nothing slower is ever taken."""
    found = naive(search, search.roots()[0])
    if found is not None:
        assert found.candidate is not None and found.answer is not None
        search.trace.note("naive data parallelism is to be beaten:")
        search.offer(found.candidate, found.answer)


def naive(search: Search, root: Candidate) -> Best | None:
    """Data parallelism on the mesh of a candidate, with one microbatch and nothing recomputed, where the request
    allows it and it fits."""
    candidate = replace(root, policy="none", microbatches=1)
    if not _allowed(search.problem.request) or search.least_bytes(candidate) > search.problem.limit:
        return None
    space, lives = search.open(candidate)
    choices = data_parallel(space)
    seconds = space.seconds(choices)
    answer = _answer(space, lives, Solution("feasible", "proof", choices, seconds, 0.0), choices)
    fits = seconds < inf and answer.peak <= search.problem.limit
    return (
        replace(search.best, candidate=candidate, space=space, lives=lives, answer=answer)
        if fits
        else None
    )


def _plainer(search: Search) -> Best | None:
    """Data parallelism on the incumbent's mesh, where it is as good as was asked for."""
    best, bound = search.best, search.lower_bound()
    if best.candidate is None or not _allowed(search.problem.request):
        return None
    if search.floors("none")[1] * (1 - search.problem.request.good_enough) > bound:
        return None
    found = naive(search, best.candidate)
    good = (
        found is not None
        and relative_gap(found.seconds, bound) <= search.problem.request.good_enough
    )
    return found if good else None


def _allowed(request: Request) -> bool:
    """Whether one microbatch with nothing recomputed is among what the user asked for."""
    plain = request.recompute in (None, "none") and request.microbatches in (None, 1)
    return plain and request.search == "exact"


def fewer_bytes(space: Space, choices: Sequence[int]) -> Choices:
    """The same assignment with every input in the fewest bytes that cost no more seconds.

    What reads the batch comes first, from the last reader on: an input is only cut for free where its readers are.
    """
    found = list(choices)
    around: list[list[tuple[int, int]]] = [[] for _ in space.nodes]
    for a, b in space.edges:
        around[a].append((a, b))
        around[b].append((a, b))
    graph = space.program.graph
    slots = {tag: space.homes[tag].node for tag in graph.input_tags}
    batch = {slots[graph.input_tags[position]] for position in batch_dims(graph)}
    readers = _near(around, {node for node in batch if node is not None}) - set(slots.values())
    slack = SAME * space.serial(choices)
    for node in [*sorted(readers, reverse=True), *dict.fromkeys(slots.values())]:
        if node is not None:
            found[node] = _leanest(space, node, around[node], found, slack)
    return tuple(found)


def _near(around: Sequence[Sequence[tuple[int, int]]], nodes: set[int]) -> set[int]:
    """Nodes at most `NEAR` edges away."""
    for _ in range(NEAR):
        nodes = nodes | {node for known in nodes for edge in around[known] for node in edge}
    return nodes


def _leanest(
    space: Space, node: int, around: Sequence[tuple[int, int]], found: Sequence[int], slack: float
) -> int:
    """The choice of one node that cuts most, of those that cost no more than the one it has."""
    seconds, now = space.nodes[node].seconds.copy(), found[node]
    for a, b in around:
        table = space.edges[a, b]
        seconds += table[:, found[b]] if a == node else table[found[a]]
    ways = np.array([_ways(space, choice) for choice in space.nodes[node].choices])
    ways[~(seconds <= seconds[now] + slack)] = 0
    best = int(np.argmax(ways))
    return best if ways[best] > ways[now] else now


def _ways(space: Space, choice: Sharding | Strategy) -> int:
    """Into how many parts a layout, or an op's strategy, cuts."""
    if isinstance(choice, Sharding):
        return choice.ways(space.mesh)
    return prod(size for size, code in zip(space.mesh.shape, choice.axes, strict=True) if code >= 0)
