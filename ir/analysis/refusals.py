"""Why a step cannot be cut into microbatches, in the user's words: what it does with the whole batch, and where."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..graph import Graph, Op

STATISTICS = {
    "reduce_sum": "a sum", "reduce_max": "a maximum", "reduce_min": "a minimum", "dot_general": "a sum of products",
    "conv_general_dilated": "a sum of products", "scatter-add": "a sum by index", "scan": "the result of a loop",
    "reduce_and": "a test", "reduce_or": "a test",
}  # fmt: skip
BY_PLACE = frozenset({"slice", "dynamic_slice", "dynamic_update_slice", "pad", "rev"})
STAY = "microbatches=1 without a pipeline"
BY_MICROBATCH = (
    'or batch_stats="microbatch", which takes it over each microbatch and changes numbers'
)
OWN = f"{STAY}; or take it over each sequence or example, as balance losses and layer norms do"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a graph cannot be cut into microbatches, where the user wrote that, and what to change."""

    reason: str
    where: str
    fix: str = STAY


def statistic(graph: Graph, op: Op, late: Collection[int], totals: Collection[int]) -> Refusal:
    """An op of single examples reads `late` values, which `totals` of the whole batch make."""
    writer = {v: visit.op for visit in graph.visits for v in visit.op.outputs}
    source: Op | None = None
    before: Op | None = None
    stack: list[tuple[int, Op | None]] = [(v, None) for v in late]
    while stack and source is None:
        value, reader = stack.pop()
        if value in totals:
            source, before = writer.get(value), reader
        elif value in writer:
            stack.extend((v, writer[value]) for v in writer[value].inputs)
    what = "a value" if source is None else _named(source, before, graph)
    at = f" at {source.where}" if source is not None and source.where else ""
    return Refusal(
        f"the step takes {what} over the whole batch{at}, and each example is computed with it ({op.kind}"
        f"{' at ' + op.where if op.where else ''})",
        op.where,
        OWN,
    )


def _named(source: Op, reader: Op | None, graph: Graph) -> str:
    """The statistic that a sum is: one that is divided by a number is a mean."""
    numbers = graph.constant_ids
    mean = (
        reader is not None
        and reader.kind in ("div", "mul")
        and not numbers.isdisjoint(reader.inputs)
    )
    if mean and source.kind == "reduce_sum":
        return "a mean"
    return STATISTICS.get(source.kind, "a statistic")


def for_results(graph: Graph, op: Op, refusal: Refusal) -> Refusal:
    """The same, with other advice where nothing of the state is made of what the op makes: only metrics are."""
    made, state = set(op.outputs), {o for _, o in graph.state}
    for other in graph.ops:
        if not made.isdisjoint(other.inputs):
            made.update(other.outputs)
    needing = [o for o, v in enumerate(graph.outputs) if v in made]
    if not state or not needing or not state.isdisjoint(needing):
        return refusal
    names = " and ".join(f"`{graph.output_name(o)}`" for o in needing)
    return replace(
        refusal,
        fix=f"{STAY}; or return a row for each example instead of {names}, and compute the rest outside of the step: "
        "no state needs it",
    )


def compares(op: Op) -> Refusal:
    """An op has the batch in two dims."""
    if op.kind == "concatenate":
        return Refusal(
            "the step puts arrays of the batch one behind the other (concatenate)", op.where
        )
    return Refusal(
        f"the step compares examples of the batch with each other ({op.kind} has the batch in two dims)",
        op.where,
        f"{STAY}; a contrastive loss over fewer examples is another loss",
    )


def together(op: Op) -> Refusal:
    """An op sees the batch dim as a whole: it sorts, shifts or joins examples, or is opaque."""
    if op.kind in BY_PLACE:
        return Refusal(
            f"the step takes some examples of the batch by their places, as x[0] or x[1:] do ({op.kind})",
            op.where,
            f"{STAY}; or give the step those examples alone",
        )
    return Refusal(f"{op.kind} needs all examples of the batch together", op.where)


def places(op: Op) -> Refusal:
    """Ids say which examples are read or written."""
    return Refusal(f"{op.kind} picks examples of the batch by index", op.where)


def dropped(op: Op) -> Refusal:
    """A result has no batch dim and is no reduction of it."""
    return Refusal(
        f"{op.kind} takes examples of the batch together in a way that no sum undoes", op.where
    )


def looped(op: Op) -> Refusal:
    """A scan whose turns are examples."""
    return Refusal(
        "a loop runs over the examples of the batch",
        op.where,
        f"{STAY}; or jax.vmap over the examples, and no loop that accumulates gradients: microbatches do that",
    )


def inside_loop(op: Op) -> Refusal:
    """A sum over the batch is used in the loop that makes it."""
    return Refusal(
        f"a loop takes a sum over the whole batch and computes with it ({op.kind})", op.where, OWN
    )


def no_zero(op: Op) -> Refusal:
    """A loop adds a sum over the batch to something that each microbatch would add once more."""
    return Refusal(
        "a loop adds sums over the batch to a value that does not start at zero", op.where
    )


def unlike(op: Op) -> Refusal:
    """Branches leave unlike things for one result: a part of the batch here, a sum over it there."""
    return Refusal("one branch sums over the batch what another leaves as it is", op.where)


def left(op: Op) -> Refusal:
    """An op after the last microbatch reads what each made for itself."""
    return Refusal(f"{op.kind} needs a statistic of which each microbatch has its own", op.where)
