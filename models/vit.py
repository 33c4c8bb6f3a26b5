"""Vision transformer, in flax nnx.

The module is split into a graph definition, closed over by the step, and its
parameters, an `nnx.State` carried in the training state. No dropout.

Dims: B batch, W image width and height, P patches per side, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from .data import coloured_batch, image_batch
from .example import Example, count
from .layers import DTYPES
from .optimizers import clipped_adamw, clipped_sgd

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of one ViT. Without a class token, tokens are averaged (Beyer et al.
    2022, arXiv 2205.01580)."""

    layers: int
    width: int
    hidden: int
    heads: int
    patch: int
    learning_rate: float
    batch: int = 4096
    image: int = 224
    classes: int = 1000
    class_token: bool = True
    optimizer: str = "adamw"
    dtype: str = "bf16"
    remat: bool = False

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + self.class_token


# Dosovitskiy et al. 2021 (arXiv 2010.11929), table 1: layers, width, hidden, heads;
# table 3: learning rate on JFT-300M; §4.1: batch 4096, β2 0.999, weight decay 0.1.
# The head is that of ImageNet-1k.
CONFIGS = {
    "vit-b16": ViTConfig(12, 768, 3072, 12, 16, 8e-4),
    "vit-l16": ViTConfig(24, 1024, 4096, 16, 16, 4e-4),
    "vit-h14": ViTConfig(32, 1280, 5120, 16, 14, 3e-4),
    # Ours, for tests.
    "vit-tiny": ViTConfig(
        2, 64, 128, 8, 4, 3e-3, batch=16, image=16, classes=16, class_token=False
    ),
}


@struct.dataclass
class ViTState:
    params: nnx.State
    opt_state: optax.OptState


class EncoderBlock(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, DTYPES[config.dtype]
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            config.heads, width, decode=False, dtype=dtype, rngs=rngs, keep_rngs=False
        )
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, config.hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.down(nnx.gelu(self.up(self.norm2(x_BTD))))


class ViT(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        width, dtype, patch = config.width, DTYPES[config.dtype], (config.patch, config.patch)
        self.patches = nnx.Conv(
            3, width, patch, strides=patch, padding="VALID", dtype=dtype, rngs=rngs
        )
        self.class_token_11D = nnx.Param(jnp.zeros((1, 1, width))) if config.class_token else None
        self.position_1TD = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1, config.tokens, width))
        )
        self.blocks = nnx.List([EncoderBlock(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, config.classes, dtype=dtype, rngs=rngs)
        self.remat = config.remat

    def __call__(self, image_BWW3: jax.Array) -> jax.Array:
        x_BTD = self.embed(image_BWW3)
        call = nnx.remat(EncoderBlock.__call__) if self.remat else EncoderBlock.__call__
        for block in self.blocks:
            x_BTD = call(block, x_BTD)
        x_BTD = self.norm(x_BTD)
        pooled_BD = x_BTD.mean(axis=1) if self.class_token_11D is None else x_BTD[:, 0]
        return self.head(pooled_BD)

    def embed(self, image_BWW3: jax.Array) -> jax.Array:
        x_BPPD = self.patches(image_BWW3)
        batch, _, _, width = x_BPPD.shape
        x_BTD = x_BPPD.reshape(batch, -1, width)
        if self.class_token_11D is not None:
            token_11D = self.class_token_11D[...].astype(x_BTD.dtype)
            x_BTD = jnp.concatenate([jnp.tile(token_11D, (batch, 1, 1)), x_BTD], axis=1)
        return x_BTD + self.position_1TD[...].astype(x_BTD.dtype)


def loss_fn(params: nnx.State, batch: Batch, graphdef: Any) -> jax.Array:
    logits_BV = nnx.merge(graphdef, params)(batch["image"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BV, batch["label"]).mean()


def train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, state: ViTState, batch: Batch
) -> tuple[ViTState, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, graphdef)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return ViTState(params, opt_state), metrics


def make_optimizer(config: ViTConfig) -> optax.GradientTransformation:
    if config.optimizer == "sgd":
        return clipped_sgd(config.learning_rate)
    return clipped_adamw(config.learning_rate, b2=0.999)


def make(name: str, config: ViTConfig) -> Example:
    optimizer = make_optimizer(config)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0))))

    def init(key: jax.Array) -> ViTState:
        _, params = nnx.split(ViT(config, nnx.Rngs(key)))
        return ViTState(params, optimizer.init(params))

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return coloured_batch(rng, config.batch, config.image, config.classes)

    state = ViTState(params, jax.eval_shape(optimizer.init, params))
    return Example(
        name=name,
        step=partial(train_step, graphdef, optimizer),
        state=state,
        batch=image_batch(config.batch, config.image),
        init=init,
        make_batch=make_batch,
        description=(
            f"ViT, {config.layers} layers of width {config.width}, {config.tokens} tokens "
            f"of {config.patch} x {config.patch} pixels"
        ),
        params=count(params),
    )
