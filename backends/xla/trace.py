"""Trace a step abstractly, and say in the user's terms why it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.errors import CaptureError, UsageError
from . import compat
from .calls import Call, Ends, calling, is_value, shortened
from .leaks import check_leaks, watched
from .lost import check_lost
from .steps import peel


@dataclass(frozen=True)
class Traced:
    """What jax found out: the jaxpr, and the trees and names of both its ends."""

    jaxpr: Any
    in_tree: Any  # of (args, kwargs) without static arguments
    in_avals: tuple[Any, ...]
    input_names: tuple[str, ...]
    donated: frozenset[int]
    ends: Ends = field(default_factory=Ends)

    @property
    def out_tree(self) -> Any:
        return self.ends.tree


def trace(
    step: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> Traced:
    """Trace `step(*args, **kwargs)`; `options` are those of `jax.jit`."""
    with calling(peel(step, options), args, kwargs) as call:
        return trace_call(call)


def trace_call(call: Call) -> Traced:
    """Trace a step as a function of its array leaves.

    Raises:
        CaptureError: it cannot be traced, takes or returns something that is no array, or does
            something that is lost outside the trace.
    """
    check_static(call)
    _check_leaves(call)
    ends = Ends()
    flat = call.pure(ends)
    bare = [_shape(leaf) for leaf in call.leaves]
    traces: list[Any] = []
    try:
        traced = jax.jit(watched(flat, traces)).trace(*bare)
    except (CaptureError, UsageError):  # of the step, or of a kernel that it declares
        raise
    except Exception as error:
        raise _explained(error, call) from error
    check_leaks(traces, call)
    if ends.lost:
        check_lost(call, bare)
    names = dict(enumerate(call.names)) | ends.input_names
    return Traced(
        jaxpr=traced.jaxpr,
        in_tree=call.tree,
        in_avals=tuple(traced.jaxpr.in_avals),
        input_names=tuple(names.values()),
        donated=call.donated,
        ends=ends,
    )


def _shape(leaf: Any) -> Any:
    """Without the layout that arrays have by now: the plan decides that."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)


# ---------------------------------------------------------------- what is refused


def check_static(call: Call) -> None:
    """Raise where what is static cannot be told apart from another, as programs are by it."""
    try:
        hash((call.tree, call.static))
    except TypeError:
        name, value = call.unhashable()
        raise CaptureError(
            f"the static argument is {shortened(value)}, a {type(value).__name__}, which cannot be hashed.",
            where=f"step argument `{name}`",
            fix="a tuple, a frozen dataclass, a string; or pass arrays as ordinary arguments",
        ) from None


def _check_leaves(call: Call) -> None:
    for name, leaf in zip(call.names, call.leaves, strict=True):
        if not is_value(leaf):
            raise CaptureError(
                f"{shortened(leaf)} is a {type(leaf).__name__}, not an array.",
                where=f"step argument `{name}`",
                fix=_instead(name, leaf),
            )
        shape = getattr(leaf, "shape", ())
        if not all(isinstance(size, int | np.integer) and size >= 0 for size in shape):
            raise CaptureError(
                f"a shape of {shape} is no array's.",
                where=f"step argument `{name}`",
                fix="sizes that are numbers, 0 or more; a plan is for one size of each dim",
            )
        if isinstance(leaf, int) and leaf.bit_length() >= jnp.iinfo(jnp.asarray(0).dtype).bits:
            raise CaptureError(
                f"{shortened(leaf)} does not fit into {jnp.asarray(0).dtype}, as which jax takes Python's integers.",
                where=f"step argument `{name}`",
                fix="a smaller number, an array of an unsigned or a floating type, or jax_enable_x64",
            )


def _instead(name: str, leaf: Any) -> str:
    if not isinstance(leaf, Hashable):
        return "an array, or leave it out"
    if name.isidentifier():
        return f"an array, or static_argnames={name!r} if it is fixed"
    return "leave it out of the argument, or give it on its own, named by static_argnames, if it is fixed"


_ADVICE: tuple[tuple[str, str, str], ...] = (
    (
        "TracerBoolConversionError",
        "the step decides in Python by a value that is known only when it runs.",
        "jnp.where or jax.lax.cond on the array; or make a fixed flag a static argument",
    ),
    (
        "TracerIntegerConversionError",
        "the step uses, as a Python integer, a value that is known only when it runs.",
        "jax.lax.dynamic_slice or jnp.take for indices; or make a fixed size a static argument",
    ),
    (
        "TracerArrayConversionError",
        "the step hands an array being traced to numpy, which needs its values.",
        "the same function from jax.numpy",
    ),
    (
        "NonConcreteBooleanIndexError",
        "the step makes an array whose shape depends on values.",
        "jnp.where with three arguments, or the `size=` argument",
    ),
    (
        "ConcretizationTypeError",
        "the step needs, while it is traced, a value that is known only when it runs.",
        "jax.numpy and jax.lax control flow on arrays; or make a fixed value a static argument",
    ),
    (
        "TraceContextError",
        "the step updates an nnx object that is not among its arguments.",
        "give the object to the step as an argument; it is updated in place all the same",
    ),
    (
        "unbound axis name",
        "the step averages or counts over devices by the name of an axis, as under pmap.",
        "remove pmean, psum and axis_index: the step sees the whole batch, and its mean is over all of it",
    ),
    (
        "shard_map",
        "the step places data itself, by `shard_map`; planning decides that here.",
        "give the function without shard_map; it takes whole arrays",
    ),
    (
        "UnexpectedTracerError",
        "the step keeps a value of its trace in a place that outlives it.",
        "return it from the step instead of storing it in a global, an attribute or a list",
    ),
)


_BY_TEXT = (  # errors whose class says too little
    (NameError, "unbound axis name", "unbound axis name"),
    (ValueError, "from different trace level", "TraceContextError"),
    (ValueError, "to shard_map", "shard_map"),
)
_JITS = {"jax": "jax.jit", "nnx": "nnx.jit", "equinox": "eqx.filter_jit"}


def _explained(error: Exception, call: Call) -> CaptureError:
    """jax's error in three lines; the whole of it stays attached as the cause."""
    where = next(_user_places(error), "") or f"step `{call.step.name}`"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    kinds |= {
        name for kind, text, name in _BY_TEXT if isinstance(error, kind) and text in str(error)
    }
    for kind, what, fix in _ADVICE:
        if kind in kinds:
            return CaptureError(what, where=where, origin=_first_line(error), fix=fix)
    return CaptureError(
        f"the step cannot be traced: {type(error).__name__}: {_first_line(error)}",
        where=where,
        fix=f"run the step once with {_JITS[call.style]} and mend what it reports",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _user_places(error: BaseException) -> Iterator[str]:
    """`file.py:line` of the user's frames the error passed, innermost first."""
    entries = []
    place = error.__traceback__
    while place is not None:
        entries.append((place.tb_frame.f_code, place.tb_lasti))
        place = place.tb_next
    for code, lasti in reversed(entries):
        if not compat.is_library(code.co_filename):
            yield compat.line_in_code(code, lasti)
