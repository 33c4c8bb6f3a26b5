"""Whether parts of a step are one program on other values: the same layer, again and again.

    part 0   %7 = dot %1 %w1;  %9 = add %7 %1
    part 1   %12 = dot %9 %w2;  %14 = add %12 %9       names: 7 -> 12, 1 -> 9, w1 -> w2, 9 -> 14

Ops are compared in order, by kind, attributes and regions. What two parts run both, as scalars of the
optimizer, stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import LoweringError
from ..graph import Graph, Op, Region

Names = Mapping[int, int]  # a value of the first part -> what takes its place in another


def names_of(
    graph: Graph, first: Sequence[Sequence[Op]], other: Sequence[Sequence[Op]], number: int
) -> Names:
    """The values of another part, by those of the first that they take the place of.

    Args:
        first: the ops of the first part, in lists that are compared one by one.
        other: the same of the other part, which is called stage `number`.

    Raises:
        LoweringError: the parts differ; says where.
    """
    pairing = _Pairing(graph, number)
    for ours, theirs in zip(first, other, strict=True):
        pairing.lists(ours, theirs)
    return pairing.names


@dataclass
class _Pairing:
    graph: Graph
    number: int
    names: dict[int, int] = field(default_factory=lambda: {})
    back: dict[int, int] = field(default_factory=lambda: {})

    @cached_property
    def _constants(self) -> Mapping[int, object]:
        return {c.value: (self.graph.types[c.value], c.data) for c in self.graph.constants}

    def lists(self, ours: Sequence[Op], theirs: Sequence[Op]) -> None:
        both = {op.outputs for op in ours} & {op.outputs for op in theirs}
        for op in ours:
            if op.outputs in both:
                self._op(op, op)
        rest = [[op for op in ops if op.outputs not in both] for ops in (ours, theirs)]
        for pair in zip(*rest, strict=False):
            self._op(*pair)
        if len(rest[0]) != len(rest[1]):
            last = max(rest, key=len)[-1]
            self._refuse(f"one has {len(rest[0])} ops where the other has {len(rest[1])}", last)

    def _op(self, one: Op, other: Op) -> None:
        if (one.kind, one.attrs, len(one.inputs)) != (other.kind, other.attrs, len(other.inputs)):
            self._refuse(
                f"`{one.kind}` here is `{other.kind}` there, or one with other attributes", other
            )
        self._values(one.inputs, other.inputs, other)
        self._values(one.outputs, other.outputs, other)
        for mine, theirs in zip(one.regions, other.regions, strict=True):
            self._region(mine, theirs, other)

    def _region(self, one: Region, other: Region, op: Op) -> None:
        self._values(one.inputs, other.inputs, op)
        if len(one.ops) != len(other.ops):
            self._refuse("a loop has another body", op)
        for pair in zip(one.ops, other.ops, strict=True):
            self._op(*pair)
        self._values(one.outputs, other.outputs, op)

    def _values(self, ours: Sequence[int], theirs: Sequence[int], op: Op) -> None:
        for a, b in zip(ours, theirs, strict=True):
            if a in self._constants and self._constants[a] == self._constants.get(b):
                continue
            if a in self._constants or b in self._constants:
                self._refuse(f"`{op.kind}` has another constant", op)
            if self.graph.types[a] != self.graph.types[b]:
                self._refuse(f"{self.graph.types[a]} here is {self.graph.types[b]} there", op)
            if self.names.setdefault(a, b) != b or self.back.setdefault(b, a) != a:
                self._refuse(f"`{op.kind}` reads something else", op)

    def _refuse(self, what: str, op: Op) -> None:
        raise LoweringError(
            f"the layers of stages 0 and {self.number} are not alike: {what}.",
            where=op.where, fix="program=stages, which runs any stages",
        )  # fmt: skip
