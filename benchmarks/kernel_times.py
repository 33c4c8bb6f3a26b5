"""Seconds of a step by part, predicted and measured: products, attention, elementwise, optimizer.

Predicted: prices of the planner's ops, added up. Measured: kernels in a trace of the profiler. XLA
names each kernel's op in its program, which says from which op of the plan it came; a kernel that
fuses several counts for the last of them.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax

from meshwright.ir.graph import Op
from meshwright.ir.ops import CONTRACTIONS, KERNELS
from meshwright.ir.program import Program
from meshwright.planner.cost.kernels import attention_values
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build

ITEM_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
              "s8": 1, "u8": 1, "pred": 1}  # fmt: skip
PARTS = (
    "products",
    "attention products",
    "softmax",
    "elementwise",
    "look-ups",
    "optimizer",
    "casts",
    "other",
)
STEPS = 3  # in a trace
PRODUCTS = ("custom-call", "gemm_fusion", "cudnn-conv", "cublas")  # names of XLA's kernels for them


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


def _part(op: Op, phase: str, inside: Collection[int]) -> str:
    if phase in ("update", "prepare"):
        return "optimizer" if phase == "update" else "casts"
    scores = any(v in inside for v in (*op.inputs, *op.outputs))
    if op.kind in CONTRACTIONS:
        return "attention products" if scores else "products"
    return "softmax" if scores else "look-ups" if op.kind in KERNELS else "elementwise"


def predicted_parts(
    program: Program, cost: Roofline, microbatches: int, mesh: Any
) -> dict[str, float]:
    """Seconds of a step on one device by part; their sum is the plan's prediction."""
    space = build(program, microbatches, cost, Layouts(cost.collectives(mesh)))
    part_of, seconds = parts_by_tag(program), dict.fromkeys(PARTS, 0.0)
    for tag, own in space.own.items():
        seconds[part_of.get(tag, "other")] += float(own[0]) * space.runs[tag]
    return seconds


@dataclass(frozen=True)
class Instruction:
    """One kernel's place in XLA's program: where it came from, and the bytes of its operands and results."""

    origin: str
    nbytes: float


def measured_parts(
    run: Callable[[Any], None], program: Any, part_of: Mapping[str, str]
) -> dict[str, Any]:
    """Of one step, by part: seconds of kernels, and for kernels that are no products the bytes that they move.

    `run` runs one step of the compiled program. `longest` are (kernel, origin, seconds, bytes).
    """
    run(program)
    known = instructions(program.as_text())
    seconds, nbytes = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    longest: dict[str, float] = defaultdict(float)
    for name, duration in _kernels(lambda: [run(program) for _ in range(STEPS)]):
        found = known.get(name, Instruction("", 0.0))
        part = _part_in(name, found.origin, part_of)
        seconds[part] += duration / STEPS
        nbytes[part] += found.nbytes / STEPS
        longest[name] += duration / STEPS
    top = sorted(longest.items(), key=lambda item: -item[1])[:30]
    rows = [
        (name, known[name].origin, spent, known[name].nbytes)
        for name, spent in top
        if name in known
    ]
    return {"seconds": seconds, "bytes": nbytes, "longest": rows}


def instructions(hlo: str) -> dict[str, Instruction]:
    """What XLA's text says of each instruction outside fusions."""
    sizes: dict[str, float] = {}
    found = {}
    for line in hlo[hlo.rindex("\nENTRY ") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) [\w\-]+\((.*)", line)
        if match is None:
            continue
        name, kind, rest = match.groups()
        operands = re.findall(r"%([\w.\-]+)", re.split(r"\)(?:,|$)", rest, maxsplit=1)[0])
        origin = re.search(r'op_name="([^"]*)"', line)
        sizes[name] = _bytes(kind)
        moved = sizes[name] + sum(sizes.get(operand, 0.0) for operand in operands)
        found[name] = Instruction(origin.group(1) if origin else "", moved)
    return found


def _bytes(kind: str) -> float:
    """Of a type as XLA writes it, all members of a tuple together."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", kind)
    sizes = ((dtype, prod(int(dim) for dim in dims.split(",") if dim)) for dtype, dims in arrays)
    return float(sum(ITEM_BYTES.get(dtype, 0) * size for dtype, size in sizes))


def _part_in(kernel: str, origin: str, part_of: Mapping[str, str]) -> str:
    """The part of the innermost op that a kernel's origin names; tags of ops in a loop are a path themselves.

    A product whose result is turned afterwards bears the name of that: gradients of weights, mostly.
    """
    pieces = origin.split("/")
    spans = ((start, end) for end in range(len(pieces), 0, -1) for start in range(end))
    tags = ("/".join(pieces[start:end]) for start, end in spans)
    part = next((part_of[tag] for tag in tags if tag in part_of), "other")
    return "products" if kernel.startswith(PRODUCTS) and part != "attention products" else part


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
