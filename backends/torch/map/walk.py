"""A traced graph of ATen's operations, node by node, each by its mapping; and what has none, refused by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ....ir.errors import CaptureError
from ..compat import is_bookkeeping, module_path, user_line
from .builder import MAPPED, OF_LIBRARIES, Builder, Value

_EACH = "aten._foreach_"
_RANDOM = frozenset({
    "alpha_dropout", "bernoulli", "bernoulli_", "native_dropout", "normal", "normal_functional", "randint",
    "randint_like", "randperm", "multinomial", "exponential", "uniform",
})  # fmt: skip


def write(b: Builder, graph: fx.GraphModule, known: Mapping[fx.Node, Value]) -> dict[fx.Node, Any]:
    """Append a graph's operations; what every node is worth.

    Args:
        known: the placeholders' values.

    Raises:
        CaptureError: an operation has no mapping, or cannot be planned.
    """
    values: dict[Any, Any] = dict(known)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = b.array(_attribute(graph, str(node.target)))
        elif node.op == "call_function" and not is_bookkeeping(node):
            b.where, b.module = user_line(node) or b.where, module_path(node) or b.module
            b.result = node.meta.get("val")
            values[node] = _call(b, node, values)
    return values


def _attribute(graph: fx.GraphModule, path: str) -> torch.Tensor:
    found: Any = graph
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _call(b: Builder, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args: Any = map_arg(node.args, values.__getitem__)
    if node.target is operator.getitem:
        return _taken(b, node, *args)
    b.results()  # raises where a value is complex
    kwargs: Any = map_arg(node.kwargs, values.__getitem__)
    name = str(node.target)
    if name.startswith(_EACH):
        return _each(b, node, args, kwargs)
    mapping = MAPPED.get(node.target) or OF_LIBRARIES.get(name)
    if mapping is None:
        raise _unmapped(b, node)
    found = mapping(b, *args, **kwargs)
    _check(b, found)
    return found


def _each(b: Builder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """An operation on lists, `_foreach_mul`, as one on each tensor."""
    packet, _, overload = str(node.target).removeprefix(_EACH).partition(".")
    named = getattr(torch.ops.aten, packet, None)
    wanted = ({"List": "Tensor", "ScalarList": "Scalar"}.get(overload, overload), "default")
    found = [MAPPED[op] for name in wanted if (op := getattr(named, name, None)) in MAPPED]
    if not found:
        raise _unmapped(b, node)
    results, made = b.result, list[Any]()
    for k, result in enumerate(results):
        b.result = result
        here = [arg[k] if isinstance(arg, list | tuple) else arg for arg in args]
        made.append(found[0](b, *here, **kwargs))
        _check(b, made[-1])
    return made


def _taken(b: Builder, node: fx.Node, results: Sequence[Any], index: int) -> Any:
    """One of several results. One that a mapping leaves out may only be read by another that needs none of it."""
    found = results[index]
    readers = {getattr(user.target, "__name__", str(user.target)) for user in node.users}
    if found is None and readers - {"max_pool2d_with_indices_backward.default"}:
        raise b.refuse(
            "the step reads the places that max pooling found.",
            "max_pool2d without return_indices, or argmax over windows made by unfold",
        )
    return found


def _check(b: Builder, found: Any) -> None:
    """Shapes and types are as torch says, else a mapping is wrong."""
    made = found if isinstance(found, tuple) else (found,)
    said = b.result if isinstance(b.result, tuple | list) else (b.result,)
    for value, tensor in zip(made, said, strict=True):
        if value is not None and tensor is not None:
            want = b.type_of(tensor)
            assert value.type == want, (b.where, value.type, want)


def _unmapped(b: Builder, node: fx.Node) -> CaptureError:
    name = str(node.target)
    packet = name.removeprefix("aten.").partition(".")[0]
    if packet in _RANDOM:
        return b.refuse(
            f"the step draws random numbers (`{name}`), which a sharded step would draw differently.",
            "dropout, torch.rand, torch.randn or torch.bernoulli, or random numbers drawn with the batch",
        )
    return b.refuse(
        f"`{name}` is no operation that can be planned yet.",
        "other operations for the same, or an issue that names it",
    )
