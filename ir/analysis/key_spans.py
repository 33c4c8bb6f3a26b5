"""Which keys each block of queries looks at: what masks that a program counts out itself leave (causal, sliding).

    rows  0..15   keys 0..15          (first, end) in blocks of keys, by block of rows
    rows 16..31   keys 0..31

A kernel leaves the others out. That changes nothing where they weigh nothing and each query has a key that
surely weighs something; both are shown here for whole blocks at a time, by intervals.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..graph import Op, TensorType
from ..ops import ADDITION, EXPONENTIAL, FORWARDING
from ..rules import rule_of
from ..rules.rule import Rule, cuttable
from .dealt import Parts, followed
from .intervals import Interval, Unknown
from .masks import Index, Kept, Masks, elsewhere

BLOCKS = 64  # of rows and of keys, at most


@dataclass(frozen=True)
class KeySpans:
    """By block of `rows`, a dim of a softmax, the first and the end of `blocks` of its dim `keys` that may weigh
    something. Values in `low` are scores that leave no weight elsewhere."""

    rows: int
    keys: int
    blocks: int
    spans: tuple[tuple[int, int], ...]
    low: frozenset[int]


@dataclass(frozen=True)
class Scores:
    """What is asked for spans.

    Attributes:
        kind: type of the exponentials. `rows` and `keys` are dims of it.
        parts: dims of scores and masks as those of the exponentials.
        made: what comes of the product of queries and keys.
    """

    kind: TensorType
    rows: int
    keys: int
    masks: Masks
    parts: Mapping[int, Parts]
    made: Collection[int]

    def spans(self, exps: Iterable[int]) -> KeySpans | None:
        """Of all exponentials of one attention; None where nothing is left out or too little is known."""
        possible, low = None, set[int]()
        for value in exps:
            chain = _Chain(self)
            passed = chain.walk(value)
            if not passed or not chain.points.certain.any(axis=1).all():
                return None
            low |= passed
            found = chain.grid.possible
            possible = found if possible is None else possible | found
        if possible is None or possible.all():
            return None
        spans = [(int(row.argmax()), len(row) - int(row[::-1].argmax())) for row in possible]
        return KeySpans(self.rows, self.keys, possible.shape[1], tuple(spans), frozenset(low))

    def grid(self) -> Index:
        """Blocks of rows and of keys."""
        rows, keys = (_blocks(self.kind.shape[d]) for d in (self.rows, self.keys))
        return self._at(Interval(*(e[:, None] for e in rows)), Interval(*(e[None] for e in keys)))

    def points(self) -> Index:
        """Every row, and keys that it may well look at."""
        many, wide = self.kind.shape[self.rows], self.kind.shape[self.keys]
        rows = np.arange(many)[:, None]
        likely = [rows * 0, rows * 0 + wide - 1, rows, rows + wide - many, rows * wide // many]
        return self._at(rows, np.clip(np.concatenate(likely, axis=1), 0, wide - 1))

    def _at(self, rows: object, keys: object) -> Index:
        found: list[object] = [Interval(0, size - 1) for size in self.kind.shape]
        found[self.rows], found[self.keys] = rows, keys
        return tuple(found)


def _blocks(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last place of each of as many equal blocks as may be."""
    many = max(n for n in range(1, min(size, BLOCKS) + 1) if size % n == 0)
    first = np.arange(many) * (size // many)
    return first, first + size // many - 1


class _Chain:
    """From an exponential back towards its product, as long as masked scores stay far below the rest."""

    def __init__(self, scores: Scores):
        self.scores, self.masks, self.at = scores, scores.masks, (scores.grid(), scores.points())
        self.grid, self.points = self.kept = tuple(Kept(scores.masks, at) for at in self.at)

    def walk(self, exp: int) -> set[int]:
        """The scores that every mask found has been put on; nothing where there is none."""
        value = self.masks.writer[exp].inputs[0]
        passed, before = {value}, self._before(value)
        while before is not None:
            value, masked = before
            if masked:
                while before is not None:
                    before = self._before(before[0])
                return passed
            passed.add(value)
            before = self._before(value)
        return set()

    def _before(self, value: int) -> tuple[int, bool] | None:
        """What a value is made of, and whether by putting a mask on it."""
        op = self.masks.writer.get(value)
        if op is None or op.regions:
            return None
        if op.kind == "optimization_barrier":
            return op.inputs[op.outputs.index(value)], False
        if op.kind in FORWARDING or (op.kind == "sub" and self._is_even(op)):
            return op.inputs[0], False
        made = [k for k, v in enumerate(op.inputs) if v in self.scores.made]
        if len(made) != 1:
            return None
        known = followed(op, self.masks.types, self.scores.parts)
        masks = [
            self._is_masked(op, made[0], known, kept, at)
            for kept, at in zip(self.kept, self.at, strict=True)
        ]
        masked = all(masks)
        return (op.inputs[made[0]], masked) if masked or self._scales(op, made[0]) else None

    def _is_masked(
        self, op: Op, made: int, known: Mapping[int, Parts], kept: Kept, at: Index
    ) -> bool:
        def there(k: int) -> Index:
            return elsewhere(known[op.inputs[k]], at, self.scores.kind)

        if op.kind == "select_n" and len(op.inputs) == 3 and made > 0:
            other = 3 - made
            return kept.chosen(op.inputs[0], there(0), op.inputs[other], there(other), made == 2)
        if op.kind in ADDITION and self._lowers(op.inputs[1 - made], there(1 - made)):
            return kept.added(op.inputs[1 - made], there(1 - made))
        return False

    def _lowers(self, value: int, at: Index) -> bool:
        """Whether what is added raises no score, so that masks put on before still leave no weight."""
        try:
            return bool(np.all(self.masks.at(value, at).high <= 0))
        except Unknown:
            return False

    def _is_even(self, op: Op) -> bool:
        """Whether what is subtracted is the same for all keys of a query."""
        known, value = followed(op, self.masks.types, self.scores.parts), op.inputs[1]
        while any(part[0] == self.scores.keys for dim in known.get(value, ()) for part in dim):
            maker = self.masks.writer.get(value)
            if maker is None or maker.kind not in FORWARDING:
                return False
            known = followed(maker, self.masks.types, {value: known[value]})
            value = maker.inputs[0]
        return value in known

    def _scales(self, op: Op, made: int) -> bool:
        """Whether an op multiplies by 1 or more, so that masks put on before still leave no weight."""
        if op.kind not in ("mul", "div") or (op.kind == "div" and made == 1):
            return False
        by, known = op.inputs[1 - made], followed(op, self.masks.types, self.scores.parts)
        try:
            at = elsewhere(known[by], self.at[0], self.scores.kind)
            scale = self.masks.at(by, at)
            if op.kind == "mul":
                return bool(np.all(scale.low >= 1))
            return bool(np.all((scale.low > 0) & (scale.high <= 1)))
        except Unknown:
            return False


def may_leave_out(
    ops: Sequence[Op],
    types: Mapping[int, TensorType],
    parts: Mapping[int, Parts],
    spans: KeySpans,
    closings: Collection[int],
    numbers: Mapping[int, object],
) -> bool:
    """Whether ops come to the same where they never see the keys outside of a window.

    What they sum over keys must be nothing there: it comes of exponentials by ops that keep nothing nothing.
    So must what they hand on by keys.
    """
    nothing = {v for v, data in numbers.items() if data == 0}
    for op in ops:
        rule = rule_of(op, types)
        keyed = factor_of(op, parts, spans.keys, rule)
        if keyed is None:
            return False
        empty = op.kind in EXPONENTIAL or any(
            group and nothing.issuperset(op.inputs[k] for k in group) for group in rule.linear
        )
        if keyed >= 0:
            factor = rule.factors[keyed]
            lost = all(keyed not in dim for dims in rule.results for dim in dims)
            if lost and factor.reduction == "max":
                if op.inputs[0] not in spans.low:
                    return False
            elif lost and not empty:
                return False
        if empty:
            nothing.update(op.outputs)
    by_keys = [
        v for v in closings if any(p[0] == spans.keys for dim in parts.get(v, ()) for p in dim)
    ]
    return nothing.issuperset(by_keys)


def factor_of(op: Op, parts: Mapping[int, Parts], keys: int, rule: Rule) -> int | None:
    """The factor of an op that keys are, -1 where it has none; None where only a piece of a dim is, or some are."""
    found, others = set[int](), set[int]()
    sides = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
    for value, dims in sides:
        for dim, told in zip(dims, parts.get(value, ((),) * len(dims)), strict=True):
            if any(part[0] == keys for part in told):
                if len(told) != 1 or told[0][1] != 1 or len(dim) != 1:
                    return None
                found.add(dim[0])
            else:
                others.update(dim)
    if len(found) > 1 or not found.isdisjoint(others) or not found <= set(cuttable(rule)):
        return None
    return found.pop() if found else -1
