"""FlexFlow's search over the same candidates, for comparison: Markov chains that prove nothing."""

from __future__ import annotations

from ..intra.solve import walk_space
from .candidates import Candidate
from .search import Search


def walk_families(search: Search) -> None:
    """Every finest mesh and recompute policy, in equal shares of the time."""
    roots = search.roots()
    search.open_bounds = {root: min(search.floors(root.policy).values()) for root in roots}
    for root in roots:
        _walk_family(search, root, search.problem.request.time_limit / len(roots))
        search.forget(keep=search.best.candidate)


def _walk_family(search: Search, root: Candidate, seconds: float) -> None:
    """The smallest microbatch count at which a chain finds something that fits."""
    candidate = search.smallest_count(root)
    while candidate is not None and not search.trace.past_deadline():
        search.trace.stopped_by = "time"  # it may fit, whatever the chains meet
        space, lives = search.open(candidate)
        seconds /= 2
        answer = walk_space(
            space, lives, search.problem.limit, time_limit=seconds, seed=search.problem.request.seed
        )
        if answer.solution.choices is not None:
            search.offer(candidate, answer)
        if answer.solution.stopped_by == "interrupt":
            raise KeyboardInterrupt
        if answer.solution.choices is not None:
            return
        candidate = search.next_count(candidate)
