"""Arguments that a step changes in place: the caller never sees it, since jax hands a step copies.

    state["w"] = state["w"] - gradient; return loss          trained nothing: refused
    batch["x"] = batch["x"] / 255; return loss_of(batch)     a value of this step's own: fine
    state["rate"] = rate; return update(state)               a result too: fine

Refused is a new value that nobody reads, or that holds more than its own argument: something was learnt and is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from ...ir.errors import CaptureError
from .calls import Call, Ends
from .steps import is_nnx


def check_lost(call: Call, leaves: Sequence[Any]) -> None:
    """Raise for the first argument whose change is lost."""
    ends = Ends()
    closed = jax.make_jaxpr(call.pure(ends, keep_lost=True))(*leaves)
    variables, results = closed.jaxpr.invars, closed.jaxpr.outvars
    count = len(results) - len(ends.lost)
    read, kept = _needed(closed.jaxpr, results[:count]), _kept(closed.jaxpr, results[:count])
    arguments = [name.partition(".")[0].partition("[")[0] for name in call.names]
    for name, value in zip(ends.lost, results[count:], strict=True):
        if value in kept:
            continue
        own = name.partition(".")[0].partition("[")[0]
        sources = _needed(closed.jaxpr, [value])
        foreign = any(v in sources for v, a in zip(variables, arguments, strict=True) if a != own)
        if foreign or value not in read:
            raise CaptureError(
                f"the step changes its argument `{name}` in place, which jax does not carry to the caller.",
                where=f"step `{call.step.name}`",
                fix=f"return the new value from the step{_advice(call)}",
            )


def _advice(call: Call) -> str:
    return (
        ", or use nnx.jit in place of jax.jit"
        if call.step.convention == "jax" and _has_nnx(call)
        else ""
    )


def _has_nnx(call: Call) -> bool:
    return any(map(is_nnx, jax.tree.leaves((call.args, dict(call.kwargs)), is_leaf=is_nnx)))


def _kept(jaxpr: Any, values: Sequence[Any]) -> set[Any]:
    """These variables, and those that they are but for their type."""
    found = {v for v in values if not hasattr(v, "val")}
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name in ("convert_element_type", "copy") and eqn.outvars[0] in found:
            found.update(v for v in eqn.invars if not hasattr(v, "val"))
    return found


def _needed(jaxpr: Any, values: Sequence[Any]) -> set[Any]:
    """Variables that these depend on, themselves included."""
    found = {v for v in values if not hasattr(v, "val")}
    for eqn in reversed(jaxpr.eqns):
        if not found.isdisjoint(eqn.outvars):
            found.update(v for v in eqn.invars if not hasattr(v, "val"))
    return found
