"""How a step is traced: jit's own options, and the step underneath its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .backends.xla.calls import Call, calling
from .backends.xla.capture import Captured, convert
from .backends.xla.steps import UserStep, parameter_names, peel, step_name
from .backends.xla.trace import trace_call
from .ir.errors import UsageError


@dataclass(frozen=True)
class Options:
    """How a step is traced: jit's own static and donated arguments."""

    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()

    @classmethod
    def of(cls, step: Callable, given: Mapping[str, Any]) -> Options:
        """From what the user gave; static parameters known by number are known by name too."""
        found = cls(
            _ints(given.get("static_argnums", ())),
            _strings(given.get("static_argnames", ())),
            _ints(given.get("donate_argnums", ())),
            _strings(given.get("donate_argnames", ())),
        )
        if not found.static_argnums and not found.static_argnames:
            return found
        names = parameter_names(step)
        for number in found.static_argnums:
            if not -len(names) <= number < len(names):
                raise UsageError(
                    f"static_argnums has {number}; the step has {len(names)} positional parameters.",
                    where=step_name(step),
                    fix="a number below that, or static_argnames",
                )
        numbers = {n % len(names) for n in found.static_argnums}
        numbers |= {i for i, name in enumerate(names) if name in found.static_argnames}
        known = set(found.static_argnames) | {names[i] for i in numbers}
        return replace(
            found, static_argnums=tuple(sorted(numbers)), static_argnames=tuple(sorted(known))
        )

    def peel(self, step: Callable) -> UserStep:
        """The function that the step is underneath."""
        return peel(step, asdict(self))

    def capture(self, step: Callable, args: tuple, kwargs: dict, stages: bool = False) -> Captured:
        """Trace the step; with `stages`, so that loops over layers can be taken apart."""
        with calling(self.peel(step), args, kwargs) as call:
            return capture_call(call, stages)


def capture_call(call: Call, stages: bool) -> Captured:
    """As `Options.capture`, of a call under way."""
    return convert(trace_call(call), hold_in_loops=stages)


def _ints(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _strings(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
