"""Why no pipeline was found, and what would do: least bytes that any needs, and bytes with which one was found.

needed    a bound: no pipeline of a shape needs less, however everything lies
enough    limits are doubled until layouts of a shape fit, then halved between (in ratio) a few times
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt

from ..ir.errors import InfeasibleError, PlanError
from ..ir.units import counted, format_bytes, parse_bytes
from .pipeline.choices import PipelineConfig
from .pipeline.search import Pipelines
from .trace import Trace

TRIED = 3  # shapes, those that may need least, one of each recompute policy first
DOUBLED, HALVED = 5, 2  # times at most
MORE = "more devices, a smaller batch, or devices with more memory"


def refusal(pipelines: Pipelines) -> PlanError:
    """Names the least that any pipeline asked for needs, memory with which one fits, and a pipeline not asked for."""
    problem, trace = pipelines.problem, pipelines.trace
    if trace.stopped_by == "proof" and trace.past_deadline():
        trace.stopped_by = "time"
    if trace.stopped_by != "proof":
        return trace.nothing_found()
    asked, limit, origin = _by_need(pipelines), problem.limit, f"cluster {problem.cluster.name}: "
    origin += counted(problem.cluster.size, "device")
    if not asked:
        pp = problem.request.pp
        of = f" of {pp} stages" if isinstance(pp, int) else ""
        return InfeasibleError(
            f"no pipeline{of} was found that fits: {format_bytes(limit)} per device may be used.",
            where="stages of unequal meshes were tried" if of else "request: pp", origin=origin,
            fix=_otherwise(pipelines, inf), limit_bytes=limit,
        )  # fmt: skip
    needed, shape = asked[0]
    known, may = format_bytes(needed), format_bytes(limit)
    if needed > limit:
        what = f"no pipeline fits: each needs at least {known} per device, {may} may be used."
    else:
        what = f"no pipeline was found that fits: {may} per device may be used; each needs {known} at least."
    trace.now("nothing fits; looking for what would")
    enough = least_room(pipelines, asked)
    fits = (
        f"{format_bytes(enough[0])} per device, with which {enough[1]} fits; or " if enough else ""
    )
    return InfeasibleError(
        what, where=f"the least, a lower bound, is with {shape}", origin=origin,
        fix=fits + _otherwise(pipelines, needed), needed_bytes=needed, limit_bytes=limit,
    )  # fmt: skip


def _by_need(pipelines: Pipelines) -> list[tuple[float, PipelineConfig]]:
    """Shapes by the least bytes that they may need; more microbatches never need more."""
    most = pipelines.choices.counts[-1]
    shapes = (replace(family, microbatches=most) for family in pipelines.choices.families())
    return sorted(
        ((pipelines.bounds.least_bytes(shape), shape) for shape in shapes), key=lambda pair: pair[0]
    )


def _otherwise(pipelines: Pipelines, needed: float) -> str:
    """What may fit with fewer pins."""
    problem, limit = pipelines.problem, pipelines.problem.limit
    free = dict.fromkeys(("mesh", "recompute", "microbatches", "schedule", "chunks"), None)
    freer = problem.asking(pp="auto", **free)
    others = Pipelines(freer, Trace(freer.request.time_limit))
    found = _by_need(others)
    if not found or found[0][0] >= needed:
        return MORE
    least, shape = found[0]
    if least > limit:
        return f"{MORE}; any pipeline here needs at least {format_bytes(least)}, that with {shape}"
    fits = _fitting(others, _first(found, limit), limit)
    if fits is not None:
        return f"{fits}, which fits; or {MORE}"
    return f"{MORE}; {shape} may fit, but was not found to: it needs at least {format_bytes(least)}"


def least_room(
    pipelines: Pipelines, asked: Sequence[tuple[float, PipelineConfig]]
) -> tuple[float, PipelineConfig] | None:
    """About the least memory with which layouts of the most frugal shapes are found, and the shape. Limits are tried
    as they print, so that what is told is what was tried."""
    low, found = max(asked[0][0], pipelines.problem.limit), None
    for _ in range(DOUBLED):
        high = _as_printed(2 * low)
        shape = _fitting(pipelines, _first(asked, high), high)
        if shape is not None:
            found = high, shape
            break
        low = high
    for _ in range(HALVED if found else 0):
        assert found is not None
        middle = _as_printed(sqrt(low * found[0]))
        shape = _fitting(pipelines, _first(asked, middle, found[1]), middle)
        low, found = (low, (middle, shape)) if shape is not None else (middle, found)
    return found


def _first(
    asked: Sequence[tuple[float, PipelineConfig]], limit: float, best: PipelineConfig | None = None
) -> list[PipelineConfig]:
    """A few that may fit: what is known to need little, then the most frugal of each recompute policy."""
    frugal = {shape.policy: shape for needed, shape in reversed(asked) if needed <= limit}
    order = [shape for _, shape in asked if frugal.get(shape.policy) == shape and shape != best]
    return [*([best] if best else []), *order][:TRIED]


def _fitting(
    pipelines: Pipelines, shapes: Sequence[PipelineConfig], limit: float
) -> PipelineConfig | None:
    """The first of some shapes of which layouts are found that fit."""
    for shape in shapes:
        if pipelines.trace.past_deadline():
            return None
        roomier = pipelines.problem.asking(memory=limit)
        tried = Pipelines(roomier, Trace(roomier.request.time_limit))
        tried.choices.take_cuts_of(pipelines.choices)
        tried.solve_shape(shape)
        if tried.best.priced is not None:
            return shape
    return None


def _as_printed(nbytes: float) -> float:
    return parse_bytes(format_bytes(nbytes))
