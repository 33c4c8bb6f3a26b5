"""What an attention composite computes, read from its body, in the words that kernels take:

    softmax(scale · q kᵀ, causal or within a window) · v          heads of queries in groups per head of keys

A kernel (cuDNN's, splash attention) runs in the place of a body that comes to this. Anything else (a mask that is an
input, a bias, dropout, capped scores) is refused in words, and runs block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..analysis.dealt import OTHER, complete, spread, whole
from ..analysis.intervals import Unknown
from ..analysis.masks import LOW, Masks, elsewhere
from ..graph import Graph, Op, TensorType
from ..ops import ADDITION, EXPONENTIAL, FORWARDING
from ..text import parse, show
from .bodies import BACKWARD

LSE = "log_sum_exp"  # of sums of exponentials, and what was taken off before: log(sum) + shift
FEATURE = -1  # a dim of queries, keys or values that is none of the scores
SAMPLED = 192  # rows at which masks are looked at; of keys, those near them too
_OF_GRADIENTS = FORWARDING | ADDITION | {
    "mul", "div", "sub", "neg", "integer_pow", "reduce_sum", "select_n", "exp", "max", "reduce_max",
    "eq", "dot_general",
}  # fmt: skip
Mask = tuple[
    str, int, int, bool
]  # chosen or added; which; what stands there otherwise; when it is kept
Labels = tuple[
    tuple[int, ...], ...
]  # by dim of an array, the dims of the scores that it is made of


class Unreadable(Exception):
    """Says why a body is not what kernels run."""


@dataclass(frozen=True)
class Form:
    """Dims of the scores are labels; an array's dims are told in them.

    Attributes:
        sizes: by label. `keys` is summed over, `rows` are queries' positions (None: there is one), `shared` are batch
            and heads of keys, `groups` heads of queries per head of keys. `free`: a label as a free dim of the rule.
        q, k, v, do: which operands they are; `do` of a gradient alone. `results`: `o`, `lse`, `dq`, `dk`, `dv`.
        causal: row i sees keys up to i; with a `window` only the last so many of them.
        total, shift: values of the body: the sum of exponentials, and what was taken off before (None: nothing).
    """

    sizes: tuple[int, ...]
    keys: int
    rows: int | None
    shared: tuple[int, ...]
    groups: tuple[int, ...]
    free: Mapping[int, int]
    operands: tuple[Labels, ...]
    results_labels: tuple[Labels, ...]
    q: int
    k: int
    v: int
    do: int | None
    results: tuple[str, ...]
    scale: float
    causal: bool
    window: int | None
    total: int
    shift: int | None
    dtype: str
    widths: tuple[int, int]  # of queries and keys, of values

    def agrees(self, other: Form, mine: Op, others: Op) -> bool:
        """Whether this is the forward pass of another form: of the same operands, with dims called the same."""
        return (
            [mine.inputs[k] for k in (self.q, self.k, self.v)]
            == [others.inputs[k] for k in (other.q, other.k, other.v)]
            and mine.attr("sizes") == others.attr("sizes")
            and self.free.keys() >= set(self.of_rows)
            and (self.sizes, self.keys, self.rows, self.free) == (other.sizes, other.keys, other.rows, other.free)
            and (self.scale, self.causal, self.window) == (other.scale, other.causal, other.window)
        )  # fmt: skip

    @property
    def has_residuals(self) -> bool:
        """Whether a gradient is handed the result and the log of the sum, as its last operands."""
        return self.do is not None and len(self.operands) == 6

    @property
    def of_rows(self) -> tuple[int, ...]:
        """Labels of one number per query: of the log of the sum."""
        return tuple(d for d, n in enumerate(self.sizes) if n > 1 and d != self.keys)


def form_of(op: Op) -> Form:
    """What a composite computes.

    Raises:
        Unreadable: kernels do not compute this.
    """
    found = _form(op.kind == BACKWARD, op.text("body"), op.attr("operands"), len(op.inputs))
    if isinstance(found, str):
        raise Unreadable(found)
    return found


@lru_cache(maxsize=256)
def _form(backward: bool, text: str, operands: Any, given: int) -> Form | str:
    try:
        return _Reader(parse(text), backward, operands).form()
    except Unreadable as reason:
        return str(reason)


def with_residuals(forward: Op, backward: Op, types: Mapping[int, TensorType]) -> Op:
    """The gradient that takes results of the forward pass too. Its body makes them anew."""
    body = parse(backward.text("body"))
    new = (max(body.types) + 1, max(body.types) + 2)
    kinds = dict(zip(new, (types[v] for v in forward.outputs), strict=True))
    grown = replace(body, types={**body.types, **kinds}, inputs=(*body.inputs, *new))
    sides = (*backward.items("operands"), *forward.items("results"))
    attrs = {**dict(backward.attrs), "body": show(grown), "operands": sides}
    return replace(
        backward, inputs=(*backward.inputs, *forward.outputs), attrs=tuple(sorted(attrs.items()))
    )


class _Reader:
    def __init__(self, graph: Graph, backward: bool, operands: Any):
        self.graph, self.types, self.backward = graph, graph.types, backward
        self.told = operands
        self.writer = {v: op for op in graph.ops for v in op.outputs}
        exps = [op for op in graph.ops if op.kind in EXPONENTIAL]
        if len(exps) != 1 or exps[0].kind != "exp":
            raise Unreadable("exponentials other than one `exp`")
        self.exp = exps[0].outputs[0]
        self.kind = self.types[self.exp]
        self.parts = spread(graph.ops, self.types, {self.exp: whole(self.kind)})
        self.every = frozenset(d for d, size in enumerate(self.kind.shape) if size > 1)
        self.numbers = {c.value: c.data for c in graph.constants}

    def form(self) -> Form:
        total = self._total()
        opening, scale, shift, masks = self._scores()
        q, k = sorted(opening.inputs, key=lambda v: self.keys in self._labels_in(v))
        in_q, in_k = self._labels_in(q), self._labels_in(k)
        if self.keys in in_q or self.keys not in in_k or in_q | in_k != self.every:
            raise Unreadable("scores that are not a product of queries and keys")
        shared, alone = in_q & in_k, in_q - in_k
        rows, causal, window = self._mask(masks, alone)
        v, do, results = self._gradients(q, k, opening) if self.backward else self._result()
        for value in (q, k, v, *(() if do is None else (do,))):
            if value not in self.graph.inputs:
                raise Unreadable("operands that are computed inside")
        if self._labels_in(v) != shared | {self.keys}:
            raise Unreadable("values with other dims than keys")
        kinds = {self.types[value].dtype for value in (q, k, v)}
        if len(kinds) > 1:
            raise Unreadable(
                f"queries, keys and values of different types ({', '.join(sorted(kinds))})"
            )
        at = self.graph.inputs.index
        free = self._free()
        operands = tuple(
            self._labels(value) if value in self.parts else self._handed_on(value, free)
            for value in self.graph.inputs
        )
        return Form(
            self.kind.shape, self.keys, rows, tuple(sorted(shared)), tuple(sorted(alone - {rows})),
            free, operands, tuple(self._labels(value) for value in self.graph.outputs[: len(results)]),
            at(q), at(k), at(v), None if do is None else at(do), results, scale, causal, window, total, shift,
            kinds.pop(), (self._width(k), self._width(v)),
        )  # fmt: skip

    # ------------------------------------------------------------ dims

    def _labels_in(self, value: int) -> frozenset[int]:
        return complete(self.parts.get(value, ()), self.kind)

    def _labels(self, value: int) -> Labels:
        found: list[tuple[int, ...]] = []
        for parts, size in zip(
            self.parts.get(value, ((),) * self.types[value].rank),
            self.types[value].shape,
            strict=True,
        ):
            if size > 1 and (not parts or all(part[0] == OTHER for part in parts)):
                found.append((FEATURE,))
            elif all(
                part[0] != OTHER and part[1:] == (1, self.kind.shape[part[0]]) for part in parts
            ):
                found.append(tuple(part[0] for part in parts))
            else:
                raise Unreadable("dims that are only parts of those of the scores")
        return tuple(found)

    def _width(self, value: int) -> int:
        widths = [
            n
            for n, dim in zip(self.types[value].shape, self._labels(value), strict=True)
            if FEATURE in dim
        ]
        if len(widths) != 1:
            raise Unreadable("heads with other than one dim of features")
        return widths[0]

    def _free(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for value, dims in zip(self.graph.inputs, self.told, strict=True):
            if value not in self.parts:
                continue
            for labels, named in zip(self._labels(value), dims, strict=True):
                if labels != (FEATURE,):
                    found.update(zip(labels, named, strict=False))
        found.pop(self.keys, None)
        return found

    def _handed_on(self, value: int, free: Mapping[int, int]) -> Labels:
        """Of a result of the forward pass, which nothing here reads: as the rule tells its dims."""
        label = {d: label for label, d in free.items()}
        dims = self.told[self.graph.inputs.index(value)]
        return tuple(
            tuple(label[d] for d in dim) if dim or size == 1 else (FEATURE,)
            for dim, size in zip(dims, self.types[value].shape, strict=True)
        )

    # ------------------------------------------------------------ softmax and scores

    def _origin(self, value: int, kinds: frozenset[str] = FORWARDING) -> int:
        """What a value shows in another form."""
        while (op := self.writer.get(value)) is not None and op.kind in kinds:
            value = op.inputs[0]
        return value

    def _total(self) -> int:
        sums = [
            op
            for op in self.graph.ops
            if op.kind == "reduce_sum" and self._origin(op.inputs[0]) == self.exp
        ]
        if len(sums) != 1:
            raise Unreadable("exponentials that are not summed once")
        total = sums[0].outputs[0]
        lost = self.every - self._labels_in(total)
        if len(lost) != 1:
            raise Unreadable("a softmax over other than one dim")
        (self.keys,) = lost
        return total

    def _scores(self) -> tuple[Op, float, int | None, list[Mask]]:
        """The product, its scale, what is taken off before the `exp`, and the masks on the way."""
        value, scale, shift = self.writer[self.exp].inputs[0], 1.0, None
        masks: list[Mask] = []
        op = self.writer[value]
        if op.kind == "sub":
            value, shift = op.inputs[0], self._taken_off(op.inputs[1])
        while (op := self.writer.get(value)) is not None and op.kind != "dot_general":
            if op.kind in FORWARDING:
                value = op.inputs[0]
            elif op.kind in ("mul", "div"):
                number = [self._number(v) for v in op.inputs]
                if number[1] is None and (number[0] is None or op.kind == "div"):
                    raise Unreadable("scores that are scaled by more than a number")
                k = 0 if number[1] is not None else 1
                by = float(number[1 - k])  # type: ignore[arg-type]
                scale, value = (scale / by if op.kind == "div" else scale * by), op.inputs[k]
            elif op.kind == "select_n" and len(op.inputs) == 3:
                k = next((k for k in (1, 2) if self._is_made(op.inputs[k])), 1)
                masks.append(("chosen", op.inputs[0], op.inputs[3 - k], k == 2))
                value = op.inputs[k]
            elif op.kind in ADDITION:
                k = next((k for k in (0, 1) if self._is_made(op.inputs[k])), 0)
                masks.append(("added", op.inputs[1 - k], op.inputs[1 - k], True))
                value = op.inputs[k]
            else:
                raise Unreadable(f"scores that `{op.kind}` changes")
        if op is None or scale <= 0:
            raise Unreadable("scores that are no product times a positive number")
        return op, scale, shift, masks

    def _is_made(self, value: int) -> bool:
        """Whether a product of what is handed in goes into a value."""
        op = self.writer.get(value)
        return op is not None and (op.kind == "dot_general" or any(map(self._is_made, op.inputs)))

    def _number(self, value: int) -> float | None:
        data = self.numbers.get(self._origin(value))
        return float(data) if isinstance(data, int | float) else None

    def _taken_off(self, value: int) -> int:
        while self.keys in self._labels_in(value) or self.types[value].rank != self.kind.rank - 1:
            op = self.writer.get(value)
            if op is None or op.kind not in FORWARDING:
                raise Unreadable("scores less something that differs from key to key")
            value = op.inputs[0]
        return value

    # ------------------------------------------------------------ masks

    def _mask(
        self, masks: list[Mask], alone: frozenset[int]
    ) -> tuple[int | None, bool, int | None]:
        """Which label rows are, and what masks leave: whether causal, and the window."""
        largest = max(alone, key=lambda d: self.kind.shape[d], default=None)
        if not masks:
            return largest, False, None
        told = [d for d in sorted(self.every - {self.keys}) if self._differs(masks, d)]
        if len(told) != 1 or told[0] not in alone:
            if told or not self._kept(masks, {}, self._sampled(self.keys)[0]).all():
                raise Unreadable("a mask that is no matter of positions alone")
            return largest, False, None
        (rows,), length = told, self.kind.shape[self.keys]
        if self.kind.shape[rows] != length:
            raise Unreadable("a mask over unequally many queries and keys")
        keys, at = self._sampled(rows)
        seen = np.where(self._kept(masks, {rows: at}, keys), at - keys, -1).max()
        window = None if seen >= length - 1 else int(seen) + 1
        keys, at = self._sampled(rows, window)
        wanted = (keys <= at) & (keys > at - (window or length))
        if not np.array_equal(self._kept(masks, {rows: at}, keys), wanted):
            raise Unreadable("a mask that is neither causal nor a window of the last keys")
        return rows, True, window

    def _differs(self, masks: list[Mask], label: int) -> bool:
        """Whether what is kept is another along a label."""
        keys, at = self._sampled(label)
        kept = self._kept(masks, {label: at}, keys)
        return not np.all(kept == kept[:1])

    def _sampled(self, rows: int, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Keys and rows to look at: all of few, some of many and what is near them."""
        many, length = self.kind.shape[rows], self.kind.shape[self.keys]
        at = np.unique(np.linspace(0, many - 1, SAMPLED).astype(np.int64))
        near = [at, at - 1, at + 1, *(() if window is None else (at - window, at - window + 1))]
        keys = np.unique(np.concatenate(near))
        return keys[(keys >= 0) & (keys < length)][None], at[:, None]

    def _kept(
        self, masks: list[Mask], at: Mapping[int, np.ndarray], keys: np.ndarray
    ) -> np.ndarray:
        """What masks leave of these keys at some places of a label; at the first one of all others."""
        index: list[Any] = [at.get(d, 0) for d in range(self.kind.rank)]
        index[self.keys] = keys
        kept = np.ones(np.broadcast_shapes(*(np.shape(p) for p in index)), bool)
        known = Masks(self.graph, self.writer, {})

        def values(value: int) -> np.ndarray:
            found = known.at(value, elsewhere(self.parts[value], tuple(index), self.kind))
            if not np.array_equal(found.low, found.high):
                raise Unknown
            return np.broadcast_to(found.low, kept.shape)

        for how, which, low, when in masks:
            try:
                found, weak = values(which), values(low) <= LOW
            except (Unknown, KeyError) as error:
                raise Unreadable(
                    "a mask that is an input" if how == "chosen" else "a bias"
                ) from error
            if how == "chosen" and not weak.all():
                raise Unreadable("a mask that leaves some weight")
            if how == "added" and not np.all(weak | (found == 0)):
                raise Unreadable("a bias")
            kept = kept & (~weak if how == "added" else (found > 0) == when)
        return kept

    # ------------------------------------------------------------ products

    def _is_weights(self, value: int) -> bool:
        """Whether a value is the softmax: exponentials over their sum."""
        op = self.writer.get(self._origin(value))
        return (
            op is not None
            and op.kind == "div"
            and self._origin(op.inputs[0]) == self.exp
            and self._is_total(op.inputs[1])
        )

    def _is_total(self, value: int) -> bool:
        op = self.writer.get(self._origin(value))
        return op is not None and op.kind == "reduce_sum" and self._origin(op.inputs[0]) == self.exp

    def _result(self) -> tuple[int, None, tuple[str, ...]]:
        first, *others = self.graph.outputs
        if [self.writer[v].kind for v in others] not in ([], [LSE]):
            raise Unreadable("other results than attention's own")
        op = self.writer[first]
        weights = [v for v in op.inputs if self._is_weights(v)]
        if len(weights) != 1:
            raise Unreadable("weights that are not a softmax as it stands (dropout, a second mask)")
        (v,) = (v for v in op.inputs if v not in weights)
        return v, None, ("o", "lse")[: len(self.graph.outputs)]

    def _gradients(self, q: int, k: int, opening: Op) -> tuple[int, int, tuple[str, ...]]:
        """Values, the gradient that comes in, and which gradient each result is."""
        masks = self._made_of_numbers()
        strange = {
            op.kind
            for op in self.graph.ops
            if op.kind not in _OF_GRADIENTS and op.outputs[0] not in masks
        }
        openings = [
            op
            for op in self.graph.ops
            if op.kind == "dot_general"
            and self._labels_in(op.outputs[0]) == self.every
            and op != opening
        ]
        if strange or len(openings) != 1:
            raise Unreadable("gradients of more than a softmax (dropout, capped scores)")
        do, v = sorted(openings[0].inputs, key=lambda value: self.keys in self._labels_in(value))
        results: list[str] = []
        for value in self.graph.outputs:
            op = self.writer[value]
            given = (
                {v for v in op.inputs if v in (q, k, do)}
                if op.kind == "dot_general"
                else set[int]()
            )
            if len(given) != 1:
                raise Unreadable("gradients of more than queries, keys and values")
            (beside,) = given
            results.append("dq" if beside == k else "dk" if beside == q else "dv")
        if len(set(results)) != len(results):
            raise Unreadable("gradients that are taken twice")
        return v, do, tuple(results)

    def _made_of_numbers(self) -> set[int]:
        found = set(self.numbers)
        for op in self.graph.ops:
            if found.issuperset(op.inputs):
                found.update(op.outputs)
        return found
