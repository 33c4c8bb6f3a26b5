"""The unsharded step, microbatch by microbatch: what a plan with `batch_stats` is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from ...ir.blocks import fold
from ...ir.graph import Op
from ...ir.mesh import Mesh
from ...ir.plan import Plan
from ...ir.program import Program, prepare
from .capture import Captured
from .rounding import moved_sums
from .scope import Held, Scope
from .spmd import LocalStep


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

    def _simple(self, op: Op, scope: Scope) -> None:
        super()._simple(op, scope)
        held = [scope.values[v] for v in op.outputs]
        arrays = moved_sums(op, self.graph, [h.array for h in held], self.seed, self.units)
        for value, before, array in zip(op.outputs, held, arrays, strict=True):
            scope.values[value] = Held(array, before.layout)


def by_microbatch(plan: Plan, captured: Captured) -> ByMicrobatch | None:
    """None for plans whose numbers are those of the step as it is.

    Args:
        captured: with the batch that the plan was made for.
    """
    if plan.microbatches == 1 or plan.batch is None or plan.batch.statistics == "batch":
        return None
    program = prepare(fold(captured.graph).whole, plan.recompute)  # type: ignore[arg-type]
    groups = LocalStep(plan, program, captured.binding.ops, captured.binding.arrays).groups
    return ByMicrobatch(plan, captured, program, groups)
