"""A traced step of an optimizer with its learning rate as an input.

Options are plain numbers to an optimizer, and what it makes of them in Python is in a trace as numbers: `-lr`,
`1 - lr * weight_decay`. Traces at three rates differ in those alone. Two of them say which multiple of the rate, plus
which number, each is; the third proves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import Any

import torch
from torch import fx

from ...ir.errors import CaptureError

PROBES = (
    0.25,
    0.5,
    1.0,
)  # powers of two: differences of what is made of them are exact, or nearly so
EXACT = 1e-12  # of what a number is made of: 64-bit arithmetic leaves some 1e-16


def with_rate(traced: Sequence[fx.GraphModule], where: str) -> fx.GraphModule:
    """The first graph with one more input, a rate of rank 0 in f32, that its numbers are made of.

    Args:
        traced: graphs of one step, at each rate of `PROBES`.

    Raises:
        CaptureError: the graphs differ in more, or a number is no multiple of the rate plus a number.
    """
    first = traced[0]
    columns = list(zip(*(graph.graph.nodes for graph in traced), strict=False))
    if len({len(graph.graph.nodes) for graph in traced}) > 1 or any(map(_differ, columns)):
        raise _refused("takes other operations", where)
    inputs = [node for node in first.graph.nodes if node.op == "placeholder"]
    with first.graph.inserting_after(inputs[-1]):
        rate = first.graph.placeholder("rate")
    rate.meta["val"] = _scalar(inputs[0])
    for column in columns:
        node = column[0]
        if node.op == "get_attr":
            _check_constant(traced, column, where)
            continue
        with first.graph.inserting_before(node):
            of_rate = _OfRate(first, rate, where)
            node.args = of_rate.merged([other.args for other in column])
            node.kwargs = of_rate.merged([other.kwargs for other in column])
    first.recompile()
    return first


def _differ(column: tuple[fx.Node, ...]) -> bool:
    return len({(node.op, str(node.target), len(node.args)) for node in column}) > 1


def _scalar(beside: fx.Node) -> Any:
    """A number without a value, of the mode that traced."""
    with beside.meta["val"].fake_mode:
        return torch.empty((), dtype=torch.float32)


def _check_constant(
    traced: Sequence[fx.GraphModule], column: tuple[fx.Node, ...], where: str
) -> None:
    held = [getattr(g, str(node.target)) for g, node in zip(traced, column, strict=True)]
    if not all(torch.equal(held[0], other) for other in held):
        raise _refused("makes a tensor of it", where)


class _OfRate:
    """Arguments of one node, with what differs made of the rate."""

    def __init__(self, graph: fx.GraphModule, rate: fx.Node, where: str):
        self.graph, self.rate, self.where = graph, rate, where

    def merged(self, given: Sequence[Any]) -> Any:
        one = given[0]
        if isinstance(one, list | tuple):
            return type(one)(self.merged(each) for each in zip(*given, strict=True))
        if isinstance(one, dict):
            return {name: self.merged([each[name] for each in given]) for name in one}
        if not isinstance(one, int | float) or all(one == other for other in given):
            return one
        return self._made(*map(float, given))

    def _made(self, *found: float) -> fx.Node:
        """scale · rate + start"""
        (low, high, last), (one, other, third) = found, PROBES
        scale = (high - low) / (other - one)
        start = low - scale * one
        size = max(abs(low), abs(scale))
        start = 0.0 if abs(start) <= EXACT * size else start
        if not isclose(start + scale * third, last, rel_tol=0, abs_tol=EXACT * size):
            raise _refused(f"has {low}, {high} and {last} at rates {PROBES}", self.where)
        node = self.rate
        for target, number, nothing in (
            (torch.ops.aten.mul.Tensor, scale, 1.0),
            (torch.ops.aten.add.Tensor, start, 0.0),
        ):
            if not isclose(number, nothing, rel_tol=0, abs_tol=EXACT):
                node = self.graph.graph.call_function(target, (node, number))
                node.meta["val"] = self.rate.meta["val"]
        return node


def _refused(what: str, where: str) -> CaptureError:
    return CaptureError(
        f"the optimizer {what} where the learning rate differs: it is no multiple of the rate and a number.",
        where=where,
        fix="AdamW, Adam or SGD; or an optimizer whose update is linear in the rate",
    )
