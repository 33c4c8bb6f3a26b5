"""Cut layers into pipeline stages, each on a submesh: the exact optimum by dynamic programming.

With B microbatches a pipeline takes about

    sum of all stages' seconds  +  (B - 1) * seconds of the slowest stage

The slowest stage's seconds are enumerated in rising order; for each, a DP over suffixes of
layers finds the least sum with no stage slower than that. Enumeration ends when the slowest
stage alone already costs more than the best answer.

Source of the formulation: Zheng et al., "Alpa", OSDI 2022, section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `first` up to, not including, `last`, on one submesh with one configuration."""

    first: int
    last: int
    submesh: int
    config: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The stages in order, and the seconds of one step."""

    seconds: float
    stages: tuple[Stage, ...]


def cut_into_stages(
    seconds: np.ndarray,
    devices: np.ndarray,
    total_devices: int,
    microbatches: int,
    most_after: np.ndarray | None = None,
) -> StagePlan | None:
    """The fastest pipeline that uses all devices; None when there is none.

    Args:
        seconds: shape (layers, layers, submeshes, configs); `[i, j, m, c]` is a stage of
            layers i to j, both included, per microbatch; inf where impossible.
        devices: devices of each submesh, shape (submeshes,).
        most_after: same shape as `seconds`: how many stages may follow this one before its
            in-flight activations no longer fit; negative where it never fits. None: any.
    """
    layers = seconds.shape[0]
    if most_after is None:
        most_after = np.full(seconds.shape, layers)
    usable = np.where(most_after >= 0, seconds, inf)
    best: StagePlan | None = None
    for slowest in np.unique(usable[np.isfinite(usable)]):
        if best is not None and slowest * microbatches >= best.seconds:
            break
        allowed = np.where(usable <= slowest, usable, inf)
        stages = _least_sum(allowed, devices, total_devices, most_after)
        if stages is None:
            continue
        each = [float(seconds[s.first, s.last - 1, s.submesh, s.config]) for s in stages]
        whole = sum(each) + (microbatches - 1) * max(each)
        if best is None or whole < best.seconds:
            best = StagePlan(whole, stages)
    return best


def _least_sum(
    seconds: np.ndarray, devices: np.ndarray, total: int, most_after: np.ndarray
) -> tuple[Stage, ...] | None:
    """The cut with the least sum of seconds.

    `least[n][i, d]`: of layers i and on, in n stages, on exactly d devices.
    """
    layers = seconds.shape[0]
    least = [np.full((layers + 1, total + 1), inf)]
    least[0][layers, 0] = 0.0
    taken: list[dict[tuple[int, int], Stage]] = [{}]
    for n in range(1, min(layers, total) + 1):
        value, how = np.full((layers + 1, total + 1), inf), {}
        own = np.where(most_after >= n - 1, seconds, inf)
        config = own.argmin(axis=3)
        cheapest = own.min(axis=3)
        for i in range(layers):
            for j in range(i, layers):
                for m in np.flatnonzero(np.isfinite(cheapest[i, j])):
                    used = int(devices[m])
                    if used > total:
                        continue
                    whole = cheapest[i, j, m] + least[n - 1][j + 1, : total + 1 - used]
                    for d in np.flatnonzero(whole < value[i, used:]):
                        value[i, d + used] = whole[d]
                        how[i, int(d) + used] = Stage(i, j + 1, int(m), int(config[i, j, m]))
        least.append(value)
        taken.append(how)
    ends = [value[0, total] for value in least]
    n = int(np.argmin(ends))
    if ends[n] == inf:
        return None
    stages, i, d = [], 0, total
    for count in range(n, 0, -1):
        stage = taken[count][i, d]
        stages.append(stage)
        i, d = stage.last, d - int(devices[stage.submesh])
    return tuple(stages)
