"""An op seen from one shard: which part of each factor of its rule is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ...ir.rules.rule import Dim, Rule


@dataclass(frozen=True)
class Part:
    """This shard holds part `index` of `ways` of a factor.

    Of a factor that is cut over time too, `index` and `ways` count devices alone, and the shard holds the rows of
    microbatch `moment` of `microbatches`: its run of each of `groups` groups of neighbours.
    """

    index: int
    ways: int
    moment: int = 0
    microbatches: int = 1
    groups: int = 1

    @property
    def all_ways(self) -> int:
        return self.ways * self.microbatches


@dataclass(frozen=True)
class View:
    """An op's rule, the parts of factors that are here (all of those not named), and the types of its results."""

    rule: Rule
    cuts: Mapping[int, Part]
    dtypes: tuple[torch.dtype, ...]

    def size(self, dim: Dim) -> int:
        """Of a dim, how much is here."""
        return prod(
            self.rule.factors[f].size // (self.cuts[f].all_ways if f in self.cuts else 1)
            for f in dim
        )

    def whole_size(self, dim: Dim) -> int:
        return prod(self.rule.factors[f].size for f in dim)

    def shape(self, result: int = 0) -> tuple[int, ...]:
        """Of a result as it is here."""
        return tuple(map(self.size, self.rule.results[result]))

    def cut(self, dim: Dim) -> int | None:
        """The factor of this dim that is cut, if one is."""
        return next((f for f in dim if f in self.cuts), None)

    def summed(self, dim: Dim) -> int | None:
        """The factor of this dim that is cut and summed over, if one is."""
        factor = self.cut(dim)
        summed = factor is not None and self.rule.factors[factor].reduction == "sum"
        return factor if summed else None

    def offset(self, factor: int) -> int:
        """Where the part of a factor begins that is here, which is one run of neighbours."""
        part = self.cuts[factor]
        size = self.rule.factors[factor].size // part.all_ways
        return (part.index * part.microbatches + part.moment) * size

    def positions(self, dim: Dim) -> torch.Tensor:
        """Where the elements of the part of a dim that is here lie in the whole, as int64[size]."""
        here, factor = torch.arange(self.size(dim)), self.cut(dim)
        if factor is None:
            return here
        part = self.cuts[factor]
        rows = here + part.index * len(here)  # among those of the microbatch
        run = self.whole_size(dim) // (part.groups * part.microbatches)
        return (rows // run * part.microbatches + part.moment) * run + rows % run

    def is_first(self, factors: Sequence[int]) -> bool:
        """Whether this shard is the one that counts what must be counted once."""
        return all(self.offset(factor) == 0 for factor in factors)
