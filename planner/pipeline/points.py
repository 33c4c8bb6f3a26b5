"""Decisions of one solve of a pipeline as plain data, to be used again on other devices."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ...ir.passes.recompute import Policy
from ...ir.plan import Layout
from ...ir.rules.rule import Strategy
from ...ir.sharding import Sharding
from ..intra.space import Space
from .unit_costs import UnitSeconds


class Point(BaseModel):
    """Decisions of one solve. `passes` are the seconds of one microbatch through all units, `once` those per step;
    `peak` bytes are held per device if one stage has all units and one microbatch, which leaves `left` for later."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy
    microbatches: int
    mesh: tuple[int, ...]
    passes: float
    once: float
    peak: float
    left: float
    strategies: dict[str, tuple[int, ...]]  # of nodes that are ops
    slots: dict[str, Layout]  # of nodes that are values

    @classmethod
    def of(
        cls, space: Space, choices: tuple[int, ...], policy: Policy, work: UnitSeconds, peak: float,
        left: float,
    ) -> Point:  # fmt: skip
        """`work` are the seconds of all units together."""
        chosen = {node.tag: node.choices[k] for node, k in zip(space.nodes, choices, strict=True)}
        return cls(
            policy=policy, microbatches=space.microbatches, mesh=space.mesh.shape,
            passes=work.passes, once=work.once, peak=peak, left=left,
            strategies={tag: c.axes for tag, c in chosen.items() if isinstance(c, Strategy)},
            slots={tag: Layout.of(c) for tag, c in chosen.items() if isinstance(c, Sharding)},
        )  # fmt: skip

    def choices_in(self, space: Space) -> tuple[int, ...] | None:
        """The same decisions in another space; None where one does not exist there."""
        found: list[int] = []
        for node in space.nodes:
            made = Strategy(self.strategies[node.tag]) if node.tag in self.strategies else None
            known = made or (self.slots[node.tag].sharding if node.tag in self.slots else None)
            if known not in node.choices:
                return None
            found.append(node.choices.index(known))  # type: ignore[arg-type]
        return tuple(found)
