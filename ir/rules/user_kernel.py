"""Kernels of users: what may be cut is what they declare (`mw.kernel`).

b h q d, b h k d, b h k d -> b h q d    cut b h      the gradient of an operand owes the sum over names it has not
"""

from __future__ import annotations

from .factors import Factors, OpCall, attr_tuple, require, rule_for
from .rule import Dim, Rule

KIND = "user_kernel"


@rule_for(KIND)
def user_kernel(call: OpCall) -> Rule:
    """Attrs `operands` and `results` name the dims of each side; names in `cut` may be cut, all others are whole."""
    sides = [
        attr_tuple(names)
        for key in ("operands", "results")
        for names in attr_tuple(call.attrs[key])
    ]
    kinds, cut = (*call.operands, *call.results), attr_tuple(call.attrs["cut"])
    require(len(sides) == len(kinds))
    results = sides[len(call.operands) :]
    factors, dims = Factors(), dict[object, Dim]()
    for names, kind in zip(sides, kinds, strict=True):
        for name, size in zip(names, kind.shape, strict=True):
            if name not in dims:
                summed = any(name not in others for others in results)
                free = factors.new(size, "sum" if summed else "") if name in cut else None
                dims[name] = factors.whole(size) if free is None else free
    told = [tuple(dims[name] for name in names) for names in sides]
    return factors.rule(told[: len(call.operands)], told[len(call.operands) :])
