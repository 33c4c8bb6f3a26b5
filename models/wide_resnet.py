"""Wide residual network with bottleneck blocks, in flax nnx.

Convolutions are NHWC. Batch norm normalises by the statistics of the whole
batch, and carries running ones in the training state. No dropout.

Dims: B batch, W image width and height, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from .data import coloured_batch, image_batch
from .example import Example, count
from .layers import DTYPES
from .optimizers import clipped_adamw, clipped_sgd

State = dict[str, Any]
Batch = dict[str, jax.Array]
EXPANSION = 4  # of a bottleneck's output; He et al. 2015 (arXiv 1512.03385), table 1


@dataclass(frozen=True)
class WideResNetConfig:
    """Sizes of one wide ResNet: blocks per stage, channels of the first stage."""

    blocks: tuple[int, ...]
    width_factor: int
    channels: int = 64
    narrow_reduce: bool = False  # the first 1x1 convolution is not widened (Alpa)
    batch: int = 256
    image: int = 224
    classes: int = 1000
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    dtype: str = "bf16"


# Zheng et al. 2022 (Alpa, arXiv 2201.12023). From github.com/alpa-projects/alpa:
# alpa/model/wide_resnet.py, and in benchmark/alpa benchmark_one_case_wresnet.py and
# suite_wresnet.py (sizes). Its Nesterov momentum is ordinary momentum here.
ALPA = partial(WideResNetConfig, narrow_reduce=True, batch=1536, classes=1024, dtype="f32")

# Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 8: WRN-50-2-bottleneck;
# 101-2 is of the same kind (torchvision). Batch 256, learning rate 0.1, momentum
# 0.9, weight decay 1e-4: torchvision's references/classification, 8 GPUs of 32.
CONFIGS = {
    "wrn-50-2": WideResNetConfig((3, 4, 6, 3), 2),
    "wrn-101-2": WideResNetConfig((3, 4, 23, 3), 2),
    "wrn-alpa-250m": ALPA((3, 4, 6, 3), 2, 160),
    "wrn-alpa-500m": ALPA((3, 4, 6, 3), 2, 224),
    "wrn-alpa-1b": ALPA((3, 4, 6, 3), 2, 320),
    "wrn-alpa-2b": ALPA((3, 4, 6, 3), 2, 448),
    "wrn-alpa-4b": ALPA((3, 4, 6, 3), 2, 640),
    "wrn-alpa-6.8b": ALPA((3, 4, 6, 3), 16, 320),
    "wrn-alpa-13b": ALPA((3, 4, 23, 3), 16, 320, batch=1520),
    # Ours, for tests.
    "wrn-tiny": WideResNetConfig((1, 1), 2, channels=8, batch=16, image=32, classes=16),
}


class Convolution(nnx.Module):
    """A convolution without bias, then batch norm."""

    def __init__(
        self, shape: tuple[int, int, int], stride: int, dtype: str, rngs: nnx.Rngs
    ) -> None:
        inputs, outputs, kernel = shape
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=(stride, stride),
            padding=kernel // 2,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            dtype=DTYPES[dtype],
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, dtype=DTYPES[dtype], rngs=rngs)

    def __call__(self, x_BWWC: jax.Array) -> jax.Array:
        return self.norm(self.conv(x_BWWC), use_running_average=False)


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; `shape` is the channels between."""

    def __init__(
        self, shape: tuple[int, int, int, int], stride: int, dtype: str, rngs: nnx.Rngs
    ) -> None:
        inputs, reduced, hidden, outputs = shape
        self.reduce = Convolution((inputs, reduced, 1), 1, dtype, rngs)
        self.spatial = Convolution((reduced, hidden, 3), stride, dtype, rngs)
        self.expand = Convolution((hidden, outputs, 1), 1, dtype, rngs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else Convolution((inputs, outputs, 1), stride, dtype, rngs)

    def __call__(self, x_BWWC: jax.Array) -> jax.Array:
        hidden_BWWC = nnx.relu(self.spatial(nnx.relu(self.reduce(x_BWWC))))
        shortcut_BWWC = x_BWWC if self.shortcut is None else self.shortcut(x_BWWC)
        return nnx.relu(self.expand(hidden_BWWC) + shortcut_BWWC)


def plan_blocks(config: WideResNetConfig) -> list[tuple[tuple[int, int, int, int], int]]:
    """Shape and stride of every block; each stage but the first halves the image."""
    plan, inputs = [], config.channels
    for stage, depth in enumerate(config.blocks):
        channels = config.channels * 2**stage
        hidden, outputs = config.width_factor * channels, EXPANSION * channels
        reduced = channels if config.narrow_reduce else hidden
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            plan.append(((inputs, reduced, hidden, outputs), stride))
            inputs = outputs
    return plan


class WideResNet(nnx.Module):
    def __init__(self, config: WideResNetConfig, rngs: nnx.Rngs) -> None:
        self.stem = Convolution((3, config.channels, 7), 2, config.dtype, rngs)
        blocks = [
            Bottleneck(shape, stride, config.dtype, rngs) for shape, stride in plan_blocks(config)
        ]
        self.blocks = nnx.List(blocks)
        outputs = EXPANSION * config.channels * 2 ** (len(config.blocks) - 1)
        self.head = nnx.Linear(outputs, config.classes, dtype=DTYPES[config.dtype], rngs=rngs)

    def __call__(self, image_BWWC: jax.Array) -> jax.Array:
        x_BWWC = nnx.relu(self.stem(image_BWWC))
        padding = ((1, 1), (1, 1))
        x_BWWC = nnx.max_pool(x_BWWC, (3, 3), strides=(2, 2), padding=padding)
        for block in self.blocks:
            x_BWWC = block(x_BWWC)
        return self.head(x_BWWC.mean(axis=(1, 2)))


def loss_fn(
    params: nnx.State, batch_stats: nnx.State, batch: Batch, graphdef: Any
) -> tuple[jax.Array, nnx.State]:
    """The loss, and the running statistics after this batch."""
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    logits_BV = model(batch["image"]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits_BV, batch["label"]).mean()
    return loss, nnx.state(model, nnx.BatchStat)


def train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    params = state["params"]
    (loss, batch_stats), grads = value_and_grad(params, state["batch_stats"], batch, graphdef)
    updates, opt_state = optimizer.update(grads, state["opt_state"], params)
    params = optax.apply_updates(params, updates)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return state_of(params, batch_stats, opt_state), metrics


def make_optimizer(config: WideResNetConfig) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        return clipped_adamw(1e-3)  # optax's and PyTorch's usual value for Adam
    return clipped_sgd(config.learning_rate, momentum=0.9, weight_decay=1e-4)


def state_of(params: nnx.State, batch_stats: nnx.State, opt_state: optax.OptState) -> State:
    return {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}


def split(model: WideResNet) -> tuple[Any, nnx.State, nnx.State]:
    return nnx.split(model, nnx.Param, nnx.BatchStat)


def make(name: str, config: WideResNetConfig) -> Example:
    optimizer = make_optimizer(config)
    shapes = nnx.eval_shape(lambda: WideResNet(config, nnx.Rngs(0)))
    graphdef, params, batch_stats = split(shapes)

    def init(key: jax.Array) -> State:
        _, params, batch_stats = split(WideResNet(config, nnx.Rngs(key)))
        return state_of(params, batch_stats, optimizer.init(params))

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return coloured_batch(rng, config.batch, config.image, config.classes)

    return Example(
        name=name,
        step=partial(train_step, graphdef, optimizer),
        state=state_of(params, batch_stats, jax.eval_shape(optimizer.init, params)),
        batch=image_batch(config.batch, config.image),
        init=init,
        make_batch=make_batch,
        description=(
            f"Wide ResNet, {3 * sum(config.blocks) + 2} layers, {config.channels} channels, "
            f"width factor {config.width_factor}"
        ),
        params=count(params),
    )
