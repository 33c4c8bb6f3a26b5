"""Attention as one op, and its gradients as another: what fused kernels run.

    o lse = attention q k v                       scores, softmax and their product
    dq dk dv = attention_grad q k v do (o lse)    the same again, and what gradients take

Of an attention that `ir/attention.py` finds, the ops between its boundary and its closings become the body of
one op; nothing of the size of the scores is left outside. Gradients make the weights again from queries and keys:
five products where the plain backward pass has four and memory for the weights. Kernels take the result and the log
of the sum of exponentials from the forward pass instead of it; what both passes are in one place of is handed on.

The body is a graph of its own, kept as text, so that equal layers have equal ops. Dims of the softmax are factors
of the op's rule: queries, heads and batch are cut, keys are whole.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Literal

from .attention import Attention, Links, attentions
from .attention_form import LSE, Unreadable, form_of, with_residuals
from .attention_kernels import has_kernels
from .bodies import BACKWARD, FORWARD
from .cluster import Cluster
from .composite_cuts import Cuts
from .dead import drop_dead_ops
from .dealt import Parts, complete, followed, spread
from .graph import Attr, Constant, Graph, Op, TensorType
from .kept_sums import with_sums_kept
from .key_spans import KeySpans
from .recompute import PRODUCTS
from .text import show

AttentionKind = Literal["plain", "fused", "ring"]


def composed(graph: Graph, attention: AttentionKind, cluster: Cluster | None = None) -> Graph:
    """The graph with its attention as asked for; without a cluster for devices that have kernels. Under "ring"
    gradients are handed what rings would work out again."""
    if attention == "plain":
        return graph
    if attention == "ring":
        return with_sums_kept(with_attention(graph, for_kernels=False))
    return with_attention(graph, cluster is None or has_kernels(cluster))


def with_attention(graph: Graph, for_kernels: bool = True) -> Graph:
    """The graph with each attention as one op; those that cannot be taken apart stay as they are. For kernels gradients
    are handed what these take of the forward pass."""
    found = attentions(graph)
    while found:
        links = Links(graph)
        rewrite = _Rewrite(graph, links, for_kernels)
        done = [one for one in found if rewrite.add(one)]
        fused = drop_dead_ops(rewrite.graph())
        alive = {v for visit in fused.visits for v in visit.op.outputs}
        stuck = [one for one in done if not alive.isdisjoint(one.made)]
        if not stuck:
            return fused if done else graph
        found = tuple(one for one in done if one not in stuck)
    return graph


class Refused(Exception):
    """This attention stays as it is."""


class _Rewrite:
    """Composites to be put in the place of closings."""

    def __init__(self, graph: Graph, links: Links, for_kernels: bool):
        self.old, self.links, self.for_kernels = graph, links, for_kernels
        self.types = dict(graph.types)
        self.unused = count(max(self.types) + 1)
        self.home: dict[
            int, int
        ] = {}  # value -> the loop that it lives in, by its first result; 0 outside
        self.made: dict[int, Op] = {}  # closing -> the composite that makes it
        self._derived: dict[int, frozenset[int]] = {}
        self._leaving: dict[int, tuple[int, ...]] = {}
        self._cuts: dict[Hashable, dict[str, Attr]] = {}  # of equal bodies, as layers have
        _note_homes(graph.ops, self.home)

    def add(self, one: Attention) -> bool:
        """Whether an attention could be made a composite; its closings are it from now on."""
        groups = self._groups(one)
        try:
            ops = [self._composite(kind, one, closings) for kind, closings in groups if closings]
        except Refused:
            return False
        for op, (_, closings) in zip(
            self._handed_on(ops), [g for g in groups if g[1]], strict=True
        ):
            self.made |= dict.fromkeys(closings, op)
        return True

    def _handed_on(self, ops: list[Op]) -> list[Op]:
        """Composites of an attention, the gradient with what kernels take from the forward pass in the same place."""
        if len(ops) != 2 or self.home[ops[0].outputs[0]] != self.home[ops[1].outputs[0]]:
            return ops
        try:
            forward, backward = map(form_of, ops)
        except Unreadable:
            return ops
        if forward.results != ("o", "lse") or not forward.agrees(backward, ops[0], ops[1]):
            return ops
        return [ops[0], with_residuals(ops[0], ops[1], self.types)]

    def _groups(self, one: Attention) -> list[tuple[str, list[int]]]:
        """Results of the softmax's weights times values; the rest are gradients, those of biases too."""
        forward = [v for v in one.closings if self._is_result(one, v)]
        return [(FORWARD, forward), (BACKWARD, [v for v in self.leaving(one) if v not in forward])]

    def leaving(self, one: Attention) -> tuple[int, ...]:
        """Closings, and sums that never come back to what is inside: gradients of biases."""
        if one.softmax not in self._leaving:
            sums = [
                op.outputs[0]
                for v in sorted(one.made)
                for op in self.links.readers[v]
                if op.kind.startswith("reduce_")
            ]
            found = [
                v
                for v in dict.fromkeys(sums)
                if v not in one.made and self._reached([v]).isdisjoint(one.made)
            ]
            self._leaving[one.softmax] = (*one.closings, *found)
        return self._leaving[one.softmax]

    def _is_result(self, one: Attention, closing: int) -> bool:
        op = self.links.writer[closing]
        left = complete(
            followed(op, self.old.types, one.dims)[closing], self.old.types[one.softmax]
        )
        return not left & one.keys and not one.weights.isdisjoint(op.inputs)

    def _composite(self, kind: str, one: Attention, closings: Sequence[int]) -> Op:
        (home,) = {self.home[v] for v in closings}
        body = Body(self, one, home)
        for value in closings:
            body.need(value)
        where = self.links.writer[closings[0]].where
        kernels = self.for_kernels and kind == FORWARD
        if kernels and (lse := self._log_of_sum(body, closings)) is not None:
            self.home[lse] = home
            closings = (*closings, lse)
        text, shape = show(body.graph(closings)), self.old.types[one.softmax].shape
        alike = (text, shape, one.keys, body.told(), *body.left_out())
        if alike not in self._cuts:
            self._cuts[alike] = Cuts(body, closings).attrs()
        attrs = {"body": text, **self._cuts[alike]}
        return Op(
            kind, tuple(body.inputs), tuple(closings), tuple(sorted(attrs.items())), where=where
        )

    def _log_of_sum(self, body: Body, closings: Sequence[int]) -> int | None:
        """A further result of a body that kernels run: what these hand to the backward pass beside the result."""
        graph = body.graph(closings)
        attrs = (("body", show(graph)), *sorted(Cuts(body, closings).attrs().items()))
        try:
            form = form_of(Op(FORWARD, tuple(body.inputs), tuple(closings), attrs))
        except Unreadable:
            return None
        known = body.order()
        total, shift = known[form.total], () if form.shift is None else (known[form.shift],)
        result = next(self.unused)
        self.types[result] = TensorType("f32", self.types[total].shape)
        body.ops.append(Op(LSE, (total, *shift), (result,)))
        return result

    def derived(self, one: Attention) -> frozenset[int]:
        """What cheap ops make of what is inside: maxima and sums, and what becomes of them."""
        if one.softmax not in self._derived:
            self._derived[one.softmax] = self._spread(one)
        return self._derived[one.softmax]

    def _spread(self, one: Attention) -> frozenset[int]:
        return self._reached(one.made, self.leaving(one))

    def _reached(self, start: Iterable[int], ends: Collection[int] = ()) -> frozenset[int]:
        """What cheap ops make of values, in the loops that these are handed to too."""
        waiting, found = list(start), set(start)
        while waiting:
            value = waiting.pop()
            new = [other for other, _ in self.links.down[value]]
            new += [
                v
                for op in self.links.readers[value]
                if not op.regions and op.kind not in PRODUCTS
                for v in op.outputs
            ]
            new = [v for v in new if v not in found and v not in ends]
            found.update(new)
            waiting += new
        return frozenset(found)

    @cached_property
    def free(self) -> frozenset[int]:
        """What is made of numbers alone."""
        found = {c.value for c in self.old.constants if not isinstance(c.data, str)}
        for visit in self.old.visits:
            if not visit.op.regions and found.issuperset(visit.op.inputs):
                found.update(visit.op.outputs)
        return frozenset(found)

    def handed(self, home: int) -> tuple[int, ...]:
        """What a loop's turns are handed."""
        op = self.links.writer.get(home)
        return () if op is None else op.regions[0].inputs

    def graph(self) -> Graph:
        new = {v: self.types[v] for op in self.made.values() for v in op.outputs}
        return replace(
            self.old, types={**self.old.types, **new}, ops=tuple(self._placed(self.old.ops))
        )

    def _placed(self, ops: Sequence[Op]) -> list[Op]:
        """Ops in their order, each as soon as all it reads is there; composites in the place of their first closing."""
        wanted: list[Op] = []
        placed: set[int] = set()  # first results of composites
        for op in ops:
            composite = self.made.get(op.outputs[0]) if op.outputs else None
            if composite is None:
                wanted.append(op)
            elif composite.outputs[0] not in placed:
                placed.add(composite.outputs[0])
                wanted.append(composite)
        return _in_order([self._inside(op) for op in wanted])

    def _inside(self, op: Op) -> Op:
        if not op.regions:
            return op
        return replace(
            op, regions=tuple(replace(r, ops=tuple(self._placed(r.ops))) for r in op.regions)
        )


def _in_order(ops: Sequence[Op]) -> list[Op]:
    missing = {v for op in ops for v in op.outputs}
    placed, waiting = list[Op](), list[Op]()
    for op in ops:
        waiting.append(op)
        while ready := [op for op in waiting if missing.isdisjoint(op.inputs)]:
            waiting = [op for op in waiting if not missing.isdisjoint(op.inputs)]
            placed += ready
            missing.difference_update(v for op in ready for v in op.outputs)
    assert not waiting
    return placed


def _note_homes(ops: Sequence[Op], home: dict[int, int], here: int = 0) -> None:
    for op in ops:
        home |= dict.fromkeys(op.outputs, here)
        for region in op.regions:
            home |= dict.fromkeys(region.inputs, op.outputs[0])
            _note_homes(region.ops, home, op.outputs[0])


class Body:
    """What is between the boundary of an attention and some of its closings, as seen from where these are.

    In a backward loop, what the forward loop stacks for it is made again from what else was stacked.
    """

    def __init__(self, rewrite: _Rewrite, one: Attention, home: int):
        self.rewrite, self.links, self.one, self.home = rewrite, rewrite.links, one, home
        self.types = rewrite.types
        self.inputs: list[int] = []
        self.ops: list[Op] = []
        self.numbers = {c.value: c for c in rewrite.old.constants if not isinstance(c.data, str)}
        self.known: dict[tuple[int, Parts | None], int] = {}
        self.dims: dict[int, Parts] = {}  # of copies of masks and other numbers

    def need(self, value: int, parts: Parts | None = None) -> int:
        """The value as the body knows it, after what makes it was added to the body.

        What is made of numbers alone is made anew for each part that it plays: positions may be those of
        queries in one place and those of keys in another.
        """
        first = self.links.first(value)
        if first in self.rewrite.free or self._is_constant(first):
            value = first
        if value in self.numbers:
            return value
        part = (value, parts if value in self.rewrite.free else None)
        if part not in self.known:
            self.known[part] = self._found(*part)
        return self.known[part]

    def _found(self, value: int, parts: Parts | None) -> int:
        op = self.links.writer.get(value)
        within = value in self.one.inside or value in self.rewrite.derived(self.one)
        if within and (op is None or op.regions):
            return self.need(self.links.up[value][0][0])  # a row of what another loop stacks
        within = within or value in self.rewrite.leaving(self.one) or value in self.rewrite.free
        if op is None or op.regions or not within:
            return self._border(value)
        inputs = tuple(self.need(v, told) for v, told in self._told(op, value, parts))
        if op.kind == "optimization_barrier":
            return inputs[op.outputs.index(value)]
        results = op.outputs if parts is None else self._copies(op, value, parts)
        self.ops.append(Op(op.kind, inputs, results, op.attrs))
        if parts is not None:
            return results[op.outputs.index(value)]
        self.known |= {(v, None): v for v in op.outputs}
        return value

    def _told(self, op: Op, value: int, parts: Parts | None) -> list[tuple[int, Parts | None]]:
        """Operands, each with its dims as those of the softmax as far as this op tells them."""
        if parts is None and value not in self.one.dims:
            return [(v, None) for v in op.inputs]
        known = {value: self.one.dims[value] if parts is None else parts}
        found = followed(op, self.types, known)
        return [(v, found.get(v)) for v in op.inputs]

    def _copies(self, op: Op, value: int, parts: Parts) -> tuple[int, ...]:
        """New values for another copy of an op's results."""
        results = tuple(next(self.rewrite.unused) for _ in op.outputs)
        self.types.update(zip(results, (self.types[v] for v in op.outputs), strict=True))
        self.dims[results[op.outputs.index(value)]] = parts
        return results

    def _border(self, value: int) -> int:
        """Something from outside: as it is known here."""
        near = self.rewrite.home.get(value, 0) == self.home or self._is_constant(value)
        here = value if near else self._handed(value)
        if here not in self.inputs:
            self.inputs.append(here)
        return here

    def _is_constant(self, value: int) -> bool:
        return value in self.rewrite.old.constant_ids

    def _handed(self, value: int) -> int:
        """Of a value of another loop: what this loop is handed of it."""
        there = self.links.origins(value)
        for mine in self.rewrite.handed(self.home):
            if any(there.get(v) == gained for v, gained in self.links.origins(mine).items()):
                return mine
        raise Refused

    # ------------------------------------------------------------ as a graph

    @property
    def used(self) -> list[Constant]:
        return [c for v, c in self.numbers.items() if any(v in op.inputs for op in self.ops)]

    def order(self) -> list[int]:
        """Values in the order of their numbers in the body's graph."""
        made = (v for op in self.ops for v in op.outputs)
        return [*self.inputs, *(c.value for c in self.used), *made]

    def graph(self, closings: Sequence[int]) -> Graph:
        """The body with values numbered in order: equal for equal attentions."""
        order = self.order()
        name = {value: number for number, value in enumerate(order)}
        ops = tuple(
            replace(
                op,
                inputs=tuple(name[v] for v in op.inputs),
                outputs=tuple(name[v] for v in op.outputs),
            )
            for op in self.ops
        )
        return Graph(
            types={name[v]: self.types[v] for v in order},
            inputs=tuple(name[v] for v in self.inputs),
            ops=ops,
            outputs=tuple(name[v] for v in closings),
            constants=tuple(Constant(name[c.value], c.data) for c in self.used),
        )

    def told(self) -> tuple[Parts | None, ...]:
        """Of each result, its dims as those of the softmax, where they are told from outside."""
        dims = {**self.one.dims, **self.dims}
        return tuple(dims.get(v) for op in self.ops for v in op.outputs)

    def left_out(self) -> tuple[KeySpans | None, frozenset[int]]:
        """Which keys may weigh nothing, with the operands that tell so as numbers in order."""
        spans, order = self.one.spans, [v for op in self.ops for v in op.inputs]
        if spans is None:
            return None, frozenset()
        low = frozenset(n for n, value in enumerate(order) if value in spans.low)
        return replace(spans, low=frozenset()), low

    def parts(self) -> dict[int, Parts]:
        """Dims of all values of the body as those of the softmax."""
        results = (v for op in self.ops for v in op.outputs)
        told = zip(results, self.told(), strict=True)
        return spread(self.ops, self.types, {v: dims for v, dims in told if dims is not None})
