"""Requests as pairs on the command line: `--pin pp=4 --pin schedule=zb-h1`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .ir.errors import UsageError, did_you_mean
from .ir.units import parse_bytes, parse_count
from .planner.request import Request, parse_mesh, parse_pp

PINS: Mapping[str, Callable[[str], Any]] = {
    "pp": parse_pp, "schedule": str, "chunks": parse_count, "mesh": parse_mesh, "microbatches": parse_count,
    "recompute": str, "memory": parse_bytes, "program": str,
}  # fmt: skip


def request_of(pins: Sequence[str]) -> Request:
    """The request of `name=value` pairs.

    Raises:
        UsageError: no such name, or no value.
    """
    found: dict[str, Any] = {}
    for pin in pins:
        name, equals, value = pin.partition("=")
        if name not in PINS:
            raise UsageError(
                f"`{name}` cannot be pinned.", where=f"--pin {pin}", fix=did_you_mean(name, PINS)
            )
        if not equals or not value:
            raise UsageError(
                f"{name} is pinned to nothing.", where=f"--pin {pin}", fix=f"--pin {name}=VALUE"
            )
        if name in found:
            raise UsageError(f"{name} is pinned twice.", where=f"--pin {pin}", fix="one value")
        found[name] = PINS[name](value)
    return Request(**found)
