"""The one interface through which the search asks what things cost.

`CostModel` is what the planner sees; `Roofline` is today's answer: a roofline for
compute, latency plus bandwidth for communication, nothing overlapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ...ir.cluster.cluster import Cluster, Device
from ...ir.execution_model import Backend, ExecutionModel, execution_model
from ...ir.graph import Op, TensorType
from ...ir.mesh import Mesh
from ...ir.rules.rule import Rule
from .bands import told
from .collectives import Collectives
from .compute import Terms, fused_terms, least_terms, op_seconds
from .kernels import Fusion, Kernels
from .ways import Ways


class CostModel(Protocol):
    """Prices ops and collectives on one cluster, in seconds."""

    @property
    def name(self) -> str: ...

    @property
    def band(self) -> str: ...

    @property
    def fused_attention(self) -> bool: ...

    @property
    def fusion(self) -> Fusion: ...

    @property
    def execution_model(self) -> ExecutionModel: ...

    @property
    def exchanges(self) -> bool: ...

    def collectives(self, mesh: Mesh) -> Collectives: ...

    def op_seconds(
        self,
        op: Op,
        rule: Rule,
        types: Mapping[int, TensorType],
        ways: Ways,
        kernels: Kernels,
    ) -> np.ndarray | float: ...

    def fused_terms(
        self, op: Op, types: Mapping[int, TensorType], kernels: Kernels
    ) -> Terms | None: ...

    def least_terms(
        self, op: Op, rule: Rule, types: Mapping[int, TensorType], kernels: Kernels
    ) -> Terms: ...


@dataclass(frozen=True)
class Roofline:
    """Compute by roofline, collectives by latency and bandwidth, no overlap."""

    cluster: Cluster
    fused_attention: bool = False  # one kernel for scores, softmax and their products
    fusion: Fusion = "all"
    products: str | None = (
        None  # element type to which products outside attention cast their operands
    )
    exchanges: bool = True  # devices may exchange rows of attention for equal work
    backend: Backend = "xla"

    @property
    def name(self) -> str:
        return "roofline-2"

    @property
    def band(self) -> str:
        return told(self.cluster)

    @cached_property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def execution_model(self) -> ExecutionModel:
        return execution_model(self.device.kind, self.backend)

    def collectives(self, mesh: Mesh) -> Collectives:
        return Collectives(mesh, self.cluster, self.backend)

    def op_seconds(
        self,
        op: Op,
        rule: Rule,
        types: Mapping[int, TensorType],
        ways: Ways,
        kernels: Kernels,
    ) -> np.ndarray | float:
        """Seconds of one run on one device, for every choice."""
        return op_seconds(
            op, rule, types, self.device, ways, kernels, self.execution_model, self.products
        )

    def fused_terms(
        self, op: Op, types: Mapping[int, TensorType], kernels: Kernels
    ) -> Terms | None:
        """The same of an op within a fused chain, before anything is chosen; None for kernels of their own."""
        return fused_terms(op, types, self.device, kernels, self.execution_model)

    def least_terms(
        self, op: Op, rule: Rule, types: Mapping[int, TensorType], kernels: Kernels
    ) -> Terms:
        """No layout that cuts everything into at most so many parts takes less."""
        return least_terms(
            op, rule, types, self.device, kernels, self.execution_model, self.products
        )
