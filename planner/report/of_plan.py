"""Write down a search's answer as a `Plan`: decisions, tables, estimate and proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from ...ir.analysis.cross_entropy import Unfused, looked_at
from ...ir.analysis.roles import roles
from ...ir.composites.attention_kernels import products_made, reason_against
from ...ir.composites.attention_op import AttentionKind, plain_attention
from ...ir.composites.bodies import BOTH, FORWARD, LOSS
from ...ir.composites.evenly import pairs_kept
from ...ir.execution_model import AttentionKernel
from ...ir.graph import Graph, Op, TensorType, Visit
from ...ir.ops import ATTENTION, CONTRACTIONS, LOSSES
from ...ir.passes.batch_stats import statistics_of
from ...ir.passes.localize import localize
from ...ir.passes.microbatch import Refusal
from ...ir.plan import EXACT, Collective, Estimate, Plan, PlannedBatch, Proof, Tensor
from ...ir.rules import rule_of
from ...ir.sharding import Sharding
from ...ir.units import counted
from ...ir.version import VERSION
from ..assumptions import assumptions
from ..cost.flop import flop
from ..cost.model import CostModel
from ..intra.space import Space
from ..memory.ledger import Ledger
from ..problem import Problem
from ..search.candidates import Candidate, SearchResult
from ..search.meshes import some_groups
from ..solver.onehot import relative_gap
from ..trace import Trace
from .chosen import slots_of
from .local_prices import LocalPrices
from .moves import find_collectives, spoken
from .usage import axis_uses

OVERLAP = "overlap of communication with compute"
OVERLAP_WITHIN = "overlap of exchanges within layers"
BESIDES = (  # pipelines
    "offload to host memory",
    OVERLAP,
    "meshes of more than three axes, and axes that straddle hosts",
    "layouts that do not divide evenly, or cut a dim across a reshape's minor factor",
    "different recompute for blocks of one step",
)
LEFT_OUT = ("pipeline stages", *BESIDES)
GROUPS = "groups of hosts that each hold all state, but for three sizes and those next to the best"


def write_plan(
    found: SearchResult, bound: float | None = None, left_out: tuple[str, ...] = LEFT_OUT
) -> Plan:
    """The plan that a search has found; `bound` and `left_out` may be of more than its own space."""
    problem, best = found.problem, found.best
    assert (
        best.candidate
        and best.space
        and best.lives
        and best.answer
        and best.answer.solution.choices is not None
    )
    space, choices = best.space, best.answer.solution.choices
    plan = Plan(
        meshwright=VERSION,
        name=problem.name,
        graph=problem.fingerprint,
        cluster=problem.cluster,
        mesh=space.mesh,
        backend=problem.request.backend,
        microbatches=best.candidate.microbatches,
        recompute=best.candidate.policy,
        attention=problem.request.execution.attention,
        loss=problem.request.loss,
        overlap=problem.request.execution.within,
        strategies=space.codes(choices),
        slots=slots_of(space, choices),
        uses=axis_uses(space, choices),
        estimate=_estimate(found, 0.0),
        proof=proof_of(
            problem,
            found.trace,
            best.seconds,
            found.lower_bound if bound is None else bound,
            left_out,
        ),
        tensors=tuple(tensors_of(space, choices)),
        collectives=(),
        opaque=opaque_of(space),
        notes=notes_of(problem, best.candidate),
        batch=PlannedBatch.of(problem.folded.whole),
    )
    collectives = collectives_of(plan, space, problem.cost)
    moving = sum(each.seconds for each in collectives)
    update = {"collectives": tuple(collectives), "estimate": _estimate(found, moving)}
    return plan.model_copy(update=update)


def collectives_of(
    plan: Plan, space: Space, cost: CostModel, often: Mapping[str, int] = MappingProxyType({})
) -> list[Collective]:
    """All that a plan sends, whose layouts were chosen from a space; `often` as `find_collectives` takes it."""
    local = localize(space.program, plan)
    return find_collectives(LocalPrices(local, space, cost, plan.strategies), often)


def _estimate(found: SearchResult, communication: float) -> Estimate:
    best = found.best
    assert best.space and best.lives and best.answer and best.answer.solution.choices is not None
    total, choices = best.seconds, best.answer.solution.choices
    serial = total if best.space.windows is None else best.space.serial(choices)
    ledger = Ledger(best.space, best.lives)
    return Estimate(
        step_seconds=total,
        compute_seconds=serial - communication,
        communication_seconds=communication,
        hidden_seconds=max(0.0, serial - total),
        peak_bytes=best.answer.peak,
        limit_bytes=found.problem.limit,
        memory=ledger.by_cause(choices, best.answer.moment),
        flop=flop_of(best.space),
    )


def flop_of(space: Space) -> float:
    """Of all products of a step, over all devices."""
    graph = space.program.graph
    return sum(
        v.times * flop(v.op, rule_of(v.op, graph.types), graph.types)
        for v in graph.visits
        if v.op.kind in CONTRACTIONS | LOSSES
    )


def proof_of(
    problem: Problem,
    trace: Trace,
    objective: float,
    bound: float,
    left_out: tuple[str, ...] = LEFT_OUT,
) -> Proof:
    """What the search can claim of a plan of so many seconds."""
    bound = min(bound, objective)
    gap, good_enough = relative_gap(objective, bound), problem.request.good_enough
    proven = gap <= max(EXACT, good_enough)
    status: Literal["within_gap", "feasible"] = "within_gap" if proven else "feasible"
    stopped = "proof" if proven else _stopped(trace)
    if (
        problem.request.pp in (1, "auto")
        and problem.request.mesh is None
        and some_groups(problem.cluster)
    ):
        left_out = (*left_out, GROUPS)
    execution = problem.request.execution
    if execution.within:
        rest = (OVERLAP_WITHIN,) if "tensor" not in execution.overlap else ()
        left_out = (*rest, *(each for each in left_out if each != OVERLAP))
    return Proof(
        status="optimal" if gap <= EXACT else status,
        stopped_by=stopped,
        objective=objective,
        lower_bound=bound,
        seed=problem.request.seed,
        cost_model=problem.cost.name,
        band=f"{problem.cost.band}; {execution.beside}",
        left_out=left_out,
        searched=tuple(trace.log),
        seconds=round(trace.elapsed, 3),
        good_enough=good_enough,
    )


def _stopped(trace: Trace) -> Literal["time", "interrupt", "end", "estimate"]:
    if trace.stopped_by != "proof":
        return trace.stopped_by
    return "time" if trace.past_deadline() else "end"


def notes_of(problem: Problem, candidate: Candidate | None) -> tuple[str, ...]:
    program, devices = problem.program("none"), problem.cluster.size
    axis, told = program.time, assumptions(program.graph)
    if where := statistics_of(program.graph):
        told = (_own_statistics(where, candidate), *told)
    if (asked := problem.request.execution.attention) != "plain":
        told = (*_fused(program.graph, problem.cost.execution_model.attention_kernel, asked), *told)
    if problem.request.loss == "fused":
        told = (*_fused_losses(program.graph), *told)
    if isinstance(axis, Refusal):
        return (f"microbatches are not possible: {axis.reason} ({axis.where})", *told)
    if axis.batch % devices:
        what = f"a batch of {axis.batch} does not divide over {devices} devices"
        return (f"{what}, so pure data parallelism was not possible", *told)
    return told


def _fused(graph: Graph, kernel: AttentionKernel | None, asked: AttentionKind) -> tuple[str, ...]:
    """What `attention="fused"` or `"ring"` found, and what runs it."""
    found = [visit for visit in graph.visits if visit.op.kind == FORWARD]
    many = sum(visit.times for visit in found)
    plain = tuple(
        f"the attention at {where} stays plain: {why}"
        for where, why in dict.fromkeys(plain_attention(graph))
    )
    if not many:
        return plain or (f"attention={asked} changes nothing: no attention was found",)
    kept = sum(visit.times * pairs_kept(visit.op) for visit in found) / many
    pairs = "all pairs" if kept == 1 else f"of all pairs {kept:.0%}, as masks leave them,"
    priced = f"{pairs} of queries and keys, priced as a fused kernel of these"
    how = f"run block by block, {priced}"
    if kernel and asked == "fused":
        by_kernel = sum(visit.times for visit in found if not reason_against(visit.op, kernel))
        which = "" if by_kernel == many else f"{by_kernel} of them "
        how = f"{which}run by {kernel}, {priced}" if by_kernel else "run block by block"
    told = (
        f"{counted(many, 'attention')} of a step fused: scores are never whole; {how}; gradients make the weights again"
        + (_round(found, many) if asked == "ring" else "")
    )
    return (told, *plain, *(_not_by_kernel(graph, kernel) if asked == "fused" else ()))


def _fused_losses(graph: Graph) -> tuple[str, ...]:
    """What `loss="fused"` found, and what stays as the step writes it."""
    runs = {kind: sum(v.times for v in graph.visits if v.op.kind == kind) for kind in (BOTH, LOSS)}
    many = sum(runs.values())
    left = [one for one in looked_at(graph) if isinstance(one, Unfused)]
    kept = tuple(
        f"the cross-entropy at {one.where} stays plain: {one.reason}" for one in dict.fromkeys(left)
    )
    if many:
        many_told = f"{many} cross-entropies" if many > 1 else "the cross-entropy"
        again = "; gradients make them again, a product more" if runs[LOSS] else ""
        told = f"{many_told} of a step fused: logits are never whole{again}"
        return (told, *kept)
    return kept or ("loss=fused changes nothing: no cross-entropy was found",)


def _not_by_kernel(graph: Graph, kernel: AttentionKernel | None) -> tuple[str, ...]:
    """Attention that the kernel does not run, and gradients that make the forward pass again."""
    if kernel is None:
        return ()
    visits = [visit for visit in graph.visits if visit.op.kind in ATTENTION]
    why: dict[str, list[str]] = {}
    for visit in visits:
        if reason := reason_against(visit.op, kernel):
            why.setdefault(reason, []).append(visit.op.where)
    again = [visit.op.where for visit in visits if products_made(visit.op, kernel) > 1]
    told = [
        f"no kernel runs the attention at {', '.join(dict.fromkeys(places))} ({reason}): it runs block by block, "
        f"priced with the scores that blocks write and read"
        for reason, places in why.items()
    ]
    if again:
        told.append(
            f"{kernel} makes the attention at {again[0]} again for its gradient, seven products for five: "
            f"the loop over layers keeps no results for it"
        )
    return tuple(told)


def _round(found: Sequence[Visit], many: int) -> str:
    """Of how many attentions keys may go round."""
    able = sum(visit.times for visit in found if visit.op.has("ring"))
    return f"; keys go round where devices share queries ({able} of {many} can)"


def _own_statistics(where: tuple[str, ...], candidate: Candidate | None) -> str:
    """What `batch_stats="microbatch"` does to the numbers of a plan."""
    places = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
    many = candidate.microbatches if candidate else 1
    if many == 1:
        return f"batch_stats=microbatch changes nothing with one microbatch; sums over the batch: {places}"
    return (
        f"batch_stats=microbatch: sums over the batch at {places} are taken over each of {many} microbatches; "
        "gradients and running averages are the mean over these, so numbers differ from the step's own"
    )


def opaque_of(space: Space) -> tuple[str, ...]:
    graph = space.program.graph
    found = {
        f"{v.op.kind} at {v.op.where or v.op.tag}"
        for v in graph.visits
        if not v.op.regions and rule_of(v.op, graph.types).opaque
    }
    return tuple(sorted(found))


# ---------------------------------------------------------------- tables


def tensors_of(space: Space, choices: tuple[int, ...]) -> list[Tensor]:
    """Inputs by tag, then the results of the forward pass's products."""
    graph, known = space.program.graph, roles(space.program.graph)
    counts: dict[str, int] = defaultdict(int)
    rows: dict[str, Tensor] = {}
    for position, value in enumerate(graph.inputs):
        tag = graph.input_tags[position]
        counts[tag] += graph.input_counts[position]
        rows[tag] = _row(space, choices, tag, value, known.get(position, "input"), counts[tag], "")
    for top, phase in zip(graph.ops, space.program.phases, strict=True):
        for op, count in _products(top, 1) if phase == "forward" else ():
            counts[op.tag] += count
            tag = space.program.value_tags[op.outputs[0]]
            rows[op.tag] = _row(
                space, choices, tag, op.outputs[0], "activation", counts[op.tag], op.where
            )
    return list(rows.values())


def _products(op: Op, times: int) -> Iterator[tuple[Op, int]]:
    """The products in an op, and how often they run per microbatch."""
    runs = times * op.count
    if op.kind in CONTRACTIONS:
        yield op, runs
    for region in op.regions:
        for inner in region.ops:
            yield from _products(inner, runs * op.trips)


def _row(
    space: Space, choices: tuple[int, ...], tag: str, value: int, role: str, count: int, where: str
) -> Tensor:
    kind, layout = _one_microbatch(space, value, role), _layout(space, choices, tag)
    local = layout.local_shape(kind.shape, space.mesh)
    name = spoken(space)[tag.rpartition(":")[0]] if role == "activation" else tag
    return Tensor(
        name=name, role=role, dtype=kind.dtype, shape=kind.shape, local_shape=local, sharding=str(layout),
        count=count, local_bytes=count * kind.nbytes / layout.ways(space.mesh), where=where,
    )  # fmt: skip


def _one_microbatch(space: Space, value: int, role: str) -> TensorType:
    """The type of a value as it exists at one time."""
    kind, axis = space.program.graph.types[value], space.program.time
    if role != "activation" or isinstance(axis, Refusal) or value not in axis.split:
        return kind
    dim = axis.split[value]
    shape = list(kind.shape)
    shape[dim] //= space.microbatches
    return TensorType(kind.dtype, tuple(shape))


def _layout(space: Space, choices: tuple[int, ...], tag: str) -> Sharding:
    home = space.homes[tag]
    number: int = home.layouts[0 if home.node is None else choices[home.node]]
    return space.layouts.known[number]
