"""Whether a body comes to what a kernel computes in its place: both run on some rows of one head, on random numbers.

    the last rows of the last head of the last example, with all keys      the body        softmax(scale q kᵀ, mask) v

A body is read by its structure (`ir/composites/attention_form.py`); this is the proof that it was read right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.composites.attention_form import FEATURE, Form, Labels
from ...ir.composites.bodies import body_of
from ...ir.errors import LoweringError
from ...ir.graph import Op
from .dtypes import jax_dtype
from .shard import ShardPart

ROWS = 64  # that are compared, at most
TOLERANCE = {
    "f32": 1e-3
}  # of the largest number of a result; less than a mask or a scale would change
_OF_SHORT_FLOATS = 5e-2
_FEATURES, _OF_VALUES = 100, 101  # dims in sums, beside labels
_checked = set[tuple[Any, ...]]()


def check_form(
    op: Op, form: Form, run: Callable[[Mapping[int, ShardPart], Sequence[Any]], list[Any]]
) -> None:
    """Compare once per body; `run` takes which part of each free dim the operands are of, and these.

    Raises:
        LoweringError: a kernel would compute something else.
    """
    key = (op.kind, op.attrs)
    if key in _checked:
        return
    with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        worst = _difference(op, form, run)
    limit = TOLERANCE.get(form.dtype, _OF_SHORT_FLOATS)
    if not worst <= limit:
        raise LoweringError(
            f"attention is not what its kernel would compute: results differ by {worst:.2g} of the largest one.",
            where=op.where or op.tag, fix="attention=plain, and report this step",
        )  # fmt: skip
    _checked.add(key)


def _difference(op: Op, form: Form, run: Callable[..., list[Any]]) -> float:
    rows = 1 if form.rows is None else form.sizes[form.rows]
    here = max(n for n in range(1, min(rows, ROWS) + 1) if rows % n == 0)
    sizes = {d: 1 if d in form.free else n for d, n in enumerate(form.sizes)}
    cuts = {
        d: ShardPart(form.sizes[label] - 1, form.sizes[label]) for label, d in form.free.items()
    }
    if form.rows is not None:
        sizes[form.rows] = here if form.rows in form.free else rows
        if form.rows in form.free:
            cuts[form.free[form.rows]] = ShardPart(rows // here - 1, rows // here)
    first = rows - sizes.get(form.rows, 1) if form.rows is not None else 0
    body = body_of(op.text("body"))
    given = [
        _numbers(n, labels, sizes, body.types[v])
        for n, (v, labels) in enumerate(zip(body.inputs, form.operands, strict=True))
    ]
    have = jax.jit(partial(run, cuts))(given)
    want = jax.jit(partial(_wanted, form, sizes, first))(given)
    return max(map(_apart, have, want))


def _numbers(seed: int, labels: Labels, sizes: Mapping[int, int], kind: Any) -> jax.Array:
    shape = [
        n if dim == (FEATURE,) else prod(sizes[d] for d in dim)
        for dim, n in zip(labels, kind.shape, strict=True)
    ]
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jax_dtype(kind.dtype))


def _apart(have: Any, want: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (have, want))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def _wanted(form: Form, sizes: Mapping[int, int], first: int, given: Sequence[Any]) -> list[Any]:
    """What the form says, in float32."""
    names = {form.q: _FEATURES, form.k: _FEATURES, form.v: _OF_VALUES}
    at = (form.q, form.k, form.v)
    operands = [_apart_dims(given[n], form.operands[n], sizes).astype(jnp.float32) for n in at]
    dims = [_named(form.operands[n], names[n]) for n in at]
    of_o = (*form.of_rows, _OF_VALUES)

    def attend(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        every = tuple(d for d, n in enumerate(form.sizes) if n > 1)
        scores = form.scale * jnp.einsum(q, dims[0], k, dims[1], every)
        if form.causal:
            scores = jnp.where(_mask(form, scores.shape, every, first), scores, -jnp.inf)
        axis = every.index(form.keys)
        weights = jax.nn.softmax(scores, axis)
        return jnp.einsum(weights, every, v, dims[2], of_o), jax.nn.logsumexp(scores, axis)

    (o, lse), pull = jax.vjp(attend, *operands)
    found: dict[str, tuple[Any, tuple[int, ...]]] = {"o": (o, of_o), "lse": (lse, form.of_rows)}
    if form.do is not None:
        labels = form.operands[form.do]
        do = _apart_dims(given[form.do], labels, sizes).astype(jnp.float32)
        do = jnp.einsum(do, _named(labels, _OF_VALUES), of_o)
        grads = pull((do, jnp.zeros_like(lse)))
        found |= {f"d{name}": (g, d) for name, g, d in zip("qkv", grads, dims, strict=True)}
    return [
        _together(*found[name], labels)
        for name, labels in zip(form.results, form.results_labels, strict=True)
    ]


def _mask(form: Form, shape: tuple[int, ...], every: tuple[int, ...], first: int) -> Any:
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, every.index(form.rows or 0)) + first
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, every.index(form.keys))
    return (keys <= rows) & (keys > rows - (form.window or form.sizes[form.keys]))


def _named(labels: Labels, feature: int) -> tuple[int, ...]:
    return tuple(feature if d == FEATURE else d for dim in labels for d in dim)


def _apart_dims(array: Any, labels: Labels, sizes: Mapping[int, int]) -> Any:
    """With a dim for each label."""
    shape = []
    for dim, n in zip(labels, array.shape, strict=True):
        shape += [n] if dim == (FEATURE,) else [sizes[d] for d in dim]
    return array.reshape(shape)


def _together(array: Any, named: tuple[int, ...], labels: Labels) -> Any:
    """With dims as a result of the body has them."""
    feature = next((d for d in named if d >= _FEATURES), _FEATURES)
    wanted = _named(labels, feature)
    turned = jnp.einsum(array, named, wanted)
    size = dict(zip(wanted, turned.shape, strict=True))
    return turned.reshape([prod(size[d] for d in _named((dim,), feature)) for dim in labels])
