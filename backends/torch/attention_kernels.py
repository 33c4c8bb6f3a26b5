"""Attention composites by torch's flash attention for CPUs, where a body is what that computes.

    forward    o, lse = flash(q, k, v)
    backward   dq, dk, dv = flash_backward(do, q, k, v, o, lse)

The kernel has arrays [batch, head, position, feature] with as many heads of keys as of queries. Where the forward pass
hands nothing on, it runs again in the backward pass. Masks other than causal ones, bias, dropout and windows, causal
rows that are cut, and rings run block by block (`emit_composite.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ...ir.composites.attention_form import FEATURE, Form, Labels, Unreadable, form_of
from ...ir.graph import Op
from .shard import Part

Tensor = torch.Tensor
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_TYPES = ("f32", "f64", "bf16", "f16")


def attention_kernel(op: Op, cuts: Mapping[int, Part]) -> Flash | None:
    """What runs a composite on this shard's part; None where it runs block by block.

    Args:
        cuts: by free dim of the composite.
    """
    try:
        form = form_of(op)
    except Unreadable:
        return None
    cut_rows = form.rows is not None and form.free.get(form.rows) in cuts
    if form.window is not None or (form.causal and cut_rows) or form.dtype not in _TYPES:
        return None
    if form.widths[0] != form.widths[1]:
        return None
    ways = {label: cuts[d].all_ways for label, d in form.free.items() if d in cuts}
    return Flash(form, tuple(n // ways.get(d, 1) for d, n in enumerate(form.sizes)))


@dataclass(frozen=True)
class Flash:
    """An attention, or its gradient, on arrays as they lie here; `sizes` are of their labels here."""

    form: Form
    sizes: tuple[int, ...]

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        form, of_q, of_k = self.form, self._of(self.form.rows), self._of(self.form.keys)
        q = self._there(operands[form.q], form.operands[form.q], of_q)
        k, v = (
            self._there(operands[n], form.operands[n], of_k).expand(-1, q.shape[1], -1, -1)
            for n in (form.k, form.v)
        )
        if form.do is None:
            o, lse = _FORWARD(q, k, v, 0.0, form.causal, scale=form.scale)
            found = {"o": (o, of_q), "lse": (lse, of_q[:-1])}
        else:
            do = self._there(operands[form.do], form.operands[form.do], of_q)
            if form.has_residuals:
                o = self._there(operands[-2], form.operands[-2], of_q)
                lse = self._there(operands[-1], form.operands[-1], of_q[:-1]).contiguous()
            else:
                o, lse = _FORWARD(q, k, v, 0.0, form.causal, scale=form.scale)
            dq, dk, dv = _BACKWARD(do, q, k, v, o, lse, 0.0, form.causal, scale=form.scale)
            found = {
                "dq": (dq, of_q),
                "dk": (self._of_heads(dk), of_k),
                "dv": (self._of_heads(dv), of_k),
            }
        results = list[Tensor]()
        for name, labels in zip(form.results, form.results_labels, strict=True):
            made, order = found[name]
            results.append(self._there(made, order, labels))
        return results

    def _of(self, positions: int | None) -> Labels:
        """The order of dims in the kernel: of keys, or of queries, which have heads of their own in each group."""
        groups = self.form.groups if positions != self.form.keys else ()
        return self.form.shared, groups, () if positions is None else (positions,), (FEATURE,)

    def _of_heads(self, gradient: Tensor) -> Tensor:
        """That of a head of keys, which all queries of its group read."""
        return gradient.sum(1, keepdim=True) if gradient.shape[1] > 1 else gradient

    def _there(self, x: Tensor, labels: Labels, order: Labels) -> Tensor:
        """An array with its dims in this order, some of them joined."""
        flat, wanted, sizes = _flat(labels), _flat(order), self._sizes(labels, x.shape)
        turned = x.reshape([sizes[d] for d in flat]).permute([flat.index(d) for d in wanted])
        return turned.reshape([prod(sizes[d] for d in dim) for dim in order])

    def _sizes(self, labels: Labels, shape: Sequence[int]) -> dict[int, int]:
        found = dict(enumerate(self.sizes))
        for dim, size in zip(labels, shape, strict=True):
            if dim == (FEATURE,):
                found[FEATURE] = size
        return found


def _flat(labels: Labels) -> list[int]:
    return [d for dim in labels for d in dim]
