"""Which classes of dims are summed up for the new state of a step, and in which order.

    dims.py finds the classes and the sums; here they are followed to what a step carries on

A class is *within* another when it is summed on the way while the other is kept and was not
summed yet: attention sums over positions for every example apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..graph import Graph, Op, Region
from .dims import DimClasses


@dataclass
class Summed:
    """Facts about the `wanted` classes. `masks`: value -> classes summed up for it, as bits."""

    graph: Graph
    classes: DimClasses
    wanted: Collection[int]
    masks: dict[int, int] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        self.bits = {c: 1 << k for k, c in enumerate(self.wanted)}
        self._depend(self.graph.ops)
        pairs = [(self.graph.inputs[i], self.graph.outputs[o]) for i, o in self.graph.state]
        self.pairs = [(old, new) for old, new in pairs if self.graph.types[old].is_float]

    @property
    def for_state(self) -> set[int]:
        """Those that are summed up for the new value of any state."""
        reached = _union(self.masks, (new for _, new in self.pairs))
        return {c for c, bit in self.bits.items() if bit & reached}

    @property
    def features(self) -> set[int]:
        """Those that some state has whose own new value needs sums over them."""
        return {
            c
            for old, new in self.pairs
            for c in self._of(old)
            if self.bits[c] & self.masks.get(new, 0)
        }

    @property
    def stated(self) -> set[int]:
        """Those that any state has."""
        return {c for old, _ in self.pairs for c in self._of(old)}

    def _of(self, value: int) -> set[int]:
        found = {
            self.classes.find(c)
            for parts in self.classes.dims.get(value, ())
            for c, size in parts
            if size > 1
        }
        return found & self.bits.keys()

    def within(self, among: Collection[int]) -> set[int]:
        """Those that are within one of these classes, which is not within them."""
        reach, others = self._reach, set(among)
        inside = {
            (c, d)
            for result, found in self.classes.sums.items()
            if result in reach
            for c, kept in found
            if c in self.bits
            for d in kept & others
            if c != d and not self.bits[d] & self.masks.get(result, 0)
        }
        return {c for c, d in inside if (d, c) not in inside}

    @property
    def alone(self) -> set[int]:
        """Those whose sums keep nothing else. A gradient sums over the batch and keeps a width."""
        kept = {
            c
            for result, found in self.classes.sums.items()
            if result in self._reach
            for c, others in found
            if others
        }
        return self.bits.keys() - kept

    @cached_property
    def _reach(self) -> set[int]:
        """Values whose numbers enter the new state; without state, a result."""
        reach = {new for _, new in self.pairs} or set(self.graph.outputs)
        reaching(self.graph.ops, self.graph, reach)
        return reach

    # ------------------------------------------------------------ what depends on sums

    def _depend(self, ops: Sequence[Op]) -> None:
        for op in ops:
            mask = _union(self.masks, op.inputs)
            for region in op.returning:  # what decides between branches is a yes or no
                self._depend_inside(op, region)
            for k, result in enumerate(op.outputs):
                ends = [region.outputs[k] for region in op.returning]
                found = _union(self.masks, ends) if ends else mask
                for summed, _ in self.classes.sums.get(result, ()):
                    found |= self.bits.get(summed, 0)
                if found:
                    self.masks[result] = found

    def _depend_inside(self, op: Op, region: Region) -> None:
        consts, carry = op.loop_inputs
        masks, starts = self.masks, region.inputs[consts : consts + carry]
        for outside, inside in zip(op.inputs, region.inputs, strict=True):
            masks[inside] = masks.get(outside, 0)
        for _ in range(carry + 1):
            self._depend(region.ops)
            before = [masks[v] for v in starts]
            for start, end in zip(starts, region.outputs[:carry], strict=True):
                masks[start] |= masks.get(end, 0)
            if before == [masks[v] for v in starts]:
                return


def reaching(ops: Sequence[Op], graph: Graph, reach: set[int]) -> None:
    """Add all values whose numbers enter one of those in `reach`. A yes or no (is it finite?) does not."""
    for op in reversed(ops):
        if reach.isdisjoint(op.outputs):
            continue
        if not op.regions:
            reach.update(v for v in op.inputs if graph.types[v].dtype != "bool")
        for region in op.returning:
            _reaching_inside(op, region, graph, reach)


def _reaching_inside(op: Op, region: Region, graph: Graph, reach: set[int]) -> None:
    consts, carry = op.loop_inputs
    reach.update(i for o, i in zip(op.outputs, region.outputs, strict=True) if o in reach)
    for _ in range(carry + 1):
        reaching(region.ops, graph, reach)
        pairs = zip(region.inputs[consts:], region.outputs[:carry], strict=False)
        ends = {end for start, end in pairs if start in reach}
        if ends <= reach:
            break
        reach |= ends
    reach.update(o for o, i in zip(op.inputs, region.inputs, strict=True) if i in reach)


def _union(masks: Mapping[int, int], values: Iterable[int]) -> int:
    found = 0
    for value in values:
        found |= masks.get(value, 0)
    return found
