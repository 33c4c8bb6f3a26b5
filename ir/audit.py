"""What a plan predicts of communication and memory, beside what a compiler made of it.

A backend counts the collectives of its programs and their memory; `compare` lays both sides out by kind and axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from .mesh import STAGE
from .plan import Plan

NOTEWORTHY = 0.25  # relative difference in bytes that is reported as such


@dataclass(frozen=True, slots=True)
class AuditLine:
    """Bytes and number of collectives of one kind over one set of axes, per device and step."""

    kind: str
    axes: tuple[str, ...]
    predicted_bytes: float
    compiled_bytes: float
    predicted_count: int
    compiled_count: int

    @property
    def difference(self) -> float:
        """Compiled over predicted, minus one; infinite when nothing was predicted."""
        if self.predicted_bytes == 0:
            return 0.0 if self.compiled_bytes == 0 else float("inf")
        return self.compiled_bytes / self.predicted_bytes - 1


@dataclass(frozen=True)
class AuditedRank:
    """One rank of a pipeline: its communication as compiled, and its memory."""

    rank: int
    stages: tuple[int, ...]
    compiled_bytes: float
    predicted_peak: float
    parts: dict[str, float]

    @property
    def compiled_peak(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Audit:
    """All lines, and memory as XLA's own analysis says it; of a pipeline, that of the fullest rank."""

    lines: tuple[AuditLine, ...]
    predicted_peak: float
    parts: dict[str, float]  # bytes of the compiled program: arguments, temporaries, results
    limit: float  # bytes that the plan was allowed
    ranks: tuple[AuditedRank, ...] = ()  # of a pipeline

    @property
    def compiled_peak(self) -> float:
        return sum(self.parts.values())

    @property
    def fullest(self) -> tuple[AuditedRank, AuditedRank] | None:
        """Of a pipeline, the rank that holds most as compiled, and the one that was to hold most."""
        if not self.ranks:
            return None
        compiled = max(self.ranks, key=lambda part: part.compiled_peak)
        return compiled, max(self.ranks, key=lambda part: part.predicted_peak)

    @property
    def memory_difference(self) -> float:
        """Compiled over predicted peak, minus one."""
        return self.compiled_peak / self.predicted_peak - 1

    @property
    def predicted_bytes(self) -> float:
        return sum(line.predicted_bytes for line in self.lines)

    @property
    def compiled_bytes(self) -> float:
        return sum(line.compiled_bytes for line in self.lines)

    @property
    def difference(self) -> float:
        if self.predicted_bytes == 0:
            return 0.0 if self.compiled_bytes == 0 else float("inf")
        return self.compiled_bytes / self.predicted_bytes - 1

    @property
    def findings(self) -> tuple[AuditLine, ...]:
        """Lines that differ noticeably."""
        return tuple(line for line in self.lines if abs(line.difference) > NOTEWORTHY)


class Counted(Protocol):
    """A collective of a program: bytes per device that one of it moves, how often it runs in a step."""

    @property
    def kind(self) -> str: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def nbytes(self) -> float: ...
    @property
    def count(self) -> float: ...


def compare(plan: Plan, found: Iterable[Counted]) -> tuple[AuditLine, ...]:
    """Add up both sides by (kind, axes), the largest first."""
    predicted: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0])
    compiled: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0])
    order = (STAGE, *plan.mesh.names).index
    for item in plan.collectives:
        cell = predicted[item.kind, tuple(sorted(item.axes, key=order))]
        cell[0] += item.nbytes * item.count
        cell[1] += item.count
    for item in found:
        cell = compiled[item.kind, tuple(sorted(item.axes, key=order))]
        cell[0] += item.nbytes * item.count
        cell[1] += item.count
    lines = [
        AuditLine(
            kind,
            axes,
            predicted[kind, axes][0],
            compiled[kind, axes][0],
            int(predicted[kind, axes][1]),
            int(compiled[kind, axes][1]),
        )
        for kind, axes in {*predicted, *compiled}
    ]
    return tuple(
        sorted(
            lines,
            key=lambda line: (
                -max(line.predicted_bytes, line.compiled_bytes),
                line.kind,
                line.axes,
            ),
        )
    )
