"""Compare the communication that a plan predicts with what XLA compiled."""

from __future__ import annotations

import re
from dataclasses import replace

import jax

from ...ir.audit import Audit, compare
from ...ir.errors import InfeasibleError, LoweringError, MeshwrightError
from ...ir.mesh import STAGE, Axis, Mesh
from ...ir.units import format_bytes, parse_bytes
from .hlo import collectives
from .lower import Lowered
from .lower_single import LoweredSingle

_TOO_LARGE = (  # what is needed, what there is; libtpu 0.0.52 has both
    re.compile(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"),
    re.compile(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"),
)


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
