"""Layers that several language models share.

Dropout is off in the zoo's named models: large models are trained without it today.

Dims: B batch, T query position, S key position, D width, V vocabulary,
N heads, K key-value heads, G query heads per key-value head, H head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def cast(params: Any, dtype: str) -> Any:
    """Copy fp32 parameters to the compute dtype (mixed precision)."""
    return jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params)


def layer_norm(x_BTD: jax.Array, *, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Ba, Kiros & Hinton 2016 (arXiv 1607.06450); statistics in fp32."""
    x32_BTD = x_BTD.astype(jnp.float32)
    centred_BTD = x32_BTD - x32_BTD.mean(axis=-1, keepdims=True)
    variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
    normed_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + 1e-5)
    return normed_BTD.astype(x_BTD.dtype) * scale + bias


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
    """Zhang & Sennrich 2019 (arXiv 1910.07467); statistics in fp32."""
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_square_BT1 = jnp.square(x32_BTD).mean(axis=-1, keepdims=True)
    normed_BTD = x32_BTD * jax.lax.rsqrt(mean_square_BT1 + 1e-5)
    return normed_BTD.astype(x_BTD.dtype) * scale_D


def rotate(x_BTNH: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, Su et al. 2021 (arXiv 2104.09864).

    Pairs dim h with dim h + H/2, as GPT-NeoX and the published Llama weights
    on Hugging Face do.
    """
    _, seq, _, head = x_BTNH.shape
    frequency_h = theta ** (-np.arange(0, head, 2, dtype=np.float32) / head)
    angle_Th = jnp.arange(seq, dtype=jnp.float32)[:, None] * frequency_h
    cos_T1h, sin_T1h = jnp.cos(angle_Th)[:, None], jnp.sin(angle_Th)[:, None]
    low_BTNh, high_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated_BTNH = jnp.concatenate(
        [low_BTNh * cos_T1h - high_BTNh * sin_T1h, high_BTNh * cos_T1h + low_BTNh * sin_T1h],
        axis=-1,
    )
    return rotated_BTNH.astype(x_BTNH.dtype)


def next_seed(seed: jax.Array) -> jax.Array:
    """A linear congruential step; constants of Numerical Recipes, 3rd ed., section 7.1."""
    return seed * jnp.uint32(1_664_525) + jnp.uint32(1_013_904_223)


def mixed(bits: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (A. Appleby, 2011) on unsigned 32-bit integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def dropout(x: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    """Zero a part `rate` of the entries and scale up the others (Srivastava et al., JMLR 15, 2014).

    Whether an entry stays is a hash of its position and the seed, as in the counter-based
    generators of GPU kernels, so that a shard of the result needs nothing of the others.
    """
    if rate == 0:
        return x
    strides = np.cumprod([1, *x.shape[:0:-1]])[::-1]
    iotas = (jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) for dim in range(x.ndim))
    position = sum(iota * jnp.uint32(stride) for iota, stride in zip(iotas, strides, strict=True))
    keep = mixed(position ^ mixed(seed)) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def causal_mask(seq: int) -> jax.Array:
    """True where query t may look at key s ≤ t."""
    shape = (seq, seq)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) >= jax.lax.broadcasted_iota(
        jnp.int32, shape, 1
    )


def causal_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    rate: float = 0.0,
    seed: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of Vaswani et al. 2017 (arXiv 1706.03762), fp32 softmax; `rate` of weights dropped."""
    _, seq, _, head = q_BTNH.shape
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) * head**-0.5
    masked_BNTS = jnp.where(causal_mask(seq), scores_BNTS.astype(jnp.float32), -jnp.inf)
    weights_BNTS = jax.nn.softmax(masked_BNTS, axis=-1).astype(v_BSNH.dtype)
    if seed is not None:
        weights_BNTS = dropout(weights_BNTS, rate, seed)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH)


def grouped_causal_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Grouped-query attention, Ainslie et al. 2023 (arXiv 2305.13245)."""
    batch, seq, heads, head = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, seq, kv_heads, heads // kv_heads, head)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * head**-0.5
    masked_BKGTS = jnp.where(causal_mask(seq), scores_BKGTS.astype(jnp.float32), -jnp.inf)
    weights_BKGTS = jax.nn.softmax(masked_BKGTS, axis=-1).astype(v_BSKH.dtype)
    mixed_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return mixed_BTKGH.reshape(q_BTNH.shape)


def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Cross-entropy averaged over all tokens, in fp32."""
    logits32_BTV = logits_BTV.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits32_BTV, targets_BT).mean()
