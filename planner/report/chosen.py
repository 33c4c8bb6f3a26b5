"""Choices of a space written as plans have them, and the local program that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...ir.mesh import Mesh
from ...ir.passes.decisions import Decisions
from ...ir.passes.localize import Localizer
from ...ir.plan import Layout
from ...ir.sharding import Sharding
from ..cost.model import CostModel
from ..intra.space import Space
from .local_prices import LocalPrices


@dataclass(frozen=True)
class Chosen:
    """What choices decide, as a plan says it."""

    name: str
    mesh: Mesh
    microbatches: int
    strategies: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, Layout]


def slots_of(space: Space, choices: tuple[int, ...]) -> dict[str, Layout]:
    """By slot, its layout."""
    return {
        node.tag: Layout.of(choice)
        for node, index in zip(space.nodes, choices, strict=True)
        if isinstance(choice := node.choices[index], Sharding)
    }


def prices_of(
    space: Space,
    choices: tuple[int, ...],
    cost: CostModel,
    orders: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> LocalPrices:
    """The local program of choices, priced.

    Nobody may be able to run it: shards of dims that do not divide are priced as if dims were padded.

    Args:
        orders: as `Decisions` takes them.
    """
    codes, slots = space.codes(choices), slots_of(space, choices)
    chosen = Chosen("choices", space.mesh, space.microbatches, codes, slots)
    local = Localizer(Decisions(chosen, space.program, orders=orders)).whole()
    return LocalPrices(local, space, cost, codes)
