"""A step in windows in which communication hides behind computation, and prices that bound it from below.

    first forward   first backward   other forwards   other backwards   last backward   the rest: prepare, update

    step = exposed + sum over windows of max(C + s H, H + s C)

C are a window's seconds of computation, H those of communication that may hide (`hideable.py`), both slowed down
while they run side by side: s is `SLOWDOWN - 1`. What is gathered once for all microbatches hides behind the first
pass that reads it, what is reduced once behind the last backward pass, which with one microbatch is the first too.
All else is exposed, one after another.

A maximum is at least any mean of its two sides. With a multiplier m per window, 0 to 1,

    step >= exposed + sum of (1 - m) (C + s H) + m (H + s C)

which is a sum over decisions and pairs again: ops count (1 - m) + m s times, what hides (1 - m) s + m times. So a
bound of the sum bounds the step, whatever the multipliers; the best ones make it nearly tight (Lagrangian duality:
Geoffrion, "Lagrangean relaxation for integer programming", 1974). Joining windows never makes a step longer, as the
maximum is convex and grows with its sides: what holds of microbatch counts without overlap holds with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from ...ir.execution import OverlapKind
from ...ir.program import Program
from ..pipeline.simulate import SLOWDOWN
from .frame import Changes
from .hideable import flow_of
from .outline import Outer, Outline

NAMES = ("first forward", "first backward", "other forwards", "other backwards", "last backward")
MANY = len(NAMES)  # the column after them: what is exposed
SHARE = SLOWDOWN - 1
FIRST, FIRST_BACK, FORWARDS, BACKWARDS, LAST = range(MANY)


@dataclass(frozen=True)
class Windows:
    """How often things run in each window, the last column outside of all: `ops` by op tag, `beside` what may hide
    and `alone` what is exposed, by reading."""

    ops: np.ndarray
    beside: np.ndarray
    alone: np.ndarray

    def op_runs(self, multipliers: np.ndarray) -> np.ndarray:
        """How often the seconds of each op count under multipliers."""
        return self.ops @ np.append(1 - multipliers + multipliers * SHARE, 1.0)

    def reading_runs(self, multipliers: np.ndarray) -> np.ndarray:
        """The same of each reading."""
        scale = np.append((1 - multipliers) * SHARE + multipliers, 1.0)
        return self.beside @ scale + self.alone.sum(axis=1)

    def of_sums(self, changes: Changes) -> tuple[np.ndarray, np.ndarray]:
        """`beside` and `alone` of each of the sums that readings of equal price and place make."""
        columns = [changes.runs(column) for column in self.beside.T]
        return np.array(columns).T.reshape(-1, MANY + 1), changes.runs(self.alone.sum(axis=1))


@dataclass(frozen=True)
class Timed:
    """Seconds of one plan: `compute` and `beside` per window, `exposed` of the rest."""

    compute: np.ndarray
    beside: np.ndarray
    exposed: float

    @property
    def sides(self) -> np.ndarray:
        """Of each window, what it takes if computation lasts longer and if communication does: [window, side]."""
        c, h = self.compute, self.beside
        return np.stack([c + SHARE * h, h + SHARE * c], axis=1)

    @property
    def seconds(self) -> float:
        return self.exposed + float(self.sides.max(axis=1).sum())

    @property
    def multipliers(self) -> np.ndarray:
        """Those under which the bound is tight at this plan."""
        return (self.beside > self.compute).astype(float)


def windows_of(outline: Outline, microbatches: int, overlap: Sequence[OverlapKind]) -> Windows:
    """How often everything runs in each window, where communication of these kinds may hide."""
    phases = phases_of(outline.program)
    back = FIRST_BACK if microbatches > 1 else LAST
    early = {"prepare": FIRST, "forward": FIRST, "backward": back}
    return windows_by(
        outline,
        overlap,
        _often(outline.outers, phases, microbatches, {}),
        _often(outline.outers, phases, microbatches, early),
        _often(outline.outers, phases, microbatches, {"update": LAST}),
    )


def windows_by(
    outline: Outline,
    overlap: Sequence[OverlapKind],
    ops: np.ndarray,
    early: np.ndarray,
    late: np.ndarray,
) -> Windows:
    """The same by how often each outer runs in each window, [outer, window or exposed]: what it computes and exchanges
    (`ops`), gathers of weights (`early`), reductions of gradients (`late`)."""
    forms = {"parameters": early, "gradients": late, "tensor": ops}
    flow, readings = flow_of(outline.program), outline.readings
    kinds = [
        flow.kind(source, reader, each.phase) for (source, reader, _), each in readings.items()
    ]
    beside, alone = (np.zeros((len(kinds), MANY + 1)) for _ in range(2))
    for kind, often in forms.items():
        mine = np.array([each == kind and kind in overlap for each in kinds], bool)
        beside[mine] = _columns(outline.reading_runs, often)[mine]
    rest = np.array([each not in overlap for each in kinds], bool)
    alone[rest] = _columns(outline.reading_runs, ops)[rest]
    return Windows(_columns(outline.op_runs, ops), beside, alone)


def phases_of(program: Program) -> dict[str, str]:
    """The phase of what runs once or in an outermost loop, by its tag; of the step's results too."""
    ops = zip(program.graph.ops, program.phases, strict=True)
    return {"": "update", **{op.tag: phase for op, phase in ops}}


def _columns(runs: Callable[[np.ndarray], np.ndarray], often: np.ndarray) -> np.ndarray:
    return np.stack([runs(column) for column in often.T], axis=1)


def _often(
    outers: Sequence[Outer], phases: Mapping[str, str], microbatches: int, once: Mapping[str, int]
) -> np.ndarray:
    """How often each outer runs in each window: [outer, window or exposed]; `once`: by phase, where what runs once
    for all microbatches counts, if not as others do."""
    found, more = np.zeros((len(outers), MANY + 1)), microbatches - 1
    for row, (tag, split) in zip(found, outers, strict=True):
        phase = phases[tag]
        if split and phase == "forward":
            row[FIRST], row[FORWARDS] = 1, more
        elif split and phase == "backward":
            row[LAST], row[FIRST_BACK], row[BACKWARDS] = 1, min(more, 1), max(0, more - 1)
        else:
            usual = {"forward": FIRST, "backward": LAST}
            row[{**usual, **once}.get(phase, MANY)] = microbatches if split else 1
    return found


def next_multipliers(met: Sequence[Timed]) -> np.ndarray:
    """Those under which the cheapest of the plans met costs most: where the bound may be highest (Kelley's cutting
    planes)."""
    optimize = import_module("scipy.optimize")  # takes long to load, and few searches need it
    sides = np.array([plan.sides for plan in met])
    compute, gain = sides[:, :, 0], sides[:, :, 1] - sides[:, :, 0]
    rows = np.hstack([-gain, np.ones((len(met), 1))])  # least - gain m <= exposed + compute
    ends = np.array([plan.exposed for plan in met]) + compute.sum(axis=1)
    aim, box = np.append(np.zeros(MANY), -1.0), [(0.0, 1.0)] * MANY + [(None, None)]
    found = optimize.linprog(aim, A_ub=rows, b_ub=ends, bounds=box, method="highs")
    return np.clip(found.x[:MANY], 0, 1)
