"""Cross-entropy and its gradients as one op, or as two: logits are never whole.

    loss = cross_entropy hidden weight labels (bias, ...)                   one number per token
    dhidden dweight = cross_entropy_grad hidden weight labels (...)         logits made again, and what gradients take
    loss dhidden dweight = cross_entropy_and_grad hidden weight labels (...)    both from the same logits

What `cross_entropy.py` finds becomes the body of ops, as attention does (`composites.py`). Where the loss's own
gradient does not wait for the loss (a mean, weights, z-loss), both passes are one op, whose gradients wait for the
backward pass in the place of the hidden states: three products, as the plain step has (Hsu et al., arXiv 2410.10989,
section 3.2). Otherwise gradients make the logits again, a product more; so they do where the step says (`checkpoint`).

Tokens are cut, and the vocabulary: devices then bring their maxima and sums together inside the op, and owe a sum of
the hidden states' gradient (vocabulary-parallel loss: Shoeybi et al., arXiv 1909.08053, section 3). Widths stay whole:
parts of a width would owe a sum of logits before the exponential.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Literal

from ..analysis.cross_entropy import CrossEntropy, WholeStep, cross_entropies
from ..attrs import Attr
from ..graph import Graph, Op
from .bodies import BOTH, LOSS, LOSS_GRAD
from .composing import Body, Refused, Rewrite, rewritten
from .cuts import LossCuts

LossKind = Literal["plain", "fused"]


def with_losses(graph: Graph) -> Graph:
    """The graph with each cross-entropy as one op, or one per pass, where it can be taken apart."""
    return rewritten(graph, cross_entropies(graph), _OfLosses)


class _OfLosses(Rewrite[CrossEntropy]):
    @cached_property
    def step(self) -> WholeStep:
        return WholeStep(self.old, self.links)

    def add(self, one: CrossEntropy) -> bool:
        """As one op of both passes, if the loss's own gradient does not wait for the loss."""
        both = [(BOTH, (*one.results, *one.gradients))]
        if one.results and one.gradients and self.put(one, both):
            return True
        return super().add(one)

    def groups(self, one: CrossEntropy) -> list[tuple[str, Sequence[int]]]:
        return [(LOSS, one.results), (LOSS_GRAD, one.gradients)]

    def remade(self, one: CrossEntropy) -> Collection[int]:
        return one.remade

    def cuts(self, kind: str, body: Body[CrossEntropy], closings: Sequence[int]) -> dict[str, Attr]:
        return LossCuts(body, closings, kind).attrs()

    def composite(self, kind: str, one: CrossEntropy, closings: Sequence[int]) -> Op:
        op = super().composite(kind, one, closings)
        if not self.step.after(closings).isdisjoint(op.inputs):
            raise Refused("it would wait for itself")
        return op
