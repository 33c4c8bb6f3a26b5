"""Small layers of all kinds, drawn by `random_steps`: each maps activations [B, T, D] or [B, H, W, D] to their shape.

A kind is `(init, apply)`: `init(draw, width)` gives its parameters, `apply(params, x, context)` runs it. Whatever a
kind may vary (heads, an activation, an axis) is drawn once, when a step is made, so that all its layers are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Params = dict[str, Any]
Init = Callable[[np.random.Generator, int], Params]
Apply = Callable[[Params, Any, "Context"], Any]
Kind = tuple[Init, Apply]


@dataclass
class Context:
    """What layers share: a random key of this layer, the number of the step, sums to add to the loss."""

    key: Any
    count: Any
    extra: list[Any] = field(default_factory=list)


def matrix(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return (draw.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)


def _one(draw: np.random.Generator, width: int) -> np.ndarray:
    return (1 + 0.2 * draw.normal(size=width)).astype(np.float32)


def _nothing(draw: np.random.Generator, width: int) -> Params:
    return {}


ACTIVATIONS = (jax.nn.gelu, jax.nn.relu, jnp.tanh, jax.nn.silu, jax.nn.softplus)


# ---------------------------------------------------------------- products


def dense(choose: np.random.Generator) -> Kind:
    act, wide, biased = (
        ACTIVATIONS[choose.integers(5)],
        int(choose.integers(1, 4)),
        choose.random() < 0.6,
    )

    def init(draw, width):
        bias = {"b": 0.1 * matrix(draw, 1, wide * width)[0]} if biased else {}
        return {
            "up": matrix(draw, width, wide * width),
            "down": matrix(draw, wide * width, width),
            **bias,
        }

    def apply(p, x, context):
        h = checkpoint_name(x @ p["up"] + p.get("b", 0.0), "up")
        return x + checkpoint_name(act(h) @ p["down"], "out")

    return init, apply


def gated(choose: np.random.Generator) -> Kind:
    stacked = choose.random() < 0.5

    def init(draw, width):
        up = {"up": matrix(draw, width, 4 * width)} if stacked else {}
        apart = (
            {}
            if stacked
            else {"gate": matrix(draw, width, 2 * width), "lin": matrix(draw, width, 2 * width)}
        )
        return {**up, **apart, "down": matrix(draw, 2 * width, width)}

    def apply(p, x, context):
        gate, lin = jnp.split(x @ p["up"], 2, -1) if stacked else (x @ p["gate"], x @ p["lin"])
        return x + checkpoint_name((jax.nn.silu(gate) * lin) @ p["down"], "out")

    return init, apply


def attention(choose: np.random.Generator) -> Kind:
    heads = int(choose.choice([2, 4]))
    groups, causal, together = (
        int(choose.choice([1, 2])),
        choose.random() < 0.7,
        choose.random() < 0.5,
    )
    form = int(choose.integers(3))

    def init(draw, width):
        head = width // heads
        kv = heads // groups * head
        one = {"qkv": matrix(draw, width, width + 2 * kv)}
        apart = {
            "q": matrix(draw, width, width),
            "k": matrix(draw, width, kv),
            "v": matrix(draw, width, kv),
        }
        return {**(one if together else apart), "o": matrix(draw, width, width)}

    def apply(p, x, context):
        b, t, width = x.shape
        kv = heads // groups
        parts = (
            jnp.split(x @ p["qkv"], [width, width + kv * (width // heads)], -1)
            if together
            else [x @ p[name] for name in "qkv"]
        )
        q, k, v = (
            part.reshape(b, t, n, -1) for part, n in zip(parts, (heads, kv, kv), strict=True)
        )
        if form == 0:
            k, v = (jnp.repeat(each, groups, axis=2) for each in (k, v))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        elif form == 1:
            scores = jnp.einsum("bqgnd,bkgd->bgnqk", q.reshape(b, t, kv, groups, -1), k).reshape(
                b, heads, t, t
            )
        else:
            k, v = (jnp.repeat(each, groups, axis=2) for each in (k, v))
            scores = q.transpose(0, 2, 1, 3) @ k.transpose(0, 2, 3, 1)
        scores = checkpoint_name(scores / jnp.sqrt(q.shape[-1]), "scores")
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        weights = jax.nn.softmax(scores)
        if form == 1:
            out = jnp.einsum("bgnqk,bkgd->bqgnd", weights.reshape(b, kv, groups, t, t), v)
        else:
            out = (weights @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        return x + checkpoint_name(out.reshape(b, t, width) @ p["o"], "out")

    return init, apply


def experts(choose: np.random.Generator) -> Kind:
    count, top, balanced = (
        int(choose.choice([2, 4])),
        int(choose.integers(1, 3)),
        choose.random() < 0.4,
    )

    def init(draw, width):
        return {
            "router": 2 * matrix(draw, width, count),
            "up": matrix(draw, count, width, 2 * width), "down": matrix(draw, count, 2 * width, width),
        }  # fmt: skip

    def apply(p, x, context):
        probs = jax.nn.softmax(x @ p["router"])
        best, chosen = lax.top_k(probs, top)
        share = jnp.einsum(
            "btk,btke->bte", best / best.sum(-1, keepdims=True), jax.nn.one_hot(chosen, count)
        )
        h = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["up"]))
        y = jnp.einsum("btef,efd,bte->btd", h, p["down"], share)
        if balanced:
            context.extra.append(jnp.mean(jnp.sum(probs.mean(1) * share.mean(1), -1)))
        return x + checkpoint_name(y, "out")

    return init, apply


def einsum(choose: np.random.Generator) -> Kind:
    def init(draw, width):
        return {"w": matrix(draw, 2, width // 2, width // 2), "mix": 0.3 * matrix(draw, 2, 2)}

    def apply(p, x, context):
        b, t, width = x.shape
        h = jnp.einsum("btgd,gde,gh->bthe", x.reshape(b, t, 2, -1), p["w"], p["mix"])
        return x + jnp.tanh(h).reshape(b, t, width)

    return init, apply


# ---------------------------------------------------------------- norms, dropout


def layer_norm(choose: np.random.Generator) -> Kind:
    centred = choose.random() < 0.5

    def init(draw, width):
        return {
            "scale": _one(draw, width),
            **({"shift": 0.1 * _one(draw, width)} if centred else {}),
        }

    def apply(p, x, context):
        h = x - x.mean(-1, keepdims=True) if centred else x
        h = h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-3)
        return h * p["scale"] + p.get("shift", 0.0)

    return init, apply


def batch_norm(choose: np.random.Generator) -> Kind:
    def init(draw, width):
        return {"scale": _one(draw, width), "shift": 0.1 * _one(draw, width)}

    def apply(p, x, context):
        axes = tuple(range(x.ndim - 1))
        h = (x - x.mean(axes)) * lax.rsqrt(x.var(axes) + 1e-2)
        return h * p["scale"] + p["shift"]

    return init, apply


def dropout(choose: np.random.Generator) -> Kind:
    normal = choose.random() < 0.3

    def apply(p, x, context):
        if normal:
            return x + 0.1 * jax.random.normal(context.key, x.shape, x.dtype)
        return jnp.where(jax.random.bernoulli(context.key, 0.8, x.shape), x / 0.8, 0.0)

    return _nothing, apply


# ---------------------------------------------------------------- loops and branches


def repeated(choose: np.random.Generator) -> Kind:
    """A loop inside a layer: of a known number of turns, with or without a product, or over slices."""
    form, turns = int(choose.integers(4)), int(choose.integers(1, 4))

    def init(draw, width):
        return (
            {"w": matrix(draw, width, width)}
            if form < 3
            else {"w": 0.5 * matrix(draw, turns, width, width)}
        )

    def apply(p, x, context):
        if form == 0:
            return lax.fori_loop(0, turns, lambda i, u: jnp.sin(u), x @ p["w"])
        if form == 1:
            return x + lax.fori_loop(0, turns, lambda i, u: jnp.tanh(u @ p["w"]), x)
        if form == 2:
            outs = lax.scan(lambda u, i: (jnp.tanh(u @ p["w"]), u.mean(-1)), x, jnp.arange(turns))
            return outs[0] + 0.1 * outs[1].sum(0)[..., None]
        return lax.scan(lambda u, w: (u + jnp.tanh(u @ w), None), x, p["w"])[0]

    return init, apply


def recurrent(choose: np.random.Generator) -> Kind:
    gate, backwards = choose.random() < 0.5, choose.random() < 0.3

    def init(draw, width):
        return {
            "in": matrix(draw, width, width),
            "on": 0.7 * matrix(draw, width, width),
            "g": matrix(draw, width, width),
        }

    def apply(p, x, context):
        def turn(h, u):
            new = jnp.tanh(u @ p["in"] + h @ p["on"])
            if gate:
                z = jax.nn.sigmoid(u @ p["g"])
                new = z * h + (1 - z) * new
            return new, new

        _, hs = lax.scan(turn, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1), reverse=backwards)
        return x + hs.swapaxes(0, 1)

    return init, apply


def conditional(choose: np.random.Generator) -> Kind:
    form = int(choose.integers(3))

    def init(draw, width):
        return {"w": matrix(draw, width, width), "s": _one(draw, width)}

    def apply(p, x, context):
        if form == 0:
            return lax.cond(
                context.count % 2 == 0, lambda u: u + jnp.tanh(u @ p["w"]), lambda u: u * p["s"], x
            )
        if form == 1:
            return (
                lax.switch(context.count % 3, [jnp.sin, jnp.cos, lambda u: u * p["s"]], x) @ p["w"]
                + x
            )
        return x + lax.cond(p["s"].sum() > 0, lambda u: u @ p["w"], lambda u: -u, x)

    return init, apply


def until(choose: np.random.Generator) -> Kind:
    """A `while` of the forward pass, which nothing is differentiated through."""

    def apply(p, x, context):
        scale = lax.while_loop(
            lambda s: s[1] < 3, lambda s: (s[0] * 0.5 + 0.1, s[1] + 1), (lax.stop_gradient(x), 0)
        )[0]
        return x + 0.1 * scale

    return _nothing, apply


# ---------------------------------------------------------------- moves


def moves(choose: np.random.Generator) -> Kind:
    form = int(choose.integers(9))

    def init(draw, width):
        return {"w": matrix(draw, width, width), "row": 0.5 * _one(draw, width)}

    def apply(p, x, context):
        h = x @ p["w"]
        half = x.shape[-1] // 2
        if form == 0:
            return x + jnp.cumsum(h, axis=1) / x.shape[1]
        if form == 1:
            return x + jnp.sort(h, axis=int(choose_axis))
        if form == 2:
            return x + jnp.concatenate([-h[..., half:], h[..., :half]], -1)
        if form == 3:
            return h.at[:, 0].set(p["row"]) + x
        if form == 4:
            return h.at[:, 1:].add(x[:, :-1])
        if form == 5:
            return x + jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        if form == 6:
            best, at = lax.top_k(h, half)
            return x + jnp.concatenate([best, jnp.take_along_axis(x, at, -1)], -1)
        if form == 7:
            return x + jnp.flip(h, 1) * jnp.arange(x.shape[1], dtype=x.dtype)[:, None] / x.shape[1]
        return x + h.max(1, keepdims=True) - jax.nn.logsumexp(h, axis=-1, keepdims=True)

    choose_axis = choose.choice([1, -1])
    return init, apply


def convolved(choose: np.random.Generator) -> Kind:
    """Over positions of a text."""

    def init(draw, width):
        return {"w": matrix(draw, 3, width, width)}

    def apply(p, x, context):
        h = lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x + jax.nn.relu(h)

    return init, apply


def chosen(choose: np.random.Generator) -> Kind:
    """Places that depend on values: sorted, looked up, written to, one way or the other by example."""
    form = int(choose.integers(6))

    def init(draw, width):
        return {"w": matrix(draw, width, width)}

    def apply(p, x, context):
        h, rows = x @ p["w"], jnp.arange(x.shape[0])
        at = jnp.argmax(lax.stop_gradient(h[..., 0]), 1)
        if form == 0:
            return x + jnp.take_along_axis(h, jnp.argsort(lax.stop_gradient(h), axis=1), 1)
        if form == 1:
            return x + h[rows, at][:, None]
        if form == 2:
            return h.at[rows, at].set(x[:, 0])
        if form == 3:
            return h.at[rows, at].add(x.mean(1))
        if form == 4:
            return x + jax.vmap(lambda u, k: lax.dynamic_slice_in_dim(u, k, 1))(h, at)
        return jax.vmap(lambda u: lax.cond(u.sum() > 0, jnp.sin, lambda u: u * 0.5, u))(h) + x

    return init, apply


def decomposed(choose: np.random.Generator) -> Kind:
    form = int(choose.integers(4))

    def init(draw, width):
        return {"w": matrix(draw, width, width)}

    def apply(p, x, context):
        h = (x @ p["w"]).astype(jnp.float32)
        square = jnp.eye(x.shape[1]) + jnp.einsum("btd,bsd->bts", h, h) / x.shape[-1]
        if form == 0:
            y = jnp.linalg.cholesky(square) @ h
        elif form == 1:
            y = jnp.linalg.solve(square, h)
        elif form == 2:
            y = jnp.fft.fft(h, axis=1).real / x.shape[1]
        else:
            y = lax.cumlogsumexp(h, axis=1) + lax.cummax(h, axis=2)
        return x + y.astype(x.dtype)

    return init, apply


# ---------------------------------------------------------------- images


def convolution(choose: np.random.Generator) -> Kind:
    act, size = ACTIVATIONS[choose.integers(5)], int(choose.choice([1, 3]))

    def init(draw, width):
        return {"w": matrix(draw, size, size, width, width) / size, "b": 0.1 * _one(draw, width)}

    def apply(p, x, context):
        h = lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x + act(h + p["b"])

    return init, apply


def pooling(choose: np.random.Generator) -> Kind:
    biggest = choose.random() < 0.5

    def apply(p, x, context):
        window, strides = (1, 2, 2, 1), (1, 1, 1, 1)
        if biggest:
            return x + lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
        return x + lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / 4

    return _nothing, apply


TEXTS: Mapping[str, Callable[[np.random.Generator], Kind]] = {
    "dense": dense, "gated": gated, "attention": attention, "experts": experts, "einsum": einsum,
    "norm": layer_norm, "batch norm": batch_norm, "dropout": dropout, "loop": repeated, "rnn": recurrent,
    "cond": conditional, "while": until, "moves": moves, "conv1d": convolved, "chosen": chosen,
    "decomposed": decomposed,
}  # fmt: skip
IMAGES: Mapping[str, Callable[[np.random.Generator], Kind]] = {
    "conv": convolution, "pool": pooling, "norm": layer_norm, "batch norm": batch_norm, "dropout": dropout,
    "dense": dense,
}  # fmt: skip
