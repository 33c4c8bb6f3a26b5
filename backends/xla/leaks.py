"""Values of a trace that outlive it: what a step stores in a list, an attribute or a global is no result.

jax notices only when such a value is used again. Here the trace itself is watched: it lives on where one of its
values does, those of loops and derivatives inside it too. Who holds it is looked for among what is the user's: the
step and what it closes over, its arguments, modules that are no library's.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...ir.errors import CaptureError
from . import compat
from .calls import Call

MOST = 20_000  # objects that are looked at
AT_ONCE = 32  # objects whose holders are looked for in one go
_DEEPEST = 8  # from the value to what has a name


def watched(flat: Callable[..., Any], traces: list[Any]) -> Callable[..., Any]:
    """The same function, which notes the trace that it runs in."""

    def noted(*leaves: Any) -> Any:
        traces.extend(
            weakref.ref(leaf._trace) for leaf in leaves[:1] if isinstance(leaf, compat.Tracer)
        )
        return flat(*leaves)

    noted.__name__ = noted.__qualname__ = flat.__name__
    return noted


def check_leaks(traces: Sequence[Any], call: Call) -> None:
    """Raise where something of the user's still holds a value of a trace that is over."""
    if not _suspected(traces):
        return
    gc.collect()
    # By type: `isinstance` asks an object for its class, which one that stands for another that is gone cannot give.
    tracers = (x for x in gc.get_objects() if issubclass(type(x), compat.Tracer))
    leaked = [x for x in tracers if _is_of(x, traces)]
    place = _holder(leaked, call)
    if place:
        raise CaptureError(
            f"the step stores a value that it computes in {place}: under jax that happens once, while the step is "
            "traced, and never again.",
            where=f"step `{call.step.name}`",
            fix="return the value from the step, and store it where the step is called",
        )


def _suspected(traces: Sequence[Any]) -> bool:
    """Whether a value may be left of these traces, or of a trace inside one: what keeps a trace alive is mostly a
    function that jax keeps. Values that are over, but not collected yet, count too."""
    level = [trace for each in traces if (trace := each()) is not None]
    seen = set(map(id, level))
    while level:
        holders = gc.get_referrers(*level)
        if any(issubclass(type(holder), compat.Tracer) for holder in holders):
            return True
        # A trace inside holds this one itself, or by the dictionary of its attributes.
        level = [
            x for x in holders if issubclass(type(x), compat.Trace | dict) and id(x) not in seen
        ]
        seen.update(map(id, level))
    return False


def _is_of(tracer: Any, traces: Sequence[Any]) -> bool:
    known = {id(trace()) for trace in traces if trace() is not None}
    seen, trace = 0, tracer._trace
    while trace is not None and seen < 50:
        if id(trace) in known:
            return True
        trace, seen = getattr(trace, "parent_trace", None), seen + 1
    return False


def _holder(leaked: list[Any], call: Call) -> str:
    """What of the user's holds one of these, breadth first; "" where nothing does."""
    named = _named(call)
    seen = {id(leaked), *map(id, leaked)}
    level: list[tuple[Any, str]] = [(tracer, "") for tracer in leaked]
    for _ in range(_DEEPEST):
        above: list[tuple[Any, str]] = []
        for holder, held, path in _holders(level):
            if id(holder) in seen or isinstance(holder, types.FrameType) or len(seen) > MOST:
                continue
            seen.add(id(holder))
            step = _step(holder, held)
            if module := _module(holder):
                if _is_library(module):  # its caches are no store of the user's
                    continue
                return f"the global `{step.removeprefix('.')}{path}` of {module.__name__}"
            if id(holder) in named:
                return f"`{named[id(holder)]}{step}{path}`"
            above.append((holder, step + path))
        seen |= {id(level), id(above)}
        level = above
    return ""


def _holders(level: list[tuple[Any, str]]) -> Iterator[tuple[Any, Any, str]]:
    """What holds these values, with the value and its path: many at once, as each look goes through all that lives."""
    for start in range(0, len(level), AT_ONCE):
        paths = {id(held): path for held, path in level[start : start + AT_ONCE]}
        some = (held for held, _ in level[start : start + AT_ONCE])
        for holder in gc.get_referrers(*some):
            held = next((each for each in gc.get_referents(holder) if id(each) in paths), None)
            if held is not None:
                yield holder, held, paths[id(held)]


def _named(call: Call) -> dict[int, str]:
    """The step's own objects: what it closes over, is bound to, or is given as a static argument."""
    function = _unwrapped(call.step.function)
    named: dict[int, str] = {}
    code = getattr(function, "__code__", None)
    for name, cell in zip(
        getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=True
    ):
        named[id(cell)] = name
    named[id(getattr(function, "__dict__", None))] = call.step.name
    named[id(getattr(function, "__defaults__", None))] = f"a default of {call.step.name}"
    bound = getattr(call.step.function, "__self__", None)
    if bound is not None:
        named[id(bound)] = type(bound).__name__
    for value in (*call.args, *call.kwargs.values()):
        if not isinstance(value, str | int | float | bool | None):
            named[id(value)] = f"a {type(value).__name__} that it is given"
    return named


def _unwrapped(function: Any) -> Any:
    """The Python function of a method or partial."""
    while hasattr(function, "__func__") or hasattr(function, "func"):
        function = getattr(function, "__func__", None) or function.func
    return function


def _step(holder: Any, held: Any) -> str:
    """How a holder says what it holds: `[2]`, `.name`, or nothing."""
    if isinstance(holder, dict):
        key = next((k for k, v in holder.items() if v is held), None)
        return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"
    if isinstance(holder, list | tuple):
        places = (k for k, v in enumerate(holder) if v is held)
        if (place := next(places, None)) is not None:  # else in an attribute of its own
            return f"[{place}]"
    attributes = getattr(holder, "__dict__", None)
    name = (
        next((k for k, v in attributes.items() if v is held), "")
        if isinstance(attributes, dict)
        else ""
    )
    return f".{name}" if name else ""


def _module(holder: Any) -> types.ModuleType | None:
    """The module whose globals these are."""
    name = holder.get("__name__") if isinstance(holder, dict) else None
    module = sys.modules.get(name) if isinstance(name, str) else None
    return module if module is not None and vars(module) is holder else None


def _is_library(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None) or "<none>"
    return compat.is_library(file) and module.__name__ != "__main__"
