"""Start here: from a folded graph, a cluster and a request to a proven plan: the best without a pipeline
(`search/search.py`), with one (`pipeline/search.py`), or of both."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from ..ir.analysis.blocks import Folded
from ..ir.cluster.cluster import Cluster
from ..ir.errors import PlanError
from ..ir.plan import Plan
from .cost.model import CostModel
from .pipeline.search import Pipelines
from .pipeline.unequal import Unequal
from .problem import Problem, cost_of
from .refusal import refusal
from .report.of_pipeline import Alternative, ProgramChoice, passed_over
from .report.of_plan import BESIDES, write_plan
from .request import Request, check
from .search.candidates import SearchResult
from .search.frontier import WIDE, Frontier
from .search.islands import Islands
from .search.search import Search
from .search.ties import offer_naive, settled
from .search.walks import walk_families
from .search.workers import Workers
from .trace import Trace


def search(
    folded: Folded, cluster: Cluster, request: Request, *, name: str, fingerprint: str,
    cost: CostModel | None = None, tell: Callable[[str], None] = lambda line: None,
    now: Callable[[str], None] = lambda line: None, keep: Callable[[Frontier], None] | None = None,
    workers: Workers | None = None,
) -> Plan:  # fmt: skip
    """Plan one step.

    Args:
        folded: the tagged graph and its small form.
        cluster: of unlike devices only with a pipeline.
        request: pins and limits.
        name, fingerprint: what the plan is for; kept in the plan.
        cost: prices; a roofline on the cluster's figures when None, and for unlike devices.
        tell: hears one line per event of the search.
        now: hears where the search stands, a few times a second.
        keep: is given what planning for other numbers of devices needs, if a pipeline was found on equal devices.
        workers: other processes that help; without them the plan is the same.

    Raises:
        InfeasibleError: nothing fits, with the least memory any layout needs.
        PlanError: the request contradicts the graph or the cluster.
    """
    if len(cluster.groups) > 1 and request.pp != 1:
        if request.program == "single":
            raise PlanError(
                "a single program for all stages needs devices of one kind.", where="request: program",
                origin=f"cluster {cluster.name}", fix="program=stages",
            )  # fmt: skip
        islands = Islands(folded, cluster, request, name, fingerprint, tell, now)
        return islands.run(_on_equal_devices)
    cost = cost or cost_of(cluster, request)
    problem = Problem(folded, cluster, request, cost, name, fingerprint)
    return _on_equal_devices(problem, Trace(request.time_limit, tell, now), keep, workers)


def _on_equal_devices(
    problem: Problem, trace: Trace, keep: Callable[[Frontier], None] | None = None,
    workers: Workers | None = None,
) -> Plan:  # fmt: skip
    """The best of all pipelines, of unequal stages too, and, where their number is open, of plans without one."""
    request = problem.request
    check(request, problem.cluster, problem.program("none").time)
    flat = Search(problem, trace, workers=workers)
    if request.pp == 1:
        return write_plan(without_stages(flat))
    pipelines = Pipelines(problem, trace, workers)
    unequal = Unequal(pipelines)
    both = request.pp == "auto" and request.schedule is None and request.program != "single"
    others: list[Alternative] = []
    if workers is not None:
        workers.start(problem, pipelines.choices.units)
    try:
        if both:
            _explore(flat, pipelines)
        else:
            pipelines.explore()
        pipelines.refine()
        if keep is not None:
            pipelines.broaden(WIDE)
        pipelines.reorder(flat.best.seconds)
        pipelines.choose_program()
        if both:
            flat.cutoff = pipelines.best.dispatched
            while flat.promises() < inf and not trace.past_deadline():
                flat.step()
            flat.end()
        slow = (
            pipelines.best.seconds < flat.best.seconds <= pipelines.best.dispatched
        )  # of dispatch alone
        if not slow and request.program != "single":
            unequal.explore(min(pipelines.best.seconds, flat.best.seconds))
            others += drop_dispatched(unequal, flat.best.seconds if both else inf)
    except KeyboardInterrupt:
        trace.stopped_by = "interrupt"
        if both and flat.best.answer is None and not flat.open_bounds:
            flat.begin(
                known=True
            )  # plans without a pipeline were not looked at, so any may be as good as its floor
    if keep is not None and pipelines.points:
        keep(Frontier.of(pipelines))
    if not both and pipelines.best.priced is None and unequal.found is None:
        raise refusal(pipelines)
    bound = pipelines.lower_bound()
    if both:
        bound = min(bound, flat.lower_bound())
    if unequal.found is not None:
        found = unequal.write(min(bound, unequal.lower_bound()))
    elif both and flat.best.seconds <= pipelines.best.dispatched:
        if flat.best.answer is None:

            def least(error: PlanError) -> float:
                return getattr(error, "needed_bytes", None) or inf

            raise min(flat.infeasible(), refusal(pipelines), key=least)
        found = write_plan(
            settled(flat), bound, tuple(dict.fromkeys((*BESIDES, *unequal.left_out)))
        )
    else:
        found = pipelines.write(bound, unequal.left_out)
    return passed_over(found, (*pipelines.best.by_stages, *others))


def without_stages(flat: Search) -> SearchResult:
    """The best plan without a pipeline."""
    offer_naive(flat)
    try:
        if flat.problem.request.search == "mcmc":
            walk_families(flat)
        else:
            flat.explore()
    except KeyboardInterrupt:
        flat.trace.stopped_by = "interrupt"
    return settled(flat)


def _explore(flat: Search, pipelines: Pipelines) -> None:
    """Plans with and without a pipeline, whichever may be faster first."""
    pipelines.besides = flat.roots()
    pipelines.begin()
    flat.cutoff = flat.bound_cutoff = pipelines.first
    flat.begin(known=pipelines.first < inf)
    while not flat.trace.past_deadline():
        pipelines.cutoff = flat.best.seconds
        with_stages, without = pipelines.promises(flat.best.seconds), flat.promises()
        if min(with_stages, without) == inf:
            return
        if without <= with_stages:
            flat.step()
            pipelines.hurry(flat.best.seconds)
        else:
            pipelines.step(flat.best.seconds)
            flat.cutoff = pipelines.as_run()


def drop_dispatched(unequal: Unequal, flat: float) -> list[Alternative]:
    """Unequal stages are given up where the host's dispatch makes them slower than a plan that has none; what is."""
    best = unequal.pipelines.best
    single = best.dispatched if ProgramChoice(best.programs).program == "single" else inf
    if unequal.found is None or unequal.dispatched < min(flat, single):
        return []
    given_up, unequal.found = unequal.alternative, None
    return [given_up]
