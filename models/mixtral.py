"""Mixtral: a Llama-like decoder whose feed-forward is a mixture of experts.

Each token goes to its top two experts. Choices are sorted to experts and looked up (`experts`), as
trainers do, or dispatched by one-hot einsums, as in GShard (Lepikhin et al. 2020, arXiv
2006.16668): the same function. Static shapes, a token beyond an expert's capacity skips that
expert. Each sequence is its own dispatch group, so that the batch stays a parallel dim. No dropout.

Dims: B batch, S position, V vocabulary, L layers, D width, F expert width,
N query heads, K key-value heads, H head width, E experts, C capacity (tokens
of one sequence that one expert takes), J choices of one token (2).
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
from .layers import cast, grouped_causal_attention, rms_norm, rotate, token_loss
from .optimizers import clipped_adamw, clipped_sgd

Params = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class MixtralConfig:
    """Sizes of one Mixtral.

    capacity_factor 1: what NVIDIA's NeMo and Megatron-Bridge train Mixtral with for speed
    (`MegatronTokenDropCallback`), and the work of dropless experts under an even load.
    balance_weight 0.01: Fedus et al. 2021 (Switch, arXiv 2101.03961), §2.2. Mixtral's own were
    not published.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    learning_rate: float
    batch: int
    seq: int
    vocab: int = 32_000
    theta: float = 1e6
    choices: int = 2
    capacity_factor: float = 1.0
    balance_weight: float = 0.01
    dispatch: str = "sorted"  # or "einsum": one-hot products
    optimizer: str = "adamw"
    dtype: str = "bf16"
    scan: bool = False
    remat: bool = False

    @property
    def capacity(self) -> int:
        """Tokens per expert and sequence, rounded up to a multiple of 8."""
        even = self.choices * self.seq / self.experts
        return 8 * math.ceil(self.capacity_factor * even / 8)


# Jiang et al. 2024 (arXiv 2401.04088), table 1; θ from the configuration released
# with the weights. Batch, sequence and learning rate of the training were not
# published: ours, of the size usual in throughput reports.
CONFIGS = {
    "mixtral-8x7b": MixtralConfig(32, 4096, 14_336, 32, 8, 8, 1e-4, 256, 4096),
    # Ours, for tests.
    "mixtral-tiny": MixtralConfig(2, 64, 128, 8, 4, 8, 1e-2, 16, 32, vocab=128, theta=1e4),
}


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class MixtralState:
    params: Params
    opt_state: optax.OptState


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape)


def init_layer(config: MixtralConfig, key: jax.Array) -> Params:
    width, hidden, experts = config.width, config.hidden, config.experts
    head = width // config.heads
    keys = jax.random.split(key, 8)
    return {
        "norm1_D": jnp.ones(width),
        "query_DNH": normal(keys[0], width, config.heads, head),
        "key_DKH": normal(keys[1], width, config.kv_heads, head),
        "value_DKH": normal(keys[2], width, config.kv_heads, head),
        "out_NHD": normal(keys[3], config.heads, head, width),
        "norm2_D": jnp.ones(width),
        "router_DE": normal(keys[4], width, experts),
        "gate_EDF": normal(keys[5], experts, width, hidden),
        "up_EDF": normal(keys[6], experts, width, hidden),
        "down_EFD": normal(keys[7], experts, hidden, width),
    }


def init_params(config: MixtralConfig, key: jax.Array) -> Params:
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)
    layer_keys = jax.random.split(layers_key, config.layers)
    init = partial(init_layer, config)
    return {
        "embed_VD": normal(embed_key, config.vocab, config.width),
        "layers": jax.vmap(init)(layer_keys) if config.scan else [init(k) for k in layer_keys],
        "norm_D": jnp.ones(config.width),
        "unembed_DV": normal(unembed_key, config.width, config.vocab),
    }


def attention(config: MixtralConfig, layer: Params, x_BSD: jax.Array) -> jax.Array:
    q_BSNH = jnp.einsum("bsd,dnh->bsnh", x_BSD, layer["query_DNH"])
    k_BSKH = jnp.einsum("bsd,dkh->bskh", x_BSD, layer["key_DKH"])
    v_BSKH = jnp.einsum("bsd,dkh->bskh", x_BSD, layer["value_DKH"])
    q_BSNH, k_BSKH = rotate(q_BSNH, config.theta), rotate(k_BSKH, config.theta)
    mixed_BSNH = grouped_causal_attention(q_BSNH, k_BSKH, v_BSKH)
    return jnp.einsum("bsnh,nhd->bsd", mixed_BSNH, layer["out_NHD"])


def assign_slots(chosen_BSJE: jax.Array) -> jax.Array:
    """Number the tokens of each expert, in the order of their positions."""
    taken_BSE = chosen_BSJE.sum(axis=2)
    slot_BSE = jnp.cumsum(taken_BSE, axis=1) - taken_BSE
    return (slot_BSE[:, :, None] * chosen_BSJE).sum(axis=-1)


def route(config: MixtralConfig, logits_BSE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each token goes, with what weight, and how uneven the load is.

    Returns (dispatch_BSEC of 0 and 1, combine_BSEC of gate weights, balance
    loss). A slot beyond the capacity has no one-hot row: the token is dropped.
    """
    top_BSJ, expert_BSJ = jax.lax.top_k(logits_BSE, config.choices)
    weight_BSJ = jax.nn.softmax(top_BSJ, axis=-1)
    chosen_BSJE = jax.nn.one_hot(expert_BSJ, config.experts, dtype=jnp.int32)
    slot_BSJC = jax.nn.one_hot(assign_slots(chosen_BSJE), config.capacity)
    mask_BSJE = chosen_BSJE.astype(jnp.float32)
    dispatch_BSEC = jnp.einsum("bsje,bsjc->bsec", mask_BSJE, slot_BSJC)
    combine_BSEC = jnp.einsum("bsj,bsje,bsjc->bsec", weight_BSJ, mask_BSJE, slot_BSJC)
    return dispatch_BSEC, combine_BSEC, balance_loss(config, logits_BSE, mask_BSJE)


def balance_loss(config: MixtralConfig, logits_BSE: jax.Array, mask_BSJE: jax.Array) -> jax.Array:
    """E · Σ_e (share of choices) · (mean probability) of each sequence, averaged; 1 when even.

    Switch §2.2, over sequences instead of the batch: DeepSeek-V3 §2.1.2 (eq. 17-20), Megatron-Core's
    `seq_aux_loss`. Over the batch it would be no sum over examples, and no microbatch could run alone.
    """
    share_BE = mask_BSJE.mean(axis=(1, 2))
    probability_BE = jax.nn.softmax(logits_BSE, axis=-1).mean(axis=1)
    return config.experts * jnp.sum(share_BE * probability_BE, axis=-1).mean()


def mixture(config: MixtralConfig, layer: Params, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_BSE = jnp.einsum("bsd,de->bse", x_BSD, layer["router_DE"]).astype(jnp.float32)
    if config.dispatch == "sorted":
        return sorted_mixture(config, layer, x_BSD, logits_BSE)
    dispatch_BSEC, combine_BSEC, balance = route(config, logits_BSE)
    x_EBCD = jnp.einsum("bsec,bsd->ebcd", dispatch_BSEC.astype(x_BSD.dtype), x_BSD)
    gate_EBCF = jax.nn.silu(jnp.einsum("ebcd,edf->ebcf", x_EBCD, layer["gate_EDF"]))
    up_EBCF = jnp.einsum("ebcd,edf->ebcf", x_EBCD, layer["up_EDF"])
    y_EBCD = jnp.einsum("ebcf,efd->ebcd", gate_EBCF * up_EBCF, layer["down_EFD"])
    return jnp.einsum("bsec,ebcd->bsd", combine_BSEC.astype(x_BSD.dtype), y_EBCD), balance


def sorted_mixture(
    config: MixtralConfig, layer: Params, x_BSD: jax.Array, logits_BSE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    top_BSJ, expert_BSJ = jax.lax.top_k(logits_BSE, config.choices)
    mask_BSJE = jax.nn.one_hot(expert_BSJ, config.experts)
    y_BSD = routed_experts(
        x_BSD, expert_BSJ, jax.nn.softmax(top_BSJ, axis=-1), layer, config.capacity
    )
    return y_BSD, balance_loss(config, logits_BSE, mask_BSJE)


def block(config: MixtralConfig, x_BSD: jax.Array, layer: Params) -> tuple[jax.Array, jax.Array]:
    x_BSD = x_BSD + attention(config, layer, rms_norm(x_BSD, layer["norm1_D"]))
    mixed_BSD, balance = mixture(config, layer, rms_norm(x_BSD, layer["norm2_D"]))
    return x_BSD + mixed_BSD, balance


def run_layers(
    config: MixtralConfig, params: Params, x_BSD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last activations, and the balance loss averaged over layers."""
    layer_fn = partial(block, config)
    layer_fn = jax.checkpoint(layer_fn) if config.remat else layer_fn
    if config.scan:
        x_BSD, balance_L = jax.lax.scan(layer_fn, x_BSD, params["layers"])
        return x_BSD, balance_L.mean()
    balances = []
    for layer in params["layers"]:
        x_BSD, balance = layer_fn(x_BSD, layer)
        balances.append(balance)
    return x_BSD, sum(balances) / config.layers


def loss_fn(params: Params, batch: Batch, config: MixtralConfig) -> tuple[jax.Array, Any]:
    params = cast(params, config.dtype)
    x_BSD, balance = run_layers(config, params, params["embed_VD"][batch["tokens"]])
    logits_BSV = jnp.einsum("bsd,dv->bsv", rms_norm(x_BSD, params["norm_D"]), params["unembed_DV"])
    loss = token_loss(logits_BSV, batch["targets"])
    return loss + config.balance_weight * balance, {"loss": loss, "balance_loss": balance}


def train_step(
    config: MixtralConfig,
    optimizer: optax.GradientTransformation,
    state: MixtralState,
    batch: Batch,
) -> tuple[MixtralState, dict[str, jax.Array]]:
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch, config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return MixtralState(params, opt_state), metrics | {"grad_norm": optax.global_norm(grads)}


def make(name: str, config: MixtralConfig) -> Example:
    make_optimizer = {"adamw": clipped_adamw, "sgd": clipped_sgd}[config.optimizer]
    optimizer = make_optimizer(config.learning_rate)

    def init(key: jax.Array) -> MixtralState:
        params = init_params(config, key)
        return MixtralState(params, optimizer.init(params))

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
            f"Mixtral, {config.layers} layers of width {config.width}, "
            f"{config.experts} experts, {config.choices} per token"
        ),
        params=count(state.params),
    )
