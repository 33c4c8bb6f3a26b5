"""Compare what a plan predicts of its pipeline with the programs that XLA compiled, and their order.

The driver walks a step with shapes in place of arrays: each program is compiled when it first runs, its
collectives count as often as it runs, and before each run the bytes are added up that its rank holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any

import jax
import numpy as np

from ...ir.audit import Audit, AuditedRank, compare
from .audit import refused
from .fragments import CompiledFragment
from .handover import Handover
from .hlo import CompiledCollective, collectives
from .pipeline import LoweredPipeline, StepRun, Store


def audit_pipeline(lowered: LoweredPipeline) -> Audit:
    """Compile all programs and hold them against the plan; memory is that of the fullest rank.

    Raises:
        InfeasibleError: the compiler says that a program does not fit into the device.
    """
    shapes = _Shapes(**{each.name: getattr(lowered, each.name) for each in fields(lowered)})
    shapes.walk()
    pipeline = lowered.plan.pipeline
    assert pipeline is not None
    ranks = [_part(shapes, rank, held) for rank, held in enumerate(lowered.schedule.held)]
    fullest = max(ranks, key=lambda part: part.compiled_peak)
    found = [each for stage in range(lowered.cut.count) for each in shapes.found(stage)]
    lines = compare(lowered.plan, found)
    return Audit(
        lines,
        fullest.predicted_peak,
        fullest.parts,
        lowered.plan.estimate.limit_bytes,
        tuple(ranks),
    )


def _part(shapes: _Shapes, rank: int, held: Sequence[int]) -> AuditedRank:
    pipeline = shapes.plan.pipeline
    assert pipeline is not None
    moved = sum(each.nbytes * each.count for stage in held for each in shapes.found(stage))
    predicted = max(pipeline.stages[stage].peak_bytes for stage in held)
    return AuditedRank(rank, tuple(held), moved, predicted, shapes.most[rank])


@dataclass(eq=False)
class _Shapes(LoweredPipeline):
    """A pipeline that computes nothing: `compiled` by program, `times` that each ran, `most` bytes per rank."""

    known: dict[tuple[str, int, tuple[int, ...]], Any] = field(default_factory=dict)
    times: Counter[Any] = field(default_factory=Counter)
    most: dict[int, dict[str, float]] = field(default_factory=dict)

    def walk(self) -> None:
        """One step; inputs that are not donated stay where they are to its end."""
        graph, avals = self.stages[0].local.graph, self.captured.binding.in_avals
        stores: list[Store] = [{} for _ in self.stages]
        for value, where, aval in zip(graph.inputs, self.cut.homes, avals, strict=True):
            for stage in where:
                layout = self.stages[stage].sharding_of(value)
                stores[stage][value] = jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=layout)
        self.inputs = [{id(each): each for each in store.values()} for store in stores]
        self.run_now = StepRun(self, stores)
        self.run_now.step()

    @property
    def moments(self) -> list[list[Any]]:  # type: ignore[override]
        count = self.schedule.microbatches
        return [
            [jax.ShapeDtypeStruct((), np.int32, sharding=s.replicated)] * count for s in self.stages
        ]

    def zeros_of(self, stage: int) -> list[Any]:
        return _results(*_compiled(self.zeros[stage]))

    def carry(self, handover: Handover, arrays: Sequence[Any] | None, what: str) -> list[Any]:
        assert arrays is not None
        return [
            jax.ShapeDtypeStruct(way.shape, array.dtype, sharding=way.arrives)
            for way, array in zip(handover.routes, arrays, strict=True)
        ]

    @staticmethod
    def scalars(array: Any) -> list[Any]:
        return [
            jax.ShapeDtypeStruct((), array.dtype, sharding=array.sharding)
            for _ in range(array.shape[0])
        ]

    def call(self, program: CompiledFragment, what: str, *operands: Any) -> Any:
        fragment = program.fragment
        key = (fragment.kind, fragment.stage, fragment.results + fragment.takes)
        if key not in self.known:
            try:
                self.known[key] = _compiled(program.call, *operands)
            except jax.errors.JaxRuntimeError as error:
                raise refused(error, self.plan.estimate.peak_bytes, self.plan.name) from error
        self.times[key] += 1
        self._look(fragment.stage, self.known[key][1].memory_analysis(), operands)
        for given in jax.tree.leaves(operands[1]):
            self.inputs[fragment.stage].pop(id(given), None)
        return _results(*self.known[key])

    def _look(self, stage: int, stats: Any, operands: Any) -> None:
        """What the rank holds while a program of it runs."""
        rank = next(r for r, held in enumerate(self.schedule.held) if stage in held)
        now, held = self.run_now, self.schedule.held[rank]
        arrays = [*operands]
        for each in held:
            arrays += [
                self.inputs[each],
                now.steady[each],
                now.flight[each],
                now.sums[each],
                now.pieces[each],
            ]
        arrays += [found for ((_, origin), _, _), found in now.leaving.items() if origin in held]
        parts = {
            "held": _bytes(jax.tree.leaves(arrays)), "temporaries": float(stats.temp_size_in_bytes),
            "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
        }  # fmt: skip
        if sum(parts.values()) > sum(self.most.get(rank, {}).values()):
            self.most[rank] = parts

    def found(self, stage: int) -> list[CompiledCollective]:
        """Collectives of a stage's programs in a step."""
        mesh = self.stages[stage].local.mesh
        return [
            replace(each, count=each.count * self.times[key])
            for key, (_, compiled) in self.known.items()
            if key[1] == stage
            for each in collectives(compiled.as_text(), mesh)
        ]


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
