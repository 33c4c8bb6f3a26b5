"""Llama 3: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Equinox style: the model is a module, and the module is the pytree of its
parameters. `blocks` is a list of modules (unrolled), or one module of stacked
arrays (scanned). Embeddings are untied, unless `tied` (Llama 3.2 1B and 3B tie them). No dropout.

Dims: B batch, T position, V vocabulary, L layers, D width, F feed-forward
width, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .data import counting_batch, token_batch
from .example import Example, abstract, count
from .layers import cast, grouped_causal_attention, rms_norm, rotate, token_loss
from .optimizers import clipped_adamw, clipped_sgd

State = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one Llama."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    learning_rate: float
    batch: int
    seq: int = 8192
    vocab: int = 128_256
    theta: float = 500_000.0
    warmup_steps: int = 8000
    decay_steps: int = 1_200_000
    optimizer: str = "adamw"
    dtype: str = "bf16"
    scan: bool = False
    remat: bool = False
    head_dim: int | None = None  # width / heads if not given
    tied: bool = False  # logits by the embedding


# Grattafiori et al. 2024 (arXiv 2407.21783), table 3: layers, width, hidden,
# heads, key-value heads, peak learning rate, vocabulary of 128 thousand tokens
# (128 256 as released), θ. §3.4.1: 405B warms up over 8000 steps, decays on a
# cosine to 1 % over 1.2 million, and trains on batches of 8 million tokens, then
# 16 million: 1024, then 2048 sequences of 8192 (table 4). The batch and the
# schedule of the smaller ones were not published: those of 405B.
CONFIGS = {
    "llama3-8b": LlamaConfig(32, 4096, 14_336, 32, 8, 3.0e-4, 1024),
    "llama3-70b": LlamaConfig(80, 8192, 28_672, 64, 8, 1.5e-4, 1024),
    "llama3-405b": LlamaConfig(126, 16_384, 53_248, 128, 8, 0.8e-4, 2048),
    # Ours, for tests.
    "llama-tiny": LlamaConfig(2, 64, 128, 8, 4, 1e-2, 16, seq=32, vocab=128, warmup_steps=2),
    "llama-tied-tiny": LlamaConfig(
        4, 64, 128, 8, 4, 1e-2, 16, seq=32, vocab=128, warmup_steps=2, tied=True
    ),
}


class Block(eqx.Module):
    """One pre-norm layer: attention, then SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    norm1_D: jax.Array
    query_DNH: jax.Array
    key_DKH: jax.Array
    value_DKH: jax.Array
    out_NHD: jax.Array
    norm2_D: jax.Array
    gate_DF: jax.Array
    up_DF: jax.Array
    down_FD: jax.Array
    theta: float = eqx.field(static=True)

    def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
        width, hidden = config.width, config.hidden
        head = config.head_dim or width // config.heads
        keys = jax.random.split(key, 7)
        self.norm1_D = jnp.ones(width)
        self.query_DNH = normal(keys[0], (width, config.heads, head))
        self.key_DKH = normal(keys[1], (width, config.kv_heads, head))
        self.value_DKH = normal(keys[2], (width, config.kv_heads, head))
        self.out_NHD = normal(keys[3], (config.heads, head, width))
        self.norm2_D = jnp.ones(width)
        self.gate_DF = normal(keys[4], (width, hidden))
        self.up_DF = normal(keys[5], (width, hidden))
        self.down_FD = normal(keys[6], (hidden, width))
        self.theta = config.theta

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(rms_norm(x_BTD, self.norm1_D))
        return x_BTD + self.feed_forward(rms_norm(x_BTD, self.norm2_D))

    def attention(self, x_BTD: jax.Array) -> jax.Array:
        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, self.query_DNH)
        k_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, self.key_DKH)
        v_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, self.value_DKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, self.theta), rotate(k_BTKH, self.theta)
        mixed_BTNH = grouped_causal_attention(q_BTNH, k_BTKH, v_BTKH)
        return jnp.einsum("btnh,nhd->btd", mixed_BTNH, self.out_NHD)

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.silu(x_BTD @ self.gate_DF) * (x_BTD @ self.up_DF)
        return hidden_BTF @ self.down_FD


class Llama(eqx.Module):
    embed_VD: jax.Array
    blocks: list[Block] | Block
    norm_D: jax.Array
    unembed_DV: jax.Array | None
    scan: bool = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
        embed_key, unembed_key, blocks_key = jax.random.split(key, 3)
        block_keys = jax.random.split(blocks_key, config.layers)
        make_block = partial(Block, config)
        self.embed_VD = normal(embed_key, (config.vocab, config.width))
        self.blocks = (
            eqx.filter_vmap(make_block)(block_keys)
            if config.scan
            else [make_block(block_key) for block_key in block_keys]
        )
        self.norm_D = jnp.ones(config.width)
        self.unembed_DV = None if config.tied else normal(unembed_key, (config.width, config.vocab))
        self.scan, self.remat = config.scan, config.remat

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.run_blocks(self.embed_VD[tokens_BT])
        unembed_DV = self.embed_VD.T if self.unembed_DV is None else self.unembed_DV
        return jnp.einsum("btd,dv->btv", rms_norm(x_BTD, self.norm_D), unembed_DV)

    def run_blocks(self, x_BTD: jax.Array) -> jax.Array:
        call = jax.checkpoint(Block.__call__) if self.remat else Block.__call__
        if self.scan:
            x_BTD, _ = jax.lax.scan(lambda x, block: (call(block, x), None), x_BTD, self.blocks)
            return x_BTD
        for block in self.blocks:
            x_BTD = call(block, x_BTD)
        return x_BTD


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal weights of 0.02, as in the configuration released with the weights."""
    return 0.02 * jax.random.normal(key, shape)


def loss_fn(model: Llama, batch: Batch, dtype: str) -> jax.Array:
    return token_loss(cast(model, dtype)(batch["tokens"]), batch["targets"])


def train_step(
    dtype: str, optimizer: optax.GradientTransformation, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    model = state["model"]
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch, dtype)
    updates, opt_state = optimizer.update(grads, state["opt_state"], model)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return {"model": eqx.apply_updates(model, updates), "opt_state": opt_state}, metrics


def make_optimizer(config: LlamaConfig) -> optax.GradientTransformation:
    """AdamW on a cosine with linear warm-up, down to 1 % of the peak."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=0.01 * config.learning_rate,
    )
    return {"adamw": clipped_adamw, "sgd": clipped_sgd}[config.optimizer](schedule)


def make(name: str, config: LlamaConfig) -> Example:
    optimizer = make_optimizer(config)

    def init(key: jax.Array) -> State:
        model = Llama(config, key)
        return {"model": model, "opt_state": optimizer.init(model)}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return counting_batch(rng, config.batch, config.seq, config.vocab)

    state = abstract(init)
    return Example(
        name=name,
        step=partial(train_step, config.dtype, optimizer),
        state=state,
        batch=token_batch(config.batch, config.seq),
        init=init,
        make_batch=make_batch,
        description=(
            f"Llama 3, {config.layers} layers of width {config.width}, "
            f"{config.heads} query and {config.kv_heads} key-value heads"
        ),
        params=count(state["model"]),
    )
