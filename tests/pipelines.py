"""Pipelined plans for tests, cut from ordinary plans of one stage's devices."""

from __future__ import annotations

from meshwright.backends.xla.capture import Captured
from meshwright.ir.blocks import fold
from meshwright.ir.plan import Pipeline, Plan, Stage
from meshwright.ir.schedule import Schedule


def pipelined(plan: Plan, captured: Captured, schedule: Schedule, cuts: list[int] | None = None) -> Plan:
    """Every stage takes the mesh and the decisions of `plan`; layers are dealt out evenly."""
    cuts = cuts or even_cuts(captured, schedule.stages)
    stages = tuple(
        Stage(
            cut=cut, blocks="", mesh=plan.mesh, strategies=plan.strategies, slots=plan.slots, forward_seconds=0,
            backward_seconds=0, weight_seconds=0, send_seconds=0, once_seconds=0, peak_bytes=0, held=0, memory={},
        )
        for cut in cuts
    )  # fmt: skip
    first = tuple(rank * plan.mesh.size for rank in range(schedule.ranks))
    pipeline = Pipeline(schedule=schedule.name, stages=stages, first=first, orders=schedule.text())
    return plan.model_copy(update={"pipeline": pipeline, "microbatches": schedule.microbatches})


def even_cuts(captured: Captured, stages: int) -> list[int]:
    """Cuts between the layers of the forward pass, the first repeated block; without one, in its first quarter."""
    blocks = fold(captured.graph).blocks
    if not blocks:
        return [len(captured.graph.ops) * k // (4 * stages) for k in range(stages)]
    block = blocks[0]
    return [0] + [block.start + block.period * round(block.repeats * k / stages) for k in range(1, stages)]
