"""What commands that give figures share: changes of a cluster, bands, memory by cause."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import UsageError
from ..ir.units import format_bytes, format_seconds

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a field of the cluster first: fabric.ib400.bandwidth=100GB/s. May be repeated.",
    ),
]
TraceFile = Annotated[
    Path | None, typer.Option(help="Also write the timeline for Perfetto (ui.perfetto.dev).")
]


def changes_of(pairs: list[str] | None) -> dict[str, str]:
    """Dotted path -> value, as `--set` gives them."""
    found = {}
    for pair in pairs or []:
        field, equals, value = pair.partition("=")
        if not equals or not field or not value:
            raise UsageError(
                f"`{pair}` changes nothing.",
                where="--set",
                fix="--set fabric.ib400.bandwidth=100GB/s",
            )
        if field in found:
            raise UsageError(f"`{field}` is set twice.", where="--set", fix="once")
        found[field] = value
    return found


def likely(between: tuple[float, float] | None) -> str:
    """Where nine in ten published runs would put a predicted step; the prediction itself may lie outside."""
    if between is None:
        return ""
    return f" predicted; {format_seconds(between[0])} to {format_seconds(between[1])} by how such runs went"


def memory_words(causes: dict[str, float]) -> str:
    """Bytes by cause, the most first."""
    rows = [
        f"{cause} {format_bytes(held)}"
        for cause, held in sorted(causes.items(), key=lambda c: -c[1])
        if held > 0
    ]
    return f"{format_bytes(sum(causes.values()))}: {', '.join(rows)};"
