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

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from .dealt import Parts, complete, followed, whole
from .graph import Graph, Op
from .key_spans import EXPS, KeySpans, Scores
from .masks import Kept, Masks, elsewhere, places

_PURE = frozenset(
    {"convert_element_type", "select_n", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "expand_dims",
     "optimization_barrier", "reduce_precision", "mul", "div"}
)  # fmt: skip
_OF_SUMS = _PURE | {"log", "max", "add", "add_any"}  # what a sum may go through before it divides
_SUMMED = frozenset({"reduce_sum", "reduce_max", "reduce_min"})


@dataclass(frozen=True)
class Attention:
    """One attention, or one pass of it.

    Attributes:
        softmax: the exponentials. `keys` are its dims that are summed over, `many_keys` their size; `rows` those of
            queries that keys have not.
        share: of all pairs of queries and keys, what masks leave that the program counts out (causal, windows);
            of the keys of one query they leave `longest` at most. `spans`: which blocks of keys a kernel leaves out.
        scores: results of the products that the softmax is taken of. `openings` are all products that make something
            with all dims of the softmax, those of the backward pass too; `closings` those that leave it.
        inside: what a fused kernel never writes. Of that `made` comes from openings, `weights` are what the softmax
            is worth, up to scales and masks. `dims` tells dims of values inside as those of the softmax.
    """

    softmax: int
    keys: frozenset[int]
    rows: frozenset[int]
    many_keys: int
    share: float
    longest: float
    spans: KeySpans | None
    scores: tuple[int, ...]
    openings: tuple[int, ...]
    closings: tuple[int, ...]
    inside: frozenset[int]
    made: frozenset[int]
    weights: frozenset[int]
    dims: Mapping[int, Parts]


def attentions(graph: Graph) -> tuple[Attention, ...]:
    """All attentions of a step, in the order of their first `exp`."""
    links, taken, found = Links(graph), set[int](), []
    for visit in graph.visits:
        op = visit.op
        if op.kind in EXPS and op.outputs[0] not in taken and links.is_divided(op.outputs[0]):
            one = _Search(links, op.outputs[0]).run()
            if one is not None:
                found.append(one)
                taken |= one.inside
    return tuple(found)


class Links:
    """Who makes and who reads a value, scans' bodies included."""

    def __init__(self, graph: Graph):
        self.graph, self.types = graph, graph.types
        self.writer: dict[int, Op] = {}
        self.readers = defaultdict[int, list[Op]](list)
        self.down = defaultdict[int, list[tuple[int, int]]](
            list
        )  # value -> (the same elsewhere, dims that gains)
        self.up = defaultdict[int, list[tuple[int, int]]](list)
        for visit in graph.visits:
            op = visit.op
            self.writer |= dict.fromkeys(op.outputs, op)
            for value in op.inputs:
                self.readers[value].append(op)
            if op.kind == "scan":
                self._enter(op)

    def _enter(self, op: Op) -> None:
        """What every turn is handed, the rows it takes and those it leaves; what is carried on is another each turn."""
        region, (consts, carry) = op.regions[0], op.loop_inputs
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            if i < consts or i >= consts + carry:
                self._link(outside, inside, 0 if i < consts else -1)
        for end, result in zip(region.outputs[carry:], op.outputs[carry:], strict=True):
            self._link(end, result, 1)

    def _link(self, source: int, result: int, gained: int) -> None:
        self.down[source].append((result, gained))
        self.up[result].append((source, -gained))

    def origins(self, value: int) -> dict[int, int]:
        """A value of a loop and what it is a row of, or stacked from: each with the dims that it has more."""
        found, waiting = {value: 0}, [value]
        while waiting:
            here = waiting.pop()
            for source, gained in self.up[here]:
                if source not in found:
                    found[source] = found[here] + gained
                    waiting.append(source)
        return found

    def first(self, value: int) -> int:
        """What a loop is handed in every turn, as it is outside of all loops."""
        while value in self.handed:
            value = self.handed[value]
        return value

    @cached_property
    def handed(self) -> dict[int, int]:
        """What every turn of a loop is handed: the same outside of it."""
        return {
            inside: found[0][0]
            for inside, found in self.up.items()
            if len(found) == 1 and not found[0][1]
        }

    @cached_property
    def leaving(self) -> frozenset[int]:
        """Results of the step, and of loops and branches what is more than a row."""
        found = set(self.graph.outputs)
        for visit in self.graph.visits:
            op = visit.op
            for region in op.regions:
                found.update(
                    region.outputs[: op.loop_inputs[1]] if op.kind == "scan" else region.outputs
                )
        return frozenset(found)

    @cached_property
    def totals(self) -> dict[int, int | None]:
        """Sums of weights, and what cheap ops make of those: each with what it is made of, a sum with None."""
        exps = [v.op.outputs[0] for v in self.graph.visits if v.op.kind in EXPS]
        weights = {value for exp in exps for value in self.steps(exp, _PURE)}
        found: dict[int, int | None] = {
            op.outputs[0]: None
            for value in weights
            for op in self.readers[value]
            if op.kind == "reduce_sum"
        }
        for total in tuple(found):
            found |= {v: u for v, u in self.steps(total, _OF_SUMS).items() if v not in found}
        return found

    def is_divided(self, exp: int) -> bool:
        """Whether weights are divided by a sum of weights, or the log of one is taken off before."""
        op = self.writer.get(self.writer[exp].inputs[0])
        if op is not None and op.kind == "sub" and op.inputs[1] in self.totals:
            return True
        readers = [(value, op) for value in self.steps(exp, _PURE) for op in self.readers[value]]
        if any(
            op.kind == "div" and op.inputs[0] == v and op.inputs[1] in self.totals
            for v, op in readers
        ):
            return True
        sums = [op.outputs[0] for _, op in readers if op.kind == "reduce_sum"]
        return any(self._divides(value) for total in sums for value in self.steps(total, _OF_SUMS))

    def _divides(self, value: int) -> bool:
        return any(
            op.kind == "log" or (op.kind == "div" and op.inputs[1] == value)
            for op in self.readers[value]
        )

    def steps(self, start: int, kinds: frozenset[str]) -> dict[int, int | None]:
        """What ops of some kinds make of a value, scans passed, each with what it is made of."""
        waiting, found = [start], dict[int, int | None]({start: None})
        while waiting:
            value = waiting.pop()
            new = [other for other, _ in self.down[value]]
            for op in self.readers[value]:
                if op.kind == "optimization_barrier":
                    new += [r for v, r in zip(op.inputs, op.outputs, strict=True) if v == value]
                elif op.kind in kinds and not (op.kind == "div" and op.inputs[0] != value):
                    new += op.outputs
            fresh = [other for other in new if other not in found]
            found |= dict.fromkeys(fresh, value)
            waiting += fresh
        return found


class _Search:
    """One attention, from one `exp` of it. `parts` tell dims of values as those of the `exp`."""

    def __init__(self, links: Links, exp: int):
        self.links, self.exp, self.kind = links, exp, links.types[exp]
        self.parts: dict[int, Parts] = {exp: whole(self.kind)}
        self.every = frozenset(d for d, size in enumerate(self.kind.shape) if size > 1)
        self.openings: dict[int, Op] = {}
        self.made: set[int] = set()  # of an opening, by ops that keep all dims
        self.given: set[int] = (
            set()
        )  # masks, biases, dropout: what else has all dims and is made for this alone

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
            self.exp, keys, self._rows(keys), many, *self._shares(keys), self._spans(keys), scores,
            tuple(self.openings), tuple(closings), inside, frozenset(self.made), frozenset(self._weights),
            {v: self.parts[v] for v in inside},
        )  # fmt: skip

    # ------------------------------------------------------------ what belongs to it

    def _full(self, parts: Parts) -> bool:
        return complete(parts, self.kind) >= self.every

    def _back(self, value: int) -> None:
        """Where a value with all dims comes from: openings, masks, what is handed in."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value in self.made or value in self.given or value in self.links.leaving:
                continue
            for other, gained in self.links.up[value]:
                self.parts.setdefault(other, _shifted(self.parts[value], gained))
                waiting.append(other)
            op = self.links.writer.get(value)
            if op is None or op.regions:
                self.given.update(() if op is None else (value,))
                continue
            known = followed(op, self.links.types, self.parts)
            sources = [v for v in op.inputs if v in known and self._full(known[v])]
            if op.kind == "dot_general" and not sources:
                self.openings[value] = op
                self.made.add(value)
                continue
            self.given.add(value)
            for source in sources:
                self.parts.setdefault(source, known[source])
                waiting.append(source)

    def _onward(self) -> list[int] | None:
        """Follow what openings make; the products that leave, None where anything else reads it."""
        closings: list[int] = []
        waiting = list(self.openings)
        while waiting:
            value = waiting.pop()
            self.given.discard(value)
            if value in self.links.leaving:
                return None
            for other, gained in self.links.down[value]:
                if other not in self.made:
                    self.parts[other] = _shifted(self.parts[value], gained)
                    self.made.add(other)
                    waiting.append(other)
            for op in self.links.readers[value]:
                if op.regions:
                    if not self._is_linked(op, value):
                        return None
                    continue
                known = followed(op, self.links.types, self.parts)
                full = [v for v in op.outputs if v in known and self._full(known[v])]
                if not full and not self._leaves(op, known):
                    return None
                if not full and op.kind == "dot_general":
                    closings += [v for v in op.outputs if v not in closings]
                for result in full:
                    if result not in self.made:
                        self.parts[result] = known[result]
                        self.made.add(result)
                        waiting.append(result)
                waiting += self._beside(op, known)
        return closings

    def _is_linked(self, op: Op, value: int) -> bool:
        """Whether a loop only hands a value on to its turns, whole or row by row."""
        inside = {other for other, _ in self.links.down[value]}
        return op.kind == "scan" and all(
            r in inside for v, r in zip(op.inputs, op.regions[0].inputs, strict=True) if v == value
        )

    def _beside(self, op: Op, known: dict[int, Parts]) -> list[int]:
        """Other operands with all dims: masks, or the gradient of the weights, which opens the backward pass."""
        before = set(self.openings)
        for value in op.inputs:
            if (
                value not in self.made
                and value not in self.given
                and value in known
                and self._full(known[value])
            ):
                self.parts.setdefault(value, known[value])
                self._back(value)
        return [value for value in self.openings if value not in before]

    def _leaves(self, op: Op, known: dict[int, Parts]) -> bool:
        """Whether an op may end what is inside: a sum or maximum, a product with something from outside."""
        if op.kind in _SUMMED:
            return True
        inside = [v for v in op.inputs if v in self.made]
        return op.kind == "dot_general" and len(inside) == 1 and op.inputs[0] != op.inputs[1]

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
                elif op.kind in ("add", "add_any"):
                    kept.added(value, elsewhere(known[value], at, self.kind))
        return kept.share, kept.longest(keys)

    def _spans(self, keys: frozenset[int]) -> KeySpans | None:
        rows, size = self._rows(keys), self.kind.shape.__getitem__
        if not rows or not keys:
            return None
        masks = Masks(self.links.graph, self.links.writer, self.links.handed)
        at = max(rows, key=size), max(keys, key=size)
        scores = Scores(self.kind, *at, masks, self.parts, self.made)
        exps = [v for v in self.made if (op := self.links.writer.get(v)) and op.kind in EXPS]
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

    def _pure(self) -> set[int]:
        """Weights: of an `exp`, by ops that scale, mask and convert, never by one that mixes in another product."""
        found: set[int] = set()
        for value in self.made:
            op = self.links.writer.get(value)
            if op is not None and op.kind in EXPS:
                found.update(self._pure_from(value))
        return found

    def _pure_from(self, start: int) -> set[int]:
        waiting, found = [start], {start}
        while waiting:
            value = waiting.pop()
            steps = [other for other, _ in self.links.down[value]]
            for op in self.links.readers[value]:
                if op.kind == "optimization_barrier":
                    steps += [r for v, r in zip(op.inputs, op.outputs, strict=True) if v == value]
                elif op.kind in _PURE and not any(v in self.made and v != value for v in op.inputs):
                    steps += op.outputs
            new = [v for v in steps if v in self.made and v not in found]
            found.update(new)
            waiting += new
        return found

    def _keys(self) -> frozenset[int] | None:
        """The dims that the softmax sums over, if all sums of weights agree."""
        self._weights = self._pure()
        found = set[frozenset[int]]()
        for value in self._weights:
            for op in self.links.readers[value]:
                if op.kind == "reduce_sum":
                    found.add(self._lost(op, op.outputs[0]))
                elif (
                    op.kind == "div" and op.inputs[0] == value and op.inputs[1] in self.links.totals
                ):
                    found.add(self._lost(op, op.inputs[1]))
            op = self.links.writer.get(value)
            before = (
                self.links.writer.get(op.inputs[0]) if op is not None and op.kind in EXPS else None
            )
            if (
                before is not None
                and before.kind == "sub"
                and before.inputs[1] in self.links.totals
            ):
                found.add(self._lost(before, before.inputs[1]))
        return next(iter(found)) if len(found) == 1 else None

    def _lost(self, op: Op, value: int) -> frozenset[int]:
        """The dims that a sum of weights, which this value beside weights is made of, has no more."""
        parts = followed(op, self.links.types, self.parts)[value]
        while (source := self.links.totals.get(value)) is not None:
            maker = self.links.writer.get(value)
            passed = dict(self.links.up[value]).get(source)
            if passed is not None:
                parts = _shifted(parts, passed)
            elif maker is not None:
                parts = followed(maker, self.links.types, {value: parts})[source]
            value = source
        return self.every - complete(parts, self.kind)

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


def _shifted(parts: Parts, gained: int) -> Parts:
    """Parts of the same value inside a loop, or stacked outside of it: with a leading dim less or more."""
    return parts[1:] if gained < 0 else ((), *parts) if gained else parts
