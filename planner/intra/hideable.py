"""Which communication may run beside computation, told locally of each place where a value may change layout.

    parameters   of a value that no example reaches: it is there before the passes begin, so it can come early
    gradients    of a value that only the update (or what adds gradients up) still reads: nothing in the passes waits
    tensor       anything else within the passes: exchanges inside layers, behind other work of the same pass

What none of the kinds asked for names holds up the next op.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from ...ir.analysis.batch import batch_dims
from ...ir.analysis.examples import Examples
from ...ir.execution import OverlapKind
from ...ir.graph import Op
from ...ir.ops import KERNELS, MOVEMENT
from ...ir.program import Program

# What a pass is made of: gradients of weights are not waited for until one reads them.
HEAVY = KERNELS - MOVEMENT


@dataclass
class Flow:
    """By tag: `batch` the values that examples reach, `updated` those that the update makes of gradients, `held_up` the
    ops and slots that a pass waits for, `deciding` those that tell whether a loop goes on or which branch runs."""

    batch: set[str] = field(default_factory=lambda: set())
    updated: set[str] = field(default_factory=lambda: set())
    held_up: set[str] = field(default_factory=lambda: set())
    deciding: set[str] = field(default_factory=lambda: set())

    def kind(self, source: str, reader: str, phase: str) -> OverlapKind | None:
        """By which kind of overlap what is read may hide; None for what must wait."""
        if source in self.updated or reader in self.deciding:
            return None
        if source not in self.batch:
            return "parameters" if phase != "update" else None
        if phase == "update" or reader not in self.held_up:
            return "gradients"
        return "tensor"


@lru_cache(maxsize=16)
def flow_of(program: Program) -> Flow:
    """Follow a prepared graph once forwards and once backwards."""
    graph, tags, found = program.graph, program.value_tags, Flow()
    examples = Examples(graph.types)
    for position, dim in batch_dims(graph).items():
        value = graph.inputs[position]
        examples.dims[value] = {dim: graph.types[value].shape[dim]}
        examples.depends.add(value)
    examples.run(graph.ops)
    found.batch = {tags[value] for value in examples.depends}
    waits = _Waits(found.held_up, found.deciding)
    for op, phase in zip(reversed(graph.ops), reversed(program.phases), strict=True):
        if phase != "update":
            waits.op(op)
    late = set[int]()  # values that are not there before the last backward pass is over
    for op, phase in zip(graph.ops, program.phases, strict=True):
        if phase == "backward" or (phase == "update" and not late.isdisjoint(op.inputs)):
            late.update(op.outputs)
            found.updated.update(tags[v] for v in _made(op) if phase == "update")
    return found


def _made(op: Op) -> set[int]:
    inside = (o for region in op.regions for o in region.ops)
    return {*op.outputs}.union(*(_made(each) for each in inside))


@dataclass
class _Waits:
    """`needed`: values that a product of the passes is made of, found from the last op to the first."""

    held_up: set[str]
    deciding: set[str]
    needed: set[int] = field(default_factory=lambda: set())

    def op(self, op: Op) -> None:
        if op.regions:
            self._regions(op)
        elif op.kind in HEAVY or not self.needed.isdisjoint(op.outputs):
            self.held_up.add(op.tag)
            self.needed.update(op.inputs)

    def _regions(self, op: Op) -> None:
        """What is carried on is needed where its next turn needs it."""
        consts, carry = op.loop_inputs
        for region in op.regions:
            ends = op.outputs if region in op.returning else region.outputs
            pairs = zip(region.outputs, ends, strict=True)
            self.needed |= {
                v for v, end in pairs if end in self.needed or region not in op.returning
            }
            known = -1
            while known < len(self.needed):
                known = len(self.needed)
                for inner in reversed(region.ops):
                    self.op(inner)
                starts = zip(region.inputs[consts : consts + carry], region.outputs, strict=False)
                self.needed |= {end for start, end in starts if start in self.needed}
            inputs = zip(op.inputs, region.inputs, strict=True)
            self.needed |= {outside for outside, v in inputs if v in self.needed}
            self._slots(op, region.inputs, region.outputs, carry)
            if region not in op.returning:
                self.deciding.update(inner.tag for inner in region.ops)
        if op.kind == "cond":
            self.needed.add(op.inputs[0])
            self.deciding.add(f"{op.tag}/in0")

    def _slots(self, op: Op, inputs: tuple[int, ...], outputs: tuple[int, ...], carry: int) -> None:
        self.held_up |= {f"{op.tag}/in{i}" for i, v in enumerate(inputs) if v in self.needed}
        self.deciding.add(f"{op.tag}/on")
        rows = enumerate(outputs[carry:], carry)
        self.held_up |= {f"{op.tag}/out{i}" for i, v in rows if v in self.needed}
