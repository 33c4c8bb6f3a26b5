"""Helpers that passes share: fresh value ids, copies of ops, block instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .graph import Graph, Op, Region, TensorType

BlockInstance = (
    tuple[str, int] | None
)  # a block's name and which of its repeats; None outside blocks


class FreshIds:
    """Hands out new value ids and keeps their types: `types` grows as a pass adds values."""

    def __init__(self, graph: Graph):
        self.types = dict(graph.types)
        self._next = max(self.types, default=-1) + 1

    def value(self, kind: TensorType) -> int:
        value = self._next
        self._next += 1
        self.types[value] = kind
        return value

    def like(self, value: int) -> int:
        return self.value(self.types[value])

    def barrier(self, held: tuple[int, ...], tag: str, count: int) -> Op:
        """Results equal operands, but exist only once every operand does."""
        results = tuple(self.like(v) for v in held)
        return Op("optimization_barrier", held, results, tag=tag, count=count)

    def clone(self, op: Op, names: dict[int, int], suffix: str, count: int) -> Op:
        """A second copy of an op with new results. `names` renames operands and learns the results."""
        inputs = tuple(names.get(v, v) for v in op.inputs)
        outputs = tuple(self.like(v) for v in op.outputs)
        names.update(zip(op.outputs, outputs, strict=True))
        regions = tuple(self._clone_region(region, suffix) for region in op.regions)
        return replace(
            op, inputs=inputs, outputs=outputs, tag=op.tag + suffix, count=count, regions=regions
        )

    def _clone_region(self, region: Region, suffix: str) -> Region:
        names = {v: self.like(v) for v in region.inputs}
        inputs = tuple(names.values())
        ops = tuple(self.clone(op, names, suffix, op.count) for op in region.ops)
        return Region(inputs, ops, tuple(names.get(v, v) for v in region.outputs))


def block_instances(ops: Sequence[Op]) -> list[BlockInstance]:
    """Of each op, read off the tags that `fold` gave."""
    found: list[BlockInstance] = []
    last: dict[str, tuple[int, int]] = {}
    for op in ops:
        block, dot, offset = op.tag.partition(".")
        if not dot or not offset.isdigit():
            found.append(None)
            continue
        repeat, before = last.get(block, (0, -1))
        repeat += int(offset) <= before
        last[block] = (repeat, int(offset))
        found.append((block, repeat))
    return found
