"""Equal tags mean equal decisions, so ops of equal tag must take and make the same kinds of values.

Layers at the same place of a block are alike as they were written. A pass may make one unlike the others, as where
recomputation leaves a first layer's loop fewer values to hand over. Those that differ from the first of their tag get
a tag that says how, the same in the small and in the whole graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

from ..graph import Graph, Op, Region


def tell_apart(graph: Graph) -> Graph:
    """Give ops that differ from the first of their tag another."""
    return replace(graph, ops=_told(graph, graph.ops, {}))


def _told(graph: Graph, ops: Sequence[Op], known: dict[str, str]) -> tuple[Op, ...]:
    found: list[Op] = []
    for op in ops:
        form = _form(graph, op)
        unlike = bool(op.tag) and known.setdefault(op.tag, form) != form
        regions = tuple(replace(r, ops=_told(graph, r.ops, known)) for r in op.regions)
        tag = f"{op.tag}~unlike{crc32(form.encode()):08x}" if unlike else op.tag
        found.append(op if not unlike and not regions else replace(op, tag=tag, regions=regions))
    return tuple(found)


def _form(graph: Graph, op: Op) -> str:
    """What decisions on an op depend on: its kind, its attributes, the types around it and within its loop."""

    def types(values: Sequence[int]) -> str:
        return " ".join(str(graph.types[v]) for v in values)

    def border(region: Region) -> str:
        return f"{types(region.inputs)} -> {types(region.outputs)}"

    inside = "; ".join(border(region) for region in op.regions)
    return f"{op.kind} {op.attrs} {types(op.inputs)} -> {types(op.outputs)} {inside}"
