"""The one interface through which the search asks what things cost.

`CostModel` is what the planner sees; `Roofline` is today's answer: a roofline for
compute, latency plus bandwidth for communication, nothing overlapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..ir.cluster import Cluster
from ..ir.graph import Op, TensorType
from ..ir.mesh import Mesh
from ..ir.rule import Rule, Strategy, operand_sharding, result_sharding
from .collectives import Collectives
from .compute import Shares, op_seconds


class CostModel(Protocol):
    """Prices ops and collectives on one cluster, in seconds."""

    @property
    def name(self) -> str: ...

    @property
    def band(self) -> str: ...

    def collectives(self, mesh: Mesh) -> Collectives: ...

    def op_seconds(
        self, op: Op, rule: Rule, types: Mapping[int, TensorType], strategy: Strategy, mesh: Mesh,
        parts: list[int], in_memory: frozenset[int],
    ) -> float: ...  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """Compute by roofline, collectives by latency and bandwidth, no overlap."""

    cluster: Cluster

    @property
    def name(self) -> str:
        return "roofline-1"

    @property
    def band(self) -> str:
        return "not validated for this device; no overlap of communication with compute is assumed"

    @cached_property
    def device(self):
        return self.cluster.device

    def collectives(self, mesh: Mesh) -> Collectives:
        return Collectives(mesh, self.cluster)

    def op_seconds(
        self, op: Op, rule: Rule, types: Mapping[int, TensorType], strategy: Strategy, mesh: Mesh,
        parts: list[int], in_memory: frozenset[int],
    ) -> float:  # fmt: skip
        """Seconds of one run on one device; `parts` are the microbatches each operand and result is cut into."""
        operands = tuple(
            1 / (operand_sharding(rule, strategy, mesh, k).ways(mesh) * parts[k]) for k in range(len(op.inputs))
        )
        results = tuple(
            1 / (result_sharding(rule, strategy, mesh, k).ways(mesh) * parts[len(op.inputs) + k])
            for k in range(len(op.outputs))
        )
        cut = mesh.ways(tuple(a for a, code in zip(mesh.names, strategy.axes, strict=True) if code >= 0))
        return op_seconds(op, rule, types, self.device, Shares(operands, results, 1 / (cut * max(parts))), in_memory)
