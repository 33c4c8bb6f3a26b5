"""Where a forward pass may be cut: at places where little crosses, into parts of little work.

    op        conv   norm   relu   conv   norm   add   relu
    bytes          4      8      4      4      8     8      4      alive across, of a whole batch
    cut                        |                           |

Work is FLOP and, as memory bounds many ops, `INTENSITY` FLOP for each byte that kernels read or write
(a parameter's bytes among them, so tables of embeddings are work too).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf

import numpy as np

from ...ir.graph import Graph
from ...ir.ops import KERNELS
from ...ir.rules import rule_of
from ..cost.flop import flop

INTENSITY = 200.0  # FLOP that devices do while they move a byte: A100 153, H100 295 (datasheets, bf16 dense)
FINEST = 1 / 16  # share of the work that a part may have
WIDEST = 4.0  # times the median of what crosses: logits are wider, early activations of an image model are not


@dataclass(frozen=True)
class OpOrder:
    """The ops of a graph in order: `work[i]` of op i in the forward pass, else 0; `crossing[p]` bytes that ops
    before position p make and forward ops from p on read."""

    work: np.ndarray
    crossing: np.ndarray

    @classmethod
    def of(cls, graph: Graph, forward: Collection[str]) -> OpOrder:
        """`forward`: tags of the ops of the forward pass."""
        inside = np.array([op.tag in forward for op in graph.ops])
        made: dict[int, int] = {}
        last: dict[int, int] = {}
        for at in np.flatnonzero(inside):
            made |= dict.fromkeys(graph.ops[at].outputs, int(at))
            last |= {v: int(at) for v in graph.ops[at].inputs if v in made}
        change = np.zeros(len(graph.ops) + 2)
        for value, end in last.items():
            change[made[value] + 1] += graph.types[value].nbytes
            change[end + 1] -= graph.types[value].nbytes
        return cls(_work(graph, inside), np.cumsum(change))

    @cached_property
    def total(self) -> float:
        return float(self.work.sum())

    @cached_property
    def _widest(self) -> float:
        return WIDEST * float(np.median(self.crossing[:-2][self.work > 0]))

    def cuts(self, first: int, end: int, closed: Collection[int] = ()) -> list[int]:
        """Positions after `first` where a stretch is cut: the fewest bytes across in all such that no part has
        more than its share of the work, but for what cannot be cut. None of them is in `closed`."""
        most = FINEST * self.total
        busy = [p for p in range(first, end) if self.work[p]]
        places = [p for p in busy[1:] if self.crossing[p] <= self._widest and p not in closed]
        if not places or self.work[first:end].sum() <= 2 * most:
            return []
        bounds = [first, *places, end]
        atoms = [float(self.work[a:b].sum()) for a, b in pairwise(bounds)]
        return [bounds[i] for i in _least_across(atoms, [self.crossing[p] for p in places], most)]

    def middle(self, first: int, end: int) -> int | None:
        """Where a layer is cut in two: little crosses, no more than half as much again as between layers, and
        each part has a quarter of the work."""
        sums = np.array([0.0, *accumulate(self.work[first:end])])
        share = sums / max(sums[-1], 1e-30)
        bytes_ = self.crossing[first:end]
        usable = [
            i for i in range(1, end - first) if self.work[first + i] and 0.25 <= share[i] <= 0.75
        ]
        usable = [i for i in usable if bytes_[i] <= 1.5 * bytes_[0]]
        best = min(usable, key=lambda i: (bytes_[i], abs(share[i] - 0.5)), default=None)
        return None if best is None else first + best


def _least_across(atoms: list[float], across: list[float], most: float) -> list[int]:
    """Which borders between atoms to cut at: border i is before atom i, and `across[i - 1]` bytes cross it.

    A part has at most so much work, or one atom that has more and little besides.
    """
    least, came = [0.0], [0]
    for end in range(1, len(atoms) + 1):
        best, at, work, largest = inf, end - 1, 0.0, 0.0
        for first in reversed(range(end)):
            work, largest = work + atoms[first], max(largest, atoms[first])
            if work > most and work - largest > most / 4:
                break
            cost = least[first] + (across[first - 1] if first else 0.0)
            if cost < best:
                best, at = cost, first
        least.append(best)
        came.append(at)
    cuts, at = list[int](), came[-1]
    while at:
        cuts.append(at)
        at = came[at]
    return cuts[::-1]


def _work(graph: Graph, inside: np.ndarray) -> np.ndarray:
    """Bytes count where kernels begin and end alone: the rest is fused with them."""
    found, types = np.zeros(len(graph.ops)), graph.types
    outer: list[int] = []  # of each visit, the position of the op at top level
    for op, times, parents in ((v.op, v.times, v.parents) for v in graph.visits):
        outer.append(outer[parents[0]] if parents else outer[-1] + 1 if outer else 0)
        if inside[outer[-1]]:
            moved = (
                sum(types[v].nbytes for v in (*op.inputs, *op.outputs))
                if op.kind in KERNELS
                else 0.0
            )
            found[outer[-1]] += times * (INTENSITY * moved + flop(op, rule_of(op, types), types))
    return found
