"""The front door: `plan`, `lower`, `parallelize`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .backends.xla.calls import calling
from .backends.xla.capture import Captured
from .backends.xla.lower import lower as lower_plan
from .backends.xla.steps import step_name
from .backends.xla.unstack import unstack
from .collector import paused
from .interrupts import heard
from .ir.cluster.cluster import Cluster
from .ir.errors import PlanError, UsageError
from .ir.plan import Plan
from .parallel import ParallelStep, place
from .planner.request import Request
from .planner.search.frontier import Frontier
from .planning import Unrolled, plan_graph
from .running import RunningStep
from .told import BatchArgs, batch_told
from .tracing import Options, capture_call

REQUEST_KEYS = tuple(Request.__dataclass_fields__)


@heard()
def plan(
    step: Callable,
    *args: Any,
    cluster: Cluster | str | Path | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    batch_argnums: BatchArgs = None,
    request: Request | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **kwargs: Any,
) -> Plan:
    """Plan a training step for a cluster, without running anything.

    Args:
        step: an ordinary single-device JAX function.
        args, kwargs: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        cluster: a `Cluster`, a shorthand (`"4xh100x8@ib400"`), a file; this process's devices when None.
        static_*, donate_*: as for `jax.jit`.
        batch_argnums: which arguments are the batch, by number or name, as `(1, 2)` or with dims `{"x": 1}`;
            inferred when None (see `told`).
        request: pins and limits of the search.
        tell: hears one line per event of the search.

    Raises:
        CaptureError, ClusterError, PlanError, InfeasibleError: each says what to try.
    """
    if request is not None and not isinstance(request, Request):
        raise PlanError(
            f"request cannot be {request!r}.",
            where="plan",
            fix="mw.Request(mesh=(4, 2), memory=60e9)",
        )
    given = {
        "static_argnums": static_argnums, "static_argnames": static_argnames,
        "donate_argnums": donate_argnums, "donate_argnames": donate_argnames,
    }  # fmt: skip
    request = request or Request()
    where = place(cluster, request)
    captured = Options.of(step, given).capture(step, args, kwargs, request.pp != 1)
    captured = batch_told(captured, step, batch_argnums)
    return plan_captured(captured, where, request, step_name(step), tell)


@heard()
@paused()
def plan_captured(
    captured: Captured, cluster: Cluster | str | Path | None, request: Request, name: str,
    tell: Callable[[str], None] = lambda line: None, now: Callable[[str], None] = lambda line: None,
    keep: Callable[[Frontier], None] | None = None,
) -> Plan:  # fmt: skip
    """Plan a step that was captured before. `keep` is as for `planner.plans.search`."""
    where, unrolled = place(cluster, request), None
    if request.pp != 1 and any(op.kind == "scan" for op in captured.graph.ops):
        layers = unstack(captured)
        # loops of one turn alone run as they are
        if layers is not None and len(layers.inputs) != len(captured.graph.inputs):
            unrolled = Unrolled(layers.captured.graph, layers.notes)
    return plan_graph(captured.graph, where, request, name, unrolled, tell, now, keep)


def lower(
    plan: Plan, step: Callable, *args: Any, devices: Sequence[Any] | None = None, **options: Any
) -> RunningStep:
    """The runnable program of a plan, for the same step and argument shapes.

    Raises:
        MismatchError: the plan belongs to another step or other shapes.
        LoweringError: this process has too few devices.
    """
    given = {key: options.pop(key) for key in Options.__dataclass_fields__ if key in options}
    inner = Options.of(step, given).peel(step)
    with calling(inner, args, options) as call:
        captured = capture_call(call, plan.pipeline is not None)
        if elsewhere := plan.read_elsewhere("xla"):
            warnings.warn(elsewhere, stacklevel=2)
        return RunningStep(lower_plan(plan, captured, devices), inner, call.inner)


def parallelize(
    step: Callable | None = None,
    *,
    cluster: Cluster | str | Path | None = None,
    plan: Plan | None = None,
    verify: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    batch_argnums: BatchArgs = None,
    **request: Any,
) -> Any:
    """Plan, shard and run a training step: `@mw.parallelize` or `@mw.parallelize(cluster=..., verify=True)`.

    Args:
        step: an ordinary single-device JAX function of arrays in pytrees.
        cluster: what to plan for; by default the devices of this process.
        plan: use this plan instead of searching for one.
        verify: on the first call for each set of shapes, run the unsharded step too
            and compare every output; raises VerificationError beyond the stated tolerance.
        static_*, donate_*: as for `jax.jit`.
        batch_argnums: as for `plan`.
        request: fields of `Request`: memory, mesh, microbatches, recompute, attention, loss, overlap, batch_stats, gap.
    """
    if step is None:
        return functools.partial(
            parallelize, cluster=cluster, plan=plan, verify=verify, static_argnums=static_argnums,
            static_argnames=static_argnames, donate_argnums=donate_argnums, donate_argnames=donate_argnames,
            batch_argnums=batch_argnums, **request,
        )  # fmt: skip
    if not callable(step):
        raise UsageError(
            f"parallelize takes a function, not {step!r}.", fix="@mw.parallelize above a def"
        )
    if plan is not None and (elsewhere := plan.read_elsewhere("xla")):
        warnings.warn(elsewhere, stacklevel=2)
    if plan is not None and batch_argnums is not None:
        raise UsageError(
            "a plan says what its batch is.",
            where="batch_argnums",
            fix="the plan alone, or plan anew",
        )
    if unknown := sorted(set(request) - set(REQUEST_KEYS)):
        raise UsageError(
            f"parallelize has no option {unknown[0]!r}.",
            where=step_name(step),
            fix=f"one of {', '.join(REQUEST_KEYS)}",
        )
    given = {
        "static_argnums": static_argnums, "static_argnames": static_argnames,
        "donate_argnums": donate_argnums, "donate_argnames": donate_argnames,
    }  # fmt: skip
    if request.get("backend", "xla") != "xla":
        raise UsageError(
            f"parallelize runs a step on xla, not {request['backend']!r}.",
            where=step_name(step),
            fix="mw.torch.parallelize, or meshwright run --backend torch",
        )
    wrapped = ParallelStep(
        step,
        cluster,
        Options.of(step, given),
        Request(**request),
        verify,
        plan,
        plan_captured,
        batch_argnums,
    )
    functools.update_wrapper(wrapped, step, updated=())
    return wrapped
