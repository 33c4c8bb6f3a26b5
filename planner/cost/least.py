"""The least seconds of all ops of a step, whatever their layouts: each cut evenly over the devices, nothing sent.
Worked out for all numbers of devices and microbatch counts at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from ...ir.graph import Op
from ...ir.microbatch import TimeAxis
from ...ir.program import Program
from ...ir.rules import rule_of
from .compute import Ways
from .kernels import free_values, kernels_of
from .model import CostModel

Class = TypeVar("Class")


def least_work(
    program: Program, cost: CostModel, devices: Sequence[int], counts: Sequence[int], class_of: Callable[[str], Class]
) -> dict[Class, np.ndarray]:
    """Seconds of one run of all ops of each class, by devices and microbatch count.

    Args:
        class_of: of an op's tag, or of that of the outermost loop around it.
    """
    found: dict[Class, np.ndarray] = defaultdict(lambda: np.zeros((len(devices), len(counts))))
    kernels = kernels_of(program, cost.fused_attention, cost.fusion, cost.redone_inside)
    types, time = program.graph.types, program.time
    split = time.split.keys() if isinstance(time, TimeAxis) else frozenset()
    once = np.array(devices, float)[:, None].repeat(len(counts), 1)
    parts = once * np.array(counts)
    for outer, op, times in _priced(program):
        sides = (*op.inputs, *op.outputs)
        ways = [parts if v in split else once for v in sides]
        work = once if split.isdisjoint(sides) else parts
        cuts = Ways(ways[: len(op.inputs)], ways[len(op.inputs) :], work)
        seconds = cost.least_seconds(op, rule_of(op, types), types, cuts, kernels)
        found[class_of(outer)] += times * seconds
    return dict(found)


def _priced(program: Program) -> Iterator[tuple[str, Op, int]]:
    """Ops that are not free, with the tag of the outermost loop around them (or their own), and runs."""
    free, graph = free_values(program), program.graph
    outer: dict[int, str] = {}
    for visit in graph.visits:
        outer[visit.index] = tag = outer[visit.parents[0]] if visit.parents else visit.op.tag
        if visit.op.kind not in ("scan", "optimization_barrier") and not free.issuperset(visit.op.outputs):
            yield tag, visit.op, visit.times
