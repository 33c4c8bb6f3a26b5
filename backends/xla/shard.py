"""An op's rule seen from one shard: which part of each factor it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp

from ...ir.rules.rule import Dim, Rule

Params = dict[str, Any]
Arrays = Sequence[jax.Array]


@dataclass(frozen=True)
class ShardPart:
    """This shard holds part `index` (an int, or an int32 scalar being traced) of `ways`."""

    index: Any
    ways: int
    moment: Moment | None = None  # where the factor is cut over time too

    def size(self, whole: int) -> int:
        """Of a factor of this size, how much is here."""
        return whole // self.ways

    def start(self, whole: int) -> Any:
        """Where that begins."""
        return self.index * self.size(whole)

    def within(self, number: Any, many: int, whole: int) -> ShardPart:
        """Part `number` of `many` of what is here."""
        return ShardPart(self.index * many + number, self.ways * many)


@dataclass(frozen=True)
class ShardWindow:
    """This shard holds `length` places of a factor from `first` on."""

    first: Any
    length: int
    moment: None = None

    def size(self, whole: int) -> int:
        return self.length

    def start(self, whole: int) -> Any:
        return self.first

    def within(self, number: Any, many: int, whole: int) -> ShardWindow:
        size = self.length // many
        return ShardWindow(self.first + number * size, size)


Part = ShardPart | ShardWindow


@dataclass(frozen=True)
class Moment:
    """Which rows of the batch microbatch `number` of `count` has: its run of each of `groups` groups, and of
    those this shard part `index`, when they are cut over devices."""

    index: Any
    number: Any
    count: int
    groups: int


@dataclass(frozen=True)
class Local:
    """The op's rule seen from one shard."""

    rule: Rule
    cuts: Mapping[int, Part]

    def size(self, dim: Dim) -> int:
        sizes = {f: self.rule.factors[f].size for f in dim}
        return prod(self.cuts[f].size(n) if f in self.cuts else n for f, n in sizes.items())

    def whole_size(self, dim: Dim) -> int:
        return prod(self.rule.factors[f].size for f in dim)

    def shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        return tuple(map(self.size, dims))

    def cut(self, dim: Dim) -> int | None:
        """The factor of this dim that is cut, if one is."""
        return next((f for f in dim if f in self.cuts), None)

    def offset(self, factor: int) -> Any:
        """Where this shard's part of a factor begins."""
        return self.cuts[factor].start(self.rule.factors[factor].size)

    def positions(self, dim: Dim) -> jax.Array:
        """Where the elements of this shard's part of a dim lie in the whole, as u32[size]."""
        here, factor = jnp.arange(self.size(dim), dtype=jnp.uint32), self.cut(dim)
        if factor is None:
            return here
        moment = self.cuts[factor].moment
        if moment is None:
            return here + jnp.asarray(self.offset(factor)).astype(jnp.uint32)
        rows = here + jnp.asarray(moment.index * len(here)).astype(jnp.uint32)
        run = jnp.uint32(self.whole_size(dim) // (moment.groups * moment.count))
        group = rows // run * jnp.uint32(moment.count) + jnp.asarray(moment.number).astype(
            jnp.uint32
        )
        return group * run + rows % run

    def is_first(self, factors: Sequence[int]) -> Any:
        """Whether this shard is the one that counts what must be counted once."""
        return reduce(and_, (jnp.asarray(self.offset(f) == 0) for f in factors))


Emitter = Callable[[Local, Any, Params, Arrays], list[jax.Array]]
