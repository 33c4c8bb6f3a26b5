"""What a device holds while it walks through the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...ir.sharding import Sharding


@dataclass(frozen=True, slots=True)
class Held:
    """A local shard and how the whole lies."""

    array: Any
    layout: Sharding


@dataclass
class Scope:
    """Values known so far; `moment` is the microbatch being run, None outside the body."""

    values: dict[int, Held] = field(default_factory=dict)
    moment: Any = None


def stacked(layout: Sharding) -> Sharding:
    """Of several values side by side, a new dim in front."""
    return Sharding(((), *layout.dims), layout.partial)
