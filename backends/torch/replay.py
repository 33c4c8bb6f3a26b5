"""A whole step on one device, op by op: the oracle of every lowering, and of capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...ir.graph import Graph, Op, Region
from ...ir.local.program import LocalOp, LocalProgram, LocalRegion, Shard
from ...ir.mesh import Mesh
from ...ir.sharding import replicated
from .local_step import LocalStep


def replay(
    graph: Graph, arrays: Mapping[int, torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """A step's results.

    Args:
        arrays: constants of the graph that are arrays.
        inputs: in the graph's order.

    Raises:
        LoweringError: torch has no such op or element type.
    """
    return LocalStep(unsharded(graph), arrays)(*inputs)


def unsharded(graph: Graph) -> LocalProgram:
    """A graph as the program of a single device."""
    shards = {v: Shard(kind, replicated(kind.rank)) for v, kind in graph.types.items()}
    return LocalProgram(
        "step", Mesh(()), 1, shards, graph.inputs, tuple(map(_local, graph.ops)), graph.outputs, graph.constants,
        graph.input_names, graph.output_names,
    )  # fmt: skip


def _local(op: Op) -> LocalOp:
    regions = tuple(map(_region, op.regions))
    return LocalOp(op.kind, op.inputs, op.outputs, op.attrs, regions, where=op.where, tag=op.tag)


def _region(region: Region) -> LocalRegion:
    return LocalRegion(region.inputs, tuple(map(_local, region.ops)), region.outputs)
