"""Run a cross-entropy, or its gradients, on this shard's part: its body, block of tokens by block of tokens.

    for block of tokens:  logits = hidden[block] · weight;  ...;  loss[block];  dweight += hidden[block]ᵀ · dlogits

Logits exist for one block at a time (`ir/composites/loss_blocks.py`). Devices that share the vocabulary bring the
maxima and sums of each block together; what gradients sum over it is owed. What is added up from block to block is
multiplied and added in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from ...ir.composites.bodies import LOSS
from ...ir.composites.free_dims import place_of
from ...ir.composites.loss_blocks import block_of, logits_in
from ...ir.graph import Op
from ...ir.rules import rule_of
from ...ir.rules.rule import Rule
from .dtypes import jax_dtype
from .emit import emit
from .emit_composite import Loop, body_for, held_operands
from .joins import settle
from .shard import Arrays, Part, ShardPart


def run_loss(
    op: Op, bound: Callable[[Op], Any], operands: Arrays, rule: Rule, cuts: Mapping[int, ShardPart],
    sharing: tuple[str, ...],
) -> list[jax.Array]:  # fmt: skip
    """This shard's results, or its contribution to those that are summed over what is cut.

    Args:
        bound: gives the jax primitive and the parameters of an op of the body.
        operands: local parts, cut as the rule and `cuts` say.
        cuts: by factor of the rule; the free dims of the composite are its first factors.
        sharing: axes over which the vocabulary is cut.
    """
    body = body_for(op)
    free = body.cuts(rule, cuts)
    block = block_of(op, {d: cut.ways for d, cut in free.items()})
    todo = body.to_cut(free, most=logits_in(op), block=block)
    added = {d for d, _ in todo}
    summed = {
        v
        for v, dims in zip(body.graph.outputs, body.results, strict=True)
        if any(place_of(dims, d) is None for d in added)
    }
    told = dict(op.attrs)
    complete = cast(tuple[int, ...], told.get("complete", ()))
    owed = frozenset(
        v for k, v in enumerate(body.graph.outputs) if op.kind != LOSS and k not in complete
    )
    loop = _Loop(body, bound, free, todo, (), sharing, owed, frozenset(summed))
    kinds = [body.graph.types[v].dtype for v in body.graph.outputs]
    results = loop(held_operands(op, operands))
    if sharing:
        mine = free[cast(int, body.vocabulary)].index == 0
        for k in complete:  # one device has all of the sum that is owed
            results[k] = jnp.where(mine, results[k], jnp.zeros_like(results[k]))
    return [array.astype(jax_dtype(kind)) for array, kind in zip(results, kinds, strict=True)]


@dataclass(frozen=True)
class _Loop(Loop):
    """`owed` results may owe sums over the axes that share the vocabulary, `summed` ones are added up over blocks."""

    sharing: tuple[str, ...] = ()
    owed: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()

    def one_op(self, op: Op, operands: Sequence[Any]) -> list[jax.Array]:
        rule, (primitive, params) = rule_of(op, self.body.graph.types), self.bound(op)
        if op.kind == "dot_general" and not self.summed.isdisjoint(op.outputs):
            params = {**params, "preferred_element_type": jnp.dtype("float32")}
        cuts = self.cuts_of(op, rule)
        results = emit(op, (primitive, params), operands, rule, cuts)
        over = self._reduction(op, rule, cuts)
        if not over:
            return results
        pairs = zip(op.outputs, results, strict=True)
        return [
            array if v in self.owed else settle(array, over, self.sharing) for v, array in pairs
        ]

    def _reduction(self, op: Op, rule: Rule, cuts: Mapping[int, Part]) -> str:
        """How results of an op over the vocabulary come together from its parts; "" where they are parts themselves."""
        whole = self.cuts.get(self.body.vocabulary) if self.body.vocabulary is not None else None
        if whole is None or not self.sharing:
            return ""
        kept = {f for dims in rule.results for dim in dims for f in dim}
        lost = [f for f, cut in cuts.items() if cut is whole and f not in kept]
        return rule.factors[lost[0]].reduction if lost else ""
