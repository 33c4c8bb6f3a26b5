"""A random training step from a seed: layers, checkpoints, a loss and an optimizer, with state and a batch for it.

made = random_step(17, pipelines=True)
made.step(*made.args), made.request      what to run, and how it is asked to be planned
made.words                               what was drawn, in a line
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .random_layers import IMAGES, TEXTS, Apply, Context, Init, matrix

VOCABULARY, LENGTH = 12, 4
WEIGHTS = {
    "batch norm": 0.12,
    "while": 0.4,
    "cond": 0.5,
    "dropout": 0.6,
    "norm": 1.5,
    "attention": 1.5,
    "dense": 1.5,
}
CHECKPOINTS = (
    "none",
    "none",
    "none",
    "layer",
    "layer",
    "dots",
    "nothing",
    "everything",
    "names",
    "nested",
    "unbarred",
)
LOSSES = ("mean", "masked", "ignored", "labels", "labels", "one-hot", "sum")
OPTIMIZERS = ("sgd", "sgd", "sgd", "momentum", "adam")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zbv", "v-half")


@dataclass(frozen=True)
class Made:
    """One random program."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    cluster: str
    request: dict[str, Any]
    words: str


@dataclass(frozen=True)
class Network:
    """The layers of a step: `kinds` of each of `layers` (init, apply), applied in a scan or one by one."""

    kinds: tuple[tuple[Init, Apply], ...]
    layers: int
    scanned: bool
    shared: bool  # all layers have the weights of the first
    checkpoint: str

    def init(self, draw: np.random.Generator, width: int) -> Any:
        made = [
            [init(draw, width) for init, _ in self.kinds]
            for _ in range(1 if self.shared else self.layers)
        ]
        return (
            jax.tree.map(lambda *rows: np.stack(rows), *made)
            if self.scanned and not self.shared
            else made
        )

    def layer(self, params: Any, x: Any, key: Any, count: Any) -> tuple[Any, Any]:
        context = Context(key, count)
        for k, ((_, apply), own) in enumerate(zip(self.kinds, params, strict=True)):
            context.key = jax.random.fold_in(key, k)
            inner = (
                jax.checkpoint(_alone(apply), static_argnums=())
                if self.checkpoint == "nested"
                else _alone(apply)
            )
            x, more = inner(own, x, context.key, count)
            context.extra.append(more)
        return x, sum(context.extra)

    def __call__(self, params: Any, x: Any, key: Any, count: Any) -> tuple[Any, Any]:
        layer, total = _held(self.layer, self.checkpoint), jnp.float32(0)
        keys = jax.random.split(key, self.layers)
        if not self.scanned:
            for k in range(self.layers):
                x, more = layer(params[0 if self.shared else k], x, keys[k], count)
                total += more
            return x, total

        def turn(carried, given):
            own, at = (params[0], given) if self.shared else given
            y, more = layer(own, carried[0], at, count)
            return (y, carried[1] + more), None

        return lax.scan(turn, (x, total), keys if self.shared else (params, keys))[0]


def _alone(apply: Apply) -> Callable[..., Any]:
    def run(params, x, key, count):
        context = Context(key, count)
        y = apply(params, x, context)
        return y.astype(x.dtype), sum(context.extra, jnp.float32(0))

    return run


def _held(layer: Callable[..., Any], how: str) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if how == "none":
        return layer
    if how in ("layer", "nested"):
        return jax.checkpoint(layer)
    if how == "unbarred":
        return jax.checkpoint(layer, prevent_cse=False)
    policy = {
        "dots": policies.dots_saveable, "nothing": policies.nothing_saveable,
        "everything": policies.everything_saveable, "names": policies.save_only_these_names("out", "scores"),
    }[how]  # fmt: skip
    return jax.checkpoint(layer, policy=policy)


def random_step(seed: int, pipelines: bool) -> Made:
    """The program of a seed; with `pipelines` others than without."""
    choose = np.random.default_rng([seed, int(pipelines)])
    images = choose.random() < 0.15
    table = IMAGES if images else TEXTS
    names = list(table)
    chances = np.array([WEIGHTS.get(name, 1.0) for name in names])
    drawn = [
        str(n) for n in choose.choice(names, int(choose.integers(1, 4)), p=chances / chances.sum())
    ]
    kinds = tuple(table[name](choose) for name in drawn)
    network = Network(
        kinds, int(choose.integers(2, 5) if pipelines else choose.integers(1, 4)),
        bool(choose.random() < 0.4), bool(choose.random() < 0.12), str(choose.choice(CHECKPOINTS)),
    )  # fmt: skip
    loss, optimizer = str(choose.choice(LOSSES)), str(choose.choice(OPTIMIZERS))
    tied, tokens = bool(choose.random() < 0.4), bool(choose.random() < 0.6) and not images
    short = (
        bool(choose.random() < 0.12) and "experts" not in drawn
    )  # whose products XLA has not on CPUs
    whole = "batch norm" in drawn
    batch, width = int(choose.choice([8, 12, 24])), int(choose.choice([8, 12]))
    if "attention" in drawn:
        width = 8
    cluster, request = _request(
        choose, pipelines, whole, batch, 1 if network.shared else network.layers
    )
    model = _Model(network, loss, optimizer, tied and tokens, tokens, images, short)
    state, data = model.arguments(np.random.default_rng([seed, 2]), batch, width)
    if beside := str(choose.choice(("", "", "", "rate", "raw key", "pair"))):
        data[beside] = {
            "rate": jnp.float32(0.05),
            "raw key": jnp.array([3, 7], jnp.uint32),
            "pair": jnp.ones(2) / 20,
        }[beside]
    args = state, data
    how = "scanned" if network.scanned else "unrolled"
    words = (
        f"{network.layers} {how}{' shared' * network.shared} x ({', '.join(drawn)}) checkpoint={network.checkpoint} "
        f"{loss} {optimizer}{' tied' * model.tied}{' tokens' * tokens}{' bf16' * short}{beside and f' {beside}'} "
        f"B={batch} D={width} {cluster} {' '.join(f'{k}={v}' for k, v in request.items())}"
    )
    return Made(model.step, args, cluster, request, words)


def _request(
    choose: np.random.Generator, pipelines: bool, whole: bool, batch: int, alike: int
) -> tuple[str, dict[str, Any]]:
    devices = int(choose.choice([2, 4, 4, 6, 8]))
    request: dict[str, Any] = {"time_limit": 30.0}
    if choose.random() < 0.4:
        request["recompute"] = str(choose.choice(["none", "elementwise", "selective", "full"]))
    parts = [m for m in (1, 2, 3, 4, 6) if batch % m == 0]
    if pipelines:
        stages = int(choose.choice([n for n in (2, 2, 3, 4) if devices % n == 0]))
        request["pp"] = stages
        devices = devices // stages
        if choose.random() < 0.7:
            request["microbatches"] = 1 if whole else int(choose.choice(parts))
        form = choose.random()
        if form < 0.55:
            request["schedule"] = str(choose.choice(SCHEDULES))
        elif form < 0.75 and request.get("microbatches") != 1 and not whole:
            request["program"] = "stages" if form < 0.62 or alike % stages else "single"
    elif choose.random() < 0.6:
        request["microbatches"] = 1 if whole else int(choose.choice(parts))
    if devices > 1 and choose.random() < 0.4:
        request["mesh"] = {2: (2,), 3: (3,), 4: (2, 2), 6: (2, 3), 8: (4, 2)}.get(
            devices, (devices,)
        )
        if choose.random() < 0.3:
            request["mesh"] = (devices,)
    return f"{devices * request.get('pp', 1)}xcpu", request


@dataclass(frozen=True)
class _Model:
    network: Network
    loss: str
    optimizer: str
    tied: bool
    tokens: bool
    images: bool
    short: bool  # computed in bfloat16

    # ------------------------------------------------------------ arguments

    def arguments(self, draw: np.random.Generator, batch: int, width: int) -> tuple[Any, Any]:
        params: dict[str, Any] = {"layers": self.network.init(draw, width)}
        if self.tokens:
            params["embed"] = draw.normal(size=(VOCABULARY, width)).astype(np.float32)
        else:
            params["in"] = matrix(draw, 3, width)
        if not self.tied:
            params["head"] = matrix(draw, width, VOCABULARY)
        params["norm"] = np.ones(width, np.float32)
        state = {"params": params, "count": np.int32(3), **self._moments(params)}
        return jax.tree.map(jnp.asarray, state), jax.tree.map(jnp.asarray, self._batch(draw, batch))

    def _moments(self, params: Any) -> dict[str, Any]:
        zeros = jax.tree.map(lambda p: 0.01 * np.ones_like(p), params)
        return {"sgd": {}, "momentum": {"m": zeros}, "adam": {"m": zeros, "v": zeros}}[
            self.optimizer
        ]

    def _batch(self, draw: np.random.Generator, batch: int) -> dict[str, Any]:
        shape = (batch, 4, 4) if self.images else (batch, LENGTH)
        found: dict[str, Any] = {"y": draw.integers(0, VOCABULARY, shape).astype(np.int32)}
        if self.tokens:
            found["x"] = draw.integers(0, VOCABULARY, shape).astype(np.int32)
        else:
            found["x"] = draw.normal(size=(*shape, 3)).astype(np.float32)
        if self.loss == "masked":
            found["mask"] = (draw.random(shape) < 0.7).astype(np.float32)
        return found

    # ------------------------------------------------------------ the step

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        key = (
            jax.random.wrap_key_data(batch["raw key"]) if "raw key" in batch else jax.random.key(7)
        )
        key = jax.random.fold_in(key, state["count"])

        def loss_of(params):
            logits, extra = self._logits(params, batch, key, state["count"])
            return self._loss(logits, batch) + 0.1 * extra, logits

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        right = jnp.mean((jnp.argmax(logits, -1) == batch["y"]).astype(jnp.float32))
        if "rate" in batch or "pair" in batch:
            grads = jax.tree.map(
                lambda g: g * (batch["rate"] if "rate" in batch else batch["pair"].sum()) * 10,
                grads,
            )
        return {**self._updated(state, grads), "count": state["count"] + 1}, {
            "loss": loss,
            "right": right,
        }

    def _logits(self, params: Any, batch: Any, key: Any, count: Any) -> tuple[Any, Any]:
        kind = jnp.bfloat16 if self.short else jnp.float32
        params = jax.tree.map(lambda p: p.astype(kind), params)
        x = params["embed"][batch["x"]] if self.tokens else batch["x"].astype(kind) @ params["in"]
        x, extra = self.network(params["layers"], x, key, count)
        x = x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3) * params["norm"]
        return (x @ (params["embed"].T if self.tied else params["head"])).astype(jnp.float32), extra

    def _loss(self, logits: Any, batch: Any) -> Any:
        labels, chances = batch["y"], jax.nn.log_softmax(logits)
        if self.loss == "one-hot":
            return -jnp.mean(jnp.sum(chances * jax.nn.one_hot(labels, VOCABULARY), -1))
        if self.loss == "labels" and labels.ndim == 2:
            rows, places = jnp.arange(labels.shape[0])[:, None], jnp.arange(labels.shape[1])
            return -jnp.mean(chances[rows, places, labels])
        picked = -jnp.take_along_axis(chances, labels[..., None], -1)[..., 0]
        if self.loss == "ignored":
            counted = labels > 2
            return jnp.sum(jnp.where(counted, picked, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
        if self.loss == "masked":
            return jnp.sum(picked * batch["mask"]) / jnp.sum(batch["mask"])
        return 0.01 * jnp.sum(picked) if self.loss == "sum" else jnp.mean(picked)

    def _updated(self, state: Any, grads: Any) -> Any:
        params = state["params"]
        if self.optimizer == "sgd":
            return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)}
        if self.optimizer == "momentum":
            m = jax.tree.map(lambda m, g: 0.9 * m + g, state["m"], grads)
            return {"params": jax.tree.map(lambda p, m: p - 0.1 * m, params, m), "m": m}
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 0.5 / norm), grads)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], grads)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, state["v"], grads)
        moved = jax.tree.map(
            lambda p, m, v: p - 0.01 * m / (jnp.sqrt(v) + 1e-3) - 1e-3 * p, params, m, v
        )
        return {"params": moved, "m": m, "v": v}
