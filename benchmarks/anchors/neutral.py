"""One evaluator for all anchors: a plan's stages in 1F1B order, simulated pass by pass.

Replicas of a stage take microbatches by turns (PipeDream, Piper), or split each of them (DAPPLE, Aceso;
then a stage counts as one replica with the seconds of the split). Sends run beside computing.
`step_seconds` asks the planner's simulator; `quick_seconds` gives the same, to the last bit, compiled, to
search with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np

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


Evaluator = Callable[[Sequence[Stage], int], float]  # seconds of a step of so many microbatches


def step_seconds(stages: Sequence[Stage], microbatches: int) -> float:
    """The makespan of one step."""
    schedule = round_robin([stage.replicas for stage in stages], microbatches)
    back = [0.0, *(stage.send for stage in stages)]
    seconds = [
        StageSeconds(s.forward, s.backward, 0.0, s.send, way)
        for s, way in zip(stages, back, strict=False)
    ]
    owner = [stage for stage in stages for _ in range(stage.replicas)]
    tail = {rank: stage.last for rank, stage in enumerate(owner) if stage.last}
    return simulate(pipeline_tasks(schedule, seconds, tail)).makespan


def quick_seconds(stages: Sequence[Stage], microbatches: int) -> float:
    """As `step_seconds`."""
    seconds = np.array([(s.forward, s.backward, s.send, s.last) for s in stages]).T.copy()
    return _makespan(seconds, np.array([s.replicas for s in stages]), microbatches)


@numba.njit(cache=True)
def _makespan(seconds, replicas, microbatches):
    """Each rank goes on until the input of its next pass is not there, and is woken when it is."""
    forward, backward, send, last = seconds
    stages = len(replicas)
    first = np.zeros(stages + 1, np.int64)
    first[1:] = np.cumsum(replicas)
    ranks = first[-1]
    stage_of = np.zeros(ranks, np.int64)
    for s in range(stages):
        stage_of[first[s] : first[s + 1]] = s
    there = np.full((2, stages, microbatches), -1.0)  # when a pass's input is
    there[0, 0], there[1, -1] = 0.0, 0.0
    free, sent, at = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks, np.int64)
    awake, queue, many = np.ones(ranks, np.bool_), np.arange(ranks), ranks
    while many:
        many -= 1
        rank = queue[many]
        awake[rank] = False
        s = stage_of[rank]
        own = -(-(microbatches - rank + first[s]) // replicas[s])
        ahead = min(-(-(ranks - first[s]) // replicas[s]) - 1, own)
        while at[rank] < 2 * own:
            turn = at[rank] - ahead
            if turn < 0:
                way, k = 0, at[rank]
            elif at[rank] < 2 * own - ahead:
                way, k = turn % 2, turn // 2 + (ahead if turn % 2 == 0 else 0)
            else:
                way, k = 1, at[rank] - own
            m = rank - first[s] + k * replicas[s]
            if there[way, s, m] < 0:
                break
            at[rank] += 1
            free[rank] = max(free[rank], there[way, s, m]) + (backward[s] if way else forward[s])
            to = s - 1 if way else s + 1
            if 0 <= to < stages:
                took, arrives = send[min(s, to)], free[rank]
                if took > 0:
                    sent[rank] = max(sent[rank], arrives) + took
                    arrives = sent[rank]
                there[way, to, m] = arrives
                woken = first[to] + m % replicas[to]
                if not awake[woken]:
                    awake[woken], queue[many] = True, woken
                    many += 1
    return max((free + last[stage_of]).max(), sent.max())
