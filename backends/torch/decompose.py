"""What is taken apart before it is mapped: core ATen's decompositions, more of them, and attention by our own.

Kept whole, as the graph has one op for them: look-ups and their gradients, max pooling, padding of slices.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...ir.errors import CaptureError
from . import compat
from .drawn import dropout, seeded

_MORE = (
    "native_layer_norm", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "native_batch_norm", "native_group_norm_backward", "gelu", "elu", "mish",
    "index_add", "linalg_vector_norm", "addmv", "log_sigmoid_forward", "log_sigmoid_backward", "hardswish",
    "hardswish_backward", "hardsigmoid", "hardsigmoid_backward", "leaky_relu_backward", "hardtanh_backward",
    "elu_backward", "unfold", "unfold_backward", "logit", "prelu", "_prelu_kernel", "_prelu_kernel_backward",
    "squeeze_copy", "unbind_copy", "native_dropout_backward", "softplus_backward", "glu", "glu_backward",
)  # fmt: skip
_KEPT = (
    "embedding_dense_backward", "slice_backward", "select_backward", "max_pool2d_with_indices_backward", "lerp",
    "tril", "triu", "masked_fill", "stack", "clamp_min", "clamp_max", "roll", "baddbmm", "addcmul", "addcdiv",
)  # fmt: skip
_BY_VALUES = frozenset({
    "_local_scalar_dense", "bincount", "item", "masked_select", "nonzero", "nonzero_numpy", "unique_consecutive",
    "unique_dim", "_unique", "_unique2",
})  # fmt: skip


@cache
def table() -> dict[Any, Any]:
    """The decompositions to trace with."""
    return compat.decompositions(_MORE, _KEPT)


def rewrite(root: torch.fx.GraphModule) -> None:
    """Write attention as products around a softmax: CPU and GPU have fused forms of it, which planning cannot see.
    One-hot labels as a comparison, without torch's check of their values. And random numbers as functions of a seed.

    Raises:
        CaptureError: an operation makes a shape of values.
    """
    seeded(root)
    for part in root.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                _check_shape(node)
                node.target = _OURS.get(node.target, node.target)
            part.recompile()


def _check_shape(node: torch.fx.Node) -> None:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    ids: Any = node.args[1] if name == "index" else ()
    by_truth = any(map(_is_truth, ids))
    if by_truth or name in _BY_VALUES:
        what = "indexes by truth values" if by_truth else f"calls `{name}`"
        raise CaptureError(
            f"the step {what}, so that a shape or what happens depends on values.",
            where=compat.user_line(node) or "the step",
            fix="torch.where(mask, a, b), masked_fill, or weights of 0 instead of fewer elements",
        )


def _is_truth(ids: Any) -> bool:
    value = ids.meta.get("val") if isinstance(ids, torch.fx.Node) else None
    return value is not None and value.dtype in (torch.bool, torch.uint8)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `torch.nn.functional.scaled_dot_product_attention` computes, of [..., heads, position, width].

    Weights of a query whose keys are all masked are 0, as there. Dropout has a seed (`drawn.py`).
    """
    if enable_gqa:
        key, value = (
            torch.repeat_interleave(x, query.shape[-3] // x.shape[-3], -3) for x in (key, value)
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        rows, columns = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        scores = torch.where(rows[:, None] >= columns, scores, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        weights = torch.softmax(torch.where(mask, scores, float("-inf")), -1)
        weights = torch.where(mask.any(-1, keepdim=True), weights, 0.0)
    else:
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return torch.matmul(weights if seed is None else dropout(seed, weights, dropout_p), value)


def one_hot(ids: torch.Tensor, classes: int = -1) -> torch.Tensor:
    """What `torch.nn.functional.one_hot` computes."""
    if classes < 0:
        raise CaptureError(
            "`one_hot` without a number of classes makes a shape of the largest label.",
            where="the step",
            fix="one_hot(labels, num_classes)",
        )
    return (ids[..., None] == torch.arange(classes, device=ids.device)).to(torch.int64)


_OURS: dict[Any, Any] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.one_hot.default: one_hot,
}
