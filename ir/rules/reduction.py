"""Reductions over whole dims, running reductions along one, and window reductions."""

from __future__ import annotations

from .factors import FLOATS, INTEGERS, NUMBERS, Factors, OpCall, Reduction, rule_for
from .rule import Rule

_ORDERED = (FLOATS | INTEGERS) - {"c64", "c128"}
_COMBINED: dict[str, tuple[Reduction, frozenset[str]]] = {
    "reduce_sum": ("sum", NUMBERS),
    "reduce_max": ("max", _ORDERED),
    "reduce_min": ("min", _ORDERED),
    "reduce_and": ("and", frozenset({"bool"})),
    "reduce_or": ("or", frozenset({"bool"})),
}


@rule_for(*_COMBINED, "reduce_prod", "reduce_xor", "argmax", "argmin")
def reduce(call: OpCall) -> Rule:
    """Kept dims are parallel; dropped ones reduced, or whole where shards can't be combined."""
    reduction, dtypes = _COMBINED.get(call.kind, ("", frozenset()))
    axes = set(call.integers("axes"))
    factors = Factors()
    operand = tuple(
        factors.new(size)
        if d not in axes
        else factors.new(size, reduction)
        if call.operands[0].dtype in dtypes
        else factors.whole(size)
        for d, size in enumerate(call.operands[0].shape)
    )
    result = tuple(dim for d, dim in enumerate(operand) if d not in axes)
    return factors.rule([operand], [result], call.linear)


@rule_for("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def running(call: OpCall) -> Rule:
    axis = call.integer("axis")
    factors = Factors()
    dims = tuple(
        factors.whole(size) if d == axis else factors.new(size)
        for d, size in enumerate(call.operands[0].shape)
    )
    return factors.rule([dims], [dims], call.linear)


@rule_for("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def reduce_window(call: OpCall) -> Rule:
    """Pooling: dims without a window are parallel, the others whole."""
    factors = Factors()
    dims = [
        (dim := factors.new(before), dim) if free else (factors.whole(before), factors.whole(after))
        for free, before, after in zip(
            _free(call), call.operands[0].shape, call.results[0].shape, strict=True
        )
    ]
    operand, result = tuple(b for b, _ in dims), tuple(a for _, a in dims)
    return factors.rule([operand], [result], call.linear)


@rule_for("select_and_scatter_add", "select_and_gather_add")
def select_in_window(call: OpCall) -> Rule:
    """Gradient and tangent of max pooling; linear in the first operand."""
    given, image = call.operands
    factors = Factors()
    dims = [
        (dim := factors.new(small), dim) if free else (factors.whole(small), factors.whole(large))
        for free, small, large in zip(_free(call), given.shape, image.shape, strict=True)
    ]
    first, second = tuple(g for g, _ in dims), tuple(i for _, i in dims)
    if call.kind == "select_and_scatter_add":
        return factors.rule([first, second], [second], call.linear)
    pooled = call.results[0].shape
    result = tuple(
        dim if free else factors.whole(size)
        for free, dim, size in zip(_free(call), second, pooled, strict=True)
    )
    return factors.rule([first, second], [result], call.linear)


def _free(call: OpCall) -> list[bool]:
    """Which dims have no window at all."""
    windows, strides = call.integers("window_dimensions"), call.integers("window_strides")
    ones = (1,) * len(windows)
    spread = call.integers("base_dilation") if "base_dilation" in call.attrs else ones
    return [
        (window, stride, pads, dilation) == (1, 1, (0, 0), 1)
        for window, stride, pads, dilation in zip(
            windows, strides, call.tuples("padding"), spread, strict=True
        )
    ]
