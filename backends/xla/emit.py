"""Run one op of the graph on this shard's part of its operands.

Most primitives need nothing: bound to smaller operands they give the smaller
result. The exceptions are listed in `_EMITTERS`: parameters that carry a shape
are rescaled by the rule, and lookups into a cut dim are masked.

Meant for `shard_map(..., check_vma=False)`: constants made here are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.graph import Op
from ...ir.rule import Dim, Rule
from .compat import bind, is_vacant

Params = dict[str, Any]
Arrays = Sequence[jax.Array]


@dataclass(frozen=True)
class Cut:
    """This shard holds part `index` (an int, or an int32 scalar being traced) of `ways`."""

    index: Any
    ways: int


@dataclass(frozen=True)
class Local:
    """The op's rule seen from one shard."""

    rule: Rule
    cuts: Mapping[int, Cut]

    def size(self, dim: Dim) -> int:
        return self.whole_size(dim) // prod(self.cuts[f].ways for f in dim if f in self.cuts)

    def whole_size(self, dim: Dim) -> int:
        return prod(self.rule.factors[f].size for f in dim)

    def shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        return tuple(map(self.size, dims))

    def cut(self, dim: Dim) -> int | None:
        """The factor of this dim that is cut, if one is."""
        return next((f for f in dim if f in self.cuts), None)

    def offset(self, factor: int) -> Any:
        """Where this shard's part of a factor begins."""
        return self.cuts[factor].index * (self.rule.factors[factor].size // self.cuts[factor].ways)

    def is_first(self, factors: Sequence[int]) -> Any:
        """Whether this shard is the one that counts what must be counted once."""
        return reduce(and_, (jnp.asarray(self.cuts[f].index == 0) for f in factors))


Emitter = Callable[[Local, Any, Params, Arrays], list[jax.Array]]


def emit(
    op: Op, bound: tuple[Any, Params], operands: Arrays, rule: Rule, cuts: Mapping[int, Cut]
) -> list[jax.Array]:
    """This shard's results, or its contribution to them where a reduced factor is cut.

    Args:
        bound: the jax primitive and its parameters for the whole op.
        operands: local parts, cut as the rule and `cuts` say.
        cuts: by factor of the rule; factors not named are not cut.
    """
    primitive, params = bound
    params = {name: None if is_vacant(value) else value for name, value in params.items()}
    cuts = {factor: cut for factor, cut in cuts.items() if cut.ways > 1}
    assert all(rule.factors[f].divisible for f in cuts), (op.kind, cuts)
    assert all(rule.factors[f].size % cut.ways == 0 for f, cut in cuts.items()), (op.kind, cuts)
    emitter = _EMITTERS.get(op.kind, _same) if cuts else _same
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


def _gather(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    """Answer the ids in this shard's part of a cut looked-up dim, and 0 for the others.

    What the user's mode says of ids outside the whole table is kept: clipped ids are
    clipped to the whole table, filled ones are filled by the first shard.
    """
    table, ids = operands
    dims = local.rule.operands[0]
    chosen = params["dimension_numbers"].start_index_map
    batching = params["dimension_numbers"].operand_batching_dims
    masked = {c: f for c, d in enumerate(chosen) if (f := _reduced(local, dims[d])) is not None}
    sizes = tuple(
        size if d in batching or local.cut(dim) is None or _reduced(local, dim) is not None
        else local.size(dim)
        for d, (size, dim) in enumerate(zip(params["slice_sizes"], dims, strict=True))
    )  # fmt: skip
    if not masked:
        return bind(primitive, operands, {**params, "slice_sizes": sizes})
    limits = [local.whole_size(dims[d]) - params["slice_sizes"][d] for d in chosen]
    fills = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    ids = _signed(ids if fills else _clip(ids, limits))
    known = _between(ids, dict(enumerate(limits)))
    ids = _shifted(local, ids, masked)
    here = _between(ids, {c: local.size(dims[chosen[c]]) - 1 for c in masked}) & known
    [found] = bind(
        primitive,
        [table, ids],
        {
            **params,
            "slice_sizes": sizes,
            "mode": lax.GatherScatterMode.CLIP,
            "fill_value": None,
            "indices_are_sorted": False,
            "unique_indices": False,
        },
    )
    kept = _aligned(here, found, params["dimension_numbers"].offset_dims)
    missing = jnp.zeros_like(found)
    if fills:
        fill = jnp.asarray(params["fill_value"], found.dtype)
        unknown = _aligned(~known, found, params["dimension_numbers"].offset_dims)
        missing = jnp.where(unknown & local.is_first(list(masked.values())), fill, missing)
    return [jnp.where(kept, found, missing)]


def _scatter(local: Local, primitive: Any, params: Params, operands: Arrays) -> list[jax.Array]:
    """Where the index is cut, the first shard counts the operand and the others start from 0;
    where a chosen dim is cut, ids outside this shard's part are dropped."""
    target, ids, updates = operands
    dims, _, update_dims = local.rule.operands
    if added := [f for f in local.cuts if local.rule.factors[f].reduction == "sum"]:
        target = jnp.where(local.is_first(added), target, jnp.zeros_like(target))
    chosen = params["dimension_numbers"].scatter_dims_to_operand_dims
    masked = {
        c: f
        for c, d in enumerate(chosen)
        if (f := local.cut(dims[d])) is not None and not any(f in dim for dim in update_dims)
    }
    if not masked:
        return bind(primitive, [target, ids, updates], params)
    if params["mode"] == lax.GatherScatterMode.CLIP:
        ids = _clip(ids, [local.whole_size(dims[d]) - _taken(local, params, d) for d in chosen])
    ids = _shifted(local, _signed(ids), masked)
    dropped = {**params, "mode": lax.GatherScatterMode.FILL_OR_DROP}
    return bind(primitive, [target, ids, updates], dropped)


def _taken(local: Local, params: Params, d: int) -> int:
    """How much of operand dim d one update covers."""
    numbers = params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    if d in gone:
        return 1
    kept = [k for k in range(len(local.rule.operands[0])) if k not in gone]
    place = sorted(numbers.update_window_dims)[kept.index(d)]
    return local.whole_size(local.rule.operands[2][place])


def _reduced(local: Local, dim: Dim) -> int | None:
    """The factor of this dim that is cut and summed over, if one is."""
    factor = local.cut(dim)
    return factor if factor is not None and local.rule.factors[factor].reduction == "sum" else None


def _signed(ids: jax.Array) -> jax.Array:
    return ids if ids.dtype.itemsize == 8 else ids.astype(jnp.int32)


def _clip(ids: jax.Array, limits: Sequence[int]) -> jax.Array:
    """Each column of ids into 0..limit."""
    top = int(jnp.iinfo(ids.dtype).max)
    bounds = jnp.asarray([min(limit, top) for limit in limits], ids.dtype)
    return jnp.clip(ids, jnp.zeros_like(bounds), bounds)


def _between(ids: jax.Array, limits: Mapping[int, int]) -> jax.Array:
    """Whether the named columns are all within 0..limit."""
    return reduce(and_, ((ids[..., c] >= 0) & (ids[..., c] <= top) for c, top in limits.items()))


def _shifted(local: Local, ids: jax.Array, masked: Mapping[int, int]) -> jax.Array:
    """Ids counted from the start of this shard's part."""
    columns = range(ids.shape[-1])
    offsets = [jnp.asarray(local.offset(masked[c]) if c in masked else 0) for c in columns]
    return ids - jnp.stack(offsets).astype(ids.dtype)


def _aligned(mask: jax.Array, found: jax.Array, window: Sequence[int]) -> jax.Array:
    """A mask over index dims, repeated over the dims that slices fill."""
    return lax.broadcast_in_dim(
        mask, found.shape, [d for d in range(found.ndim) if d not in set(window)]
    )


_EMITTERS: dict[str, Emitter] = {
    "reshape": _rescaled(_reshape),
    "broadcast_in_dim": _rescaled(_broadcast_in_dim),
    "slice": _rescaled(_slice),
    "dynamic_slice": _rescaled(_dynamic_slice),
    "tile": _rescaled(_tile),
    "conv_general_dilated": _rescaled(_convolution),
    "iota": _iota,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter-sub": _scatter,
    "scatter-mul": _scatter,
    "scatter-max": _scatter,
    "scatter-min": _scatter,
}
