"""Compare the communication that a plan predicts with what XLA compiled."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ...ir.plan import Plan
from .hlo import Found, collectives
from .lower import Lowered

NOTEWORTHY = 0.25  # relative difference in bytes that is reported as such


@dataclass(frozen=True, slots=True)
class Line:
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
class Audit:
    """All lines, and memory as XLA's own analysis says it."""

    lines: tuple[Line, ...]
    predicted_peak: float
    compiled_peak: float
    limit: float  # bytes that the plan was allowed

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
    def findings(self) -> tuple[Line, ...]:
        """Lines that differ noticeably."""
        return tuple(line for line in self.lines if abs(line.difference) > NOTEWORTHY)


def audit(lowered: Lowered) -> Audit:
    """Compile the program (if it is not yet) and hold it against its plan."""
    found = collectives(lowered.hlo(), lowered.plan.mesh)
    stats = lowered.compiled.memory_analysis()
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Audit(
        compare(lowered.plan, found),
        lowered.plan.estimate.peak_bytes,
        arguments + temporary + outputs,
        lowered.plan.estimate.limit_bytes,
    )


def compare(plan: Plan, found: list[Found]) -> tuple[Line, ...]:
    """Add up both sides by (kind, axes), the largest first."""
    predicted: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0])
    compiled: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0])
    order = plan.mesh.names.index
    for item in plan.collectives:
        cell = predicted[item.kind, tuple(sorted(item.axes, key=order))]
        cell[0] += item.nbytes * item.count
        cell[1] += item.count
    for item in found:
        cell = compiled[item.kind, tuple(sorted(item.axes, key=order))]
        cell[0] += item.nbytes * item.count
        cell[1] += item.count
    lines = [
        Line(
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
