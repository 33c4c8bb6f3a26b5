"""Drop ops whose results nobody reads, in loops too.

    before  %1 = mul %0 %0;  %2 = add %0 %0;  return %2
    after   %2 = add %0 %0;  return %2

A loop loses the carries, stacked results and operands that nothing alive depends on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..graph import Graph, Op, Region


def drop_dead_ops(graph: Graph, before: Graph | None = None) -> Graph:
    """Keep what the outputs depend on; types and constants shrink with it.

    `before`: the graph that a pass was given, in which some results may have had no reader. Those are kept: in a
    folded graph the layers that are folded away read them.
    """
    ops, _ = live_ops(graph.ops, {*graph.outputs, *(_unread(before) if before else ())})
    graph = replace(graph, ops=tuple(ops))
    known = {*graph.inputs, *graph.outputs}
    for visit in graph.visits:
        known.update(visit.op.inputs, visit.op.outputs)
        for region in visit.op.regions:
            known.update(region.inputs, region.outputs)
    return replace(
        graph,
        types={v: kind for v, kind in graph.types.items() if v in known},
        constants=tuple(c for c in graph.constants if c.value in known),
    )


def _unread(graph: Graph) -> set[int]:
    read = {v for op in graph.ops for v in op.inputs}
    return {v for op in graph.ops for v in op.outputs} - read


def live_ops(ops: Sequence[Op], live: set[int]) -> tuple[list[Op], set[int]]:
    """The ops that `live` values depend on, and everything alive before them, which `live` learns."""
    kept: list[Op] = []
    for op in reversed(ops):
        if live.isdisjoint(op.outputs):
            continue
        trimmed = _trim_regions(op, live) if op.regions else op
        trimmed = _trim_barrier(op, live) if op.kind == "optimization_barrier" else trimmed
        kept.append(trimmed)
        live.update(trimmed.inputs)
    return kept[::-1], live


def _trim_barrier(op: Op, live: set[int]) -> Op:
    pairs = [(v, r) for v, r in zip(op.inputs, op.outputs, strict=True) if r in live]
    return replace(op, inputs=tuple(v for v, _ in pairs), outputs=tuple(r for _, r in pairs))


def _trim_regions(op: Op, live: set[int]) -> Op:
    """A loop or branch with only the parts its live results need. Carries can need each other."""
    attrs, (consts, carry) = dict(op.attrs), op.loop_inputs
    needed = {k for k, v in enumerate(op.outputs) if v in live}
    while True:
        bodies, used = list[list[Op]](), {0} if op.kind == "cond" else set[int]()
        for region in op.regions:
            body, alive = live_ops(region.ops, set(_ends(op, region, needed)))
            bodies.append(body)
            used |= {i for i, v in enumerate(region.inputs) if v in alive}
        more = {i - consts for i in used if consts <= i < consts + carry} - needed
        if not more:
            break
        needed |= more
    given = [
        i for i in range(len(op.inputs))
        if (i - consts in needed if consts <= i < consts + carry else i in used)
    ]  # fmt: skip
    made = sorted(needed)
    if op.kind != "cond":
        attrs["num_consts"] = sum(i < consts for i in given)
        attrs["num_carry"] = sum(k < carry for k in made)
    return replace(
        op,
        inputs=tuple(op.inputs[i] for i in given),
        outputs=tuple(op.outputs[k] for k in made),
        attrs=tuple(sorted(attrs.items())),
        regions=tuple(
            Region(tuple(r.inputs[i] for i in given), tuple(body), _ends(op, r, made))
            for r, body in zip(op.regions, bodies, strict=True)
        ),
    )


def _ends(op: Op, region: Region, made: Collection[int]) -> tuple[int, ...]:
    """What a region gives for these results; the condition of a while gives nothing for them."""
    if region not in op.returning:
        return region.outputs
    return tuple(region.outputs[k] for k in made)
