"""A mixture of experts whose tokens are sorted to experts and looked up: no one-hot products.

Each expert takes `capacity` tokens of a sequence. With the capacity of an even load the products
are exactly those of the choices; a token beyond an expert's capacity skips it. Static shapes, and
each sequence is its own dispatch group, so that the batch stays a parallel dim.

Dims: B sequence, S position, D width, F expert width, E experts, C capacity, J choices of one
token, X all choices of a sequence (S·J).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def routed_experts(
    x_BSD: jax.Array,
    expert_BSJ: jax.Array,
    weight_BSJ: jax.Array,
    weights: dict[str, jax.Array],
    capacity: int,
) -> jax.Array:
    """Sum over the choices of weight · expert(x); experts are SwiGLUs of `gate_EDF`, `up_EDF`, `down_EFD`.

    A weight scales the hidden activations: the same sum, and the backward pass needs no outputs of
    experts (as Megatron-Core does).
    """
    batch, seq, choices = expert_BSJ.shape
    experts = weights["gate_EDF"].shape[0]
    choice_BY, place_BX = assign(expert_BSJ.reshape(batch, -1), experts, capacity)
    x_BECD = look_up(x_BSD, choice_BY // choices).reshape(batch, experts, capacity, -1)
    scale_BEC1 = look_up(weight_BSJ.reshape(batch, -1, 1), choice_BY).reshape(
        batch, experts, capacity, 1
    )
    y_BECD = feed_forward(x_BECD, scale_BEC1.astype(x_BSD.dtype), weights)
    y_BXD = look_up(y_BECD.reshape(batch, experts * capacity, -1), place_BX)
    return y_BXD.reshape(batch, seq, choices, -1).sum(axis=2)


def feed_forward(
    x_BECD: jax.Array, scale_BEC1: jax.Array, weights: dict[str, jax.Array]
) -> jax.Array:
    gate_BECF = jax.nn.silu(jnp.einsum("becd,edf->becf", x_BECD, weights["gate_EDF"]))
    up_BECF = jnp.einsum("becd,edf->becf", x_BECD, weights["up_EDF"])
    return jnp.einsum("becf,efd->becd", gate_BECF * up_BECF * scale_BEC1, weights["down_EFD"])


def assign(expert_BX: jax.Array, experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Which choice fills each slot, and in which slot each choice lies.

    Returns (choice_BY, place_BX) with Y = E·C slots; an empty slot and a choice without a slot
    hold a number out of range.
    """
    order_BX = jnp.argsort(expert_BX, axis=1)
    rank_BX = jnp.argsort(order_BX, axis=1)
    count_BE = (expert_BX[:, :, None] == jnp.arange(experts)).sum(axis=1)
    start_BE = jnp.cumsum(count_BE, axis=1) - count_BE
    slot_BX = rank_BX - jnp.take_along_axis(start_BE, expert_BX, axis=1)
    place_BX = jnp.where(slot_BX < capacity, expert_BX * capacity + slot_BX, experts * capacity)
    slot_C = jnp.arange(capacity)
    source_BEC = jnp.where(
        slot_C < count_BE[:, :, None], start_BE[:, :, None] + slot_C, order_BX.shape[1]
    )
    source_BY = source_BEC.reshape(len(order_BX), -1)
    choice_BY = jnp.take_along_axis(
        order_BX, source_BY, axis=1, mode="fill", fill_value=order_BX.shape[1]
    )
    return choice_BY, place_BX


def look_up(rows_BRD: jax.Array, index_BX: jax.Array) -> jax.Array:
    """Rows by number; zeros for numbers out of range."""
    return jnp.take_along_axis(rows_BRD, index_BX[:, :, None], axis=1, mode="fill", fill_value=0)
