"""Names for content: of a graph, equal for equal graphs whatever ids their values carry; of an array."""

from __future__ import annotations

import hashlib

import numpy as np

from .graph import Graph, Op


def fingerprint(graph: Graph) -> str:
    """sha256 over types, ops and attributes with values renumbered; source lines and tags left out."""
    known: dict[int, str] = {}
    digest = hashlib.sha256()

    def number(value: int) -> str:
        if value not in known:
            known[value] = f"{len(known)}:{graph.types[value]}"
        return known[value]

    def add(op: Op) -> None:
        digest.update(f"{op.kind} {op.attrs} {[number(v) for v in op.inputs]}".encode())
        for region in op.regions:
            digest.update(f"( {[number(v) for v in region.inputs]}".encode())
            for inner in region.ops:
                add(inner)
            digest.update(f") {[number(v) for v in region.outputs]}".encode())
        digest.update(f"-> {[number(v) for v in op.outputs]}".encode())

    digest.update(
        f"{[number(v) for v in graph.inputs]} {graph.state} {sorted(graph.donated)}".encode()
    )
    digest.update(f"{[(number(c.value), c.data) for c in graph.constants]}".encode())
    for op in graph.ops:
        add(op)
    digest.update(f"{[number(v) for v in graph.outputs]}".encode())
    return digest.hexdigest()


def digest_of(array: np.ndarray) -> str:
    """The name that an array of constants has in a graph."""
    data = np.ascontiguousarray(array).view(np.uint8).data if array.size else b""
    return f"sha256:{hashlib.sha256(data).hexdigest()[:24]}"
