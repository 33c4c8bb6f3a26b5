"""Write down the best pipeline of a search as a `Plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.plan import Estimate, Pipeline, Plan, Stage
from ..ir.version import VERSION
from .moves import find_collectives
from .pipeline.priced import Priced
from .report import flop_of, notes_of, opaque_of, proof_of, slots_of, tensors_of
from .space import Space, build
from .usage import axis_uses

if TYPE_CHECKING:
    from .pipelines import Pipelines

LEFT_OUT = (
    "stages of different meshes, or on different devices",
    "other orders of passes than the schedules' own, but for the pipeline that was best with those",
    "meshes of a stage with more than two axes",
    "offload to host memory",
    "overlap of communication with compute",
    "layouts that do not divide evenly, or cut a dim across a reshape's minor factor",
    "different recompute for blocks of one step",
)


def write_pipeline(pipelines: Pipelines, lower_bound: float) -> Plan:
    """The plan of the best pipeline; tables count all its stages together."""
    best, search = pipelines.best, pipelines.search
    assert best.shape and best.space and best.pricing and best.priced
    shape, priced, choices = best.shape, best.priced, best.choices
    space = build(best.space.program, shape.microbatches, search.cost, search.layouts_on(shape.mesh))
    collectives = find_collectives(space, choices)
    worst = max(range(shape.stages), key=lambda rank: priced.peaks[rank])
    strategies = {tag: found[choices[space.op_node[tag]]].axes for tag, found in space.strategies.items()}
    slots = slots_of(space, choices)
    moving = sum(c.seconds for c in collectives) / shape.stages
    return Plan(
        meshwright=VERSION,
        name=search.name,
        graph=search.fingerprint,
        cluster=search.cluster,
        mesh=space.mesh,
        microbatches=shape.microbatches,
        recompute=shape.policy,
        strategies=strategies,
        slots=slots,
        uses=axis_uses(space, choices),
        estimate=Estimate(
            step_seconds=priced.seconds,
            compute_seconds=priced.seconds - moving,
            communication_seconds=moving,
            peak_bytes=max(priced.peaks),
            limit_bytes=search.limit,
            memory=_memory(pipelines, worst),
            flop=flop_of(space),
        ),
        proof=proof_of(search, priced.seconds, lower_bound, LEFT_OUT),
        tensors=tuple(tensors_of(space, choices)),
        collectives=tuple(collectives),
        opaque=opaque_of(space),
        notes=(*notes_of(search), "tables count all stages together"),
        pipeline=_pipeline(pipelines, priced, space, strategies, slots),
    )


def _pipeline(pipelines: Pipelines, priced: Priced, space: Space, strategies: dict, slots: dict) -> Pipeline:
    units, schedule = pipelines.choices.units, priced.schedule
    assert pipelines.best.pricing
    ends = (*priced.firsts[1:], len(units))
    stages = []
    for number, (first, end) in enumerate(zip(priced.firsts, ends, strict=True)):
        rank = schedule.homes[number]
        seconds = priced.stages[number]
        stages.append(
            Stage(
                cut=units.cuts[first], blocks=units.words(first, end), mesh=space.mesh, strategies={}, slots={},
                forward_seconds=seconds.forward, backward_seconds=seconds.backward + seconds.weight,
                weight_seconds=seconds.weight, send_seconds=seconds.send, once_seconds=priced.once[number],
                peak_bytes=priced.peaks[rank], held=priced.held[rank], memory=_memory(pipelines, rank),
            )
        )  # fmt: skip
    return Pipeline(
        schedule=schedule.name,
        stages=tuple(stages),
        first=tuple(rank * space.mesh.size for rank in range(schedule.ranks)),
        orders=schedule.text(),
    )


def _memory(pipelines: Pipelines, rank: int) -> dict[str, float]:
    best = pipelines.best
    assert best.priced and best.pricing
    runs = [best.priced.runs(pipelines.choices.units, stage) for stage in best.priced.schedule.held[rank]]
    return best.pricing.places[rank].memory.by_cause(tuple(map(sum, zip(*runs, strict=True))), best.priced.held[rank])
