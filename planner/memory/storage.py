"""Which values are written to memory for later, and which are made again from others, by a backend's execution model.

XLA fuses a cheap op into every one of its readers, those of the backward pass too, and then never
stores its result: the readers make it again from what it was made of.

    dot ─▶ add ─▶ [ tanh ] ─▶ mul ─▶ dot      stored: both operands of products, the first product
             └─────── mul ────┘               and tanh, which is dear; `add` is made again

Stored are borders of kernels, results of dear ops and reductions, and what a barrier holds; a
reshape shows its operand. A backend that does not fuse so stores whatever a kernel leaves, and one that runs op by op
what each op does (`by_op.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ...ir.execution_model import ExecutionModel
from ...ir.graph import ITEM_BYTES, Graph, Op
from ...ir.ops import ALIASES, CONTRACTIONS, DIVISION, INDEXED, REDUCTIONS, TRANSCENDENTAL
from ...ir.passes.copies import settles
from ...ir.passes.microbatch import TimeAxis
from ...ir.program import Program
from ..cost.kernels import Kernels, is_kernel, kernels_of
from .by_op import shown_by

DEAR = REDUCTIONS | TRANSCENDENTAL | DIVISION | {"copy"}


def is_fused(op: Op) -> bool:
    """Whether it may be a part of its readers, which make its own operands again for it."""
    return not is_kernel(op) and op.kind not in DEAR and op.kind not in ALIASES


@dataclass(frozen=True, slots=True)
class Storage:
    """What is stored for some time, and what is read in place of what is not.

    `kept` are stored. Whoever reads a value of `made` reads its sources instead. A value of
    `twice` is stored for kernels that read it, while fused readers make it again. `widths` are
    factors on bytes, of values that are stored in a wider type or more than once. `early` are
    stored from the start of the step.
    """

    model: ExecutionModel
    kept: frozenset[int]
    made: Mapping[int, frozenset[int]]
    twice: Mapping[int, frozenset[int]]
    widths: Mapping[int, float]
    early: frozenset[int] = frozenset()


def storage_of(program: Program, model: ExecutionModel, kernels: Kernels | None = None) -> Storage:
    """What of a program is stored.

    Args:
        kernels: of the program, where they are not fused into their readers; as they are by default if None.
    """
    if model.runs_ops_alone:
        shown = shown_by(program)
        made = {value: frozenset((root,)) for value, root in shown.items()}
        every = {v for visit in program.graph.visits for v in (*visit.op.inputs, *visit.op.outputs)}
        kept = (every | {*program.graph.inputs} | {*program.graph.outputs}) - made.keys()
        return Storage(model, frozenset(kept - {*program.graph.constant_ids}), made, {}, {})
    if not model.fuses_into_readers:
        return Storage(model, (kernels or kernels_of(program)).kept, {}, {}, {})
    return _Analysis(program, kernels_of(program, joined=True), model).run()


class _Analysis:
    def __init__(self, program: Program, kernels: Kernels, model: ExecutionModel):
        self.kernels, self.model, self.types = kernels, model, program.graph.types
        self.ops = [visit.op for visit in program.graph.visits]
        self.maker = {v: op for op in self.ops for v in op.outputs}
        phases = zip(program.graph.ops, program.phases, strict=True)
        self.updated = {v for op, phase in phases if phase == "update" for v in op.outputs}
        self.aliases: dict[int, int] = {}  # to the value whose memory they show
        self.slices: dict[int, int] = {}  # what a loop's body sees of one turn, to the whole
        for op in self.ops:
            self._join(op)
        totals = program.time.totals if isinstance(program.time, TimeAxis) else ()
        reduced = self._reduced() if model.lone_reductions else ()
        borders = (*self._borders(program.graph), *totals, *reduced)
        self.stored = frozenset(map(self.root, borders))
        self.known = frozenset(program.graph.constant_ids)
        self.inputs = frozenset(program.graph.inputs)
        self.borders = (*program.graph.inputs, *program.graph.outputs)
        self._sources: dict[int, frozenset[int]] = {}

    def _join(self, op: Op) -> None:
        """A loop reads its constants where they are, and turns its carry over in one place."""
        if op.kind in ALIASES or self._transposes_product(op):
            self.aliases |= dict(zip(op.outputs, op.inputs, strict=False))
        for region in op.regions:
            consts, carry = op.loop_inputs
            inside, first = region.inputs, consts + carry
            self.aliases |= dict(zip(inside[:consts], op.inputs, strict=False))
            self.aliases |= dict(zip(inside[consts:first], op.outputs, strict=False))
            self.slices |= dict(zip(inside[first:], op.inputs[first:], strict=True))
        if op.kind == "cond":
            self._share(op)

    def _transposes_product(self, op: Op) -> bool:
        """A weight's gradient is written in the order of dims that the update wants."""
        product = self.maker.get(op.inputs[0]) if op.kind == "transpose" else None
        if product is not None and settles(product):
            product = self.maker[product.inputs[0]]
        return (
            product is not None and product.kind == "dot_general" and op.outputs[0] in self.updated
        )

    def _share(self, op: Op) -> None:
        """What branches make is made where the results lie."""
        for region in op.regions:
            made = {v for inner in region.ops if inner.kind not in ALIASES for v in inner.outputs}
            ends = zip(region.outputs, op.outputs, strict=True)
            self.aliases |= {v: result for v, result in ends if v in made and v not in self.aliases}

    def _borders(self, graph: Graph) -> Iterator[int]:
        yield from (*graph.inputs, *graph.outputs)
        for op in self.ops:
            if is_kernel(op):
                yield from (*op.inputs, *op.outputs)
            if op.kind == "optimization_barrier":
                yield from op.inputs
            for region in op.returning:
                yield from (
                    region.outputs if op.kind == "cond" else region.outputs[: op.loop_inputs[1]]
                )

    def run(self) -> Storage:
        for op in self.ops:  # in order, so that no chain is followed twice
            for value in op.outputs:
                self.sources(value)
        kept: set[int] = set()
        made: dict[int, frozenset[int]] = {}
        for value in self.kernels.kept:
            sources = self.sources(value)
            kept |= sources
            if sources != frozenset((value,)):
                made[value] = sources
        twice = {v: found for v in kept if (found := self._remakes(v))}
        stored = frozenset(kept) - self.kernels.inside.keys()
        widths, eager = self._widths(), self.model.eager_schedule
        if eager:
            widths = self._transposed(widths)
        early = self._early() if eager else frozenset[int]()
        return Storage(self.model, stored, made, twice, widths, early)

    def _early(self) -> frozenset[int]:
        """Results of scatters that add to zeros."""
        return frozenset(
            op.outputs[0]
            for op in self.ops
            if op.kind in INDEXED - {"gather"} and not self.sources(op.inputs[0])
        )

    def _transposed(self, widths: dict[int, float]) -> dict[int, float]:
        """Inputs whose examples a convolution takes for features, to make the gradient of its kernel:
        one copy more, in f32."""
        for op in self.ops:
            if op.kind != "conv_general_dilated":
                continue
            if op.integers("lhs_spec")[0] != 0 and self._is_input(op.inputs[0]):
                root = self.root(op.inputs[0])
                widths[root] = widths.get(root, 1.0) + 4 / ITEM_BYTES[self.types[root].dtype]
        return widths

    def _is_input(self, value: int) -> bool:
        """Whether it is an input of the step, or made of inputs alone, element by element."""
        op = self.maker.get(value)
        if op is None:
            return value in self.inputs or value in self.known
        return (self._is_fused(op) or op.kind in ALIASES or op.kind == "copy") and all(
            map(self._is_input, op.inputs)
        )

    def _remakes(self, value: int) -> frozenset[int]:
        """What a fused reader makes a cheap stored value of."""
        op = self.maker.get(value)
        if op is None or not self._is_fused(op):
            return frozenset()
        return self._made_of(value) - {value}

    def root(self, value: int) -> int:
        while value in self.aliases:
            value = self.aliases[value]
        return value

    def sources(self, value: int) -> frozenset[int]:
        """The stored values that a reader of this one reads; none if constants make it."""
        root = self.root(value)
        if root not in self._sources:
            made = self._made_of(root)
            constant = root in self.known or (not made and self._is_plain(root))
            self._sources[root] = (
                frozenset() if constant else frozenset({root}) if self._is_kept(root) else made
            )
        return self._sources[root]

    def _is_kept(self, root: int) -> bool:
        if root in self.stored:
            return True
        op = self.maker.get(root)
        if op is None:
            return root not in self.slices
        return not self._is_fused(op) or self._rounded(root)

    def _is_fused(self, op: Op) -> bool:
        return is_fused(op) or op.kind in self.model.fused_dear

    def _is_plain(self, root: int) -> bool:
        """Whether it is constant if its operands are."""
        op = self.maker.get(root)
        return root in self.slices if op is None else op.kind == "copy" or self._is_fused(op)

    def _made_of(self, value: int) -> frozenset[int]:
        op = self.maker.get(value)
        operands = (self.slices[value],) if value in self.slices else op.inputs if op else ()
        return frozenset[int]().union(*map(self.sources, operands))

    def _rounded(self, value: int) -> bool:
        return self.types[value].dtype in self.model.widened

    def _widths(self) -> dict[int, float]:
        """An operand of products alone is stored as f32; one that others read too, or that comes in or goes out, as
        both.

        What was gathered for products is widened at once, for all copies made of it, and what a
        loop takes slices of before the loop.
        """
        if not self.model.widened:
            return {}
        products, others = set[int](), {*map(self.root, self.borders)}
        for op in reversed(self.ops):
            gathered = op.kind == "copy" and self.maker.get(op.inputs[0], op).kind == "copy"
            if op.kind in CONTRACTIONS or (gathered and op.outputs[0] in products):
                products.update(map(self.root, op.inputs))
            elif op.regions:
                first = sum(op.loop_inputs)
                others.update(map(self.root, op.inputs[:first]))
                products.update(map(self.root, op.inputs[first:]))
            elif op.kind not in ALIASES:
                others.update(map(self.root, op.inputs))
        return {
            v: 4 / ITEM_BYTES[self.types[v].dtype] + (v in others)
            for v in products
            if self.types[v].dtype in self.model.widened
        }

    def _reduced(self) -> Iterator[int]:
        for op in self.ops:
            if op.kind in REDUCTIONS:
                yield from _factors(self.maker.get(self.root(op.inputs[0])), op.inputs)


def _factors(op: Op | None, operand: Collection[int]) -> Collection[int]:
    return op.inputs if op is not None and op.kind == "mul" else operand
