"""Seconds of a step by part, predicted and measured: products, attention, elementwise, optimizer.

Predicted: prices of the planner's ops, added up. Measured: kernels in a trace of the profiler. XLA
names each kernel's op in its program, which says from which op of the plan it came; a kernel that
fuses several counts for the last of them.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from meshwright.ir.graph import Op
from meshwright.ir.program import Program
from meshwright.planner.cost.kernels import CONTRACTIONS, KERNELS, attention_values
from meshwright.planner.cost.model import Roofline
from meshwright.planner.layouts import Layouts
from meshwright.planner.space import build

PARTS = ("products", "attention products", "softmax", "elementwise", "look-ups", "optimizer", "casts", "other")
STEPS = 3  # in a trace


def parts_by_tag(program: Program) -> dict[str, str]:
    """By op tag, the part of the step that the op belongs to."""
    inside = attention_values(program)
    found: dict[str, str] = {}
    for op, phase in zip(program.graph.ops, program.phases, strict=True):
        for each in _nested(op):
            found[each.tag] = _part(each, phase, inside)
    return found


def _nested(op: Op) -> Iterator[Op]:
    if not op.regions:
        yield op
    for region in op.regions:
        for inner in region.ops:
            yield from _nested(inner)


def _part(op: Op, phase: str, inside: frozenset[int]) -> str:
    if phase in ("update", "prepare"):
        return "optimizer" if phase == "update" else "casts"
    scores = not inside.isdisjoint((*op.inputs, *op.outputs))
    if op.kind in CONTRACTIONS:
        return "attention products" if scores else "products"
    return "softmax" if scores else "look-ups" if op.kind in KERNELS else "elementwise"


def predicted_parts(program: Program, cost: Roofline, microbatches: int, mesh: Any) -> dict[str, float]:
    """Seconds of a step on one device by part; their sum is the plan's prediction."""
    space = build(program, microbatches, cost, Layouts(cost.collectives(mesh)))
    part_of, seconds = parts_by_tag(program), dict.fromkeys(PARTS, 0.0)
    for tag, own in space.own.items():
        seconds[part_of.get(tag, "other")] += float(own[0]) * space.runs[tag]
    return seconds


def measured_parts(
    run: Callable[[Any], None], program: Any, part_of: Mapping[str, str]
) -> tuple[dict[str, float], list[tuple[str, str, float]]]:
    """Seconds of kernels per step by part, and the longest kernels: (instruction, what it is, seconds).

    `run` runs one step of the compiled program.
    """
    run(program)
    seconds, longest = dict.fromkeys(PARTS, 0.0), defaultdict(float)
    names = op_names(program.as_text())
    for instruction, duration in _kernels(lambda: [run(program) for _ in range(STEPS)]):
        name = names.get(instruction, "")
        seconds[_part_in(name, part_of)] += duration / STEPS
        longest[instruction, name] += duration / STEPS
    top = sorted(((i, n, s) for (i, n), s in longest.items()), key=lambda row: -row[2])[:40]
    return seconds, top


def op_names(hlo: str) -> dict[str, str]:
    """By instruction, where it came from, as XLA's text says it."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
    return dict(pattern.findall(hlo))


def _part_in(name: str, part_of: Mapping[str, str]) -> str:
    """The part of the innermost op that a kernel's origin names; tags of ops in a loop are a path themselves."""
    pieces = name.split("/")
    for end in range(len(pieces), 0, -1):
        for start in range(end):
            if (tag := "/".join(pieces[start:end])) in part_of:
                return part_of[tag]
    return "other"


def _kernels(run: Callable[[], object]) -> Iterator[tuple[str, float]]:
    """(instruction, seconds) of everything that the GPU did meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        for plane in data.planes:
            if "GPU:0" not in plane.name:
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    yield str(stats.get("hlo_op", event.name)), event.duration_ns * 1e-9
