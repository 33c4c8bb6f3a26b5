"""A composite (attention, cross-entropy, their gradients) on one shard's part: by a kernel, or else block by block.

    for block of heads:  scores = q[block] · kᵀ;  ...;  o[block] = weights · v

Scores or logits exist for one block at a time. A block is a part of a free dim, like the part that a device has, so the
body is run by the same emitters as any op; results that are summed over the dim are added up from block to block, in
float32. Devices that share the vocabulary of a loss bring the maxima and sums of each block together; what its
gradients sum over it is owed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from ...ir.analysis.dealt import through
from ...ir.composites.bodies import LOSS, body_of
from ...ir.composites.evenly import partners
from ...ir.composites.free_dims import BLOCK, blocks_of, dims_of, place_of
from ...ir.composites.loss_blocks import block_of, logits_in
from ...ir.composites.online import body_parts
from ...ir.graph import Op
from ...ir.ops import LOSSES
from ...ir.rules import rule_of
from ...ir.rules.rule import Rule
from .attention_kernels import attention_kernel
from .collectives import Axes, Communicator, Pairs, joined
from .dtypes import torch_dtype
from .emit import emitter
from .shard import Part, View

Tensor = torch.Tensor
Cuts = Mapping[int, Part]
Blocks = Sequence[tuple[int, int]]  # free dims and how many blocks each is taken in
Run = Callable[[Sequence[Tensor]], list[Tensor]]


class Body:
    """A composite's graph, with the dims of its values as free dims; keys are numbered after those."""

    def __init__(self, op: Op):
        self.op, self.graph, self.sizes = op, body_of(op.text("body")), op.integers("sizes")
        self.operands, self.results = dims_of(op, "operands"), dims_of(op, "results")
        keys = (op.integer("keys"),) if op.has("keys") else ()
        self.dims = (*self.sizes, *keys)
        self.kept = op.integer("kept") if op.has("kept") else 0
        self.vocabulary = op.integer("vocabulary") if op.has("vocabulary") else None
        self.parts = body_parts(self.graph, self.dims, self.operands)
        types = self.graph.types
        self.most = max(
            (kind.size for kind in types.values() if kind.is_float), default=0
        )  # scores
        self.numbers = {
            c.value: torch.tensor(c.data, dtype=torch_dtype(types[c.value].dtype))
            for c in self.graph.constants
        }

    def cuts(self, view: View) -> dict[int, Part]:
        """Of free dims, by the composite's rule, whose first factors they are, but for those of size 1."""
        numbers = iter(range(len(view.rule.factors)))
        factors = [next(numbers) if size > 1 else None for size in self.sizes]
        return {d: view.cuts[f] for d, f in enumerate(factors) if f is not None and f in view.cuts}

    def blocks(self, cuts: Cuts, most: int, block: int, keys: int = 1) -> Blocks:
        """Free dims and the number of blocks of each, so that of `most` scores no more than `block` exist at a time:
        first those that most operands have, as they need no sums. The batch is left alone where microbatches cut it
        over time. Keys are cut in so many parts before."""
        timed = [d for d, cut in cuts.items() if cut.microbatches > 1]
        ways = {d: cut.all_ways for d, cut in cuts.items()}
        left_whole = (self.vocabulary, *timed)
        return blocks_of(self.sizes, self.operands, ways, most // keys, block, left_whole)

    def by_blocks(
        self, operands: Sequence[Tensor], cuts: Cuts, blocks: Blocks, run: Callable[[Cuts], Run]
    ) -> list[Tensor]:
        """Results of blocks of a dim, side by side; what is summed over the dim is added up."""
        if not blocks:
            return run(cuts)(operands)
        (dim, many), *rest = blocks
        cut = cuts.get(dim, Part(0, 1))
        parts = [Part(cut.index * many + number, cut.ways * many) for number in range(many)]
        return self.by_parts(operands, cuts, dim, parts, rest, run)

    def by_parts(
        self, operands: Sequence[Tensor], cuts: Cuts, dim: int, parts: Sequence[Part],
        blocks: Blocks, run: Callable[[Cuts], Run],
    ) -> list[Tensor]:  # fmt: skip
        """Results of what is here of a dim, in equal parts that lie so in the whole."""
        places, many = [place_of(dims, dim) for dims in self.operands], len(parts)
        found = list[list[Tensor]]()
        for number, part in enumerate(parts):
            given = [
                x if at is None else _nth(x, at, number, many)
                for x, at in zip(operands, places, strict=True)
            ]
            found.append(self.by_blocks(given, {**cuts, dim: part}, blocks, run))
        return [
            _added(pieces) if (at := place_of(dims, dim)) is None else torch.cat(pieces, at)
            for pieces, dims in zip(map(list, zip(*found, strict=True)), self.results, strict=True)
        ]

    def rule_and_cuts(self, op: Op, cuts: Cuts) -> tuple[Rule, dict[int, Part]]:
        """Of an op of the body: which part of its factors is here."""
        rule, found = rule_of(op, self.graph.types), dict[int, Part]()
        known = through(op, rule, self.graph.types, self.parts)
        for parts, dims in zip(known, (*rule.operands, *rule.results), strict=True):
            for told, dim in zip(parts, dims, strict=True):
                if told and dim and told[0][0] in cuts and told[0][1] == 1:
                    found[dim[0]] = cuts[told[0][0]]
        return rule, found

    def dtype(self, value: int) -> torch.dtype:
        return torch_dtype(self.graph.types[value].dtype)


class Composite:
    """Runs one on the part that is here; made once for each microbatch.

    Args:
        view: the composite's rule.
        joint: how devices work it out together, by axes: "even", rows are dealt out for equal work
            (`ir/composites/evenly.py`); "vocabulary", that of a loss is shared.
    """

    def __init__(self, op: Op, view: View, joint: Mapping[str, Axes], communicator: Communicator):
        self.op, self.body, self.communicator = op, Body(op), communicator
        self.cuts = self.body.cuts(view)
        self.sharing = joint.get("vocabulary", ())
        self.halves = None
        self.kernel = None if joint else attention_kernel(op, self.cuts)
        if even := joint.get("even", ()):
            spans = tuple((first, end) for first, end in op.integer_rows("spans"))
            rows = op.integer("rows")
            pairs = partners(spans, op.integer("blocks"), self.cuts[rows].ways)
            self.rows, self.halves = rows, Halves(communicator, even, pairs)
        outputs, loss = self.body.graph.outputs, op.kind in LOSSES
        self.complete = op.integers("complete") if op.has("complete") else ()
        self.owed = {
            v for k, v in enumerate(outputs) if loss and op.kind != LOSS and k not in self.complete
        }
        if loss:
            block = block_of(op, {d: cut.ways for d, cut in self.cuts.items()})
            self.blocks = self.body.blocks(self.cuts, logits_in(op), block)
        else:
            self.blocks = self.body.blocks(self.cuts, self.body.most, BLOCK)
        self.summed = {
            v for v, dims in zip(outputs, self.body.results, strict=True)
            if loss and any(place_of(dims, d) is None for d, _ in self.blocks)
        }  # fmt: skip
        self._runs: dict[tuple[tuple[int, Part], ...], Run] = {}

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        body = self.body
        if self.kernel is not None and operands[0].device.type == "cpu":
            found = self.kernel(operands)
        elif self.halves is not None:
            found = self._evenly(self.halves, operands)
        else:
            found = body.by_blocks(operands, self.cuts, self.blocks, self._run)
        if self.sharing and body.vocabulary is not None:
            for k in self.complete:  # one device has all of the sum that is owed
                if self.cuts[body.vocabulary].index:
                    found[k] = torch.zeros_like(found[k])
        return [x.to(body.dtype(v)) for x, v in zip(found, body.graph.outputs, strict=True)]

    def _evenly(self, halves: Halves, operands: Sequence[Tensor]) -> list[Tensor]:
        """Each device works on the first half of its rows and on the second half of a partner's."""
        cut, rows, body = self.cuts[self.rows], self.rows, self.body
        given = [
            halves.there(x, place_of(dims, rows))
            for x, dims in zip(operands, body.operands, strict=True)
        ]
        parts = [Part(half, 2 * cut.ways) for half in halves.numbers(cut.index)]
        found = body.by_parts(given, self.cuts, rows, parts, self.blocks, self._run)
        return [
            halves.back(x, place_of(dims, rows))
            for x, dims in zip(found, body.results, strict=True)
        ]

    def _run(self, cuts: Cuts) -> Run:
        """The body on one block, its ops looked up."""
        key = tuple(sorted(cuts.items(), key=lambda each: each[0]))
        if key not in self._runs:
            self._runs[key] = self._made(cuts)
        return self._runs[key]

    def _made(self, cuts: Cuts) -> Run:
        graph, numbers, steps = self.body.graph, self.body.numbers, []
        last = {v: number for number, op in enumerate(graph.ops) for v in (*op.inputs, *op.outputs)}
        for number, op in enumerate(graph.ops):
            rule, here = self.body.rule_and_cuts(op, cuts)
            wide = op.kind == "dot_general" and not self.summed.isdisjoint(op.outputs)
            dtypes = tuple(torch.float32 if wide else self.body.dtype(v) for v in op.outputs)
            call = emitter(op, View(rule, here, dtypes))
            gone = [v for v, end in last.items() if end == number and v not in graph.outputs]
            steps.append((op, call, self._reduction(rule, here, cuts), gone))

        def run(operands: Sequence[Tensor]) -> list[Tensor]:
            values = numbers | dict(zip(graph.inputs, operands, strict=True))
            for op, call, over, gone in steps:
                results = call([values[v] for v in op.inputs])
                for value, x in zip(op.outputs, results, strict=True):
                    brought = over and value not in self.owed
                    values[value] = (
                        joined(x.clone(), over, self.sharing, self.communicator) if brought else x
                    )
                del results
                for value in gone:
                    del values[value]
            return [values[v] for v in graph.outputs]

        return run

    def _reduction(self, rule: Rule, here: Cuts, cuts: Cuts) -> str:
        """How results over a vocabulary that devices share come together; "" where they are parts themselves."""
        whole = (
            cuts.get(self.body.vocabulary)
            if self.body.vocabulary is not None and self.sharing
            else None
        )
        if whole is None:
            return ""
        kept = {f for dims in rule.results for dim in dims for f in dim}
        lost = [f for f, cut in here.items() if cut is whole and f not in kept]
        return rule.factors[lost[0]].reduction if lost else ""


@dataclass(frozen=True)
class Halves:
    """Devices along `axes` keep the first half of what they have of a dim, and get the second half of a partner's."""

    communicator: Communicator
    axes: Axes
    partners: tuple[int, ...]

    def numbers(self, device: int) -> tuple[int, int]:
        """Which of all halves a device then has."""
        return 2 * device, 2 * self.partners[device] + 1

    def there(self, x: Tensor, at: int | None) -> Tensor:
        return self._exchanged(x, at, [(theirs, mine) for mine, theirs in enumerate(self.partners)])

    def back(self, x: Tensor, at: int | None) -> Tensor:
        return self._exchanged(x, at, list(enumerate(self.partners)))

    def _exchanged(self, x: Tensor, at: int | None, pairs: Pairs) -> Tensor:
        if at is None:
            return x
        first, second = x.chunk(2, at)
        return torch.cat([first, self.communicator.permute(second, pairs, self.axes)], at)


def _nth(x: Tensor, dim: int, number: int, many: int) -> Tensor:
    """One of equal parts."""
    size = x.shape[dim] // many
    return x.narrow(dim, number * size, size)


def _added(pieces: Sequence[Tensor]) -> Tensor:
    """Sums, of short floats in float32."""
    dtype = pieces[0].dtype
    return reduce(torch.add, [x.to(widened(dtype)) for x in pieces]).to(dtype)


def widened(dtype: torch.dtype) -> torch.dtype:
    """What sums of a type are kept in."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
