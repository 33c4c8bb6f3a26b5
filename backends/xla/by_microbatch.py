"""The unsharded step, microbatch by microbatch: what a plan with `batch_stats` is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from ...ir.analysis.blocks import fold
from ...ir.local.program import LocalOp, LocalProgram
from ...ir.mesh import Mesh
from ...ir.plan import Plan
from ...ir.program import Program, prepare
from .capture import Captured
from .rounding import moved_sums
from .spmd import LocalStep, Running


@dataclass(frozen=True)
class ByMicrobatch:
    """Callable on flat leaves; the rows of each microbatch are those of the plan."""

    plan: Plan
    captured: Captured
    program: Program
    groups: int

    def __call__(self, *leaves: Any) -> Any:
        return self._jitted(*leaves)

    @cached_property
    def _jitted(self) -> Any:
        return jax.jit(LocalStep(*self._alone, groups=self.groups))

    def moved(self, seed: Any, units: Any, *leaves: Any) -> Any:
        """The same with its sums moved by rounding, as `rounding.measure` does."""
        return _Moved(seed, units, *self._alone, groups=self.groups)(*leaves)

    @property
    def _alone(self) -> tuple[Any, ...]:
        whole = {"owed": ()}
        slots = {
            tag: layout.model_copy(update={"dims": ((),) * len(layout.dims), **whole})
            for tag, layout in self.plan.slots.items()
        }
        plan = self.plan.model_copy(update={"mesh": Mesh(()), "strategies": {}, "slots": slots})
        return plan, self.program, self.captured.binding.ops, self.captured.binding.arrays


class _Moved(LocalStep):
    def __init__(self, seed: Any, units: Any, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.seed, self.units = seed, units

    def running(self, program: LocalProgram, moment: Any, constants: Mapping[int, Any]) -> Running:
        return _RunningMoved(self, program, moment, constants, self.seed, self.units)


@dataclass
class _RunningMoved(Running):
    seed: Any
    units: Any

    def computed(self, op: LocalOp, operands: Sequence[Any]) -> Sequence[Any]:
        found = super().computed(op, operands)
        return moved_sums(op, self.program.outputs, found, self.seed, self.units)


def by_microbatch(plan: Plan, captured: Captured) -> ByMicrobatch | None:
    """None for plans whose numbers are those of the step as it is.

    Args:
        captured: with the batch that the plan was made for.
    """
    if plan.microbatches == 1 or plan.batch is None or plan.batch.statistics == "batch":
        return None
    program = prepare(fold(captured.graph).whole, plan.recompute)
    groups = LocalStep(
        plan, program, captured.binding.ops, captured.binding.arrays
    ).decisions.groups
    return ByMicrobatch(plan, captured, program, groups)
