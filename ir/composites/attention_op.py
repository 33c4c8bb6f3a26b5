"""Attention as one op, and its gradients as another: what fused kernels run.

    o lse = attention q k v                       scores, softmax and their product
    dq dk dv = attention_grad q k v do (o lse)    the same again, and what gradients take

Of an attention that `ir/analysis/attention.py` finds, the ops between its boundary and its closings become the body of
one op; nothing of the size of the scores is left outside. Gradients make the weights again from queries and keys:
five products where the plain backward pass has four and memory for the weights. Kernels take the result and the log
of the sum of exponentials from the forward pass instead of it; what both passes are in one place of is handed on.

The body is a graph of its own, kept as text, so that equal layers have equal ops. Dims of the softmax are factors
of the op's rule: queries, heads and batch are cut, keys are whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

from ..analysis.attention import Attention, attentions
from ..analysis.dealt import complete, followed
from ..attrs import Attr
from ..cluster.cluster import Cluster
from ..execution_model import Backend
from ..graph import Graph, Op, TensorType
from ..text import show
from .attention_form import LSE, Unreadable, form_of, with_residuals
from .attention_kernels import has_kernels
from .bodies import BACKWARD, FORWARD
from .composing import Body, Rewrite, left_plain, rewritten
from .cuts import AttentionCuts
from .kept_sums import with_sums_kept
from .losses import LossKind, with_losses

AttentionKind = Literal["plain", "fused", "ring"]


def composed(
    graph: Graph,
    attention: AttentionKind,
    cluster: Cluster | None = None,
    loss: LossKind = "plain",
    backend: Backend = "xla",
) -> Graph:
    """The graph with its attention and losses as asked for, for a backend on a cluster; without one, for devices that
    have kernels. Under "ring" gradients are handed what rings would work out again."""
    if loss == "fused":
        graph = with_losses(graph)
    if attention == "plain":
        return graph
    if attention == "ring":
        return with_sums_kept(with_attention(graph, for_kernels=False))
    return with_attention(graph, cluster is None or has_kernels(cluster, backend))


def with_attention(graph: Graph, for_kernels: bool = True) -> Graph:
    """The graph with each attention as one op; those that cannot be taken apart stay as they are. For kernels gradients
    are handed what these take of the forward pass."""
    return rewritten(graph, attentions(graph), lambda old: _OfAttention(old, for_kernels))


def plain_attention(graph: Graph) -> list[tuple[str, str]]:
    """Where attention is that stayed as it is written, and why."""
    return left_plain(graph, attentions(graph), lambda old: _OfAttention(old, for_kernels=False))


class _OfAttention(Rewrite[Attention]):
    def __init__(self, graph: Graph, for_kernels: bool):
        super().__init__(graph)
        self.for_kernels = for_kernels
        self._remade: dict[int, frozenset[int]] = {}
        self._leaving: dict[int, tuple[int, ...]] = {}

    def cuts(self, kind: str, body: Body[Attention], closings: Sequence[int]) -> dict[str, Attr]:
        return AttentionCuts(body, closings, self.for_kernels).attrs()

    def beside(self, body: Body[Attention]) -> tuple[Hashable, ...]:
        """Which keys may weigh nothing, with the operands that tell so as numbers in order."""
        spans, order = body.one.spans, [v for op in body.ops for v in op.inputs]
        if spans is None:
            return None, frozenset[int]()
        low = frozenset(n for n, value in enumerate(order) if value in spans.low)
        return replace(spans, low=frozenset()), low

    def remade(self, one: Attention) -> frozenset[int]:
        if one.softmax not in self._remade:
            found = self.reached(one.made, self.leaving(one))
            self._remade[one.softmax] = found.union(self.leaving(one))
        return self._remade[one.softmax]

    def groups(self, one: Attention) -> list[tuple[str, Sequence[int]]]:
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
                if v not in one.made and self.reached([v]).isdisjoint(one.made)
            ]
            self._leaving[one.softmax] = (*one.closings, *found)
        return self._leaving[one.softmax]

    def _is_result(self, one: Attention, closing: int) -> bool:
        op = self.links.writer[closing]
        left = complete(
            followed(op, self.old.types, one.dims)[closing], self.old.types[one.softmax]
        )
        return not left & one.keys and not one.weights.isdisjoint(op.inputs)

    def more_results(
        self, kind: str, body: Body[Attention], closings: Sequence[int]
    ) -> Sequence[int]:
        """The log of the sum of a body that kernels run: what these hand to the backward pass beside the result."""
        if not self.for_kernels or kind != FORWARD:
            return ()
        graph = body.graph(closings)
        attrs = (
            ("body", show(graph)),
            *sorted(AttentionCuts(body, closings, self.for_kernels).attrs().items()),
        )
        try:
            form = form_of(Op(FORWARD, tuple(body.inputs), tuple(closings), attrs))
        except Unreadable:
            return ()
        known = body.order()
        total, shift = known[form.total], () if form.shift is None else (known[form.shift],)
        result = next(self.unused)
        self.types[result] = TensorType("f32", self.types[total].shape)
        body.ops.append(Op(LSE, (total, *shift), (result,)))
        self.home[result] = body.home
        return (result,)

    def finished(self, ops: list[Op]) -> list[Op]:
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
