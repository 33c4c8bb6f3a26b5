"""What a user's step is underneath: a plain function, and what its wrappers say about its arguments.

    jax.jit(f, static_argnums=2)            f, argument 2 static
    functools.partial(jitted, state)        the same f, its first argument given
    nnx.jit(f), eqx.filter_jit(f)           f, called as its library calls it
    nnx.cached_partial(jitted, model)       f by nnx's convention, its first argument given

Only one `jit` is taken off: one inside another is part of the function, as for jax. Libraries are known by what is
imported already; none is imported here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from ...ir.errors import CaptureError, UsageError
from . import compat

Convention = Literal["plain", "jax", "nnx", "equinox"]


@dataclass(frozen=True, eq=False)
class UserStep:
    """A function, and which of its arguments are static, donated or given already.

    Numbers count the function's own parameters, `given` included. A parameter that is known by
    number and by name stands in both sets.
    """

    function: Callable[..., Any]
    name: str
    convention: Convention = "plain"
    static: frozenset[int] = frozenset()
    static_names: frozenset[str] = frozenset()
    donated: frozenset[int] = frozenset()
    donated_names: frozenset[str] = frozenset()
    donates_rest: int | None = None  # arguments from this number on are donated, and all keywords
    given: tuple[Any, ...] = ()
    given_names: Mapping[str, Any] = field(default_factory=dict)
    constant: frozenset[int] = frozenset()  # given arguments that are part of the function

    def without_static(self) -> UserStep:
        """How a program of it is called, for which static arguments are settled."""
        gone = self.static | self.constant
        return replace(
            self,
            given=tuple(value for i, value in enumerate(self.given) if i not in gone),
            given_names={k: v for k, v in self.given_names.items() if k not in self.static_names},
            static=frozenset(), static_names=frozenset(), constant=frozenset(),
        )  # fmt: skip


def peel(step: Callable[..., Any], options: Mapping[str, Any] | None = None) -> UserStep:
    """The function under a step's wrappers; `options` are `jax.jit`'s, said of the step itself.

    Raises:
        UsageError: no plain function of arrays: a generator, a coroutine, `pmap`.
        CaptureError: the wrapper places data, which planning decides here.
    """
    said = {name: _as_set(value) for name, value in (options or {}).items()}
    found = _peeled(step)
    _check_kind(found.function, found.name)
    shift = len(found.given)
    names = parameter_names(found.function)
    static = found.static | _shifted(said.get("static_argnums"), shift, names)
    static_names = found.static_names | said.get("static_argnames", frozenset())
    return replace(
        found,
        static=static | {i for i, name in enumerate(names) if name in static_names},
        static_names=static_names | {names[i] for i in static if i < len(names)},
        donated=found.donated | _shifted(said.get("donate_argnums"), shift, names),
        donated_names=found.donated_names | said.get("donate_argnames", frozenset()),
    )


def _peeled(step: Callable[..., Any]) -> UserStep:
    if isinstance(step, functools.partial):
        return _partial(step)
    if compat.is_jitted(step):
        return _jitted(step, step)
    if (wrapper := _nnx_wrapper(step)) is not None:
        return wrapper
    if _is_filter_jitted(step):
        return _filter_jitted(step)
    if _is_pmapped(step):
        raise UsageError(
            "a step under `pmap` is parallel already, and takes a batch for each device.",
            where=step_name(step),
            fix="give the function itself, without pmap and without pmean; it takes the whole batch at once",
        )
    if inspect.ismethod(step) and _is_module(step.__self__):
        return UserStep(step.__func__, step_name(step), given=(step.__self__,))
    return UserStep(step, step_name(step))


def _partial(step: functools.partial) -> UserStep:
    """Of a jitted function all that is given is an argument as any; of another it is part of it, but for modules."""
    inner = _peeled(step.func)
    count = len(inner.given)
    given = (*inner.given, *step.args)
    named = {**inner.given_names, **step.keywords}
    fixed = frozenset(range(count, len(given))) if inner.convention == "plain" else frozenset()
    fixed = frozenset(i for i in fixed if not _holds_module(given[i]))
    if inner.convention == "plain" and step.keywords:
        open_names = {k: v for k, v in step.keywords.items() if _holds_module(v)}
        closed = {k: v for k, v in step.keywords.items() if k not in open_names}
        function = functools.partial(inner.function, **closed) if closed else inner.function
        inner, named = replace(inner, function=function), {**inner.given_names, **open_names}
    return replace(inner, given=given, given_names=named, constant=inner.constant | fixed)


def _jitted(jitted: Any, step: Any, convention: Convention = "jax") -> UserStep:
    """`jitted` is a `jax.jit`; `step` what the user calls and what has the function."""
    info = jitted._jit_info
    for leaf in (*info.in_shardings_leaves, *info.out_shardings_leaves):
        placed = isinstance(leaf, jax.sharding.Sharding | jax.sharding.PartitionSpec)
        if placed and not compat.is_vacant(leaf):
            raise CaptureError(
                "the step's jit has shardings of its own, in_shardings or out_shardings; planning decides that here.",
                where=step_name(step),
                fix="leave them out, or pin what you want through the plan's request",
            )
    return UserStep(
        step.fun if convention == "nnx" else jitted.__wrapped__,
        step_name(step),
        convention,
        frozenset(info.static_argnums),
        frozenset(info.static_argnames),
        frozenset(info.donate_argnums),
        frozenset(info.donate_argnames),
    )


# ---------------------------------------------------------------- flax.nnx and equinox


def nnx() -> Any:
    """flax.nnx, where the user has imported it."""
    return sys.modules.get("flax.nnx")


def equinox() -> Any:
    """equinox, where the user has imported it."""
    return sys.modules.get("equinox")


def is_nnx(value: Any) -> bool:
    """Whether nnx treats this as an object that is updated in place."""
    library = nnx()
    return library is not None and isinstance(value, (nnx_node(), library.Variable))


def nnx_node() -> type:
    """The class of nnx's modules, optimizers and metrics, which older versions call Object."""
    return getattr(nnx(), "Pytree", None) or nnx().Object


def _nnx_wrapper(step: Any) -> UserStep | None:
    if nnx() is None:
        return None
    code: Any = getattr(step, "__code__", None)
    if getattr(code, "co_name", "") == "cache_args_wrapper" and "cached_args" in code.co_freevars:
        held = dict(zip(code.co_freevars, (c.cell_contents for c in step.__closure__), strict=True))
        inner = _peeled(held["f"])
        return replace(inner, given=(*inner.given, *held["cached_args"]))
    jitted = getattr(step, "jitted_fn", None)
    if type(step).__module__.startswith("flax.nnx.") and compat.is_jitted(jitted):
        bound = tuple(getattr(step, "partial_args", ()))
        flat = (
            type(step).__name__ == "SimpleJitPartialWrapped"
        )  # its function takes one list of all
        return replace(_jitted(jitted, step, "nnx"), given=(list(bound),) if flat else bound)
    return None


def _is_filter_jitted(step: Any) -> bool:
    library = equinox()
    return library is not None and isinstance(step, library.Module) and hasattr(step, "donate_rest")


def _filter_jitted(step: Any) -> UserStep:
    rest = 0 if step.donate_first else 1 if step.donate_rest else None
    return UserStep(step.__wrapped__, step_name(step), "equinox", donates_rest=rest)


def _is_module(value: Any) -> bool:
    library = equinox()
    return is_nnx(value) or (library is not None and isinstance(value, library.Module))


def _holds_module(value: Any) -> bool:
    return any(map(is_nnx, jax.tree.leaves(value, is_leaf=is_nnx)))


def _is_pmapped(step: Any) -> bool:
    code: Any = getattr(step, "__code__", None)
    file = getattr(code, "co_filename", "").replace("\\", "/")
    return file.endswith(("/jax/_src/pmap.py", "/jax/_src/api.py")) and "pmap" in code.co_qualname


# ---------------------------------------------------------------- names, and what is refused


def step_name(step: Any) -> str:
    while isinstance(step, functools.partial):
        step = step.func
    return getattr(step, "__qualname__", type(step).__name__)


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [parameter.name for parameter in found if parameter.kind in kinds]


def argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """The function's own names for `count` positional arguments."""
    names = parameter_names(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return [*names, *(f"{rest}[{i}]" for i in range(count - len(names)))]


def _as_set(value: Any) -> frozenset:
    return frozenset((value,) if isinstance(value, int | str) else value)


def _shifted(numbers: frozenset[int] | None, shift: int, names: list[str]) -> frozenset[int]:
    """Numbers that count from the step's first open argument, or from its last, as the function's own."""
    return frozenset(n + shift if n >= 0 else n + len(names) for n in numbers or ())


def _check_kind(function: Callable[..., Any], name: str) -> None:
    for kind, is_kind in (
        ("an asynchronous function", inspect.iscoroutinefunction),
        ("an asynchronous generator", inspect.isasyncgenfunction),
        ("a generator", inspect.isgeneratorfunction),
    ):
        if is_kind(function):
            raise UsageError(
                f"the step is {kind}, which jax cannot trace.",
                where=name,
                fix="a plain function that does one step and returns its results; loop or await around it",
            )
