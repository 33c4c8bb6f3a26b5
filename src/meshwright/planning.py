"""From a captured step's graph to a plan, whatever framework it was captured from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .collector import paused
from .interrupts import heard
from .ir.analysis.blocks import fold, told_statistics
from .ir.analysis.cross_entropy import cross_entropies
from .ir.cluster.cluster import Cluster
from .ir.composites.attention_op import composed
from .ir.errors import InfeasibleError, PlanError
from .ir.fingerprint import fingerprint
from .ir.graph import Graph
from .ir.plan import Plan
from .ir.units import format_bytes
from .ir.verify import verify as verify_graph
from .planner.plans import search
from .planner.request import Request
from .planner.search.frontier import Frontier
from .planner.search.workers import worker_pool

AGAIN = 10.0  # seconds, at most, of looking whether something fits with another loss
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Unrolled:
    """A step whose loops over layers were unrolled, and what is to be said of it."""

    graph: Graph
    notes: tuple[str, ...]


@heard()
@paused()
def plan_graph(
    graph: Graph, where: Cluster, request: Request, name: str, unrolled: Unrolled | None = None,
    tell: Tell = lambda line: None, now: Tell = lambda line: None,
    keep: Callable[[Frontier], None] | None = None,
) -> Plan:  # fmt: skip
    """Plan a step.

    Args:
        unrolled: the same step as it is planned where it may have stages, if it has loops over layers.
        tell, now: hear one line per event of the search; what it is at.
        keep: as for `planner.plans.search`.

    Raises:
        PlanError, InfeasibleError: each says what to try.
    """
    request = request.on(where)
    try:
        return _planned(graph, where, request, name, unrolled, tell, now, keep)
    except InfeasibleError as error:
        error.fix = _mended(graph, where, request, name, unrolled, error.fix)
        raise


def _mended(
    graph: Graph, where: Cluster, request: Request, name: str, unrolled: Unrolled | None, fix: str | None
) -> str | None:  # fmt: skip
    """What to try where nothing fits: with logits never whole something may."""
    if request.loss == "fused" or not cross_entropies(graph):
        return fix
    fused = replace(request, loss="fused", time_limit=min(request.time_limit, AGAIN))
    try:
        found = _planned(graph, where, fused, name, unrolled)
    except PlanError:
        return fix
    peak = format_bytes(found.estimate.peak_bytes)
    return f"loss=fused, with which a plan fits ({peak} per device); or {fix}"


def _planned(
    whole: Graph, where: Cluster, request: Request, name: str, unrolled: Unrolled | None,
    tell: Tell = lambda line: None, now: Tell = lambda line: None,
    keep: Callable[[Frontier], None] | None = None,
) -> Plan:  # fmt: skip
    apart, attention = unrolled is not None, request.execution.attention
    notes = ("stacked parameters are held layer by layer", *unrolled.notes) if unrolled else ()
    graph = whole if unrolled is None else unrolled.graph
    with worker_pool(where, request) as workers:
        graph = composed(graph, attention, where, request.loss, request.backend)
        verify_graph(graph)

        def kept(frontier: Frontier) -> None:
            assert keep is not None
            keep(frontier.model_copy(update={"unstacked": apart, "notes": notes}))

        same = {"name": name, "fingerprint": fingerprint(whole), "tell": tell, "now": now}
        folded = told_statistics(fold(graph), request.batch_stats)
        found = search(folded, where, request, **same, keep=kept if keep else None, workers=workers)
    if not apart:
        return found
    if found.pipeline is None:
        again = search(
            fold(composed(whole, attention, where, request.loss, request.backend)),
            where,
            request.flat,
            **same,
        )
        return again.model_copy(
            update={"notes": tuple(dict.fromkeys((*again.notes, *found.notes)))}
        )
    pipeline = found.pipeline.model_copy(update={"unstacked": True})
    return found.model_copy(update={"pipeline": pipeline, "notes": (*found.notes, *notes)})
