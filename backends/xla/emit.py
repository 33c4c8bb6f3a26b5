"""Run one op of the graph on this shard's part of its operands.

Most primitives need nothing: bound to smaller operands they give the smaller
result. The exceptions are listed in `_EMITTERS`: parameters that carry a shape
are rescaled by the rule, and lookups into a cut dim are masked.

Meant for `shard_map(..., check_vma=False)`: constants made here are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ...ir.graph import Op
from ...ir.rules.rule import Rule
from .compat import bind, is_vacant
from .emit_grouped import ragged_dot
from .emit_indexing import gather, scatter
from .emit_random import drawing, random_bits, random_split
from .shard import Arrays, Emitter, Local, Params, Part, ShardPart


def emit(
    op: Op, bound: tuple[Any, Params], operands: Arrays, rule: Rule, cuts: Mapping[int, Part]
) -> list[jax.Array]:
    """This shard's results, or its contribution to them where a reduced factor is cut.

    Args:
        bound: the jax primitive and its parameters for the whole op.
        operands: local parts, cut as the rule and `cuts` say.
        cuts: by factor of the rule; factors not named are not cut.
    """
    primitive, params = bound
    params = {name: None if is_vacant(value) else value for name, value in params.items()}
    sizes = {f: rule.factors[f].size for f in cuts}
    cuts = {f: cut for f, cut in cuts.items() if cut.size(sizes[f]) < sizes[f]}
    assert all(rule.factors[f].divisible for f in cuts), (op.kind, cuts)
    assert all(
        not isinstance(cut, ShardPart) or sizes[f] % cut.ways == 0 for f, cut in cuts.items()
    ), (
        op.kind,
        cuts,
    )
    emitter = _EMITTERS.get(op.kind, _same) if cuts else _same
    with drawing(op):
        return emitter(Local(rule, cuts), primitive, params, operands)


def _same(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    return bind(primitive, operands, params)


def _rescaled(rescale: Callable[[Local, Params], Params]) -> Emitter:
    """An emitter that only replaces parameters."""

    def emitter(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
        return bind(primitive, operands, {**params, **rescale(local, params)})

    return emitter


def _reshape(local: Local, params: Params) -> Params:
    return {"new_sizes": local.shape(local.rule.results[0])}


def _broadcast_in_dim(local: Local, params: Params) -> Params:
    return {"shape": local.shape(local.rule.results[0])}


def _dynamic_slice(local: Local, params: Params) -> Params:
    return {"slice_sizes": local.shape(local.rule.results[0])}


def _slice(local: Local, params: Params) -> Params:
    limits = zip(local.rule.operands[0], params["limit_indices"], strict=True)
    return {
        "limit_indices": tuple(
            limit if local.cut(dim) is None else local.size(dim) for dim, limit in limits
        )
    }


def _tile(local: Local, params: Params) -> Params:
    sizes = zip(local.rule.results[0], local.rule.operands[0], strict=True)
    return {"reps": tuple(local.size(made) // max(local.size(given), 1) for made, given in sizes)}


def _convolution(local: Local, params: Params) -> Params:
    """Groups that are cut are fewer here."""
    images, features = (local.rule.operands[0][d] for d in params["dimension_numbers"].lhs_spec[:2])
    by_feature, by_batch = params["feature_group_count"], params["batch_group_count"]
    return {
        "feature_group_count": by_feature if by_feature == 1 else local.size(features[:1]),
        "batch_group_count": by_batch if by_batch == 1 else local.size(images[:1]),
    }


def _iota(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    dims = local.rule.results[0]
    [counted] = bind(primitive, operands, {**params, "shape": local.shape(dims)})
    factor = local.cut(dims[params["dimension"]])
    if factor is None:
        return [counted]
    return [counted + jnp.asarray(local.offset(factor)).astype(counted.dtype)]


_EMITTERS: dict[str, Emitter] = {
    "reshape": _rescaled(_reshape),
    "broadcast_in_dim": _rescaled(_broadcast_in_dim),
    "slice": _rescaled(_slice),
    "dynamic_slice": _rescaled(_dynamic_slice),
    "tile": _rescaled(_tile),
    "conv_general_dilated": _rescaled(_convolution),
    "iota": _iota,
    "ragged_dot_general": ragged_dot,
    "random_bits": random_bits,
    "random_split": random_split,
    "gather": gather,
    "scatter": scatter,
    "scatter-add": scatter,
    "scatter-sub": scatter,
    "scatter-mul": scatter,
    "scatter-max": scatter,
    "scatter-min": scatter,
}
