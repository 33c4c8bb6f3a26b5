"""One evaluator for all anchors: a plan's stages in 1F1B order, simulated pass by pass.

Replicas of a stage take microbatches by turns (PipeDream, Piper), or split each of them (DAPPLE, Aceso;
then a stage counts as one replica with the seconds of the split). Sends run beside computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.planner.pipeline.schedules import round_robin
from meshwright.planner.pipeline.simulate import StageSeconds, pipeline_tasks, simulate


@dataclass(frozen=True)
class Stage:
    """Seconds of one microbatch on one replica; `send` to the next stage, and as long back.

    last: seconds that each replica works after its last pass.
    """

    forward: float
    backward: float
    send: float = 0.0
    replicas: int = 1
    last: float = 0.0


def step_seconds(stages: Sequence[Stage], microbatches: int) -> float:
    """The makespan of one step."""
    schedule = round_robin([stage.replicas for stage in stages], microbatches)
    back = [0.0, *(stage.send for stage in stages)]
    seconds = [StageSeconds(s.forward, s.backward, 0.0, s.send, way) for s, way in zip(stages, back, strict=False)]
    owner = [stage for stage in stages for _ in range(stage.replicas)]
    tail = {rank: stage.last for rank, stage in enumerate(owner) if stage.last}
    return simulate(pipeline_tasks(schedule, seconds, tail)).makespan
