"""Compare what a plan predicts of its pipeline with the programs that XLA compiled, and their order.

The driver walks a step with shapes in place of arrays: each program is compiled when it first runs, its
collectives count as often as it runs, and before each run the bytes are added up that its rank holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh as DeviceMesh

from ...ir.audit import Audit, AuditedRank, compare
from ...ir.sharding import Sharding
from ..runtime.driver import StepRun
from ..runtime.programs import Route, StageProgram, Transfer
from .audit import refused
from .devices import named_sharding
from .hlo import CompiledCollective, collectives
from .pipeline import LoweredPipeline
from .runtime import JaxDevices


def audit_pipeline(lowered: LoweredPipeline) -> Audit:
    """Compile all programs and hold them against the plan; memory is that of the fullest rank.

    Raises:
        InfeasibleError: the compiler says that a program does not fit into the device.
    """
    walk = _Walk(lowered)
    walk.step()
    ranks = [_part(walk, rank, held) for rank, held in enumerate(lowered.schedule.held)]
    fullest = max(ranks, key=lambda part: part.compiled_peak)
    found = [each for stage in range(lowered.cut.count) for each in walk.found(stage)]
    lines = compare(lowered.plan, found)
    return Audit(
        lines,
        fullest.predicted_peak,
        fullest.parts,
        lowered.plan.estimate.limit_bytes,
        tuple(ranks),
    )


def _part(walk: _Walk, rank: int, held: Sequence[int]) -> AuditedRank:
    pipeline = walk.lowered.plan.pipeline
    assert pipeline is not None
    moved = sum(each.nbytes * each.count for stage in held for each in walk.found(stage))
    predicted = max(pipeline.stages[stage].peak_bytes for stage in held)
    return AuditedRank(rank, tuple(held), moved, predicted, walk.most[rank])


class _Shapes(JaxDevices):
    """Devices that have shapes in place of arrays, all of them in this process."""

    def processes_of(self, mesh: DeviceMesh) -> set[int]:
        return {self.process}

    def place(
        self, leaves: Sequence[Any], mesh: DeviceMesh, layouts: Sequence[Sharding]
    ) -> Sequence[Any]:
        return [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(mesh, layout))
            for leaf, layout in zip(leaves, layouts, strict=True)
        ]

    def transfer(
        self, routes: Sequence[Route], sender: DeviceMesh, receiver: DeviceMesh
    ) -> Transfer:
        layouts = [route.arrives for route in routes]

        def moved(arrays: Sequence[Any] | None) -> tuple[Sequence[Any], Any]:
            return self.place(arrays or (), receiver, layouts), ()

        return moved

    def scalars(self, vector: Any) -> Sequence[Any]:
        one = partial(jax.ShapeDtypeStruct, (), vector.dtype, sharding=vector.sharding)
        return [one() for _ in range(vector.shape[0])]


@dataclass(eq=False)
class _Walk:
    """A pipeline that computes nothing: `known` programs, `times` that each ran, `most` bytes per rank."""

    lowered: LoweredPipeline
    known: dict[tuple[str, int, tuple[int, ...]], Any] = field(default_factory=dict)
    times: Counter[Any] = field(default_factory=Counter)
    most: dict[int, dict[str, float]] = field(default_factory=dict)

    def step(self) -> None:
        """One step; inputs that are not donated stay where they are to its end."""
        driver = self.lowered.driver
        driver = replace(
            driver,
            devices=_Shapes(),
            stages=[replace(s, zeros=partial(_zeros, s.zeros)) for s in driver.stages],
            passes={name: self._compiling(program) for name, program in driver.passes.items()},
        )
        stores = driver.placed(self.lowered.captured.binding.in_avals)
        self.inputs = [{id(each): each for each in store.values()} for store in stores]
        self.run = StepRun(driver, stores)
        self.run.step()

    def _compiling(self, program: StageProgram) -> StageProgram:
        return replace(program, call=partial(self._call, program))

    def _call(self, program: StageProgram, *operands: Any) -> Any:
        fragment, plan = program.fragment, self.lowered.plan
        key = (fragment.kind, fragment.stage, fragment.results + fragment.takes)
        if key not in self.known:
            try:
                self.known[key] = _compiled(program.call, *operands)
            except jax.errors.JaxRuntimeError as error:
                raise refused(error, plan.estimate.peak_bytes, plan.name) from error
        self.times[key] += 1
        self._look(fragment.stage, self.known[key][1].memory_analysis(), operands)
        for given in jax.tree.leaves(operands[1]):
            self.inputs[fragment.stage].pop(id(given), None)
        return _results(*self.known[key])

    def _look(self, stage: int, stats: Any, operands: Any) -> None:
        """What the rank holds while a program of it runs."""
        rank = next(r for r, held in enumerate(self.lowered.schedule.held) if stage in held)
        now, held = self.run, self.lowered.schedule.held[rank]
        arrays = [*operands]
        for each in held:
            arrays += [
                self.inputs[each],
                now.steady[each],
                now.flight[each],
                now.sums[each],
                now.pieces[each],
            ]
        arrays += [array for (origin, *_), array in now.leaving.items() if origin in held]
        parts = {
            "held": _bytes(jax.tree.leaves(arrays)), "temporaries": float(stats.temp_size_in_bytes),
            "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
        }  # fmt: skip
        if sum(parts.values()) > sum(self.most.get(rank, {}).values()):
            self.most[rank] = parts

    def found(self, stage: int) -> list[CompiledCollective]:
        """Collectives of a stage's programs in a step."""
        mesh = self.lowered.stages[stage].local.mesh
        return [
            replace(each, count=each.count * self.times[key])
            for key, (_, compiled) in self.known.items()
            if key[1] == stage
            for each in collectives(compiled.as_text(), mesh)
        ]


def _zeros(make: Any) -> Any:
    return _results(*_compiled(make))


def _compiled(call: Any, *operands: Any) -> tuple[Any, Any]:
    lowered = call.lower(*operands)
    return lowered.out_info, lowered.compile()


def _results(shapes: Any, compiled: Any) -> Any:
    """What a program gives, as shapes that know their layout; new ones each time, which are told apart."""
    make = lambda shape, layout: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout)  # noqa: E731
    return jax.tree.map(make, shapes, compiled.output_shardings)


def _bytes(arrays: Iterable[Any]) -> float:
    """Of distinct arrays, on one device."""
    distinct = {id(array): array for array in arrays}.values()
    return float(sum(prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in distinct))
