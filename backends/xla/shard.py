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

from ...ir.rule import Dim, Rule

Params = dict[str, Any]
Arrays = Sequence[jax.Array]


@dataclass(frozen=True)
class Cut:
    """This shard holds part `index` (an int, or an int32 scalar being traced) of `ways`."""

    index: Any
    ways: int
    moment: Moment | None = None  # where the factor is cut over time too


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
    cuts: Mapping[int, Cut]

    def size(self, dim: Dim) -> int:
        return self.whole_size(dim) // prod(self.cuts[f].ways for f in dim if f in self.cuts)

    def whole_size(self, dim: Dim) -> int:
        return prod(self.rule.factors[f].size for f in dim)

    def shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        return tuple(map(self.size, dims))

    def cut(self, dim: Dim) -> int | None:
        """The factor of this dim that is cut, if one is."""
        return next((f for f in dim if f in self.cuts), None)

    def offset(self, factor: int) -> Any:
        """Where this shard's part of a factor begins."""
        return self.cuts[factor].index * (self.rule.factors[factor].size // self.cuts[factor].ways)

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
        return reduce(and_, (jnp.asarray(self.cuts[f].index == 0) for f in factors))


Emitter = Callable[[Local, Any, Params, Arrays], list[jax.Array]]
