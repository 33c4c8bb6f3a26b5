"""Grouped products (`ragged_dot`) on one shard: which of its rows belong to which of its groups.

    rows x [m, k], weights w [g, k, n], sizes [g] -> [m, n]     row i meets the weights of its group
    rows x [m, k], rows y [m, n],       sizes [g] -> [g, k, n]  the gradient of the weights

Sizes are whole on every shard. A shard of the rows counts those of each group that it holds. A shard of the
groups turns its rows until its own groups' come first, and leaves zeros for the rows of others: a part of the sum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .compat import bind
from .shard import Arrays, Local, Params


def ragged_dot(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    """This shard's rows, or its contribution to them where the groups are cut."""
    left, right, sizes = operands
    numbers = params["ragged_dot_dimension_numbers"]
    (left_sum, right_sum), _ = numbers.dot_dimension_numbers
    [row] = numbers.lhs_ragged_dimensions
    summed = row in left_sum
    ends = jnp.cumsum(sizes)
    rows = local.positions(local.rule.operands[0][row]).astype(sizes.dtype)
    first, after = (jnp.searchsorted(rows, each) for each in (ends - sizes, ends))
    held = (after - first).astype(sizes.dtype)
    group = local.cut(
        local.rule.results[0][0]
        if summed
        else local.rule.operands[1][numbers.rhs_group_dimensions[0]]
    )
    if group is None:
        return bind(primitive, [left, right, held], params)
    begin = local.offset(group)
    turn = lax.dynamic_index_in_dim(first, begin, keepdims=False)
    held = lax.dynamic_slice_in_dim(held, begin, local.cuts[group].size(len(sizes)))
    left = jnp.roll(left, -turn, row)
    if summed:
        right = jnp.roll(right, -turn, right_sum[left_sum.index(row)])
        return bind(primitive, [left, right, held], params)
    [made] = bind(primitive, [left, right, held], params)
    place = [d for d in range(left.ndim) if d not in left_sum].index(row)
    mine = jnp.arange(made.shape[place]) < held.sum()
    made = jnp.where(lax.broadcast_in_dim(mine, made.shape, (place,)), made, jnp.zeros_like(made))
    return [jnp.roll(made, turn, place)]
