"""Which kernel runs an attention composite on which devices, and why none does.

| devices | kernel | what it runs |
|---|---|---|
| cuda | cuDNN's flash attention | bf16, f16; heads of up to 128, in eights; causal masks and windows of the last keys |
| tpu | splash attention | bf16, f32; positions in 128s; the same masks |

Elsewhere, and where none does, attention runs block by block, as XLA compiles it. What cuDNN takes: jax 0.10,
`check_is_flash_attention` (heads of up to 256 from Hopper on are left out: a plan does not know the library there).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..cluster.cluster import Cluster
from ..graph import Op
from .attention_form import BACKWARD, Form, Unreadable, form_of

NAMES: Mapping[str, str] = {"cuda": "cuDNN", "tpu": "splash attention"}  # by kind of device
_TYPES = {"cuda": ("bf16", "f16"), "tpu": ("bf16", "f32")}
LANES = 128  # positions that splash attention takes at a time
_PRODUCTS, _FORWARD_AGAIN = (
    5,
    2,
)  # of a gradient; of the forward pass, where its results are not handed on


def has_kernels(cluster: Cluster) -> bool:
    """Whether any of its devices runs attention by a kernel."""
    return any(device.kind in NAMES for device in cluster.devices.values())


def kernel_of(op: Op, kind: str) -> Form | None:
    """What a kernel of this kind of device is told to compute; None where it runs block by block."""
    return None if reason_against(op, kind) else form_of(op)


def reason_against(op: Op, kind: str) -> str | None:
    """Why no kernel runs a composite on devices of this kind; None where one does."""
    if kind not in NAMES:
        return f"no kernel for {kind} devices"
    if "round" in dict(op.attrs):
        return "keys that may go round"
    try:
        form = form_of(op)
    except Unreadable as reason:
        return str(reason)
    return _against(form, kind)


def products_made(op: Op, kind: str) -> float:
    """How many times the products that are written in a body a kernel makes: in gradients to which the forward pass
    hands nothing on, the forward pass once more."""
    form = kernel_of(op, kind)
    if op.kind != BACKWARD or form is None or form.has_residuals:
        return 1.0
    return (_PRODUCTS + _FORWARD_AGAIN) / _PRODUCTS


def fits(form: Form, kind: str, rows: int, keys: int) -> bool:
    """Whether a kernel takes so many positions at a time."""
    return kind != "tpu" or not (rows % LANES or keys % LANES)


def _against(form: Form, kind: str) -> str | None:
    width, of_values = form.widths
    if form.dtype not in _TYPES[kind]:
        return f"{form.dtype}, where {NAMES[kind]} takes {' and '.join(_TYPES[kind])}"
    if width != of_values:
        return f"heads of {width} features with values of {of_values}"
    if kind == "cuda" and (width > 128 or width % 8):
        return f"heads of {width} features, where cuDNN takes up to 128 in eights"
    rows = 1 if form.rows is None else form.sizes[form.rows]
    if not fits(form, kind, rows, form.sizes[form.keys]):
        return f"{rows} queries and {form.sizes[form.keys]} keys, where splash attention takes them in 128s"
    return None
