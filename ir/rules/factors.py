"""What rule writers share: the call they look at and the factors they collect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..attrs import Attr
from ..graph import TensorType
from ..ops import linear_in
from .rule import Dim, Factor, Rule

Dims = tuple[Dim, ...]
Reduction = Literal["", "sum", "max", "min", "and", "or", "inside"]

FLOATS = frozenset({"bf16", "f16", "f32", "f64", "f8e4m3fn", "f8e5m2", "c64", "c128"})
OWING = FLOATS - {"f8e4m3fn", "f8e5m2"}  # parts of a sum lose most of their bits in a byte
SIGNED = frozenset({"s4", "s8", "s16", "s32", "s64"})
UNSIGNED = frozenset({"u4", "u8", "u16", "u32", "u64"})
INTEGERS = SIGNED | UNSIGNED
NUMBERS = FLOATS | INTEGERS  # what a sum over shards may be made of


class Unusual(Exception):
    """These parameters are outside what the rule covers; the op becomes opaque."""


@dataclass(frozen=True, slots=True)
class OpCall:
    """One op as a rule sees it: attrs and the types of what it reads and writes."""

    kind: str
    attrs: Mapping[str, Attr]
    operands: tuple[TensorType, ...]
    results: tuple[TensorType, ...]

    @property
    def linear(self) -> tuple[tuple[int, ...], ...]:
        """Groups of operands in which ops of this kind are linear."""
        return linear_in(self.kind, len(self.operands))

    def integer(self, name: str) -> int:
        return _integer(self.attrs[name])

    def integers(self, name: str) -> tuple[int, ...]:
        return integers(self.attrs[name])

    def tuples(self, name: str) -> tuple[tuple[int, ...], ...]:
        """A tuple of tuples of integers, such as dimension numbers."""
        return tuple(integers(part) for part in attr_tuple(self.attrs[name]))


def integers(value: Attr) -> tuple[int, ...]:
    return tuple(_integer(item) for item in attr_tuple(value))


def _integer(value: Attr) -> int:
    require(isinstance(value, int))
    assert isinstance(value, int)
    return value


def attr_tuple(value: Attr) -> tuple[Attr, ...]:
    require(isinstance(value, tuple))
    assert isinstance(value, tuple)
    return value


def require(condition: bool) -> None:
    if not condition:
        raise Unusual


RuleWriter = Callable[[OpCall], Rule]
WRITERS: dict[str, RuleWriter] = {}


def rule_for(*kinds: str) -> Callable[[RuleWriter], RuleWriter]:
    """Register the function that writes the rule of these kinds."""

    def register(writer: RuleWriter) -> RuleWriter:
        for kind in kinds:
            assert kind not in WRITERS, kind
            WRITERS[kind] = writer
        return writer

    return register


@dataclass
class Factors:
    """Collects factors while a rule is written: `new(8)` is the Dim of a fresh one.

    A size of 1 needs no factor: its Dim is empty. Dims concatenate with `+`.
    """

    found: list[Factor] = field(default_factory=lambda: [])

    def new(self, size: int, reduction: Reduction = "") -> Dim:
        return self._add(Factor(size, "reduced" if reduction else "parallel", reduction))

    def whole(self, size: int) -> Dim:
        return self._add(Factor(size, "whole"))

    def halo(self, size: int) -> Dim:
        return self._add(Factor(size, "halo"))

    def like(self, shape: Iterable[int]) -> Dims:
        """One parallel factor per dim."""
        return tuple(self.new(size) for size in shape)

    def wholes(self, shape: Iterable[int]) -> Dims:
        return tuple(self.whole(size) for size in shape)

    def rule(
        self,
        operands: Sequence[Dims],
        results: Sequence[Dims],
        linear: Sequence[tuple[int, ...]] = (),
    ) -> Rule:
        return Rule(tuple(self.found), tuple(operands), tuple(results), tuple(linear))

    def _add(self, factor: Factor) -> Dim:
        if factor.size == 1:
            return ()
        self.found.append(factor)
        return (len(self.found) - 1,)


def opaque_rule(operands: Sequence[TensorType], results: Sequence[TensorType]) -> Rule:
    """Nothing is known: every dim is whole."""
    factors = Factors()
    dims = [factors.wholes(kind.shape) for kind in (*operands, *results)]
    split = len(operands)
    return Rule(tuple(factors.found), tuple(dims[:split]), tuple(dims[split:]), opaque=True)
