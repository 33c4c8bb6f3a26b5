"""Trace a step abstractly, and say in the user's terms why it cannot be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ...ir.errors import CaptureError
from . import compat

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Traced:
    """What jax found out: the jaxpr, and the trees and names of both its ends."""

    jaxpr: Any
    in_tree: Any  # of (args, kwargs) without static arguments
    out_tree: Any
    in_avals: tuple[Any, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    donated: frozenset[int]


def trace(
    step: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> Traced:
    """Trace `step(*args, **kwargs)`; `options` are those of `jax.jit`."""
    options = {name: value for name, value in options.items() if value not in ((), None)}
    names = _parameter_names(step, len(args))
    inner = compat.is_jitted(step)
    if not inner:
        _check_arguments(args, kwargs, names, options)
    jitted = step if inner and not options else jax.jit(step, **options)
    static = _static(names, len(args), options)
    bare = [arg if i in static else _bare(arg) for i, arg in enumerate(args)]
    chosen = _as_tuple(options.get("static_argnames"))
    named = {name: arg if name in chosen else _bare(arg) for name, arg in kwargs.items()}
    try:
        traced = jitted.trace(*bare, **named)  # type: ignore[attr-defined]
    except CaptureError:
        raise
    except Exception as error:
        raise _explained(error, step, args, kwargs, names) from error
    infos, in_tree = jax.tree.flatten(traced.args_info)
    donated = frozenset(p for p, info in enumerate(infos) if info.donated)
    if inner and options:
        donated |= _donated_inside(traced.jaxpr)
    kept = _kept_names(names, args, options)
    return Traced(
        jaxpr=traced.jaxpr,
        in_tree=in_tree,
        out_tree=jax.tree.structure(traced.out_info),
        in_avals=tuple(traced.jaxpr.in_avals),
        input_names=_input_names(traced.args_info, kept),
        output_names=tuple(
            "result" + jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(traced.out_info)
        ),
        donated=donated,
    )


def _bare(argument: Any) -> Any:
    """Without the layout that arrays have by now: the plan decides that."""
    return jax.tree.map(_shape, argument)


def _shape(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)


def _donated_inside(closed: Any) -> frozenset[int]:
    """Donations of a jitted step that was wrapped again: they stand on its one call."""
    eqns = closed.jaxpr.eqns
    if len(eqns) != 1 or "donated_invars" not in eqns[0].params:
        return frozenset()
    given = {v for v, d in zip(eqns[0].invars, eqns[0].params["donated_invars"], strict=True) if d}
    return frozenset(p for p, var in enumerate(closed.jaxpr.invars) if var in given)


# ---------------------------------------------------------------- names


def _parameter_names(step: Callable[..., Any], count: int) -> list[str]:
    """The step's own names for `count` positional arguments."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return [f"args[{i}]" for i in range(count)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return [*names, *(f"{rest}[{i}]" for i in range(count - len(names)))]


def _kept_names(names: list[str], args: tuple, options: Mapping[str, Any]) -> list[str]:
    """Names of the positional arguments that are not static."""
    static = _static(names, len(args), options)
    return [name for i, name in enumerate(names[: len(args)]) if i not in static]


def _static(names: list[str], count: int, options: Mapping[str, Any]) -> set[int]:
    numbers = {n if n >= 0 else n + len(names) for n in _as_tuple(options.get("static_argnums"))}
    by_name = set(_as_tuple(options.get("static_argnames")))
    return numbers | {i for i, name in enumerate(names[:count]) if name in by_name}


def _as_tuple(value: Any) -> tuple:
    return () if value is None else (value,) if isinstance(value, int | str) else tuple(value)


def _input_names(info: Any, names: Sequence[str]) -> tuple[str, ...]:
    args, kwargs = info
    found = [
        _named(names[i] if i < len(names) else f"args[{i}]", path)
        for i, arg in enumerate(args)
        for path, _ in jax.tree_util.tree_leaves_with_path(arg)
    ]
    found += [
        _named(name, path)
        for name, arg in sorted(kwargs.items())
        for path, _ in jax.tree_util.tree_leaves_with_path(arg)
    ]
    return tuple(found)


def _named(name: str, path: Path) -> str:
    return name + jax.tree_util.keystr(path)


# ---------------------------------------------------------------- what is refused


def _check_arguments(
    args: tuple, kwargs: Mapping[str, Any], names: list[str], options: Mapping[str, Any]
) -> None:
    static = _static(names, len(args), options)
    fixed = set(_as_tuple(options.get("static_argnames"))) | {
        names[i] for i in static if i < len(names)
    }
    for name, arg in [*zip(names, args, strict=False), *kwargs.items()]:
        if name in fixed:
            _check_static(name, arg)
        else:
            _check_leaves(name, arg)


def _check_static(name: str, arg: Any) -> None:
    try:
        hash(arg)
    except TypeError:
        raise CaptureError(
            f"the static argument is a {type(arg).__name__}, which cannot be hashed.",
            where=f"step argument `{name}`",
            fix="a tuple, a frozen dataclass, a string; or pass arrays as ordinary arguments",
        ) from None


def _check_leaves(name: str, arg: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
        if not _is_array(leaf):
            raise CaptureError(
                f"{_shortened(leaf)} is a {type(leaf).__name__}, not an array.",
                where=f"step argument `{_named(name, path)}`",
                fix=f"an array; static_argnames={name!r} if `{name}` is fixed; or leave the leaf out",
            )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV"
    return isinstance(leaf, bool | int | float | complex) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def _shortened(leaf: Any) -> str:
    text = repr(leaf).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        "UnexpectedTracerError",
        "the step keeps a value of its trace in a place that outlives it.",
        "return it from the step instead of storing it in a global, an attribute or a list",
    ),
)


def _explained(
    error: Exception,
    step: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    names: list[str],
) -> CaptureError:
    """jax's error in three lines; the whole of it stays attached as the cause."""
    if compat.is_jitted(step):  # its static arguments are not known to us: look only now
        _blame_leaf(error, args, kwargs, names)
    where = next(_user_places(error), "") or f"step `{getattr(step, '__name__', step)}`"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    for kind, what, fix in _ADVICE:
        if kind in kinds:
            return CaptureError(what, where=where, origin=_first_line(error), fix=fix)
    return CaptureError(
        f"the step cannot be traced: {type(error).__name__}: {_first_line(error)}",
        where=where,
        fix="run the step once with jax.jit and mend what it reports",
    )


def _blame_leaf(error: Exception, args: tuple, kwargs: Mapping[str, Any], names: list[str]) -> None:
    if isinstance(error, TypeError) and "valid JAX type" in str(error):
        for name, arg in [*zip(names, args, strict=False), *kwargs.items()]:
            _check_leaves(name, arg)


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
        if not compat.is_library(code.co_filename) and code.co_filename != __file__:
            yield compat.line_in_code(code, lasti)
