"""DeepSeek V2 and V3: multi-head latent attention, shared and routed experts, leading dense layers.

Queries, keys and values are made from narrow latents; one rotary key serves all heads. Each token
goes to its top experts (`experts`) and to the shared ones. Left out: limits on the groups that a
token's experts come from, the bias and the losses that balance loads, multi-token prediction. No
dropout.

Dims: B sequence, S position, V vocabulary, L layers, D width, F feed-forward width, N heads,
H value head width, Q query head width (plain and rotary part), R query latent, P key-value latent,
T rotary width, U latent and rotary key, W plain key and value, E experts, J choices of one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .data import counting_batch, token_batch
from .example import Example, abstract, count
from .experts import routed_experts
from .layers import cast, causal_attention, rms_norm, rotate, token_loss
from .optimizers import clipped_adamw, clipped_sgd

Params = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class DeepSeekConfig:
    """Sizes of one DeepSeek. `dense` of the layers, the first ones, have a feed-forward of `hidden`."""

    layers: int
    dense: int
    width: int
    hidden: int
    heads: int
    experts: int
    choices: int
    expert_hidden: int
    shared_hidden: int
    learning_rate: float
    batch: int
    vocab: int
    seq: int = 4096
    query_latent: int = 1536
    latent: int = 512
    head: int = 128
    rotary: int = 64
    scores: str = (
        "softmax"  # of the router; "sigmoid" weights are normalised over a token's choices
    )
    scale: float = 1.0  # of the weights of routed experts
    theta: float = 10_000.0
    capacity_factor: float = 1.0
    optimizer: str = "adamw"
    dtype: str = "bf16"
    remat: bool = False

    @property
    def capacity(self) -> int:
        """Tokens per expert and sequence."""
        return math.ceil(self.capacity_factor * self.choices * self.seq / self.experts)


# Sizes: `config.json` released with deepseek-ai/DeepSeek-V2 and DeepSeek-V3. Batch, sequence, peak
# learning rate: arXiv 2405.04434, section 3.1.2 (9216), and arXiv 2412.19437, section 4.2 (15360).
CONFIGS = {
    "deepseek-v2": DeepSeekConfig(
        60, 1, 5120, 12_288, 128, 160, 6, 1536, 3072, 2.4e-4, 9216, 102_400, scale=16.0
    ),
    "deepseek-v3": DeepSeekConfig(
        61, 3, 7168, 18_432, 128, 256, 8, 2048, 2048, 2.2e-4, 15_360, 129_280, scores="sigmoid", scale=2.5
    ),
    # Ours, for tests.
    "deepseek-tiny": DeepSeekConfig(
        3, 1, 64, 128, 4, 8, 2, 32, 64, 1e-2, 16, 128, 32, 32, 16, 16, 8, "sigmoid", capacity_factor=2.0
    ),
}  # fmt: skip


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class DeepSeekState:
    params: Params
    opt_state: optax.OptState


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape)


def init_attention(config: DeepSeekConfig, key: jax.Array) -> Params:
    c, keys = config, jax.random.split(key, 5)
    return {
        "norm1_D": jnp.ones(c.width),
        "query_down_DR": normal(keys[0], c.width, c.query_latent),
        "query_norm_R": jnp.ones(c.query_latent),
        "query_up_RNQ": normal(keys[1], c.query_latent, c.heads, c.head + c.rotary),
        "latent_down_DU": normal(keys[2], c.width, c.latent + c.rotary),
        "latent_norm_P": jnp.ones(c.latent),
        "latent_up_PNW": normal(keys[3], c.latent, c.heads, 2 * c.head),
        "out_NHD": normal(keys[4], c.heads, c.head, c.width),
        "norm2_D": jnp.ones(c.width),
    }


def init_feed_forward(width: int, hidden: int, key: jax.Array) -> Params:
    keys = jax.random.split(key, 3)
    return {
        "gate_DF": normal(keys[0], width, hidden),
        "up_DF": normal(keys[1], width, hidden),
        "down_FD": normal(keys[2], hidden, width),
    }


def init_experts(config: DeepSeekConfig, key: jax.Array) -> Params:
    c, keys = config, jax.random.split(key, 5)
    return {
        "router_DE": normal(keys[0], c.width, c.experts),
        "gate_EDF": normal(keys[1], c.experts, c.width, c.expert_hidden),
        "up_EDF": normal(keys[2], c.experts, c.width, c.expert_hidden),
        "down_EFD": normal(keys[3], c.experts, c.expert_hidden, c.width),
        "shared": init_feed_forward(c.width, c.shared_hidden, keys[4]),
    }


def init_layer(config: DeepSeekConfig, dense: bool, key: jax.Array) -> Params:
    attention_key, key = jax.random.split(key)
    return init_attention(config, attention_key) | (
        init_feed_forward(config.width, config.hidden, key) if dense else init_experts(config, key)
    )


def init_params(config: DeepSeekConfig, key: jax.Array) -> Params:
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)
    keys = jax.random.split(layers_key, config.layers)
    return {
        "embed_VD": normal(embed_key, config.vocab, config.width),
        "layers": [init_layer(config, i < config.dense, k) for i, k in enumerate(keys)],
        "norm_D": jnp.ones(config.width),
        "unembed_DV": normal(unembed_key, config.width, config.vocab),
    }


def attention(config: DeepSeekConfig, layer: Params, x_BSD: jax.Array) -> jax.Array:
    """Multi-head latent attention, arXiv 2405.04434, section 2.1, as it is trained: nothing absorbed."""
    latent_BSR = rms_norm(x_BSD @ layer["query_down_DR"], layer["query_norm_R"])
    q_BSNQ = jnp.einsum("bsr,rnq->bsnq", latent_BSR, layer["query_up_RNQ"])
    latent_BSP, key_BST = jnp.split(x_BSD @ layer["latent_down_DU"], [config.latent], axis=-1)
    latent_BSP = rms_norm(latent_BSP, layer["latent_norm_P"])
    kv_BSNW = jnp.einsum("bsp,pnw->bsnw", latent_BSP, layer["latent_up_PNW"])
    plain_BSNH, v_BSNH = jnp.split(kv_BSNW, 2, axis=-1)
    plain_q_BSNH, q_BSNT = jnp.split(q_BSNQ, [config.head], axis=-1)
    q_BSNQ = jnp.concatenate([plain_q_BSNH, rotate(q_BSNT, config.theta)], axis=-1)
    key_BSNT = jnp.broadcast_to(rotate(key_BST[:, :, None], config.theta), q_BSNT.shape)
    k_BSNQ = jnp.concatenate([plain_BSNH, key_BSNT], axis=-1)
    return jnp.einsum("bsnh,nhd->bsd", causal_attention(q_BSNQ, k_BSNQ, v_BSNH), layer["out_NHD"])


def feed_forward(weights: Params, x_BSD: jax.Array) -> jax.Array:
    return (jax.nn.silu(x_BSD @ weights["gate_DF"]) * (x_BSD @ weights["up_DF"])) @ weights[
        "down_FD"
    ]


def mixture(config: DeepSeekConfig, layer: Params, x_BSD: jax.Array) -> jax.Array:
    """Shared experts, and the top experts of each token (arXiv 2412.19437, section 2.1.2)."""
    logits_BSE = (x_BSD @ layer["router_DE"]).astype(jnp.float32)
    scores_BSE = (
        jax.nn.sigmoid(logits_BSE) if config.scores == "sigmoid" else jax.nn.softmax(logits_BSE)
    )
    weight_BSJ, expert_BSJ = jax.lax.top_k(scores_BSE, config.choices)
    if config.scores == "sigmoid":
        weight_BSJ = weight_BSJ / weight_BSJ.sum(axis=-1, keepdims=True)
    routed_BSD = routed_experts(
        x_BSD, expert_BSJ, config.scale * weight_BSJ, layer, config.capacity
    )
    return feed_forward(layer["shared"], x_BSD) + routed_BSD


def block(config: DeepSeekConfig, x_BSD: jax.Array, layer: Params) -> jax.Array:
    x_BSD = x_BSD + attention(config, layer, rms_norm(x_BSD, layer["norm1_D"]))
    normed_BSD = rms_norm(x_BSD, layer["norm2_D"])
    if "router_DE" in layer:
        return x_BSD + mixture(config, layer, normed_BSD)
    return x_BSD + feed_forward(layer, normed_BSD)


def loss_fn(params: Params, batch: Batch, config: DeepSeekConfig) -> jax.Array:
    params = cast(params, config.dtype)
    x_BSD = params["embed_VD"][batch["tokens"]]
    layer_fn = partial(block, config)
    layer_fn = jax.checkpoint(layer_fn) if config.remat else layer_fn
    for layer in params["layers"]:
        x_BSD = layer_fn(x_BSD, layer)
    logits_BSV = jnp.einsum("bsd,dv->bsv", rms_norm(x_BSD, params["norm_D"]), params["unembed_DV"])
    return token_loss(logits_BSV, batch["targets"])


def train_step(
    config: DeepSeekConfig,
    optimizer: optax.GradientTransformation,
    state: DeepSeekState,
    batch: Batch,
) -> tuple[DeepSeekState, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return DeepSeekState(params, opt_state), {"loss": loss, "grad_norm": optax.global_norm(grads)}


def make(name: str, config: DeepSeekConfig) -> Example:
    make_optimizer = {"adamw": clipped_adamw, "sgd": clipped_sgd}[config.optimizer]
    optimizer = make_optimizer(config.learning_rate)

    def init(key: jax.Array) -> DeepSeekState:
        params = init_params(config, key)
        return DeepSeekState(params, optimizer.init(params))

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return counting_batch(rng, config.batch, config.seq, config.vocab)

    state = abstract(init)
    return Example(
        name=name,
        step=partial(train_step, config, optimizer),
        state=state,
        batch=token_batch(config.batch, config.seq),
        init=init,
        make_batch=make_batch,
        description=(
            f"DeepSeek, {config.layers} layers of width {config.width}, "
            f"{config.experts} experts, {config.choices} per token"
        ),
        params=count(state.params),
    )
