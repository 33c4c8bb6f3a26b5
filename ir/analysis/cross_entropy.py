"""Cross-entropy over a vocabulary, found by structure: which values lie between its products.

    hidden · weight ─▶ [ bias, cast, cap ─ exp, maximum, sum, label's logit ] ─▶ loss of each token       forward
                       [ gradient of logits ] ─▶ · weightᵀ, hiddenᵀ ·                                     backward

What `softmax.py` finds is one if its logits are one product of something that has the tokens and something that has
the vocabulary alone, labels from outside pick among them (a look-up, `labels == iota`, labels as numbers with all
dims), and products that leave it take the same two operands again. What is made of each token's maximum, sum and
picked logit and has nothing of the vocabulary (log, z-loss, weights of tokens) belongs to it, up to where tokens are
summed.

Not one: attention (its weights meet values), a contrastive loss (labels are numbers of the program's own), logits
that others read too (returned, sorted, `argmax`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from ..graph import Graph, Op
from ..ops import CONTRACTIONS, EXPONENTIAL, FORWARDING
from .dealt import Parts, complete, followed
from .links import Links
from .softmax import SUMMED, Softmax, SoftmaxFinder, shifted

_MOVED = FORWARDING - {"broadcast_in_dim"}


@dataclass(frozen=True)
class CrossEntropy(Softmax):
    """One cross-entropy, or one pass of it; `keys` is the vocabulary.

    Attributes:
        results: losses of tokens and what else of the forward pass others read.
        gradients: what leaves the backward pass.
        remade: values without the vocabulary that are made inside: maxima, sums, and what becomes of them.
    """

    results: tuple[int, ...]
    gradients: tuple[int, ...]
    remade: frozenset[int]


@dataclass(frozen=True)
class Unfused:
    """A cross-entropy that stays as it is: where, and why."""

    where: str
    reason: str


def cross_entropies(graph: Graph) -> tuple[CrossEntropy, ...]:
    """All of a step that can be fused, in the order of their first `exp`."""
    return tuple(one for one in looked_at(graph) if isinstance(one, CrossEntropy))


def looked_at(graph: Graph) -> tuple[CrossEntropy | Unfused, ...]:
    """All of a step, those too that others read the logits of."""
    links, taken, found = Links(graph), set[int](), list[CrossEntropy | Unfused]()
    within = WholeStep(graph, links)
    for visit in graph.visits:
        op = visit.op
        if (
            op.kind in EXPONENTIAL
            and op.outputs[0] not in taken
            and links.is_divided(op.outputs[0])
        ):
            search = _Search(links, op.outputs[0], within)
            one = search.run()
            if one is not None:
                found.append(one)
                taken |= search.made | search.given
    return tuple(found)


@dataclass(frozen=True)
class WholeStep:
    """What searches ask of the whole step."""

    graph: Graph
    links: Links

    @cached_property
    def free(self) -> frozenset[int]:
        """What is made of numbers alone."""
        found = set(self.graph.constant_ids)
        for visit in self.graph.visits:
            if not visit.op.regions and found.issuperset(visit.op.inputs):
                found.update(visit.op.outputs)
        return frozenset(found)

    @cached_property
    def updating(self) -> frozenset[int]:
        """What enters new state; a yes or no (is the loss finite?) does not."""
        found = {self.graph.outputs[o] for _, o in self.graph.state}
        for visit in reversed([*self.graph.visits]):
            op = visit.op
            inner = {v for region in op.regions for v in region.inputs}
            if found.isdisjoint((*op.outputs, *inner)):
                continue
            found.update(v for v in op.inputs if self.graph.types[v].dtype != "bool")
            found.update(v for region in op.regions for v in region.outputs)
        return frozenset(found)

    def after(self, values: Iterable[int]) -> set[int]:
        """What depends on values, within one turn of each loop."""
        waiting, found = list(values), set[int]()
        while waiting:
            value = waiting.pop()
            for op in self.links.readers[value]:
                inner = (
                    r
                    for region in op.regions
                    for v, r in zip(op.inputs, region.inputs, strict=False)
                    if v == value
                )
                new = [v for v in (*op.outputs, *inner) if v not in found]
                found.update(new)
                waiting += new
        return found


class _Search(SoftmaxFinder):
    ending = SUMMED | {"gather"}

    def __init__(self, links: Links, exp: int, step: WholeStep):
        super().__init__(links, exp)
        self.step = step
        self.others: list[str] = []  # who reads what is inside and may not
        self.small: dict[int, Parts] = {}  # values of tokens that are made of what is inside

    def run(self) -> CrossEntropy | Unfused | None:
        """The cross-entropy, if it is one."""
        self._back(self.exp)
        products = self._onward() or []
        keys = self._keys()
        if keys is None or len(self.openings) != 1 or not self._is_loss(products, keys):
            return None
        if self.others:
            if not self.links.takes_log((*self.made, *self.left)):
                return None  # the weights of a router: no loss is made of them
            return Unfused(self.links.writer[self.exp].where, self.others[0])
        self._follow_tokens(keys)
        results, gradients = self._sides(products, keys)
        inside, closings = frozenset(self.made | self.given), (*results, *gradients)
        return CrossEntropy(
            self.exp, keys, tuple(self.openings), closings, inside, frozenset(self.made),
            {**self.small, **{v: self.parts[v] for v in inside}},
            results, gradients, frozenset({*self.small, *self.left, *closings}),
        )  # fmt: skip

    def _bars(self, value: int, reader: Op | None) -> bool:
        shape = "[" + ", ".join(map(str, self.links.types[value].shape)) + "]"
        self.others.append(
            f"its logits {shape} are a result" if reader is None else f"`{reader.kind}` reads its logits {shape}"
        )  # fmt: skip
        return False

    # ------------------------------------------------------------ whether it is one

    def _is_loss(self, products: Collection[int], keys: frozenset[int]) -> bool:
        (opening,) = self.openings.values()
        sides = dict(zip(opening.inputs, self._sides_of(opening), strict=True))
        tokens = self.every - keys
        if sorted(map(sorted, sides.values())) != sorted(map(sorted, (keys, tokens))) or not tokens:
            return False
        source = {side: self._root(v) for v, side in sides.items()}
        for closing in products:
            op = self.links.writer[closing]
            for value, side in zip(op.inputs, self._sides_of(op), strict=True):
                if value not in self.made and self._root(value) != source.get(side):
                    return False
        return self._is_picked()

    def _sides_of(self, op: Op) -> list[frozenset[int]]:
        """Dims of the softmax on both operands of a product."""
        known = followed(op, self.links.types, self.parts)
        return [complete(known[v], self.kind) for v in op.inputs]

    def _root(self, value: int) -> int:
        """What a value shows in another place or form."""
        while True:
            op = self.links.writer.get(value)
            if above := self.links.up.get(value):
                value = above[0][0]
            elif op is not None and op.kind == "optimization_barrier":
                value = op.inputs[op.outputs.index(value)]
            elif op is not None and op.kind in _MOVED:
                value = op.inputs[0]
            else:
                return value

    def _is_picked(self) -> bool:
        """Whether labels from outside tell classes apart."""
        free = self.step.free
        makers = [op for v in self.given if (op := self.links.writer.get(v)) is not None]
        looked_up = [*self.left.values(), *(op for op in makers if op.kind.startswith("scatter"))]
        if any(op.kind not in SUMMED and op.inputs[1] not in free for op in looked_up):
            return True
        compared = [op for op in makers if op.kind == "eq" and not free.issuperset(op.inputs)]
        return bool(compared) or any(self._is_handed(v) for v in self.parts)

    def _is_handed(self, value: int) -> bool:
        """Whether it is a label for each class: a number from outside with all dims."""
        kind = self.links.types[value]
        unmade = value not in self.links.writer and not self.links.up.get(value)
        return (
            unmade and value not in self.step.free and kind.is_float and self._full(self.parts[value])
        )  # fmt: skip

    # ------------------------------------------------------------ what becomes of tokens

    def _follow_tokens(self, keys: frozenset[int]) -> None:
        """Follow what is made of values inside by ops that keep all tokens."""
        tokens = self.every - keys
        inside = self.made | self.given
        waiting = list(inside)
        while waiting:
            value = waiting.pop()
            found = {other: shifted(self._parts(value), n) for other, n in self.links.down[value]}
            for op in self.links.readers[value]:
                if not op.regions and op.kind not in CONTRACTIONS:
                    known = followed(op, self.links.types, self._known(op))
                    found |= {v: known[v] for v in op.outputs if v in known}
            for other, parts in found.items():
                if (
                    other not in inside
                    and other not in self.small
                    and complete(parts, self.kind) >= tokens
                ):
                    self.small[other] = parts
                    waiting.append(other)

    def _parts(self, value: int) -> Parts:
        return self.small[value] if value in self.small else self.parts[value]

    def _known(self, op: Op) -> dict[int, Parts]:
        told = (*op.inputs, *op.outputs)
        return {v: self._parts(v) for v in told if v in self.small or v in self.parts}

    def _sides(
        self, products: Collection[int], keys: frozenset[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What leaves, of the forward pass and of the backward pass. A gradient depends on the loss, or enters new
        state, or has classes."""
        read = [v for v in self._in_order({**self.small, **self.left}) if self._is_read(v)]
        after = self.step.after(self._readers(read))
        late = after if not after.isdisjoint(products) else self.step.updating
        has_keys = {v for v in read if complete(self._parts_of_left(v), self.kind) & keys}
        later = [v for v in read if products and (v in late or v in has_keys)]
        return tuple(v for v in read if v not in later), (*products, *later)

    def _parts_of_left(self, value: int) -> Parts:
        if value in self.small:
            return self.small[value]
        return followed(self.left[value], self.links.types, self.parts)[value]

    def _in_order(self, values: Collection[int]) -> list[int]:
        made = (v for visit in self.links.graph.visits for v in visit.op.outputs)
        return [v for v in made if v in values]

    def _is_read(self, value: int) -> bool:
        """Whether anything outside reads it."""
        return value in self.links.leaving or bool(self._readers([value]))

    def _readers(self, values: Iterable[int]) -> list[int]:
        """What ops outside make of values."""
        within = self.made | self.given | self.small.keys() | self.left.keys()
        found = list[int]()
        for value in values:
            for op in self.links.readers[value]:
                if op.regions and self._is_linked(op, value):
                    continue
                results = op.outputs
                if op.kind == "optimization_barrier":
                    results = [r for v, r in zip(op.inputs, op.outputs, strict=True) if v == value]
                found += [v for v in results if v not in within]
        return found
