"""Batches: their shapes, and synthetic contents that a model can learn.

Dims: B batch, T position, W width and height of a square image.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def token_batch(batch: int, seq: int) -> dict[str, jax.ShapeDtypeStruct]:
    tokens_BT = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    return {"tokens": tokens_BT, "targets": tokens_BT}


def image_batch(batch: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((batch, width, width, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }


def counting_batch(
    rng: np.random.Generator, batch: int, seq: int, vocab: int
) -> dict[str, np.ndarray]:
    """Sequences that count upwards from a random token: quickly learnt."""
    start_B1 = rng.integers(0, vocab, (batch, 1))
    count_BT = ((start_B1 + np.arange(seq + 1)) % vocab).astype(np.int32)
    return {"tokens": count_BT[:, :-1], "targets": count_BT[:, 1:]}


def source_batch(rng: np.random.Generator, batch: int, seq: int) -> dict[str, np.ndarray]:
    """Windows of the bytes of this folder's own source files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    start_B1 = rng.integers(0, len(text) - seq, (batch, 1))
    window_BT = text[start_B1 + np.arange(seq + 1)].astype(np.int32)
    return {"tokens": window_BT[:, :-1], "targets": window_BT[:, 1:]}


def coloured_batch(
    rng: np.random.Generator, batch: int, width: int, classes: int
) -> dict[str, np.ndarray]:
    """Noisy images, each tinted with the colour of its class."""
    label_B = rng.integers(0, classes, batch, dtype=np.int32)
    colour_B3 = np.random.default_rng(0).normal(size=(classes, 3))[label_B]
    noise_BWW3 = rng.normal(size=(batch, width, width, 3), scale=0.5)
    image_BWW3 = (colour_B3[:, None, None] + noise_BWW3).astype(np.float32)
    return {"image": image_BWW3, "label": label_B}
