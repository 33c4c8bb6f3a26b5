"""A composite (attention, cross-entropy, their gradients) on one shard's part: its body, block by block.

    for block of heads:  scores = q[block] · kᵀ;  ...;  o[block] = weights · v

Scores or logits exist for one block at a time. A block is a part of a free dim, like the part that a device has, so the
body is run by the same emitters as any op; results that are summed over the dim are added up from block to block, in
float32. Devices that share the vocabulary of a loss bring the maxima and sums of each block together; what its
gradients sum over it is owed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod

import torch

from ...ir.analysis.dealt import through
from ...ir.attrs import Attr
from ...ir.composites.bodies import LOSS, body_of
from ...ir.composites.evenly import partners
from ...ir.composites.loss_blocks import block_of, logits_in
from ...ir.composites.online import body_parts
from ...ir.errors import LoweringError
from ...ir.graph import Op
from ...ir.ops import LOSSES
from ...ir.rules import rule_of
from ...ir.rules.rule import Rule
from .collectives import Axes, Communicator, Pairs, joined
from .dtypes import torch_dtype
from .emit import emitter
from .shard import Part, View

Tensor = torch.Tensor
Dims = tuple[tuple[int, ...], ...]  # by dim of an array, the free dims that it is made of
Cuts = Mapping[int, Part]
Run = Callable[[Sequence[Tensor]], list[Tensor]]
BLOCK = 1 << 20  # scores that exist at a time, at most where dims can be cut so far


class Composite:
    """Runs one; made once for each microbatch.

    Args:
        view: the composite's rule; its free dims are the first factors, but for those of size 1.
        joint: how devices work it out together, by axes: "even", rows are dealt out for equal work
            (`ir/composites/evenly.py`); "vocabulary", that of a loss is shared.

    Raises:
        LoweringError: keys would have to go round the devices.
    """

    def __init__(self, op: Op, view: View, joint: Mapping[str, Axes], communicator: Communicator):
        if "ring" in joint:
            raise LoweringError(
                "attention whose keys go round a ring of devices cannot run on torch yet.",
                where=op.where or None,
                fix="plan with --attention fused, or run the step with --backend xla",
            )
        told = dict(op.attrs)
        self.op, self.graph, self.communicator = op, body_of(op.text("body")), communicator
        self.sizes = op.integers("sizes")
        self.operands, self.results = _dims(told["operands"]), _dims(told["results"])
        dims = self.sizes if told.get("keys") is None else (*self.sizes, op.integer("keys"))
        self.parts = body_parts(self.graph, dims, self.operands)
        self.vocabulary = op.integer("vocabulary") if op.has("vocabulary") else None
        self.sharing = joint.get("vocabulary", ())
        numbers = iter(range(len(view.rule.factors)))
        factors = [next(numbers) if size > 1 else None for size in self.sizes]
        self.cuts = {
            d: view.cuts[f] for d, f in enumerate(factors) if f is not None and f in view.cuts
        }
        self.even, self.rows, self.partners = joint.get("even", ()), 0, ()
        if self.even:
            self.rows = op.integer("rows")
            spans = _dims((told["spans"],))[0]
            pairs = tuple((first, end) for first, end in spans)
            self.partners = partners(pairs, op.integer("blocks"), self.cuts[self.rows].ways)
        complete = op.integers("complete") if op.has("complete") else ()
        self.complete = complete
        self.owed = {
            v
            for k, v in enumerate(self.graph.outputs)
            if op.kind in LOSSES and op.kind != LOSS and k not in complete
        }
        self.blocks = self._blocks()
        added = [d for d, _ in self.blocks]
        self.summed = {
            v for v, dims in zip(self.graph.outputs, self.results, strict=True)
            if op.kind in LOSSES and any(_place(dims, d) is None for d in added)
        }  # fmt: skip
        types = self.graph.types
        self.dtypes = [torch_dtype(types[v].dtype) for v in self.graph.outputs]
        self.numbers = {
            c.value: torch.tensor(c.data, dtype=torch_dtype(types[c.value].dtype))
            for c in self.graph.constants
        }
        self._bodies: dict[tuple[tuple[int, Part], ...], Run] = {}

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        found = (
            self._evenly(operands) if self.even else self._loop(operands, self.cuts, self.blocks)
        )
        if self.sharing and self.vocabulary is not None:
            for k in self.complete:  # one device has all of the sum that is owed
                if self.cuts[self.vocabulary].index:
                    found[k] = torch.zeros_like(found[k])
        return [x.to(dtype) for x, dtype in zip(found, self.dtypes, strict=True)]

    def _blocks(self) -> list[tuple[int, int]]:
        """Free dims and the number of blocks of each, so that scores are small: first those that most operands have, as
        they need no sums. The batch is left alone where microbatches cut it over time."""
        if self.op.kind in LOSSES:
            most, block = (
                logits_in(self.op),
                block_of(self.op, {d: cut.ways for d, cut in self.cuts.items()}),
            )
        else:
            most = max(
                (kind.size for kind in self.graph.types.values() if kind.is_float), default=0
            )
            block = BLOCK
        left = most // prod(cut.all_ways for cut in self.cuts.values())
        lacking = {
            d: sum(all(d not in dim for dim in dims) for dims in self.operands)
            for d in range(len(self.sizes))
            if d != self.vocabulary
        }
        found: list[tuple[int, int]] = []
        for d in sorted(lacking, key=lambda d: (lacking[d], d)):
            cut = self.cuts.get(d, Part(0, 1))
            here, wanted = self.sizes[d] // cut.all_ways, -(-left // block)
            if wanted <= 1 or cut.microbatches > 1:
                continue
            many = next((n for n in range(wanted, here) if here % n == 0), here)
            if many > 1:
                found.append((d, many))
                left //= many
        return found

    def _evenly(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Each device works on the first half of its rows and on the second half of a partner's."""
        mine, ways = self.cuts[self.rows].index, self.cuts[self.rows].ways
        there = [(theirs, device) for device, theirs in enumerate(self.partners)]
        given = [
            self._exchanged(x, _place(dims, self.rows), there)
            for x, dims in zip(operands, self.operands, strict=True)
        ]
        halves = (2 * mine, 2 * self.partners[mine] + 1)
        parts = [Part(half, 2 * ways) for half in halves]
        found = self._by_parts(given, self.rows, parts, self.cuts, self.blocks)
        back = [(device, theirs) for theirs, device in there]
        return [
            self._exchanged(x, _place(dims, self.rows), back)
            for x, dims in zip(found, self.results, strict=True)
        ]

    def _exchanged(self, x: Tensor, at: int | None, pairs: Pairs) -> Tensor:
        """With the second half of rows of another device."""
        if at is None:
            return x
        first, second = x.chunk(2, at)
        return torch.cat([first, self.communicator.permute(second, pairs, self.even)], at)

    def _loop(
        self, operands: Sequence[Tensor], cuts: Cuts, blocks: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Results of blocks of a dim, side by side; what is summed over the dim is added up."""
        if not blocks:
            return self._body(cuts)(operands)
        (dim, many), *rest = blocks
        cut = cuts.get(dim, Part(0, 1))
        parts = [Part(cut.index * many + number, cut.ways * many) for number in range(many)]
        return self._by_parts(operands, dim, parts, cuts, rest)

    def _by_parts(
        self, operands: Sequence[Tensor], dim: int, parts: Sequence[Part], cuts: Cuts,
        blocks: Sequence[tuple[int, int]],
    ) -> list[Tensor]:  # fmt: skip
        """Results of what is here of a dim, in equal parts that lie so in the whole."""
        places, many = [_place(dims, dim) for dims in self.operands], len(parts)
        found = list[list[Tensor]]()
        for number, part in enumerate(parts):
            given = [
                x
                if at is None
                else x.narrow(at, number * (x.shape[at] // many), x.shape[at] // many)
                for x, at in zip(operands, places, strict=True)
            ]
            found.append(self._loop(given, {**cuts, dim: part}, blocks))
        return [
            _added(pieces) if (at := _place(dims, dim)) is None else torch.cat(pieces, at)
            for pieces, dims in zip(map(list, zip(*found, strict=True)), self.results, strict=True)
        ]

    def _body(self, cuts: Cuts) -> Run:
        """The body on one block, its ops looked up."""
        key = tuple(sorted(cuts.items(), key=lambda each: each[0]))
        if key not in self._bodies:
            self._bodies[key] = self._made(cuts)
        return self._bodies[key]

    def _made(self, cuts: Cuts) -> Run:
        graph, steps = self.graph, []
        for op in graph.ops:
            rule = rule_of(op, graph.types)
            here = self._cuts_of(op, rule, cuts)
            wide = op.kind == "dot_general" and not self.summed.isdisjoint(op.outputs)
            dtypes = tuple(
                torch.float32 if wide else torch_dtype(graph.types[v].dtype) for v in op.outputs
            )
            over = self._reduction(rule, here, cuts)
            steps.append((op, emitter(op, View(rule, here, dtypes)), over))

        def run(operands: Sequence[Tensor]) -> list[Tensor]:
            values = self.numbers | dict(zip(graph.inputs, operands, strict=True))
            for op, call, over in steps:
                results = call([values[v] for v in op.inputs])
                for value, x in zip(op.outputs, results, strict=True):
                    brought = over and value not in self.owed
                    values[value] = (
                        joined(x, over, self.sharing, self.communicator) if brought else x
                    )
            return [values[v] for v in graph.outputs]

        return run

    def _cuts_of(self, op: Op, rule: Rule, cuts: Cuts) -> dict[int, Part]:
        """Which part of the factors of an op of the body is here."""
        found: dict[int, Part] = {}
        known = through(op, rule, self.graph.types, self.parts)
        for parts, dims in zip(known, (*rule.operands, *rule.results), strict=True):
            for told, dim in zip(parts, dims, strict=True):
                if told and dim and told[0][0] in cuts and told[0][1] == 1:
                    found[dim[0]] = cuts[told[0][0]]
        return found

    def _reduction(self, rule: Rule, here: Cuts, cuts: Cuts) -> str:
        """How results over a vocabulary that devices share come together; "" where they are parts themselves."""
        whole = cuts.get(self.vocabulary) if self.vocabulary is not None and self.sharing else None
        if whole is None:
            return ""
        kept = {f for dims in rule.results for dim in dims for f in dim}
        lost = [f for f, cut in here.items() if cut is whole and f not in kept]
        return rule.factors[lost[0]].reduction if lost else ""


def _dims(told: Attr) -> tuple[Dims, ...]:
    """Of each array, by dim, the free dims that it is made of."""
    assert isinstance(told, tuple)
    return tuple(tuple(tuple(int(d) for d in dim) for dim in array) for array in told)  # type: ignore[union-attr, arg-type]


def _place(dims: Dims, dim: int) -> int | None:
    """The dim of an array that a free dim is in."""
    return next((k for k, d in enumerate(dims) if dim in d), None)


def _added(pieces: Sequence[Tensor]) -> Tensor:
    """Sums, of short floats in float32."""
    dtype = pieces[0].dtype
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    return reduce(torch.add, [x.to(wide) for x in pieces]).to(dtype)
