"""The binding of ops that a pass made: jax's primitives and parameters for their kinds and attributes.

reduce_sum axes=(0,)   was made of  reduce_sum axes=(0, 1)  whose parameters it takes, with other axes
slice                  is new       its primitive, with the parameters that this version of jax has
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import lax

from ...ir.passes.narrow import Attrs
from ...ir.passes.unroll import Unrolled
from .capture import Bound
from .params import attrs_of

Bindings = dict[tuple[str, Attrs], Bound]


def rebound(found: Unrolled, bound: Mapping[Any, Bound]) -> Bindings:
    """The bindings of a graph before it was unrolled, and of what is new in it."""
    made: Bindings = dict(bound)
    for key in {(visit.op.kind, visit.op.attrs) for visit in found.graph.visits} - made.keys():
        kind, attrs = key
        if key in found.narrowed:
            primitive, params = bound[kind, found.narrowed[key]]
        elif kind in _EXAMPLES:
            primitive, params = _own(kind)
        else:
            continue  # loops and branches are run by their regions
        made[key] = primitive, _with_attrs(kind, params, attrs)
    return made


def _with_attrs(kind: str, params: dict[str, Any], attrs: Attrs) -> dict[str, Any]:
    """Parameters with other dims and sizes, which attributes tell as jax does, except dimension numbers."""
    if kind == "dot_general":
        of = dict(attrs)
        contracting, batch = (
            (of[f"lhs_{which}"], of[f"rhs_{which}"]) for which in ("contracting", "batch")
        )
        return {**params, "dimension_numbers": (contracting, batch)}
    before = dict(attrs_of(kind, params))
    return {**params, **{name: value for name, value in attrs if before.get(name) != value}}


_EXAMPLES: Mapping[str, Any] = {
    "slice": lambda x: lax.slice(x, (0, 0), (1, 2)),
    "squeeze": lambda x: lax.squeeze(x, (0,)),
    "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (3, 1, 2), (1, 2)),
    "concatenate": lambda x: lax.concatenate([x, x], 0),
    "add": lax.add,
    "max": lax.max,
    "min": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
}
_OF_TWO = ("add", "max", "min", "and", "or")


@lru_cache(maxsize=len(_EXAMPLES))
def _own(kind: str) -> Bound:
    """A primitive that the pass adds itself, and the parameters it has in this version of jax."""
    arrays = [np.ones((1, 2), np.int32)] * (2 if kind in _OF_TWO else 1)
    eqn = jax.make_jaxpr(_EXAMPLES[kind])(*arrays).eqns[0]
    assert eqn.primitive.name == kind, eqn
    return eqn.primitive, dict(eqn.params)
