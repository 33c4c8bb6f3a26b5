"""Write down the best pipeline of a search as a `Plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from ...ir.cluster.cluster import Cluster
from ...ir.execution_model import ExecutionModel
from ...ir.plan import Estimate, Pipeline, Plan, PlannedBatch, Stage
from ...ir.units import format_seconds
from ...ir.version import VERSION
from ..intra.space import Space, build
from ..pipeline.priced import Priced, Pricing
from ..pipeline.single import exchanges, memory_by_cause, once_alike, price_single, with_dispatch
from ..problem import Problem
from ..request import ProgramKind
from ..trace import Trace
from .chosen import slots_of
from .moves import repeated
from .of_plan import collectives_of, flop_of, notes_of, opaque_of, proof_of, tensors_of
from .usage import axis_uses

BESIDES = (  # whatever the meshes of stages
    "other orders of passes than the schedules' own, but for the pipeline that was best with those",
    "meshes of a stage with more than two axes, but for those that cut the best one further",
    "a single program for all stages, but for the pipeline that was best without",
    "offload to host memory",
    "overlap of communication with compute",
    "layouts that do not divide evenly, or cut a dim across a reshape's minor factor",
    "different recompute for blocks of one step",
)
LEFT_OUT = ("stages of different meshes", *BESIDES)


@dataclass(frozen=True)
class Rank:
    """What the devices of one rank do: a solution for them."""

    problem: Problem
    space: Space
    choices: tuple[int, ...]

    @property
    def strategies(self) -> dict[str, tuple[int, ...]]:
        return self.space.codes(self.choices)


@dataclass(frozen=True)
class ProgramChoice:
    """Predicted seconds of a step by each kind of program that can be, and why there is no single one."""

    programs: Mapping[str, float] = field(default_factory=lambda: {})
    why: str = ""

    @property
    def program(self) -> ProgramKind:
        seconds = self.programs.get
        return "single" if seconds("single", inf) < seconds("stages", inf) else "stages"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"no single program for all stages: {self.why}",) if self.why else ()


@dataclass(frozen=True)
class Alternative:
    """A pipeline by programs of its stages, in words: seconds of a step by the devices alone, and with the host's
    dispatch of the passes."""

    words: str
    seconds: float
    dispatched: float

    def __str__(self) -> str:
        alone, together = format_seconds(self.seconds), format_seconds(self.dispatched)
        return f"{self.words}: {alone} by the devices alone, {together} with the host's dispatch of its passes"


def passed_over(taken: Plan, others: Iterable[Alternative]) -> Plan:
    """The plan, with a line for each pipeline that would take the devices less time but waits for the host."""
    slow = [
        each for each in others if each.seconds < taken.estimate.step_seconds <= each.dispatched
    ]
    return taken.model_copy(
        update={"notes": (*taken.notes, *(f"not taken: {each}" for each in slow))}
    )


def by_stages(
    pricing: Pricing, priced: Priced, model: ExecutionModel, why: str = ""
) -> ProgramChoice:
    """Programs of each stage, with what the host takes to dispatch them."""
    return ProgramChoice({"stages": with_dispatch(pricing, priced, model)}, why)


def write_pipeline(
    ranks: Sequence[Rank], pricing: Pricing, priced: Priced, cluster: Cluster, lower_bound: float,
    trace: Trace, left_out: tuple[str, ...] = LEFT_OUT, chosen: ProgramChoice = ProgramChoice(),
) -> Plan:  # fmt: skip
    """The plan of a pipeline; tables count all its stages together, as the rank with most memory lays them out."""
    worst = max(range(len(ranks)), key=lambda rank: priced.peaks[rank] / pricing.places[rank].limit)
    problem, solved, choices = ranks[worst].problem, ranks[worst].space, ranks[worst].choices
    space = build(
        solved.program, solved.microbatches, problem.cost, problem.layouts_on(solved.mesh)
    )
    alike = dict.fromkeys(once_alike(pricing), len(ranks)) if chosen.program == "single" else {}
    serial = _serial(pricing, priced, chosen)
    unlike = len({id(rank.space) for rank in ranks}) > 1
    as_laid = f", as rank {worst} lays them out" * unlike
    plan = Plan(
        meshwright=VERSION,
        name=problem.name,
        graph=problem.fingerprint,
        cluster=cluster,
        mesh=space.mesh,
        backend=problem.request.backend,
        microbatches=space.microbatches,
        recompute=problem.policy_of(space.program),
        attention=problem.request.execution.attention,
        loss=problem.request.loss,
        overlap=problem.request.execution.overlap,
        strategies=ranks[worst].strategies,
        slots=slots_of(space, choices),
        uses=axis_uses(space, choices),
        estimate=Estimate(
            step_seconds=priced.seconds,
            compute_seconds=serial,
            communication_seconds=0.0,
            hidden_seconds=serial - priced.seconds,
            peak_bytes=priced.peaks[worst],
            limit_bytes=pricing.places[worst].limit,
            memory=_memory(pricing, priced, worst, chosen),
            flop=flop_of(space),
        ),
        proof=proof_of(problem, trace, priced.seconds, lower_bound, left_out),
        tensors=tuple(tensors_of(space, choices)),
        collectives=(),
        opaque=opaque_of(space),
        notes=(
            *notes_of(problem, None),
            *chosen.notes,
            f"tables count all stages together{as_laid}",
        ),
        batch=PlannedBatch.of(problem.folded.whole),
        pipeline=_pipeline(ranks, pricing, priced, unlike, chosen),
    )
    collectives = collectives_of(plan, space, problem.cost, alike)
    if chosen.program == "single":
        collectives += [
            repeated(each, len(ranks)) for each in exchanges(pricing, space.microbatches)
        ]
    moving = sum(each.seconds for each in collectives) / len(ranks)
    parts = {"compute_seconds": serial - moving, "communication_seconds": moving}
    update = {
        "collectives": tuple(sorted(collectives, key=lambda each: -each.seconds)),
        "estimate": plan.estimate.model_copy(update=parts),
    }
    return plan.model_copy(update=update)


def _serial(pricing: Pricing, priced: Priced, chosen: ProgramChoice) -> float:
    """Seconds of the same step if nothing overlapped within its stages."""
    if not any(unit.hides for place in pricing.places for unit in place.each):
        return priced.seconds
    if chosen.program == "single":
        return price_single(pricing.serial, priced.schedule.microbatches).seconds
    found = pricing.serial.with_cut(priced.schedule, priced.firsts)
    assert found is not None
    return found.seconds


def _pipeline(
    ranks: Sequence[Rank], pricing: Pricing, priced: Priced, unlike: bool, chosen: ProgramChoice
) -> Pipeline:
    units, schedule = pricing.units, priced.schedule
    ends = (*priced.firsts[1:], len(units))
    spaces = {id(rank.space): rank for rank in ranks} if unlike else {}
    uses = {key: axis_uses(rank.space, rank.choices) for key, rank in spaces.items()}
    stages: list[Stage] = []
    for number, (first, end) in enumerate(zip(priced.firsts, ends, strict=True)):
        rank = schedule.homes[number]
        mine, seconds = ranks[rank], priced.stages[number]
        stages.append(
            Stage(
                cut=units.cuts[first], blocks=units.words(first, end), mesh=mine.space.mesh,
                strategies=mine.strategies if unlike else {},
                slots=slots_of(mine.space, mine.choices) if unlike else {}, uses=uses.get(id(mine.space), ()),
                forward_seconds=seconds.forward, backward_seconds=seconds.backward + seconds.weight,
                weight_seconds=seconds.weight, send_seconds=seconds.send, once_seconds=priced.once[number],
                peak_bytes=priced.peaks[rank], held=priced.held[rank],
                memory=_memory(pricing, priced, rank, chosen),
            )
        )  # fmt: skip
    return Pipeline(
        schedule=schedule.name,
        stages=tuple(stages),
        first=tuple(place.first for place in pricing.places),
        orders=schedule.text(),
        program=chosen.program,
        programs=dict(chosen.programs),
    )


def _memory(pricing: Pricing, priced: Priced, rank: int, chosen: ProgramChoice) -> dict[str, float]:
    if chosen.program == "single":
        return memory_by_cause(pricing, priced.schedule.microbatches, rank)
    runs = [priced.runs(pricing.units, stage) for stage in priced.schedule.held[rank]]
    memory = pricing.places[rank].memory.under(priced.schedule, rank)
    return memory.by_cause(tuple(map(sum, zip(*runs, strict=True))), priced.held[rank])
