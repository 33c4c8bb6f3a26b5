"""The best pipeline that a search has found, and the kind of program that runs it: programs of each stage, whose
passes the host dispatches, or a single one for all stages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from ...ir.analysis.blocks import Folded
from ...ir.errors import LoweringError, MeshwrightError, PlanError
from ...ir.execution_model import ExecutionModel
from ...ir.pipeline.layered import layered
from ...ir.pipeline.one_program import check_one_program
from ...ir.pipeline.part_cuts import part_cuts
from ...ir.pipeline.stages import cut_stages
from ...ir.program import prepare
from ...ir.units import format_seconds
from ..intra.space import Space
from ..problem import Problem
from ..report.of_pipeline import Alternative
from ..trace import Trace
from .choices import PipelineConfig
from .priced import Priced, Pricing
from .single import price_single, with_dispatch


@dataclass
class Found:
    """The best pipeline so far."""

    shape: PipelineConfig | None = None
    space: Space | None = None
    choices: tuple[int, ...] = ()
    pricing: Pricing | None = None
    priced: Priced | None = None
    # Seconds of a step by each kind of program, once chosen.
    programs: dict[str, float] = field(default_factory=lambda: {})
    why: str = ""  # why there is no single program
    apart: Priced | None = None  # as programs of each stage, where a single one was chosen

    @property
    def seconds(self) -> float:
        return self.priced.seconds if self.priced else inf

    @property
    def dispatched(self) -> float:
        """With the host's dispatch, once the kind of program is chosen."""
        return max(self.seconds, min(self.programs.values(), default=0.0))

    @property
    def by_stages(self) -> list[Alternative]:
        """As programs of each stage, if it can be so and was chosen."""
        priced = self.apart or self.priced
        if priced is None or "stages" not in self.programs:
            return []
        return [
            Alternative(
                f"{self.shape}, {priced.schedule.name}", priced.seconds, self.programs["stages"]
            )
        ]

    def as_run(self, model: ExecutionModel) -> float:
        """Seconds with the host's dispatch, as programs of its stages; inf if none was found."""
        if self.priced is None or self.pricing is None:
            return inf
        return with_dispatch(self.pricing, self.priced, model)


def with_program(found: Found, problem: Problem, trace: Trace) -> Found:
    """The same with seconds by each kind of program, as the faster of them.

    Raises:
        PlanError: a single program was asked for, and the stages are not equal.
    """
    if found.priced is None or found.pricing is None or found.shape is None:
        return found
    wanted, programs = problem.request.program, dict[str, float]()
    if wanted != "single":
        programs["stages"] = found.as_run(problem.cost.execution_model)
    single, why = None, ""
    try:
        if wanted != "stages" and problem.request.schedule in (None, "gpipe"):
            single = price_single(found.pricing, found.shape.microbatches)
            programs["single"] = single.seconds
            if single.seconds < programs.get("stages", inf):
                _check_alike(found, single, problem.folded)
    except MeshwrightError as error:
        if wanted == "single" and isinstance(error, LoweringError):
            raise PlanError.at(error, None, None) from error
        if wanted == "single":
            raise
        single, why = None, error.what
        programs.pop("single", None)
    if single is not None and single.seconds < programs.get("stages", inf):
        trace.note(f"{found.shape}, a single program: {format_seconds(single.seconds)}")
        found = replace(found, priced=single, apart=found.priced)
    return replace(found, programs=programs, why=why)


def _check_alike(found: Found, single: Priced, folded: Folded) -> None:
    """Raises LoweringError where the layers of the whole step are not one program on other values, or what
    they hold does not lie alike."""
    assert found.shape and found.space and found.pricing
    cuts = part_cuts(folded, [found.pricing.units.cuts[first] for first in single.firsts])
    program = prepare(folded.whole, found.shape.policy, in_stages=True)
    check_one_program(found.space.program.graph, found.space.codes(found.choices))
    layers = layered(program, cut_stages(program, folded.whole, cuts, found.shape.microbatches))
    name, tags = folded.whole.input_name, [program.value_tags[v] for v in program.graph.inputs]
    for first, *others in layers.inputs:
        lies = found.space.layout(tags[first], found.choices)
        if unlike := [
            each for each in others if found.space.layout(tags[each], found.choices) != lies
        ]:
            raise LoweringError(
                f"{name(first)} and {name(unlike[0])} are laid out in different ways.", where="pipeline",
                fix="program=stages, which runs any stages",
            )  # fmt: skip
