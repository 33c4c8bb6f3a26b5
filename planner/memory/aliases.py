"""A copy that lies like its source, or a gradient like the new state that lends it its place, is the same memory: a
choice of its own for the solver.

The solver's bytes follow from one node's choice, but whether a copy takes any depends on
two nodes. So the node of a copy has every choice twice: with bytes of its own, or
sharing its source's, which only a source of the same layout allows:

    copy           own [-]  own [x]  shared [-]  shared [x]
    bytes             8        4          0           0
    source [-]        0     a slice       0        forbidden
           [x]    a gather     0      forbidden       0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..intra.space import Space
from .lives import Lifetimes


@dataclass(frozen=True)
class Alias:
    """A node of copies and that of their sources; `same[p, q]`: choices p and q have equal layouts."""

    copy: int
    source: int
    same: np.ndarray
    values: set[int] = field(default_factory=lambda: set())  # the copies that take no memory then

    def choices(self) -> np.ndarray:
        """The node's choices with bytes of their own, then those that may share."""
        return np.concatenate([np.arange(len(self.same)), np.flatnonzero(self.same.any(axis=1))])

    def shared(self) -> np.ndarray:
        """Which of `choices` share their source's memory."""
        return np.arange(self.choices().size) >= len(self.same)

    def penalty(self) -> np.ndarray:
        """Seconds added to the pairs of `choices` and the source's choices: inf where they lie apart."""
        return np.where(self.shared()[:, None] & ~self.same[self.choices()], np.inf, 0.0)


def aliases(space: Space, lives: Lifetimes) -> dict[int, Alias]:
    """By the node of the copies. Copies of a second source in one node keep their own bytes."""
    found: dict[int, Alias] = {}
    for copy, source in lives.copies.items():
        mine, its = (space.homes[space.program.value_tags[v]] for v in (copy, source))
        if mine.node is None or its.node is None or mine.node == its.node:
            continue
        same = mine.layouts[:, None] == its.layouts
        alias = found.setdefault(mine.node, Alias(mine.node, its.node, same))
        if alias.source == its.node and np.array_equal(alias.same, same):
            alias.values.add(copy)
    return found


def extended(space: Space, found: dict[int, Alias]) -> Iterator[tuple[int, int, np.ndarray]]:
    """The space's edges between nodes of which those of copies have more choices."""
    origins = {node: alias.choices() for node, alias in found.items()}
    tables = dict(space.edges)
    for alias in found.values():
        pair = min(alias.copy, alias.source), max(alias.copy, alias.source)
        tables.setdefault(pair, np.zeros([len(space.nodes[n].choices) for n in pair]))
    for (a, b), table in sorted(tables.items()):
        table = table[origins[a]] if a in origins else table
        table = table[:, origins[b]] if b in origins else table
        for copy, source in ((a, b), (b, a)):
            if copy in found and found[copy].source == source:
                penalty = found[copy].penalty()
                penalty = penalty[:, origins[source]] if source in origins else penalty
                table = table + (penalty if copy == a else penalty.T)
        yield a, b, table
