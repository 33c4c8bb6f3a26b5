"""A pipelined step as jax runs it: the runtime's driver on jitted programs, and its border with the user's arrays.

    running = lower_pipeline(plan, captured)
    results = running.jitted(*leaves)

Each fragment of each stage is a program of its own (`fragments`). Results are global arrays: state lies on its
stage, and what is whole there and no state, as a loss, is with several processes whole everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding

from ...ir.local.pipeline import PassProgram, PipelineProgram
from ...ir.passes.localize_pipeline import pipeline_program
from ...ir.pipeline.schedule import Schedule
from ...ir.pipeline.staged import StagedStep
from ...ir.pipeline.stages import Stages
from ...ir.plan import Plan
from ..runtime.driver import PipelineDriver
from ..runtime.programs import StageProgram
from ..runtime.rendezvous import Rendezvous
from .capture import Captured
from .devices import nowhere, on_cpus
from .dtypes import jax_dtype
from .everywhere import Everywhere
from .fragments import StagePrograms
from .runtime import JaxDevices
from .unstack import Unstacked


@dataclass(eq=False)
class LoweredPipeline:
    """A pipelined step on flat leaves; each result lies on the devices of its stage."""

    plan: Plan
    captured: Captured
    step: StagedStep
    stages: Sequence[StagePrograms]
    local: Sequence[PassProgram]
    passes: Mapping[str, StageProgram]  # the same as jitted programs, by name
    apart: Unstacked | None = None  # how the user's leaves were taken apart, layer by layer

    def __post_init__(self) -> None:
        totals = [
            [
                v
                for p in self.passes.values()
                if p.fragment.stage == stage
                for v in p.fragment.totals
            ]
            for stage in range(self.cut.count)
        ]
        places = [stage.devices(own) for stage, own in zip(self.stages, totals, strict=True)]
        self.driver = PipelineDriver(
            JaxDevices(), self.schedule, self.program.ranks, self.stages[0].local.graph, self.cut, places,
            self.passes, on_cpus(self.stages[0].mesh),
        )  # fmt: skip

    @property
    def schedule(self) -> Schedule:
        return self.step.schedule

    @property
    def cut(self) -> Stages:
        return self.step.cut

    @cached_property
    def program(self) -> PipelineProgram:
        """What each rank runs."""
        layouts = [stage.layouts for stage in self.stages]
        return pipeline_program(self.step, layouts, [*self.passes.values()], self.local)

    # ------------------------------------------------------------ as `Lowered`

    @property
    def by_tree(self) -> None:
        """There is no single program that jax could dispatch."""
        return None

    @property
    def compiled(self) -> Callable[..., Any]:
        """The step; its programs are compiled when they first run."""
        return self.jitted

    @property
    def joint(self) -> bool:
        """Whether the stages lie in several processes."""
        return self.driver.joint

    @property
    def rendezvous(self) -> Rendezvous:
        return self.driver.rendezvous

    @property
    def input_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each leaf lies first; other stages that read it get copies."""
        graph = self.stages[0].local.graph
        homes = zip(graph.inputs, self.cut.homes, strict=True)
        return tuple(self.stages[where[0]].sharding_of(v) for v, where in homes)

    @cached_property
    def output_shardings(self) -> tuple[NamedSharding, ...]:
        ends = [
            self.stages[s].sharding(self.stages[s].layouts.ends(o))
            for o, s in enumerate(self.cut.ends)
        ]
        return tuple(
            self.shared.layout if o in self.shared.sources else end for o, end in enumerate(ends)
        )

    @cached_property
    def shared(self) -> Everywhere:
        """Results that are whole on their stage and no state: with several processes, whole everywhere."""
        graph, state = self.stages[0].local.graph, {o for _, o in self.captured.graph.state}
        types = [graph.types[v] for v in graph.outputs]
        whole = {
            o: stage
            for o, stage in enumerate(self.cut.ends)
            if self.joint
            and o not in state
            and not any(self.stages[stage].layouts.ends(o).dims)
            and types[o].dtype != "key"
        }
        kinds = {o: (types[o].shape, jax_dtype(types[o].dtype)) for o in whole}
        return Everywhere(whole, kinds, [stage.mesh for stage in self.stages])

    def jitted(self, *leaves: Any) -> tuple[Any, ...]:
        """One step; donated leaves are given up."""
        results = self.driver.run(leaves)
        if self.joint:
            self._share(results)
        return tuple(results)

    def placed(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Leaves where they lie first; with several processes each stage puts its own."""
        return leaves if self.joint else jax.device_put(list(leaves), list(self.input_shardings))

    def run(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """One step from leaves that lie anywhere."""
        return self.jitted(*self.placed(leaves))

    def _share(self, results: list[Any]) -> None:
        """Results that all processes shall have, and the places of those that lie elsewhere."""
        if self.shared.sources:
            everyone = range(jax.process_count())
            made = self.rendezvous.run("the step's results", everyone, lambda: self.shared(results))
            for position, array in made.items():
                results[position] = array
        types, outputs = self.stages[0].local.types, self.stages[0].local.graph.outputs
        for position, layout in enumerate(self.output_shardings):
            if results[position] is None:
                kind = types[outputs[position]]
                results[position] = nowhere(kind.shape, jax_dtype(kind.dtype), layout)
