"""Which dims of the inputs are the batch: told by the user, or inferred by dataflow, with evidence.

Dims that meet in one factor of an op are the same thing; so all dims of a step fall into
classes (`dims.py`). The batch is a class of the inputs that are not carried. What speaks
for and against one, the strongest first:

    summed      a sum over it reaches the new value of some state: gradients sum over the batch
    feature     not: state has it, and its new value needs sums over it, as a width does
    recurrent   not: a loop over it hands values from turn to turn (time of an RNN)
    stated      not: some other state has it (biases of the last layer; a carried hidden state)
    within      not: it is summed while another is kept, as attention sums over positions per example
    mapped      not: a loop runs over it, as over microbatches stacked in front
    alone       not: no sum over it keeps anything else, as gradients of weights do
    handled     not: an op needs it whole or looks up places in it
    behind      the first dim of its inputs before the second

Inputs that never meet (images of two losses) are one batch where all this and their size are
equal. What draws random numbers is never the batch; a step without state gives no evidence of
sums. Where two classes differ in nothing but their place, the first is taken and
`Batch.doubt` names the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..graph import Batch, Graph
from .dims import DimClasses, classes_of
from .summed import Summed

Place = tuple[int, int]  # input position, dim


def batch_dims(graph: Graph) -> dict[int, int]:
    """Input position -> batch dim, as known or else inferred. Other inputs are the same for every example."""
    return dict(known_batch(graph).dims)


def known_batch(graph: Graph) -> Batch:
    return infer_batch(graph) if graph.batch is None else graph.batch


def with_batch(graph: Graph) -> Graph:
    """The graph with its batch, inferred if it is not known."""
    return graph if graph.batch is not None else replace(graph, batch=infer_batch(graph))


def infer_batch(graph: Graph) -> Batch:
    """The batch by dataflow; no dims where nothing in the graph speaks for any."""
    classes = classes_of(graph)
    found = _candidates(graph, classes)
    if any(candidate.summed for candidate in found):
        found = [candidate for candidate in found if candidate.summed]
    if not found:
        return Batch((), "no input has a dim that could be it")
    first = min(found, key=lambda candidate: candidate.rank)
    same = [
        c for c in found if (c.case, c.behind, c.size) == (first.case, first.behind, first.size)
    ]
    dims: dict[int, int] = {}
    for position, dim in sorted(place for candidate in same for place in candidate.places):
        if graph.types[graph.inputs[position]].shape[dim] == first.size:
            dims.setdefault(position, dim)
    others = [c for c in found if c.case == first.case and c not in same]
    return Batch(tuple(sorted(dims.items())), first.evidence, _doubt(graph, others))


@dataclass(frozen=True)
class _Candidate:
    """One class of dims of the inputs that are not carried."""

    places: tuple[Place, ...]
    size: int
    summed: bool
    feature: bool
    recurrent: bool
    stated: bool
    within: bool
    mapped: bool
    alone: bool
    handled: bool

    @property
    def case(self) -> tuple[bool, ...]:
        """What the dataflow says, the weightiest first."""
        against = (
            self.feature,
            self.recurrent,
            self.stated,
            self.within,
            self.mapped,
            self.alone,
            self.handled,
        )
        return (not self.summed, *against)

    @property
    def behind(self) -> int:
        return max(dim for _, dim in self.places)

    @property
    def rank(self) -> tuple[object, ...]:
        return (self.case, self.behind, -len(self.places), -self.size, self.places)

    @property
    def evidence(self) -> str:
        said = ["the update sums over it" if self.summed else "no update sums over it"]
        said += ["a loop runs over it"] * self.mapped
        return ", ".join(
            [*said, "state has it too" if self.feature or self.stated else "no state has it"]
        )


def _candidates(graph: Graph, classes: DimClasses) -> list[_Candidate]:
    carried = {i for i, _ in graph.state}
    places: dict[int, list[Place]] = {}
    for position, value in enumerate(graph.inputs):
        for dim, size in enumerate(graph.types[value].shape):
            if position not in carried and size > 1:
                places.setdefault(classes.of(value, dim), []).append((position, dim))
    made = {c: found for c, found in places.items() if c not in classes.drawn}
    sums = Summed(graph, classes, made)
    summed, features, stated, alone = sums.for_state, sums.features, sums.stated, sums.alone
    within = sums.within(made.keys() - features - classes.recurrent)
    return [
        _Candidate(
            tuple(found), _size(graph, found), c in summed, c in features, c in classes.recurrent, c in stated,
            c in within, c in classes.mapped, c in alone, c in classes.handled,
        )
        for c, found in made.items()
    ]  # fmt: skip


def _size(graph: Graph, places: list[Place]) -> int:
    """The size that most of its inputs have."""
    sizes = [graph.types[graph.inputs[p]].shape[d] for p, d in places]
    return max(sizes, key=sizes.count)


def _doubt(graph: Graph, others: list[_Candidate]) -> str:
    names = [f"{graph.input_name(p)} dim {d} ({c.size})" for c in others for p, d in c.places[:1]]
    return ", ".join(names)
