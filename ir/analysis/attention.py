"""Softmax attention, found by structure: which values lie between its products.

    q · kᵀ ─▶ [ scale, mask, bias ─ exp ─ sum, divide ─ dropout ] ─▶ · v        forward
    do · vᵀ ─▶ [ gradient of weights, of scores ] ─▶ · k, ᵀ · q, weightsᵀ · do   backward

A search starts at an `exp` whose results are divided by a sum of them. Its operand comes from
one product (the opening) through ops that keep all dims; everything that has all those dims, on either
side, belongs to the attention, and leaves it only by products that sum over keys or queries (the
closings) and by sums. Sizes play no part: dims are followed through dim rules.

Where layers are computed again, the backward pass has an `exp` of its own and is found by that one.

Not attention: a contrastive loss or a cross-entropy (no product takes the weights), weights that are
not a softmax (relu), weights that someone else reads (returned, sorted, looked up).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..graph import Graph, Op
from ..ops import ADDITION, EXPONENTIAL
from .dealt import complete, followed
from .key_spans import KeySpans, Scores
from .links import Links
from .masks import Kept, Masks, elsewhere, places
from .softmax import Softmax, SoftmaxFinder


@dataclass(frozen=True)
class Attention(Softmax):
    """One attention, or one pass of it; `closings` are products.

    Attributes:
        rows: dims of queries that keys have not; of keys there are `many_keys`.
        share: of all pairs of queries and keys, what masks leave that the program counts out (causal, windows);
            of the keys of one query they leave `longest` at most. `spans`: which blocks of keys a kernel leaves out.
        scores: results of the products that the softmax is taken of.
        weights: what the softmax is worth, up to scales and masks.
    """

    rows: frozenset[int]
    many_keys: int
    share: float
    longest: float
    spans: KeySpans | None
    scores: tuple[int, ...]
    weights: frozenset[int]


def attentions(graph: Graph) -> tuple[Attention, ...]:
    """All attentions of a step, in the order of their first `exp`."""
    links, taken, found = Links(graph), set[int](), list[Attention]()
    for visit in graph.visits:
        op = visit.op
        if (
            op.kind in EXPONENTIAL
            and op.outputs[0] not in taken
            and links.is_divided(op.outputs[0])
        ):
            one = _Search(links, op.outputs[0]).run()
            if one is not None:
                found.append(one)
                taken |= one.inside
    return tuple(found)


class _Search(SoftmaxFinder):
    def run(self) -> Attention | None:
        """The attention, if it is one."""
        self._back(self.exp)
        scores = tuple(self.openings)
        if not scores:
            return None
        closings = self._onward()
        keys = self._keys()
        if closings is None or keys is None or not self._is_attention(scores, closings, keys):
            return None
        inside, many = frozenset(self.made | self.given), prod(self.kind.shape[d] for d in keys)
        return Attention(
            self.exp, keys, tuple(self.openings), tuple(closings), inside, frozenset(self.made),
            {v: self.parts[v] for v in inside}, self._rows(keys), many, *self._shares(keys), self._spans(keys), scores,
            frozenset(self._weights),
        )  # fmt: skip

    def _shares(self, keys: frozenset[int]) -> tuple[float, float]:
        """What masks between the opening and the `exp` leave: of all pairs, and of one query's keys at most."""
        at = places(self.kind.shape, self._rows(keys), keys)
        kept = Kept(Masks(self.links.graph, self.links.writer, self.links.handed), at)
        for op in self._between():
            known = followed(op, self.links.types, self.parts)
            for k, value in enumerate(op.inputs):
                if value in self.made:
                    continue
                if op.kind == "select_n" and k > 0 and len(op.inputs) == 3:
                    which = op.inputs[0]
                    kept.chosen(
                        which,
                        elsewhere(known[which], at, self.kind),
                        value,
                        elsewhere(known[value], at, self.kind),
                        k == 1,
                    )
                elif op.kind in ADDITION:
                    kept.added(value, elsewhere(known[value], at, self.kind))
        return kept.share, kept.longest(keys)

    def _spans(self, keys: frozenset[int]) -> KeySpans | None:
        rows, size = self._rows(keys), self.kind.shape.__getitem__
        if not rows or not keys:
            return None
        masks = Masks(self.links.graph, self.links.writer, self.links.handed)
        at = max(rows, key=size), max(keys, key=size)
        scores = Scores(self.kind, *at, masks, self.parts, self.made)
        exps = [v for v in self.made if (op := self.links.writer.get(v)) and op.kind in EXPONENTIAL]
        return scores.spans(exps)

    def _between(self) -> list[Op]:
        """The ops that lead from openings to the `exp`."""
        waiting, found = [self.exp], list[Op]()
        while waiting:
            op = self.links.writer.get(value := waiting.pop())
            waiting += [other for other, _ in self.links.up[value]]
            if op is not None and value not in self.openings and op not in found:
                found.append(op)
                waiting += [v for v in op.inputs if v in self.made]
        return found

    # ------------------------------------------------------------ whether it is attention
    def _is_attention(
        self, scores: tuple[int, ...], closings: list[int], keys: frozenset[int]
    ) -> bool:
        """Keys come from one operand of the opening, and a product takes the weights themselves."""
        if not all(self._is_product(self.openings[value], keys) for value in scores):
            return False
        makers = [self.links.writer[value] for value in closings]
        return all(self._sums_positions(op, keys) for op in makers) and any(
            not self._weights.isdisjoint(op.inputs) for op in makers
        )

    def _is_product(self, op: Op, keys: frozenset[int]) -> bool:
        """Whether one operand has the keys and the other has none of them."""
        known = followed(op, self.links.types, self.parts)
        sides = [complete(known[v], self.kind) for v in op.inputs]
        return sorted(bool(side & keys) for side in sides) == [False, True] and any(
            side >= keys for side in sides
        )

    def _sums_positions(self, op: Op, keys: frozenset[int]) -> bool:
        """Whether a closing sums over all keys, or over what queries alone have."""
        left = complete(followed(op, self.links.types, self.parts)[op.outputs[0]], self.kind)
        return not left & keys or bool(self._rows(keys) - left)

    def _rows(self, keys: frozenset[int]) -> frozenset[int]:
        """Dims of the scores that the operand without keys has alone."""
        op = next(iter(self.openings.values()))
        known = followed(op, self.links.types, self.parts)
        one, other = sorted(
            (complete(known[v], self.kind) for v in op.inputs), key=lambda side: bool(side & keys)
        )
        return one - other
