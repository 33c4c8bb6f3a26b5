"""Deep learning recommendation model: large embedding tables between two MLPs.

Plain JAX; the state is a tuple (params, opt_state). Gradients of the tables are
dense arrays, as `jax.grad` makes them. No dropout.

Dims: B batch, D embedding width, I dense features, R table rows, X categorical
features and the dense one together, P pairs of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .example import Example, abstract, count
from .layers import DTYPES, cast
from .optimizers import clipped_adamw, clipped_sgd

Params = dict[str, Any]
State = tuple[Params, optax.OptState]
Batch = dict[str, jax.Array]
MLP = list[dict[str, jax.Array]]


@dataclass(frozen=True)
class DLRMConfig:
    """Sizes of one DLRM: rows of each table, outputs of each MLP layer."""

    rows: tuple[int, ...]
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    dense: int
    learning_rate: float
    batch: int
    optimizer: str = "sgd"
    dtype: str = "bf16"

    @property
    def width(self) -> int:
        return self.bottom[-1]


# fmt: off
CRITEO_ROWS = (
    45_833_188, 36_746, 17_245, 7_413, 20_243, 3, 7_114, 1_441, 62, 29_275_261, 1_572_176,
    345_138, 10, 2_209, 11_267, 128, 4, 974, 14, 48_937_457, 11_316_796, 40_094_537, 452_104,
    12_606, 104, 35,
)
# fmt: on

# Naumov et al. 2019 (arXiv 1906.00091), as trained on Criteo 1TB: rows, MLPs, batch
# and learning rate from github.com/facebookresearch/dlrm, torchrec_dlrm/README.MD,
# the run with a global batch of 65536.
CONFIGS = {
    "dlrm": DLRMConfig(CRITEO_ROWS, (512, 256, 128), (1024, 1024, 512, 256, 1), 13, 15.0, 65_536),
    # Ours, for tests: 16 features make 120 pairs, a multiple of 8.
    "dlrm-tiny": DLRMConfig((64, 128, 256) * 5, (32, 16), (64, 32, 1), 16, 1.0, 16),
}


def init_mlp(key: jax.Array, inputs: int, outputs: tuple[int, ...]) -> MLP:
    """Normal weights of sqrt(2 / (in + out)), as in dlrm_s_pytorch.py."""
    layers = []
    for layer_key, width in zip(jax.random.split(key, len(outputs)), outputs, strict=True):
        scale = (2 / (inputs + width)) ** 0.5
        weight = scale * jax.random.normal(layer_key, (inputs, width))
        layers.append({"weight": weight, "bias": jnp.zeros(width)})
        inputs = width
    return layers


def init_table(key: jax.Array, rows: int, width: int) -> jax.Array:
    """Uniform in ±1/sqrt(rows), as in dlrm_s_pytorch.py."""
    bound = rows**-0.5
    return jax.random.uniform(key, (rows, width), minval=-bound, maxval=bound)


def init_params(config: DLRMConfig, key: jax.Array) -> Params:
    bottom_key, top_key, *table_keys = jax.random.split(key, 2 + len(config.rows))
    features = len(config.rows) + 1
    interactions = features * (features - 1) // 2
    return {
        "tables_RD": [
            init_table(table_key, rows, config.width)
            for table_key, rows in zip(table_keys, config.rows, strict=True)
        ],
        "bottom": init_mlp(bottom_key, config.dense, config.bottom),
        "top": init_mlp(top_key, interactions + config.width, config.top),
    }


def run_mlp(layers: MLP, x: jax.Array) -> jax.Array:
    """Linear layers with a ReLU after each but the last."""
    *hidden, last = layers
    for layer in hidden:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
    return x @ last["weight"] + last["bias"]


def interact(features_BXD: jax.Array) -> jax.Array:
    """Dot products of all pairs of different features."""
    dots_BXX = jnp.einsum("bxd,byd->bxy", features_BXD, features_BXD)
    row_P, column_P = np.tril_indices(features_BXD.shape[1], k=-1)
    return dots_BXX[:, row_P, column_P]


def predict(params: Params, batch: Batch, dtype: str) -> jax.Array:
    dense_BI = batch["dense"].astype(DTYPES[dtype])
    dense_BD = jax.nn.relu(run_mlp(cast(params["bottom"], dtype), dense_BI))
    sparse = [
        jnp.take(table_RD, batch["categories"][:, index], axis=0).astype(DTYPES[dtype])
        for index, table_RD in enumerate(params["tables_RD"])
    ]
    pairs_BP = interact(jnp.stack([dense_BD, *sparse], axis=1))
    joined = jnp.concatenate([dense_BD, pairs_BP], axis=1)
    return run_mlp(cast(params["top"], dtype), joined)[:, 0]


def loss_fn(params: Params, batch: Batch, dtype: str) -> jax.Array:
    logit_B = predict(params, batch, dtype).astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logit_B, batch["click"]).mean()


def train_step(
    dtype: str, optimizer: optax.GradientTransformation, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, dtype)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return (params, opt_state), metrics


def make_optimizer(config: DLRMConfig) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        return clipped_adamw(1e-3)  # optax's and PyTorch's usual value for Adam
    return clipped_sgd(config.learning_rate, momentum=None)


def abstract_batch(config: DLRMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "dense": jax.ShapeDtypeStruct((config.batch, config.dense), jnp.float32),
        "categories": jax.ShapeDtypeStruct((config.batch, len(config.rows)), jnp.int32),
        "click": jax.ShapeDtypeStruct((config.batch,), jnp.float32),
    }


def click_batch(config: DLRMConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random features; a click when the first dense one is positive."""
    dense_BI = rng.normal(size=(config.batch, config.dense)).astype(np.float32)
    categories = rng.integers(0, config.rows, (config.batch, len(config.rows)), dtype=np.int32)
    click_B = (dense_BI[:, 0] > 0).astype(np.float32)
    return {"dense": dense_BI, "categories": categories, "click": click_B}


def make(name: str, config: DLRMConfig) -> Example:
    optimizer = make_optimizer(config)

    def init(key: jax.Array) -> State:
        params = init_params(config, key)
        return params, optimizer.init(params)

    state = abstract(init)
    return Example(
        name=name,
        step=partial(train_step, config.dtype, optimizer),
        state=state,
        batch=abstract_batch(config),
        init=init,
        make_batch=partial(click_batch, config),
        description=f"DLRM, {len(config.rows)} tables of {sum(config.rows):,} rows in all",
        params=count(state[0]),
    )
