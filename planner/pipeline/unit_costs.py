"""What a solution of the intra-operator problem costs in each kind of unit of the forward pass.

Seconds are sums over the ops of one kind, so a stage of any layers is priced by adding up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.graph import Op
from ...ir.microbatch import TimeAxis
from ..outline import often
from ..space import Space, Transfer
from .units import Cut


@dataclass(frozen=True, slots=True)
class UnitSeconds:
    """One unit: `forward`, `backward`, `weight` of one microbatch, `once` per step; `sent` and `handed` are
    bytes that one device gives to the next stage per microbatch, and once per step to others."""

    forward: float
    backward: float
    weight: float
    once: float
    sent: float
    handed: float

    @property
    def passes(self) -> float:
        """Of one microbatch."""
        return self.forward + self.backward + self.weight


def unit_seconds(cut: Cut, space: Space, choices: Sequence[int]) -> tuple[UnitSeconds, ...]:
    """Of each kind of unit, under one solution."""
    return _Seconds(cut, space, choices).run()


@dataclass
class _Seconds:
    cut: Cut
    space: Space
    choices: Sequence[int]

    def run(self) -> tuple[UnitSeconds, ...]:
        self.tags = self.space.program.value_tags
        self.moves = self._transfers()
        return tuple(map(self._unit, range(len(self.cut.units.names))))

    def _transfers(self) -> dict[tuple[str, str], float]:
        """(source, reader) -> seconds of one run of the layout changes between them."""
        found: dict[tuple[str, str], float] = defaultdict(float)
        for item in self.space.transfers:
            have, wanted = chosen_layouts(item, self.choices)
            if have != wanted:
                table = self.space.layouts.seconds(
                    np.array([have]), np.array([wanted]), item.nbytes, item.phase
                )
                found[item.source, item.reader] += float(table[0, 0])
        return found

    def _unit(self, kind: int) -> UnitSeconds:
        sums: dict[str, float] = defaultdict(float)
        alike = self.cut.units.kinds.count(kind)
        for fragment in self.cut.fragments(kind):
            name = fragment.kind if fragment.kind in ("forward", "backward", "weight") else "once"
            sums[name] += sum(self._op(op) * op.count / alike for op in fragment.ops)
            sums[name] += sum(map(self._result, fragment.results))
        sums["once"] += sum(self._op(op) * op.count / alike for op in self.cut.unread.get(kind, ()))
        stages = self.cut.stages
        once = [*(f[kind] for f in stages.updates)]
        return UnitSeconds(
            sums["forward"], sums["backward"], sums["weight"], sums["once"],
            self._bytes(self.cut.crossing(kind)), sum(self._bytes(v for v, _ in f.sends) for f in once),
        )  # fmt: skip

    def _op(self, op: Op) -> float:
        """One run of an op, what it does to bring its operands included."""
        if op.regions:
            inside = sum(
                often(op, n) * self._op(o)
                for n, region in enumerate(op.regions)
                for o in region.ops
            )
            edges = sum(
                s for (_, reader), s in self.moves.items() if reader.startswith(f"{op.tag}/in")
            )
            return inside + edges
        if op.tag not in self.space.op_node:
            return sum(self.moves.get((self.tags[v], op.tag), 0.0) for v in set(op.inputs))
        own = self.space.own[op.tag]
        brought = sum(
            self.moves.get((source, op.tag), 0.0) for source in {self.tags[v] for v in op.inputs}
        )
        return float(own[self.choices[self.space.op_node[op.tag]]]) + brought

    def _result(self, position: int) -> float:
        """Of bringing a result of the step to its layout."""
        graph = self.space.program.graph
        source = {o: graph.inputs[i] for i, o in graph.state}
        reader = self.tags[source[position]] if position in source else graph.output_name(position)
        return self.moves.get((self.tags[graph.outputs[position]], reader), 0.0)

    def _bytes(self, values: Iterable[int]) -> float:
        return sum(local_bytes(self.space, self.choices, v) for v in values)


def chosen_layouts(item: Transfer, choices: Sequence[int]) -> tuple[int, int]:
    """The layout that a value has, and the one that its reader wants."""
    reader = item.consumer if item.consumer is not None else item.producer
    have, wanted = (
        table[0 if node is None or len(table) == 1 else choices[node]]
        for table, node in ((item.have, item.producer), (item.wanted, reader))
    )
    return int(have), int(wanted)


def local_bytes(space: Space, choices: Sequence[int], value: int) -> float:
    """Of one microbatch's part of a value on one device."""
    sizes, node = all_bytes(space, value)
    return float(sizes[0 if node is None or sizes.size == 1 else choices[node]])


def all_bytes(space: Space, value: int) -> tuple[np.ndarray, int | None]:
    """Of one microbatch's part of a value on one device, for each choice of the node that decides it."""
    graph, time = space.program.graph, space.program.time
    home = space.homes[space.program.value_tags[value]]
    split = isinstance(time, TimeAxis) and value in time.split
    whole = graph.types[value].nbytes / (space.microbatches if split else 1)
    return whole / space.layouts.ways(home.layouts), home.node
