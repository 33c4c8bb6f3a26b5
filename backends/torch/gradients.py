"""What a step does with gradients before its update, as clipping them: traced with the gradients as arguments.

changed(parameters, model, batch, lambda model, batch: clip_grad_norm_(model.parameters(), 1.0))

is (gradients) -> (gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import inf
from typing import Any

import torch
from torch import nn

from ...ir.errors import CaptureError
from . import compat
from .decompose import table

Change = Callable[[nn.Module, Any], Any]


def changed(
    parameters: Mapping[str, nn.Parameter], model: nn.Module, batch: Any, change: Change
) -> Any:
    """The graph of what `change` makes of the gradients of these parameters, in their order.

    Args:
        parameters, model, batch: without values.

    Raises:
        CaptureError: it takes a gradient away, or makes it of something else than gradients.
    """

    def run(*gradients: torch.Tensor) -> list[torch.Tensor]:
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient.clone()  # what it is given stays
        change(model, batch)
        return [_left(name, parameter) for name, parameter in parameters.items()]

    examples = [torch.empty_like(parameter).detach() for parameter in parameters.values()]
    try:
        with compat.norm_of_all(total_norm):
            traced = compat.traced(run, examples, table())
        traced.graph.eliminate_dead_code()
        _check_constants(traced)
        return traced
    finally:
        for parameter in parameters.values():
            parameter.grad = None


def _check_constants(traced: torch.fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        if node.op == "get_attr" and compat.is_fake(getattr(traced, str(node.target))):
            raise CaptureError(
                "gradients are changed by what is made of parameters or the batch.",
                where=compat.user_line(node) or "the change of gradients",
                fix="changes that depend on gradients alone, as clipping; or the same as a part of the loss",
            )


def _left(name: str, parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise CaptureError(
            f"the gradient of `{name}` is taken away before the update.",
            where="the change of gradients",
            fix="requires_grad_(False) for what is not trained, or gradients of 0",
        )
    return parameter.grad


def total_norm(
    gradients: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None
) -> torch.Tensor:
    """What `torch.nn.utils.get_total_norm` computes; of squares that are summed before any root, as shards can.

    Raises:
        CaptureError: it is to raise an error by values, or is another norm than those of 2 and infinity.
    """
    if error_if_nonfinite:
        raise CaptureError(
            "`error_if_nonfinite` decides in Python by a value that is known only when the step runs.",
            where="clip_grad_norm_",
            fix="error_if_nonfinite=False",
        )
    tensors = [gradients] if isinstance(gradients, torch.Tensor) else list(gradients)
    if float(norm_type) == inf:
        found = [tensor.abs().amax() for tensor in tensors]
        return torch.stack(found).amax()
    if float(norm_type) != 2:
        raise CaptureError(
            f"gradients are clipped by the norm of order {norm_type}.",
            where="clip_grad_norm_",
            fix="norm_type=2.0 or inf",
        )
    total = reduce(torch.add, [tensor.float().square().sum() for tensor in tensors])
    return total.sqrt().to(tensors[0].dtype)
