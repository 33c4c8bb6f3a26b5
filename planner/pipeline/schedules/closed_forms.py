"""What schedules cost on paper: idle seconds and memory, for equal stages and transfers that take no time.

p ranks, m microbatches, v stages per rank; F, B, W seconds of one microbatch's forward, input-gradient and
weight-gradient pass on one rank, all its stages together; T = F + B + W. Sources: the schedules' own (see
`catalogue`); the forms of looped-bfs, interleaved-zero-bubble and dualpipe-v are read off simulations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .catalogue import entry


@dataclass(frozen=True, slots=True)
class Case:
    """One pipeline."""

    p: int
    m: int
    v: int
    F: float
    B: float
    W: float

    @property
    def T(self) -> float:
        return self.F + self.B + self.W


@dataclass(frozen=True, slots=True)
class Idle:
    """Seconds in which the idlest rank waits, of the makespan or of its own span.

    formula, where: as text; the functions say the same.
    """

    formula: str
    seconds: Callable[[Case], float]
    of: Literal["makespan", "span"] = "makespan"
    where: str = ""
    holds: Callable[[Case], bool] = lambda case: True


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """Microbatches' worth of forward results that a rank holds at most until backward passes, and idle seconds.

    peak: as text; `peak_of` says the same, where the groups of microbatches are of `p` if `grouped`.
    """

    peak: str
    peak_of: Callable[[Case], float]
    idle: Idle | None = None
    grouped: bool = False


def _short_weights(c: Case) -> bool:
    return min(c.F, c.B) >= c.W


PLAIN = Idle("(p - 1) T", lambda c: (c.p - 1) * c.T)
FORMS = {
    "gpipe": ClosedForm("m", lambda c: c.m, PLAIN),
    "1f1b": ClosedForm("min(m, p)", lambda c: min(c.m, c.p), PLAIN),
    "interleaved": ClosedForm(
        "p + (p - 1) / v", lambda c: c.p + (c.p - 1) / c.v,
        Idle("(p - 1) T / v", lambda c: (c.p - 1) * c.T / c.v, where="p divides m", holds=lambda c: c.m % c.p == 0),
        grouped=True,
    ),
    "looped-bfs": ClosedForm(
        "m", lambda c: c.m,
        Idle("(p - 1) T / v", lambda c: (c.p - 1) * c.T / c.v, where="m >= p", holds=lambda c: c.m >= c.p),
    ),
    "zb-h1": ClosedForm(
        "min(m, p)", lambda c: min(c.m, c.p),
        Idle(
            "(p - 1) (F + B - W)", lambda c: (c.p - 1) * (c.F + c.B - c.W),
            where="W <= F, W <= B, m >= p", holds=lambda c: _short_weights(c) and c.m >= c.p,
        ),
    ),
    "zb-h2": ClosedForm(
        "min(m, 2 p - 1)", lambda c: min(c.m, 2 * c.p - 1),
        Idle(
            "(p - 1) (F + B - 2 W)", lambda c: (c.p - 1) * (c.F + c.B - 2 * c.W), "span",
            where="W <= F, W <= B, m >= 2 p - 1", holds=lambda c: _short_weights(c) and c.m >= 2 * c.p - 1,
        ),
    ),
    "interleaved-zero-bubble": ClosedForm(
        "p", lambda c: c.p,
        Idle(
            "(p - 1) (F + B - W) / v", lambda c: (c.p - 1) * (c.F + c.B - c.W) / c.v,
            where="W <= F, W <= B, p divides m", holds=lambda c: _short_weights(c) and c.m % c.p == 0,
        ),
        grouped=True,
    ),
    "zbv": ClosedForm(
        "p", lambda c: c.p,
        Idle(
            "0", lambda c: 0.0, "span",
            where="F = B = W, m >= 2 p - 1", holds=lambda c: c.F == c.B == c.W and c.m >= 2 * c.p - 1,
        ),
    ),
    "v-half": ClosedForm("floor((p + 2) / 2)", lambda c: (c.p + 2) // 2),
    "v-min": ClosedForm("floor((p + 4) / 3)", lambda c: (c.p + 4) // 3),
    "chimera": ClosedForm(
        "p", lambda c: c.p,
        Idle(
            "(p / 2 - 1) T", lambda c: (c.p / 2 - 1) * c.T,
            where="F = B + W, p divides m", holds=lambda c: c.F == c.B + c.W and c.m % c.p == 0,
        ),
    ),
    "dualpipe": ClosedForm(
        "p + 1", lambda c: c.p + 1,
        Idle(
            "(p / 2 - 1) (F + 2 B - W)", lambda c: (c.p / 2 - 1) * (c.F + 2 * c.B - c.W),
            where="F = B, W <= F", holds=lambda c: c.F == c.B >= c.W,
        ),
    ),
    "dualpipe-v": ClosedForm(
        "p + 1 / 2", lambda c: c.p + 0.5,
        Idle(
            "(p - 1) (F + 2 B - W) / 2", lambda c: (c.p - 1) * (c.F + 2 * c.B - c.W) / 2,
            where="F = B, W <= F", holds=lambda c: c.F == c.B >= c.W,
        ),
    ),
}  # fmt: skip


def form_of(name: str) -> ClosedForm:
    """The form of a schedule of the catalogue, by name or alias.

    Raises:
        PlanError: no such schedule.
    """
    return FORMS[entry(name).name]
