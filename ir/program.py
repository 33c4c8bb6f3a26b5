"""A graph made ready for planning or lowering: recompute applied, copies placed, time cut.

The planner prepares the small graph of a `Folded` pair, the backends the whole
one; equal tags then mean equal decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from .analysis.attention import Attention, attentions
from .analysis.batch import batch_dims
from .analysis.refusals import BY_MICROBATCH
from .analysis.roles import phases as find_phases
from .graph import Graph, Op
from .passes.batch_stats import with_statistics_apart
from .passes.copies import insert_copies
from .passes.early import with_early_totals
from .passes.held import hold_microbatches
from .passes.late import with_late_factors
from .passes.microbatch import Refusal, TimeAxis, time_axis
from .passes.recompute import Policy, recompute
from .passes.saved import save_less
from .passes.told_apart import tell_apart
from .verify import verify_time


@dataclass(frozen=True, eq=False)
class Program:
    """`phases` has one entry per top-level op of `graph`. Equal to itself alone, so analyses can be kept."""

    graph: Graph
    phases: tuple[str, ...]
    time: TimeAxis | Refusal

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        return attentions(self.graph)

    @cached_property
    def value_tags(self) -> dict[int, str]:
        """A name for every value that is the same in the small and the whole graph."""
        return value_tags(self.graph)


def prepare(graph: Graph, policy: Policy, in_stages: bool = False) -> Program:
    """Apply a recompute policy and place copies, on a graph tagged by `fold`.

    Args:
        in_stages: the step is to run as a pipeline, whose passes save what they hand to each other.
    """
    batch = batch_dims(graph)
    graph = hold_microbatches(graph, batch)
    base = find_phases(graph, batch)
    top = [base[visit.index] for visit in graph.visits if not visit.parents]
    phase_of = {v: phase for op, phase in zip(graph.ops, top, strict=True) for v in op.outputs}
    graph, axis = _cut_in_time(graph, batch, phase_of)
    if isinstance(axis, Refusal):
        graph, axis = _statistics_apart(graph, batch, phase_of)
    top = [phase_of[op.outputs[0]] for op in graph.ops]
    if in_stages and policy == "none":
        again = save_less(graph, top)
    else:
        again = recompute(graph, top, policy, None if isinstance(axis, Refusal) else axis.split)
    again = tell_apart(hold_microbatches(again, batch))
    middle = [_phase(op, phase_of) for op in again.ops]
    phase_of |= {op.outputs[0]: phase for op, phase in zip(again.ops, middle, strict=True)}
    ready = insert_copies(again, middle)
    time = time_axis(ready, batch) if isinstance(axis, TimeAxis) else axis
    if isinstance(time, TimeAxis):
        verify_time(ready, time)
    return Program(ready, tuple(_phase(op, phase_of) for op in ready.ops), time)


def _cut_in_time(
    graph: Graph, batch: Mapping[int, int], phase_of: dict[int, str]
) -> tuple[Graph, TimeAxis | Refusal]:
    """The graph with what gives it a time axis, if anything does; `phase_of` learns new values."""
    found, axis = with_early_totals(graph, batch)
    phase_of |= {v: "prepare" for op in found.ops for v in op.outputs if v not in phase_of}
    if isinstance(axis, Refusal):
        found, axis = with_late_factors(found, batch)
        phase_of |= {v: "update" for op in found.ops for v in op.outputs if v not in phase_of}
    return (found, axis) if isinstance(axis, TimeAxis) else (graph, time_axis(graph, batch))


def _statistics_apart(
    graph: Graph, batch: Mapping[int, int], phase_of: dict[int, str]
) -> tuple[Graph, TimeAxis | Refusal]:
    """The graph with statistics per microbatch, where those were asked for; else the refusal names them if they do."""
    apart, axis = with_statistics_apart(graph, batch)
    if isinstance(axis, Refusal):
        return graph, axis
    if graph.batch is None or graph.batch.statistics != "microbatch":
        refused = time_axis(graph, batch)
        assert isinstance(refused, Refusal)
        return graph, replace(refused, fix=f"{refused.fix}; {BY_MICROBATCH}")
    for op in apart.ops:
        phase = phase_of.get(op.inputs[0], "prepare") if op.inputs else "prepare"
        phase_of |= {v: phase for v in op.outputs if v not in phase_of}
    return apart, axis


def _phase(op: Op, known: dict[int, str]) -> str:
    """Phase of an op; a loop rebuilt by a pass keeps its first result; copies say theirs in the tag."""
    if op.kind == "copy" and "~" in op.tag:
        name = op.tag.rpartition("~")[2]
        return "prepare" if name == "step" else name
    return known.get(op.outputs[0], "backward")


def value_tags(graph: Graph) -> dict[int, str]:
    tags = {c.value: f"const{c.value}" for c in graph.constants}
    names = graph.input_tags or tuple(f"in{i}" for i in range(len(graph.inputs)))
    tags.update(zip(graph.inputs, names, strict=True))
    for visit in graph.visits:
        for k, value in enumerate(visit.op.outputs):
            tags[value] = f"{visit.op.tag}:{k}"
        for region in visit.op.regions:
            for k, value in enumerate(region.inputs):
                tags[value] = f"{visit.op.tag}/in{k}"
    return tags
