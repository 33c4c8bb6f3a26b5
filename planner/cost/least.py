"""The least seconds of all ops of a step, whatever their layouts: each cut evenly over the devices, nothing sent.
Worked out for all numbers of devices and microbatch counts at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from ...ir.graph import Op
from ...ir.passes.microbatch import TimeAxis, timed_sides
from ...ir.program import Program
from ...ir.rules import rule_of
from .kernels import free_values, kernels_of
from .model import CostModel

Class = TypeVar("Class")


def least_work(
    program: Program,
    cost: CostModel,
    devices: Sequence[int],
    counts: Sequence[int],
    class_of: Callable[[str], Class],
) -> dict[Class, np.ndarray]:
    """Seconds of one run of all ops of each class, by devices and microbatch count.

    Args:
        class_of: of an op's tag, or of that of the outermost loop around it.
    """
    return spread(summed(program, cost, class_of), devices, counts)


def summed(
    program: Program, cost: CostModel, class_of: Callable[[str], Class]
) -> dict[Class, np.ndarray]:
    """Seconds of each class that nothing cuts, that devices cut, and that microbatches cut too: the same for
    any number of either."""
    sums: dict[Class, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for outer, each in _pieces(program, cost):
        sums[class_of(outer)] += each
    return dict(sums)


def spread(
    sums: Mapping[Class, np.ndarray], devices: Sequence[int], counts: Sequence[int]
) -> dict[Class, np.ndarray]:
    """What `least_work` says, of sums."""
    ways = np.array(devices, float)[:, None].repeat(len(counts), 1)
    parts = ways * np.array(counts)
    return {
        key: fixed + whole / ways + split / parts for key, (fixed, whole, split) in sums.items()
    }


@lru_cache(maxsize=16)
def _pieces(program: Program, cost: CostModel) -> list[tuple[str, np.ndarray]]:
    """The same of each op, with the tag that decides its runs."""
    kernels = kernels_of(
        program, cost.fused_attention, cost.fusion, cost.execution_model.redone_inside
    )
    types, time = program.graph.types, program.time
    cut: Mapping[int, int] = time.split if isinstance(time, TimeAxis) else {}
    found: list[tuple[str, np.ndarray]] = []
    for outer, op, times in _priced(program):
        rule = rule_of(op, types)
        terms, timed = cost.least_terms(op, rule, types, kernels), timed_sides(op, rule, cut)
        split = sum(seconds for k, seconds in terms.sides.items() if timed[k])
        whole = sum(terms.sides.values()) - split
        work = (0.0, terms.work) if any(timed) else (terms.work, 0.0)
        found.append((outer, times * np.array([terms.fixed, whole + work[0], split + work[1]])))
    return found


def _priced(program: Program) -> Iterator[tuple[str, Op, int]]:
    """Ops that are not free, with the tag of the outermost loop around them (or their own), and runs."""
    free, graph = free_values(program), program.graph
    outer: dict[int, str] = {}
    for visit in graph.visits:
        outer[visit.index] = tag = outer[visit.parents[0]] if visit.parents else visit.op.tag
        if (
            not visit.op.regions
            and visit.op.kind != "optimization_barrier"
            and not free.issuperset(visit.op.outputs)
        ):
            yield tag, visit.op, visit.times
