"""GPT-2 and GPT-3: pre-norm decoder with learnt positions and tied embeddings.

Plain JAX: parameters are nested dicts. `layers` is a list of one dict per
layer (unrolled), or one dict of stacked arrays (scanned). Dropout, where asked for, is that
of GPT-2: on the embedding, on attention's weights and on what each half of a layer adds.

Dims: B batch, T position, V vocabulary, L layers, D width, F feed-forward
width, N heads, H head width, 3 query-key-value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .data import counting_batch, source_batch, token_batch
from .example import Example, abstract, count
from .layers import cast, causal_attention, dropout, layer_norm, next_seed, token_loss
from .optimizers import clipped_adamw, clipped_sgd

Params = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of one GPT.

    The vocabulary of 50 257 is padded to 50 304, a multiple of 128, as
    Megatron-LM does (`--make-vocab-size-divisible-by 128`).
    """

    layers: int
    width: int
    heads: int
    learning_rate: float
    batch: int
    seq: int = 2048
    vocab: int = 50_304
    optimizer: str = "adamw"
    dtype: str = "bf16"
    scan: bool = False
    remat: bool = False
    dropout: float = 0.0
    corpus: str = "counting"  # what `make_batch` draws from: "counting" or "source"
    head_dim: int | None = None  # width / heads if not given
    hidden: int | None = None  # of the feed-forward; 4 x width if not given


# GPT-2: Radford et al. 2019, table 2: layers, width; batch 512 and 1024 tokens
# (§2.3). Heads as released: github.com/openai/gpt-2. The learning rates were not
# published: those of GPT-3 at the same size.
# GPT-3: Brown et al. 2020 (arXiv 2005.14165), table 2.1: layers, width, heads,
# learning rate; batches of 0.5, 1, 2 and 3.2 million tokens as sequences of 2048.
# Two of its entries do not multiply out: 1.3B has 16 heads (not 24) of 128, and
# 13B is 5120 wide (not 5140).
CONFIGS = {
    "gpt2": GPTConfig(12, 768, 12, 6.0e-4, 512, seq=1024),
    "gpt2-medium": GPTConfig(24, 1024, 16, 3.0e-4, 512, seq=1024),
    "gpt2-large": GPTConfig(36, 1280, 20, 2.5e-4, 512, seq=1024),
    "gpt2-xl": GPTConfig(48, 1600, 25, 2.0e-4, 512, seq=1024),
    "gpt3-125m": GPTConfig(12, 768, 12, 6.0e-4, 256),
    "gpt3-350m": GPTConfig(24, 1024, 16, 3.0e-4, 256),
    "gpt3-760m": GPTConfig(24, 1536, 16, 2.5e-4, 256),
    "gpt3-1.3b": GPTConfig(24, 2048, 16, 2.0e-4, 512),
    "gpt3-2.7b": GPTConfig(32, 2560, 32, 1.6e-4, 512),
    "gpt3-6.7b": GPTConfig(32, 4096, 32, 1.2e-4, 1024),
    "gpt3-13b": GPTConfig(40, 5120, 40, 1.0e-4, 1024),
    "gpt3-175b": GPTConfig(96, 12_288, 96, 0.6e-4, 1536),
    # Ours: small enough for tests, and for a demo on CPU.
    "gpt-tiny": GPTConfig(4, 64, 8, 1e-2, 16, seq=32, vocab=128),
    "gpt-bytes": GPTConfig(6, 256, 8, 3e-4, 32, seq=128, vocab=256, dtype="f32", corpus="source"),
}


class TrainState(NamedTuple):
    step: jax.Array
    params: Params
    opt_state: optax.OptState


def init_layer(config: GPTConfig, key: jax.Array) -> Params:
    """Normal weights of 0.02; residual outputs scaled by 1/sqrt(2L) (GPT-2 §2.3)."""
    width, heads, head = config.width, config.heads, config.head_dim or config.width // config.heads
    hidden = config.hidden or 4 * width
    qkv_key, out_key, up_key, down_key = jax.random.split(key, 4)
    residual = 0.02 * (2 * config.layers) ** -0.5
    return {
        "norm1": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "qkv_D3NH": 0.02 * jax.random.normal(qkv_key, (width, 3, heads, head)),
        "qkv_bias_3NH": jnp.zeros((3, heads, head)),
        "out_NHD": residual * jax.random.normal(out_key, (heads, head, width)),
        "out_bias_D": jnp.zeros(width),
        "norm2": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "up_DF": 0.02 * jax.random.normal(up_key, (width, hidden)),
        "up_bias_F": jnp.zeros(hidden),
        "down_FD": residual * jax.random.normal(down_key, (hidden, width)),
        "down_bias_D": jnp.zeros(width),
    }


def init_params(config: GPTConfig, key: jax.Array) -> Params:
    token_key, position_key, *layer_keys = jax.random.split(key, 2 + config.layers)
    layers = [init_layer(config, layer_key) for layer_key in layer_keys]
    return {
        "token_VD": 0.02 * jax.random.normal(token_key, (config.vocab, config.width)),
        "position_TD": 0.01 * jax.random.normal(position_key, (config.seq, config.width)),
        "layers": stack(layers) if config.scan else layers,
        "norm": {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)},
    }


def stack(layers: list[Params]) -> Params:
    """One dict whose arrays have a leading dim L, for `jax.lax.scan`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def attention(layer: Params, x_BTD: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    qkv_BT3NH = jnp.einsum("btd,dcnh->btcnh", x_BTD, layer["qkv_D3NH"]) + layer["qkv_bias_3NH"]
    q_BTNH, k_BTNH, v_BTNH = (qkv_BT3NH[:, :, i] for i in range(3))
    mixed_BTNH = causal_attention(q_BTNH, k_BTNH, v_BTNH, rate, seed)
    return jnp.einsum("btnh,nhd->btd", mixed_BTNH, layer["out_NHD"]) + layer["out_bias_D"]


def feed_forward(layer: Params, x_BTD: jax.Array) -> jax.Array:
    hidden_BTF = jax.nn.gelu(x_BTD @ layer["up_DF"] + layer["up_bias_F"])
    return hidden_BTF @ layer["down_FD"] + layer["down_bias_D"]


def block(
    carry: tuple[jax.Array, jax.Array], layer: Params, rate: float
) -> tuple[jax.Array, jax.Array]:
    """One layer; the seed of dropout is handed on with the stream."""
    x_BTD, seed = carry[0], next_seed(carry[1]) if rate else carry[1]
    mixed_BTD = attention(layer, layer_norm(x_BTD, **layer["norm1"]), rate, seed)
    x_BTD = x_BTD + dropout(mixed_BTD, rate, seed + 1)
    fed_BTD = feed_forward(layer, layer_norm(x_BTD, **layer["norm2"]))
    return x_BTD + dropout(fed_BTD, rate, seed + 2), seed


def run_layers(config: GPTConfig, params: Params, x_BTD: jax.Array, seed: jax.Array) -> jax.Array:
    layer_fn = partial(block, rate=config.dropout)
    layer_fn = jax.checkpoint(layer_fn) if config.remat else layer_fn
    carry = (x_BTD, seed)
    if config.scan:
        carry, _ = jax.lax.scan(
            lambda carry, layer: (layer_fn(carry, layer), None), carry, params["layers"]
        )
        return carry[0]
    for layer in params["layers"]:
        carry = layer_fn(carry, layer)
    return carry[0]


def loss_fn(params: Params, batch: Batch, seed: jax.Array, config: GPTConfig) -> jax.Array:
    params = cast(params, config.dtype)
    x_BTD = params["token_VD"][batch["tokens"]] + params["position_TD"]
    x_BTD = dropout(x_BTD, config.dropout, seed)
    x_BTD = run_layers(config, params, x_BTD, seed + 1)
    x_BTD = layer_norm(x_BTD, **params["norm"])
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, params["token_VD"])
    return token_loss(logits_BTV, batch["targets"])


def train_step(
    config: GPTConfig, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(loss_fn)(
        state.params, batch, state.step.astype(jnp.uint32), config
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


def make(name: str, config: GPTConfig) -> Example:
    make_optimizer = {"adamw": clipped_adamw, "sgd": clipped_sgd}[config.optimizer]
    optimizer = make_optimizer(config.learning_rate)

    def init(key: jax.Array) -> TrainState:
        params = init_params(config, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        if config.corpus == "source":
            return source_batch(rng, config.batch, config.seq)
        return counting_batch(rng, config.batch, config.seq, config.vocab)

    state = abstract(init)
    return Example(
        name=name,
        step=partial(train_step, config, optimizer),
        state=state,
        batch=token_batch(config.batch, config.seq),
        init=init,
        make_batch=make_batch,
        description=f"GPT, {config.layers} layers of width {config.width}, {config.heads} heads",
        params=count(state.params),
    )
