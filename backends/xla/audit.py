"""Compare the communication that a plan predicts with what XLA compiled."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace

import jax

from ...ir.errors import InfeasibleError, LoweringError, MeshwrightError
from ...ir.mesh import STAGE, Axis, Mesh
from ...ir.plan import Plan
from ...ir.units import format_bytes, parse_bytes
from .hlo import Found, collectives
from .lower import Lowered
from .lower_single import LoweredSingle

_TOO_LARGE = (  # what is needed, what there is; libtpu 0.0.52 has both
    re.compile(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"),
    re.compile(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"),
)
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
class Part:
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

    lines: tuple[Line, ...]
    predicted_peak: float
    parts: dict[str, float]  # bytes of the compiled program: arguments, temporaries, results
    limit: float  # bytes that the plan was allowed
    ranks: tuple[Part, ...] = ()  # of a pipeline

    @property
    def compiled_peak(self) -> float:
        return sum(self.parts.values())

    @property
    def fullest(self) -> tuple[Part, Part] | None:
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
    def findings(self) -> tuple[Line, ...]:
        """Lines that differ noticeably."""
        return tuple(line for line in self.lines if abs(line.difference) > NOTEWORTHY)


def audit(lowered: Lowered) -> Audit:
    """Compile the program (if it is not yet) and hold it against its plan.

    Raises:
        InfeasibleError: the compiler says that the program does not fit into the device.
    """
    estimate, parts = lowered.plan.estimate, _memory(lowered)
    found = collectives(lowered.hlo(), lowered.plan.mesh)
    return Audit(compare(lowered.plan, found), estimate.peak_bytes, parts, estimate.limit_bytes)


def audit_single(lowered: LoweredSingle) -> Audit:
    """The same of a single program for all stages of a pipeline: what it moves is counted on all stages together, as
    the plan does. In a tick without a microbatch a stage computes nothing; it hands on in every tick.

    Raises:
        InfeasibleError: the compiler says that the program does not fit into the device.
    """
    plan, stages = lowered.plan, lowered.mesh.shape[STAGE]
    estimate, parts = plan.estimate, _memory(lowered)
    mesh = Mesh((Axis(STAGE, stages), *plan.mesh.axes))
    found = collectives(lowered.hlo(), mesh, {plan.microbatches + stages - 1: plan.microbatches})
    every = [replace(each, count=each.count * stages) for each in found]
    return Audit(compare(plan, every), estimate.peak_bytes, parts, estimate.limit_bytes)


def _memory(lowered: Lowered | LoweredSingle) -> dict[str, float]:
    """What the compiled program takes on a device."""
    plan = lowered.plan
    try:
        stats = lowered.compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise refused(error, plan.estimate.peak_bytes, plan.name) from error
    return {
        "arguments": float(stats.argument_size_in_bytes),
        "temporaries": float(stats.temp_size_in_bytes),
        "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
    }


def refused(error: Exception, predicted: float, name: str) -> MeshwrightError:
    """What the compiler said, in the house form; TPU compilers know how much memory there is."""
    first = str(error).strip().splitlines()[0].rstrip(".")
    if "RESOURCE_EXHAUSTED" not in first:
        return LoweringError(f"XLA cannot compile the program: {first}.", where=f"plan `{name}`")
    match = next((m for m in (said.search(str(error)) for said in _TOO_LARGE) if m), None)
    needed, limit = (parse_bytes(f"{n}iB") for n in match.groups()) if match else (None, None)
    said = (
        f"it needs {format_bytes(needed)} of {format_bytes(limit)}" if needed and limit else first
    )
    return InfeasibleError(
        f"XLA refuses the program: {said} ({format_bytes(predicted)} were predicted).",
        where=f"plan `{name}`", fix="plan again with less: meshwright plan --memory",
        needed_bytes=needed, limit_bytes=limit,
    )  # fmt: skip


def compare(plan: Plan, found: list[Found]) -> tuple[Line, ...]:
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
