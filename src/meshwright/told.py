"""`batch_argnums`: which arguments of a step are its batch, and in which dim.

batch_argnums=1                     the second argument, dim 0 of all its arrays
batch_argnums=(1, "mask")           by number or by name
batch_argnums={"x": 1, "y": 0}      with the dim of each
batch_argnums={1: {"x": 0, "key": None}}   a tree above the argument, as `in_axes` of `jax.vmap`; None: no batch
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from .backends.xla.capture import Captured
from .ir.analysis.told import HOW, tell_batch
from .ir.errors import UsageError, did_you_mean

BatchArgs = int | str | Sequence[int | str] | Mapping[Any, Any] | None


def batch_told(captured: Captured, step: Callable[..., Any], given: BatchArgs) -> Captured:
    """The captured step with the batch as told; None: nothing is told, and the batch is inferred.

    Raises:
        UsageError: no such argument, or no such tree above it.
        PlanError: dims that contradict the step; see `tell_batch`.
    """
    if given is None:
        return captured
    inputs = captured.graph.input_names
    words = list(dict.fromkeys(_leading(name) for name in inputs))
    names = _positional(step) or words
    dims: dict[int, int] = {}
    for key, axes in _pairs(given):
        name = key if isinstance(key, str) else _named(key, names)
        if name not in words:
            what = f"the step has no array argument `{name}`."
            raise UsageError(what, where=f"batch_argnums: {key!r}", fix=did_you_mean(name, words))
        dims |= _dims_of(name, axes, inputs)
    return replace(captured, graph=tell_batch(captured.graph, dims))


def _leading(name: str) -> str:
    """`state` of "state.params['w']"."""
    return name.partition(".")[0].partition("[")[0]


def _positional(step: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return []
    return [p.name for p in parameters if p.kind in kinds]


def _pairs(given: Any) -> list[tuple[int | str, Any]]:
    """(argument, dims) of what the user gave."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, int | str):
        pairs = [(given, 0)]
    elif isinstance(given, Sequence):
        pairs = [(key, 0) for key in given]
    else:
        raise UsageError(f"batch_argnums cannot be {given!r}.", where="batch_argnums", fix=HOW)
    for key, _ in pairs:
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise UsageError(f"batch_argnums cannot hold {key!r}.", where="batch_argnums", fix=HOW)
    return pairs


def _named(number: int, names: Sequence[str]) -> str:
    if not -len(names) <= number < len(names):
        what = f"the step has no argument {number}: they are {', '.join(names)}."
        raise UsageError(what, where=f"batch_argnums: {number}", fix=HOW)
    return names[number]


def _dims_of(name: str, axes: Any, inputs: Sequence[str]) -> dict[int, int]:
    """Input position -> dim; a dim above a part of the argument is that of all its arrays."""
    found: dict[int, int] = {}
    for path, axis in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda axis: axis is None):
        part = name + jax.tree_util.keystr(path)
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise UsageError(f"{axis!r} is no dim.", where=f"batch_argnums: {part}", fix=HOW)
        below = [
            p
            for p, full in enumerate(inputs)
            if full == part or full.startswith((f"{part}[", f"{part}."))
        ]
        if not below:
            raise UsageError(
                f"the step has no array `{part}`.",
                where="batch_argnums",
                fix=did_you_mean(part, inputs),
            )
        if axis is not None:
            found.update(dict.fromkeys(below, axis))
    return found


def parse_batch_args(text: str) -> dict[int | str, int]:
    """`1,2` or `x=0,mask=1`, as on the command line."""
    found: dict[int | str, int] = {}
    for part in text.split(","):
        name, equals, dim = (word.strip() for word in part.partition("="))
        if not name or (equals and not _is_number(dim.removeprefix("-"))):
            raise UsageError(
                f"`{text}` names no arguments.", where="--batch-argnums", fix="1,2 or x=0,mask=1"
            )
        found[int(name) if _is_number(name) else name] = int(dim or 0)
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
