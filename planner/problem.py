"""What is to be planned, and what all algorithms that plan it share: programs, layouts, made once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from ..ir.analysis.blocks import Folded
from ..ir.cluster.cluster import Cluster
from ..ir.execution_model import execution_model
from ..ir.mesh import Mesh
from ..ir.passes.recompute import POLICIES, Policy
from ..ir.program import Program, prepare
from .cost.model import CostModel, Roofline
from .intra.catalogue import Catalogue
from .intra.layouts import Layouts
from .request import Request


def cost_of(cluster: Cluster, request: Request) -> Roofline:
    """Prices on a cluster of what a request's backend makes of a step."""
    alone = all(
        execution_model(device.kind, request.backend).runs_ops_alone
        for device in cluster.devices.values()
    )
    return Roofline(
        cluster,
        fusion="eager" if alone else "all",
        exchanges=request.program != "single",
        backend=request.backend,
    )


@dataclass(frozen=True)
class _Made:
    """What a step's decisions may be, on any cluster."""

    programs: dict[tuple[Policy, bool], Program] = field(default_factory=lambda: {})
    catalogues: dict[tuple[str, ...], Catalogue] = field(default_factory=lambda: {})


@dataclass(frozen=True, eq=False)
class Problem:
    """A step to be planned on a cluster, as a request asks for it.

    Attributes:
        folded: the tagged graph of the step and its small form.
        cost: prices of ops and collectives on the cluster.
        name, fingerprint: of the step; kept in plans.
    """

    folded: Folded
    cluster: Cluster
    request: Request
    cost: CostModel
    name: str
    fingerprint: str
    _made: _Made = field(default_factory=_Made, repr=False)

    @property
    def limit(self) -> float:
        """Bytes that a plan may use on each device."""
        if self.request.memory is not None:
            return self.request.memory
        return self.cluster.memory_per_device * (1 - self.request.headroom)

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """What may be recomputed; of policies that make one program, as without scores, the first."""
        if self.request.recompute is not None:
            return (self.request.recompute,)
        graphs = [self.program(policy).graph for policy in POLICIES]
        return tuple(p for n, p in enumerate(POLICIES) if graphs[n] not in graphs[:n])

    def program(self, policy: Policy, in_stages: bool = False) -> Program:
        """The step that recomputes so, to be run whole or by the stages of a pipeline."""
        known = self._made.programs
        if (policy, in_stages) not in known:
            known[policy, in_stages] = prepare(self.folded.small, policy, in_stages)
        return known[policy, in_stages]

    def policy_of(self, program: Program) -> Policy:
        """By which policy a program of this problem recomputes."""
        return next(p for (p, _), known in self._made.programs.items() if known is program)

    @cached_property
    def _layouts(self) -> dict[Mesh, Layouts]:
        return {}

    def layouts_on(self, mesh: Mesh) -> Layouts:
        """All layouts on a mesh, with the prices of changes between them."""
        if mesh not in self._layouts:
            shared = self._made.catalogues.setdefault(mesh.names, Catalogue(mesh))
            self._layouts[mesh] = Layouts(self.cost.collectives(mesh), shared)
        return self._layouts[mesh]

    def on_cluster(self, cluster: Cluster, request: Request) -> Problem:
        """The same step on another cluster; programs and what their decisions may be are shared."""
        return replace(self, cluster=cluster, request=request, cost=cost_of(cluster, request))

    def asking(self, **changes: object) -> Problem:
        """The same step on the same cluster, with another request."""
        return self.on_cluster(self.cluster, replace(self.request, **changes))  # type: ignore[arg-type]
