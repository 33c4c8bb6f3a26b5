"""A plan looked into: its step simulated, what-ifs included, and what each device runs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .graph_file import graph_of, is_graph_file
from .ir.analysis.blocks import fold
from .ir.cluster.cluster import Cluster
from .ir.composites.attention_op import composed
from .ir.errors import MismatchError, UsageError
from .ir.execution import Execution
from .ir.fingerprint import fingerprint
from .ir.graph import Graph
from .ir.local.pipeline import PipelineProgram
from .ir.local.program import LocalProgram
from .ir.passes.localize import localize
from .ir.passes.localize_pipeline import localize_pipeline
from .ir.plan import Plan
from .ir.plan_checks import check_decisions
from .ir.program import Program, prepare
from .ir.units import counted
from .planner.cost.bands import band_of, told, weakest
from .planner.pipeline.timeline import Timeline
from .planner.problem import cost_of
from .planner.report.instructions import Simulation, simulate_plan
from .planner.report.pipeline_prices import PipelineSimulation, simulate_pipeline
from .planner.request import Request, check_overlap

if TYPE_CHECKING:
    from .backends.xla.capture import Captured


@dataclass(frozen=True)
class Simulated:
    """A plan's step as simulated on its cluster, or on a changed one.

    `band` says how far predictions on this device have been off, `hangs_on` which figure not
    measured the result depends on most.
    """

    plan: Plan
    cluster: Cluster
    result: Simulation | PipelineSimulation
    band: str
    hangs_on: str  # empty for pipelines
    execution: Execution

    @property
    def seconds(self) -> float:
        return self.result.seconds

    @property
    def between(self) -> tuple[float, float] | None:
        """Seconds that the band allows for; None without a band."""
        band = band_of(self.cluster)
        return band.around(self.seconds) if band else None

    @property
    def limit(self) -> float:
        return self.cluster.memory_per_device

    @property
    def timeline(self) -> Timeline:
        return Timeline.of(self.result.run)


def simulate(
    plan: Plan,
    step: Callable[..., Any] | None = None,
    *args: Any,
    cluster: Cluster | str | None = None,
    changes: Mapping[str, str] | None = None,
    overlap: str | None = None,
    **options: Any,
) -> Simulated:
    """Simulate one step of a plan, op by op as its local program has them.

    Args:
        plan: as made or loaded.
        step, args: the step and its arguments; a plan made on the command line knows its own.
        cluster: another cluster with as many devices; the plan's own if not given.
        changes: fields of the cluster to change first: {"fabric.ib400.bandwidth": "100 GB/s"}.
        overlap: what runs beside computation, as in a request; as the plan assumes if None.

    Raises:
        UsageError, ClusterError: no step, no such field, a value that makes no sense.
        MismatchError: the plan was made for another step, or the cluster has another size.
    """
    where = plan.cluster if cluster is None else Cluster.parse(cluster)
    if where.size != plan.device_count:
        raise MismatchError(
            f"the plan is for {counted(plan.device_count, 'device')}, the cluster has {where.size}.",
            where=f"cluster {where.name}", fix="a cluster of as many devices, or plan again",
        )  # fmt: skip
    for path, value in (changes or {}).items():
        where = where.with_(path, value)
    if where.size != plan.device_count:
        raise MismatchError(
            f"a change of size needs a new plan: {counted(plan.device_count, 'device')} became {where.size}.",
            where="changes", fix="meshwright plan",
        )  # fmt: skip
    beside = plan.overlap if overlap is None else Request(overlap=overlap).execution.overlap
    check_overlap(beside, where, plan.backend)
    execution = Execution(plan.attention, beside, plan.loss)
    cost = cost_of(where, Request(backend=plan.backend))
    if plan.pipeline is not None:
        _check_stages(plan, "simulated op by op")
        graph = _staged_graph(plan, step, args, options)
        small = prepare(fold(graph).small, plan.recompute, in_stages=True)
        ranks = localize_pipeline(plan, graph)
        found = simulate_pipeline(plan, ranks, small, cost, beside)
        return Simulated(plan, where, found, told(where), "", execution)
    program = prepared(plan, step, args, options)
    result = simulate_plan(plan, program, cost, beside)
    hangs_on = weakest(where, plan.mesh, result.compute, result.collectives)
    return Simulated(plan, where, result, told(where), hangs_on, execution)


def _check_stages(plan: Plan, what: str) -> None:
    """Refuse a pipeline as a single program, which is no program of each rank."""
    if plan.pipeline is not None and plan.pipeline.program == "single":
        raise UsageError(
            f"a pipeline as a single program is not {what} yet.", where=f"plan `{plan.name}`",
            fix="a plan made with --program stages, which has passes, sends and receives",
        )  # fmt: skip


def _staged_graph(plan: Plan, step: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Graph:
    """The step of a plan with a pipeline, its layers apart and with its batch, attention and losses as planned."""
    assert plan.pipeline is not None
    graph = _graph(plan, step, args, options, plan.pipeline.unstacked)
    graph = composed(graph, plan.attention, plan.cluster, plan.loss, plan.backend)
    return graph if plan.batch is None else replace(graph, batch=plan.batch.known)


def local_program(
    plan: Plan, step: Callable[..., Any] | None = None, *args: Any, **options: Any
) -> LocalProgram | PipelineProgram:
    """What each device of a plan runs, layers alike once; of a pipeline, what each rank runs, layer by layer.

    Args:
        step, args: the step and its arguments; a plan made on the command line knows its own.

    Raises:
        UsageError: no step, or a pipeline as a single program.
        MismatchError: the plan was made for another step.
    """
    if plan.pipeline is None:
        return localize(prepared(plan, step, args, options), plan)
    _check_stages(plan, "printed")
    return localize_pipeline(plan, _staged_graph(plan, step, args, options))


def prepared(plan: Plan, step: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Program:
    """The folded program of a plan without a pipeline: of its own step, or of one that is given.

    Raises:
        UsageError: there is no step.
        MismatchError: the plan was made for another one.
    """
    graph = _graph(plan, step, args, options)
    folded = fold(composed(graph, plan.attention, plan.cluster, plan.loss, plan.backend))
    program = prepare(folded.small, plan.recompute)
    check_decisions(plan, program.graph, program.value_tags)
    return program


def _graph(
    plan: Plan, step: Any, args: tuple[Any, ...], options: dict[str, Any], unstacked: bool = False
) -> Graph:
    """The step as it was captured for the plan, or as it is with its layers taken apart."""
    model = str((plan.recipe or {}).get("model", ""))
    if step is None and is_graph_file(model):
        found, captured = graph_of(plan.recipe or {}), None
    else:
        captured = _traced(plan, step, args, options)
        found = captured.graph
    if fingerprint(found) != plan.graph:
        raise MismatchError(
            f"the plan was made for another step than `{plan.name}` is now.",
            where="graph fingerprint", fix="plan again",
        )  # fmt: skip
    if not unstacked or captured is None:
        return found
    from .backends.xla.unstack import unstack

    layers = unstack(captured)
    assert layers is not None, plan.name
    return layers.captured.graph


def _traced(plan: Plan, step: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Captured:
    stages = plan.pipeline is not None
    if step is not None:
        from .tracing import Options

        given = {key: options.pop(key) for key in Options.__dataclass_fields__ if key in options}
        return Options.of(step, given).capture(step, args, options, stages)
    if not plan.recipe:
        raise UsageError(
            f"the plan does not say how its step `{plan.name}` is made.",
            fix="mw.simulate(plan, step, *arguments)",
        )
    from .recipe import make

    return make(plan.recipe).capture(stages)
