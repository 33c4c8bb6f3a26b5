"""Attention by a kernel of the device: cuDNN's on CUDA, splash attention on TPUs, by jax's own public functions.

    forward    o, pull = jax.vjp(kernel, q, k, v)      what `pull` keeps holds the log of the sum
    backward   pull, with o and the log of the sum from the forward pass in their places, of do

The backward pass traces the forward one to get its `pull`; what that computes nobody reads then, so jax drops it: five
products. Where the forward pass handed nothing on (its loop is another) it runs again: seven.

Devices that share the rows of a causal attention know which they have when they run only: a switch over all runs of
rows. A run sees all keys before its own and is causal from there on: two calls that are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.composites.attention_form import FEATURE, Form, Labels
from ...ir.composites.attention_kernels import fits, form_for
from ...ir.execution_model import execution_model
from ...ir.graph import Op

Three = tuple[Any, Any, Any]  # queries, keys and values, or their gradients, as a kernel has them


def attention_kernel(
    op: Op, platform: str, cuts: Mapping[int, Any], even: Sequence[str] = ()
) -> Kernel | None:
    """The kernel that runs a composite on this shard's part; None where it runs block by block.

    Args:
        cuts: by free dim of the composite. With `even`, devices work on two halves of as many rows.
    """
    kernel = execution_model(platform).attention_kernel
    form = form_for(op, kernel)
    if kernel is None or form is None:
        return None
    ways = {label: cuts[d].ways for label, d in form.free.items() if d in cuts}
    if form.window is not None and form.rows is not None and ways.get(form.rows, 1) > 1:
        return None
    sizes = tuple(n // ways.get(d, 1) for d, n in enumerate(form.sizes))
    at_a_time = 1 if form.rows is None else sizes[form.rows] // (2 if even else 1)
    if not fits(kernel, at_a_time, sizes[form.keys]):
        return None
    return Kernel(form, sizes, _LIBRARIES[kernel])


@dataclass(frozen=True)
class Kernel:
    """An attention, or its gradient, on arrays as they lie here; `sizes` are of their labels here."""

    form: Form
    sizes: tuple[int, ...]
    library: Library

    def __call__(self, operands: Sequence[Any]) -> list[jax.Array]:
        """With all rows here, or with rows that look at all keys."""
        return self._results(operands, (KeyRange(0, self.sizes[self.form.keys], self.form.causal),))

    def of_runs(self, runs: Sequence[Any], ways: int) -> Callable[[Sequence[Any]], list[jax.Array]]:
        """With one run of rows, or two one after the other, of all that these rows are cut into."""
        return partial(self._by_runs, runs, ways * len(runs))

    def _by_runs(self, runs: Sequence[Any], many: int, operands: Sequence[Any]) -> list[jax.Array]:
        rows, length = self.form.rows, runs[0].rows.length
        assert rows is not None
        here = replace(
            self, sizes=tuple(length if d == rows else n for d, n in enumerate(self.sizes))
        )
        found = []
        for run in runs:
            given = [
                _cut(a, labels, rows, run.at, length)
                for a, labels in zip(operands, self.form.operands, strict=True)
            ]
            choices = [partial(here._run, number * length, length) for number in range(many)]
            found.append(lax.switch(run.rows.first // length, choices, given))
        return [
            pieces[0] if len(pieces) == 1 else _joined(pieces, labels, rows)
            for pieces, labels in zip(
                zip(*found, strict=True), self.form.results_labels, strict=True
            )
        ]

    def _run(self, first: int, length: int, operands: Sequence[Any]) -> list[jax.Array]:
        """Rows from `first` on: all keys before, and a square of rows and keys that is causal."""
        before = (KeyRange(0, first, False),) if first else ()
        return self._results(operands, (*before, KeyRange(first, length, True)))

    # ------------------------------------------------------------ as kernels have it

    def _results(self, operands: Sequence[Any], parts: Sequence[KeyRange]) -> list[jax.Array]:
        form, at = self.form, (self.form.q, self.form.k, self.form.v)
        q, k, v = (
            self._there(operands[n], form.operands[n], order)
            for n, order in zip(at, (self._of_q, self._of_k, self._of_k), strict=True)
        )
        if form.do is None:
            o, lse = self._forward((q, k, v), parts)
            found = {"o": (o, self._of_q), "lse": (lse, self._of_lse)}
        else:
            do = self._there(operands[form.do], form.operands[form.do], self._of_q)
            if form.has_residuals:
                o, lse = (
                    self._there(operands[n], form.operands[n], order)
                    for n, order in ((-2, self._of_q), (-1, self._of_lse))
                )
            else:
                o, lse = self._forward((q, k, v), parts)
            dq, dk, dv = self._backward((q, k, v), o, lse, do, parts)
            found = {"dq": (dq, self._of_q), "dk": (dk, self._of_k), "dv": (dv, self._of_k)}
        return [
            self._back(*found[name], labels)
            for name, labels in zip(form.results, form.results_labels, strict=True)
        ]

    def _forward(self, given: Three, parts: Sequence[KeyRange]) -> tuple[Any, Any]:
        """The result and the log of the sum of each row, over parts of the keys put together."""
        found = [residuals(self._part(part), *_keys(given, part)) for part in parts]
        if len(found) == 1:
            return found[0]
        total = jax.nn.logsumexp(jnp.stack([lse for _, lse in found]), axis=0)
        shares = [self.library.beside(jnp.exp(lse - total)) for _, lse in found]
        o = sum(o.astype(jnp.float32) * share for (o, _), share in zip(found, shares, strict=True))
        return jnp.asarray(o).astype(given[0].dtype), total

    def _backward(
        self, given: Three, o: Any, lse: Any, do: Any, parts: Sequence[KeyRange]
    ) -> list[Any]:
        """Gradients of queries, keys and values: those of all parts of the keys, added up."""
        found = [pulled(self._part(part), *_keys(given, part), o, lse, do) for part in parts]
        if parts[0].length == given[1].shape[1]:
            return list(found[0])
        wide = [jnp.zeros(a.shape, jnp.float32) for a in given]
        for part, grads in zip(parts, found, strict=True):
            at = (slice(None), slice(part.first, part.first + part.length))
            dq, dk, dv = (g.astype(jnp.float32) for g in grads)
            wide = [wide[0] + dq, wide[1].at[at].add(dk), wide[2].at[at].add(dv)]
        return [w.astype(a.dtype) for w, a in zip(wide, given, strict=True)]

    def _part(self, part: KeyRange) -> Callable[..., Any]:
        return partial(
            self.library.attend, scale=self.form.scale, causal=part.causal, window=self.form.window
        )

    # ------------------------------------------------------------ dims

    @property
    def _of_q(self) -> Labels:
        return self.library.dims(self.form, self.form.rows)

    @property
    def _of_k(self) -> Labels:
        return self.library.dims(self.form, self.form.keys)

    @property
    def _of_lse(self) -> Labels:
        return self.library.of_logs(self.form)

    def _there(self, array: Any, labels: Labels, order: Labels) -> Any:
        """An array with its dims in this order, some of them joined."""
        flat, wanted = _flat(labels), _flat(order)
        sizes = self._sizes(labels, array.shape)
        apart = array.reshape([sizes[d] for d in flat])
        turned = apart.transpose([flat.index(d) for d in wanted])
        return turned.reshape([prod(sizes[d] for d in dim) for dim in order])

    def _back(self, array: Any, order: Labels, labels: Labels) -> Any:
        """The way back."""
        flat, wanted = _flat(order), _flat(labels)
        sizes = self._sizes(order, array.shape)
        turned = array.reshape([sizes[d] for d in flat]).transpose([flat.index(d) for d in wanted])
        return turned.reshape([prod(sizes[d] for d in dim) for dim in labels])

    def _sizes(self, labels: Labels, shape: Sequence[int]) -> dict[int, int]:
        found = dict(enumerate(self.sizes))
        for dim, size in zip(labels, shape, strict=True):
            if dim == (FEATURE,):
                found[FEATURE] = size
        return found


@dataclass(frozen=True)
class KeyRange:
    """Keys from `first` on; with `causal`, row i of those here sees them up to the i-th."""

    first: int
    length: int
    causal: bool


def _keys(given: Three, part: KeyRange) -> Three:
    q, k, v = given
    k, v = (lax.slice_in_dim(a, part.first, part.first + part.length, axis=1) for a in (k, v))
    return q, k, v


def _flat(labels: Labels) -> list[int]:
    return [d for dim in labels for d in dim]


def _cut(array: Any, labels: Labels, label: int, first: Any, length: int) -> Any:
    at = next((n for n, dim in enumerate(labels) if dim == (label,)), None)
    return array if at is None else lax.dynamic_slice_in_dim(array, first, length, at)


def _joined(pieces: Sequence[Any], labels: Labels, label: int) -> Any:
    """Results of runs side by side; added up where they have no rows."""
    at = next((n for n, dim in enumerate(labels) if dim == (label,)), None)
    if at is not None:
        return jnp.concatenate(pieces, at)
    total = sum(p.astype(jnp.float32) for p in pieces)
    return jnp.asarray(total).astype(pieces[0].dtype)


# ------------------------------------------------------------ kernels


def residuals(attend: Callable[..., Any], q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """The result, and of what the backward pass keeps the log of the sum."""
    o, pull = jax.vjp(attend, q, k, v)
    leaves = jax.tree.leaves(pull)
    return o, leaves[_log_in(leaves, q)]


def pulled(attend: Callable[..., Any], q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any) -> Three:
    """Gradients, of a result and a log of the sum that are known, over these keys and perhaps others."""
    made, pull = jax.vjp(attend, q, k, v)
    leaves, tree = jax.tree.flatten(pull)
    (result,) = (n for n, leaf in enumerate(leaves) if leaf is made)
    leaves[_log_in(leaves, q)], leaves[result] = lse, o
    return jax.tree.unflatten(tree, leaves)(do)


def _log_in(leaves: Sequence[Any], q: Any) -> int:
    """Where the log of the sum is: the one array of f32 with a number per head and row."""
    many = q.size // q.shape[-1]
    (at,) = (
        n
        for n, leaf in enumerate(leaves)
        if leaf.dtype == jnp.float32 and leaf.size == many and leaf.ndim == q.ndim - 1
    )
    return at


def _cudnn(q: Any, k: Any, v: Any, *, scale: float, causal: bool, window: int | None) -> Any:
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip


def _splash(q: Any, k: Any, v: Any, *, scale: float, causal: bool, window: int | None) -> Any:
    kernel = _splash_kernel(q.shape[0], q.shape[1], k.shape[1], causal, window)
    return kernel((q * scale).astype(q.dtype), k, v)


INTERPRET = False  # splash attention without a TPU, for tests


def _splash_kernel(heads: int, rows: int, keys: int, causal: bool, window: int | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, (q, k) = (rows, keys), (_block(rows), _block(keys))
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=INTERPRET
    )  # fmt: skip


def _block(size: int) -> int:
    """The largest block of a kernel that divides a dim."""
    return next(block for block in (512, 256, 128) if size % block == 0)


@dataclass(frozen=True)
class Library:
    """Whose kernel it is: cuDNN's has heads behind rows, splash attention batch and heads in one dim."""

    attend: Callable[..., Any]  # (q, k, v, scale, causal, window) -> o; rows and keys are dim 1
    apart: bool

    def dims(self, form: Form, label: int | None) -> Labels:
        """Of an array with queries' or keys' positions."""
        batch, heads = form.shared[:-1], form.shared[-1:]
        places = () if label is None else (label,)
        heads = heads if label == form.keys else (*heads, *form.groups)
        if self.apart:
            return (batch, places, heads, (FEATURE,))
        return ((*batch, *heads), places, (FEATURE,))

    def of_logs(self, form: Form) -> Labels:
        first, places, *heads, _ = self.dims(form, form.rows)
        return (first, *heads, places)

    def beside(self, lse: Any) -> Any:
        """Numbers of rows, as they go with the result."""
        return (lse.swapaxes(1, 2) if self.apart else lse)[..., None]


_LIBRARIES = {"cuDNN": Library(_cudnn, True), "splash attention": Library(_splash, False)}
