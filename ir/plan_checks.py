"""What a plan must be to make sense by itself, and for the graph that it is lowered for.

    check_plan(plan)                  axes, sizes, ranks, stages, schedule, seconds and bytes agree with each other
    check_decisions(plan, ...)        strategies are known to the ops' dim rules, products have one, inputs' layouts fit

A checksum tells that a file is as it was written, not that what wrote it was right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from math import isfinite
from typing import Any, NoReturn

from .errors import GraphError, PlanError, did_you_mean
from .graph import Graph, Op, TensorType
from .mesh import STAGE, Mesh
from .ops import CONTRACTIONS
from .passes.recompute import POLICIES
from .pipeline.schedule import check
from .plan import Layout, Pipeline, Plan
from .rules import rule_of
from .rules.rule import cut_twice
from .units import counted

MOST_AXES, MOST_MICROBATCHES = 8, 2**31
ROUNDING = 1e-9
FIX = "plan again; what is to be fixed is pinned in the request"


def check_plan(plan: Plan) -> None:
    """Refuse a plan that contradicts itself.

    Raises:
        PlanError: the first contradiction, with values and the field.
    """
    if not re.fullmatch("[0-9a-f]{64}", plan.graph):
        _refuse("graph", f"`{plan.graph:.80}` is no fingerprint of a graph")
    if not 0 < plan.microbatches <= MOST_MICROBATCHES:
        _refuse("microbatches", f"a step of {plan.microbatches} microbatches cannot be")
    if plan.recompute not in POLICIES:
        _refuse(
            "recompute",
            f"`{plan.recompute}` is no policy of plans",
            did_you_mean(plan.recompute, POLICIES),
        )
    _check_mesh("mesh", plan.mesh)
    _check_layouts("", plan.mesh, plan.strategies, plan.slots)
    _check_uses("uses", plan.mesh, plan.uses)
    _check_figures(plan)
    if plan.pipeline is None:
        several = (
            len(plan.cluster.groups) > 1
        )  # a plan for one kind of device alone is one for the cluster
        if plan.mesh.size > plan.cluster.size or (
            plan.mesh.size < plan.cluster.size and not several
        ):
            there = counted(plan.cluster.size, "device")
            _refuse(
                "mesh",
                f"mesh {plan.mesh} has {counted(plan.mesh.size, 'device')}, the cluster has {there}",
            )
    else:
        _check_pipeline(plan, plan.pipeline)


def _check_mesh(where: str, mesh: Mesh) -> None:
    if not 1 <= len(mesh.axes) <= MOST_AXES:
        _refuse(where, f"a mesh with this number of axes cannot be: {len(mesh.axes)}")
    for axis in mesh.axes:
        if not re.fullmatch(r"\w{1,40}", axis.name) or axis.name == STAGE:
            _refuse(where, f"`{axis.name:.60}` cannot name an axis")
        if axis.size < 1:
            _refuse(where, f"axis `{axis.name}` has {axis.size} devices")
    if len(mesh.sizes) < len(mesh.axes):
        _refuse(where, f"two axes of mesh {mesh} have one name")


def _check_layouts(
    where: str, mesh: Mesh, strategies: Mapping[str, tuple[int, ...]], slots: Mapping[str, Layout]
) -> None:
    for tag, codes in strategies.items():
        if len(codes) != len(mesh.axes):
            _refuse(
                f"{where}strategies.{tag}",
                f"{counted(len(codes), 'code')} for the axes of mesh {mesh}",
            )
    for tag, layout in slots.items():
        _check_axes(
            f"{where}slots.{tag}", mesh, [a for dim in layout.dims for a in dim], layout.owed
        )


def _check_axes(where: str, mesh: Mesh, cut: Iterable[str], owed: Iterable[str] = ()) -> None:
    named = [*cut, *owed]
    for axis in named:
        if axis not in mesh.sizes:
            _refuse(
                where,
                f"axis `{axis:.60}` is none of mesh {mesh}",
                did_you_mean(axis[:60], mesh.names),
            )
    if len({*named}) < len(named):
        twice = next(axis for axis in named if named.count(axis) > 1)
        _refuse(where, f"axis `{twice}` is used twice in one layout")


def _check_uses(where: str, mesh: Mesh, uses: tuple[Any, ...]) -> None:
    if uses and [(use.axis, use.size) for use in uses] != [
        (axis.name, axis.size) for axis in mesh.axes
    ]:
        _refuse(
            where,
            f"{', '.join(f'{use.axis:.20}={use.size}' for use in uses)} are not the axes of mesh {mesh}",
        )
    for use in uses:
        for name in ("batch", "sequence", "experts", "columns", "sums"):
            if not -ROUNDING <= getattr(use, name) <= 1 + ROUNDING:
                _refuse(f"{where}.{use.axis}.{name}", f"{getattr(use, name)} is no share")


def _check_figures(plan: Plan) -> None:
    """Seconds, bytes and FLOP are finite and not negative; tables speak of the plan's axes."""
    estimate, proof = plan.estimate, plan.proof
    _amounts(
        "estimate",
        estimate,
        "step_seconds",
        "compute_seconds",
        "communication_seconds",
        "hidden_seconds",
        "peak_bytes",
        "flop",
    )
    _amounts("estimate", estimate, "limit_bytes")
    _all_amounts("estimate.memory", estimate.memory)
    _amounts("proof", proof, "objective", "lower_bound")
    if proof.lower_bound > proof.objective * (1 + ROUNDING) + ROUNDING:
        _refuse(
            "proof", f"a bound of {proof.lower_bound} s is above the plan's own {proof.objective} s"
        )
    axes = {*plan.mesh.names, STAGE}
    for each in plan.tensors:
        if (
            len(each.shape) != len(each.local_shape)
            or min((*each.shape, *each.local_shape), default=0) < 0
        ):
            _refuse(
                f"tensors.{each.name}",
                f"shape {each.shape} with {each.local_shape} on a device cannot be",
            )
        if each.count < 1:
            _refuse(f"tensors.{each.name}", f"a count of {each.count} is none")
        _amounts(f"tensors.{each.name}", each, "local_bytes")
    for number, moved in enumerate(plan.collectives):
        _amounts(f"collectives.{number}", moved, "nbytes", "seconds", "count")
        if other := [axis for axis in moved.axes if axis not in axes]:
            _refuse(f"collectives.{number}", f"axis `{other[0]:.60}` is none of mesh {plan.mesh}")


def _amounts(where: str, part: Any, *names: str) -> None:
    _all_amounts(where, {name: getattr(part, name) for name in names})


def _all_amounts(where: str, amounts: Mapping[str, float]) -> None:
    for name, amount in amounts.items():
        if not (isfinite(amount) and amount >= -ROUNDING):
            _refuse(f"{where}.{name}", f"{amount} is no amount")


# ---------------------------------------------------------------- pipelines


def _check_pipeline(plan: Plan, pipeline: Pipeline) -> None:
    stages = pipeline.stages
    if not stages:
        _refuse("pipeline.stages", "a pipeline of no stages cannot be")
    cuts = [stage.cut for stage in stages]
    if cuts[0] < 0 or any(cut >= after for cut, after in pairwise(cuts)):
        _refuse(
            "pipeline.stages", f"stages that begin at ops {', '.join(map(str, cuts[:40]))} overlap"
        )
    for number, stage in enumerate(stages):
        where = f"pipeline.stages.{number}."
        _check_mesh(f"{where}mesh", stage.mesh)
        if stage.strategies or stage.slots or stage.mesh != plan.mesh:
            own = (stage.strategies or plan.strategies, stage.slots or plan.slots)
            _check_layouts(where, stage.mesh, *own)
        _check_uses(f"{where}uses", stage.mesh, stage.uses)
        seconds = (
            "forward_seconds",
            "backward_seconds",
            "weight_seconds",
            "send_seconds",
            "once_seconds",
        )
        _amounts(where.rstrip("."), stage, *seconds, "peak_bytes", "held")
        _all_amounts(f"{where}memory", stage.memory)
    _all_amounts("pipeline.programs", pipeline.programs)
    _check_ranks(plan, pipeline)


def _check_ranks(plan: Plan, pipeline: Pipeline) -> None:
    """Each rank has devices of its own, and its passes are those of the stages and microbatches, each once."""
    if len(pipeline.first) != len(pipeline.orders):
        there = f"{len(pipeline.first)} first devices for {counted(len(pipeline.orders), 'rank')}"
        _refuse("pipeline.first", there)
    passes = sum(order.count(" ") + 1 for order in pipeline.orders)
    if passes < 2 * len(pipeline.stages) * plan.microbatches:
        wanted = f"{len(pipeline.stages)} stages and {plan.microbatches} microbatches"
        _refuse("pipeline.orders", f"{passes} passes are too few for {wanted}")
    schedule = pipeline.read(plan.microbatches)
    check(schedule)
    ends: list[tuple[int, int, int]] = []
    for rank, (first, held) in enumerate(zip(pipeline.first, schedule.held, strict=True)):
        sizes = {pipeline.stages[stage].mesh.size for stage in held}
        ends.append((first, first + max(sizes, default=0), rank))
    ends.sort()
    for (_, end, rank), (after, _, other) in pairwise(ends):
        if after < end:
            _refuse("pipeline.first", f"ranks {rank} and {other} lie on the same devices")
    if ends[0][0] < 0 or ends[-1][1] > plan.cluster.size:
        span = f"devices {ends[0][0]} to {ends[-1][1] - 1}"
        _refuse("pipeline.first", f"{span} are not among the {plan.cluster.size} of the cluster")


# ---------------------------------------------------------------- against a graph


def check_decisions(plan: Plan, graph: Graph, tags: Mapping[int, str]) -> None:
    """Refuse a plan whose decisions do not fit the graph made ready for it.

    Args:
        tags: of the graph's values, as `Program.value_tags`.

    Raises:
        PlanError: the op or input, and what its decision is.
    """
    parts = plan.pipeline.stages if plan.pipeline is not None else ()
    own = [
        (part.mesh, part.strategies or plan.strategies, part.slots or plan.slots) for part in parts
    ]
    different = {id(each[1]): each for each in [(plan.mesh, plan.strategies, plan.slots), *own]}
    ops = [*_needed(graph)]
    for mesh, strategies, slots in different.values():
        for op in ops:
            _check_strategy(op, strategies.get(op.tag), graph.types)
        for value in graph.inputs:
            if (layout := slots.get(tags[value])) is not None:
                _check_fits(tags[value], layout, graph.types[value], mesh)


def _needed(graph: Graph) -> Iterator[Op]:
    """Ops outside loops whose results are read."""
    read = {*graph.outputs}
    for op in reversed(graph.ops):
        if not read.isdisjoint(op.outputs):
            read.update(op.inputs)
            yield op


def _check_strategy(op: Op, codes: tuple[int, ...] | None, types: Mapping[int, TensorType]) -> None:
    if op.regions or op.kind in ("optimization_barrier", "copy"):
        return
    if codes is None:
        if op.kind in CONTRACTIONS:
            _refuse(f"strategies.{op.tag}", f"the plan has no strategy for {op.kind} `{op.tag}`")
        return
    rule = rule_of(op, types)
    for code in codes:
        if not -2 - len(rule.linear) < code < len(rule.factors) + len(rule.joints):
            _refuse(f"strategies.{op.tag}", f"{op.kind} has no strategy {code}")
    if cut_twice(rule, codes):
        _refuse(f"strategies.{op.tag}", f"{op.kind} has no strategy {codes}")


def _check_fits(tag: str, layout: Layout, kind: TensorType, mesh: Mesh) -> None:
    try:
        layout.sharding.check(kind, mesh)
    except GraphError as error:
        _refuse(f"slots.{tag}", error.what.rstrip("."))


def _refuse(where: str, what: str, fix: str = FIX) -> NoReturn:
    raise PlanError(f"the plan contradicts itself: {what}.", where=where[:200], fix=fix)
