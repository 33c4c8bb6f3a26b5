"""Windows of a pipeline's step, for bounds and solves: as those of a step without one (`windows.py`), of stages.

    first forward, last backward   of each stage: 1 / stages of a step, as all of them have theirs
    other passes                   as often as the least schedule makes them count (`Choices.share`), less those

A pass of a stage takes alone + max(C + s H, H + s C) over all of its units, what is gathered or reduced once counts in
its first or last one. Each maximum is at least any mean of its sides, so with one multiplier per window

    step >= sum over stages of its passes, as often as they count >= sum over ops and readings of scaled prices

whatever the cut into stages and however bubbles fall: the sum takes all stages together, which can only be less than
stage by stage. Backward passes and those of gradients of weights are one window: apart they take no less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...ir.execution import OverlapKind
from ..intra.outline import Outline
from ..intra.windows import BACKWARDS, FIRST, FORWARDS, LAST, MANY, Windows, windows_by

OFTEN = {"forward": (FIRST, FORWARDS), "backward": (LAST, BACKWARDS), "weight": (LAST, BACKWARDS)}


def stage_windows(
    outline: Outline,
    passes: Mapping[str, str],
    weights: Mapping[str, float],
    stages: int,
    overlap: Sequence[OverlapKind],
) -> Windows:
    """How often everything counts in each window.

    Args:
        passes: of ops by tag; all others run once per step.
        weights: by tag, how often an op counts in the step; "" for those not named.
    """
    shape = len(outline.outers), MANY + 1
    ops, early, late = (np.zeros(shape) for _ in range(3))
    for row, (tag, _) in enumerate(outline.outers):
        weight, name = weights.get(tag, weights[""]), passes.get(tag, "once")
        if name in OFTEN:
            one, others = OFTEN[name]
            for each in (ops, early, late):
                each[row, one] = min(weight, 1 / stages)
                each[row, others] = weight - each[row, one]
        else:
            ops[row, MANY], early[row, FIRST], late[row, LAST] = weight, weight, weight
    return windows_by(outline, overlap, ops, early, late)
