"""What kernels run of attention composites, and why one does not run another.

| kernel | what it runs |
|---|---|
| cuDNN's flash attention | bf16, f16; heads of up to 128, in eights; causal masks and windows of the last keys |
| splash attention | bf16, f32; positions in 128s; the same masks |

Which of them a backend has is in its `ExecutionModel`. What no kernel runs is run block by block. What cuDNN takes:
jax 0.10, `check_is_flash_attention` (heads of up to 256 from Hopper on are left out: a plan does not know the library
there).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..cluster.cluster import Cluster
from ..execution_model import AttentionKernel, Backend, execution_model
from ..graph import Op
from .attention_form import BACKWARD, Form, Unreadable, form_of

_TYPES: Mapping[AttentionKernel, tuple[str, ...]] = {
    "cuDNN": ("bf16", "f16"), "splash attention": ("bf16", "f32")
}  # fmt: skip
LANES = 128  # positions that splash attention takes at a time
_PRODUCTS, _FORWARD_AGAIN = (
    5,
    2,
)  # of a gradient; of the forward pass, where its results are not handed on


def has_kernels(cluster: Cluster, backend: Backend = "xla") -> bool:
    """Whether a backend runs attention by a kernel on any of its devices."""
    kinds = {device.kind for device in cluster.devices.values()}
    return any(execution_model(kind, backend).attention_kernel for kind in kinds)


def form_for(op: Op, kernel: AttentionKernel | None) -> Form | None:
    """What a kernel is told to compute; None where a composite runs block by block."""
    return None if kernel is None or reason_against(op, kernel) else form_of(op)


def reason_against(op: Op, kernel: AttentionKernel) -> str | None:
    """Why a kernel does not run a composite; None where it does."""
    if op.has("round"):
        return "keys that may go round"
    try:
        form = form_of(op)
    except Unreadable as reason:
        return str(reason)
    return _against(form, kernel)


def products_made(op: Op, kernel: AttentionKernel | None) -> float:
    """How many times the products that are written in a body a kernel makes: in gradients to which the forward pass
    hands nothing on, the forward pass once more."""
    form = form_for(op, kernel)
    if op.kind != BACKWARD or form is None or form.has_residuals:
        return 1.0
    return (_PRODUCTS + _FORWARD_AGAIN) / _PRODUCTS


def fits(kernel: AttentionKernel, rows: int, keys: int) -> bool:
    """Whether a kernel takes so many positions at a time."""
    return kernel != "splash attention" or not (rows % LANES or keys % LANES)


def _against(form: Form, kernel: AttentionKernel) -> str | None:
    width, of_values = form.widths
    if form.dtype not in _TYPES[kernel]:
        return f"{form.dtype}, where {kernel} takes {' and '.join(_TYPES[kernel])}"
    if width != of_values:
        return f"heads of {width} features with values of {of_values}"
    if kernel == "cuDNN" and (width > 128 or width % 8):
        return f"heads of {width} features, where cuDNN takes up to 128 in eights"
    rows = 1 if form.rows is None else form.sizes[form.rows]
    if not fits(kernel, rows, form.sizes[form.keys]):
        return f"{rows} queries and {form.sizes[form.keys]} keys, where splash attention takes them in 128s"
    return None
