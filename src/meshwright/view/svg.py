"""The drawings of a plan: mesh, cut of a tensor, bars, distance to the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import prod

from ..ir.plan import Plan
from ..ir.units import format_seconds
from .words import duty

COLOURS = ("#4878cf", "#e08a3c", "#59a14f", "#b65d9e", "#8c8c8c", "#c9b12c", "#43a5b5", "#d4605a")
DUTY = {"data": "#4878cf", "tensor": "#e08a3c", "expert": "#b65d9e", "sequence": "#59a14f"}
MOST_CELLS = 16  # drawn along one direction; the rest is told in numbers


def mesh_picture(plan: Plan) -> str:
    """Devices as a grid: the last axis (neighbours) to the right, the others downward."""
    axes = plan.mesh.axes
    columns = axes[-1].size
    rows = prod(axis.size for axis in axes[:-1])
    shown_columns, shown_rows = min(columns, MOST_CELLS), min(rows, MOST_CELLS)
    cell, left, top = 26, 8, 22
    parts = [f'<text x="{left}" y="14">{escape(_axis_label(plan, len(axes) - 1))} →</text>']
    for r in range(shown_rows):
        for c in range(shown_columns):
            rank = r * columns + c
            x, y = left + c * (cell + 3), top + r * (cell + 3)
            colour = _tint(plan, r, c)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" rx="4" fill="{colour}"/>'
                f'<text x="{x + cell / 2}" y="{y + cell / 2 + 4}" text-anchor="middle">{rank}</text>'
            )
    height = top + shown_rows * (cell + 3) + 4
    notes = [f"{_axis_label(plan, k)} ↓" for k in range(len(axes) - 1)]
    if rows > shown_rows or columns > shown_columns:
        notes.append(f"the first {shown_rows} × {shown_columns} of {rows} × {columns} devices")
    for k, note in enumerate(notes):
        parts.append(f'<text x="{left}" y="{height + 12 + 15 * k}">{escape(note)}</text>')
    longest = max([len(note) for note in notes] + [len(_axis_label(plan, len(axes) - 1)) + 2])
    width = max(left + shown_columns * (cell + 3) + 8, 7 * longest + 16)
    return _svg(width, height + 15 * len(notes) + 4, parts, f"mesh {plan.mesh}")


def _axis_label(plan: Plan, position: int) -> str:
    use = plan.uses[position]
    return f"{use.axis}={use.size} {duty(use)}"


def _tint(plan: Plan, row: int, column: int) -> str:
    """Devices that work on the same examples have the same shade."""
    group, rest = 0, row * plan.mesh.axes[-1].size + column
    scale = 1
    for axis, use in zip(reversed(plan.mesh.axes), reversed(plan.uses), strict=True):
        rest, coordinate = divmod(rest, axis.size)
        if duty(use) == "data":
            group += scale * coordinate
            scale *= axis.size
    light = 92 - 28 * (group % 8) / 8
    return f"hsl(216 70% {light:.0f}%)"


def cut_picture(ways: Sequence[int]) -> str:
    """A tensor as a rectangle (its first and last cut dims), one device's part filled."""
    width, height = 60, 26
    cut = [(dim, n) for dim, n in enumerate(ways) if n > 1]
    if not cut:
        return _svg(width + 2, height + 2, [_rect(1, 1, width, height, "#c8d7f2")], "replicated")
    down = cut[0][1] if cut[0][0] == 0 or len(cut) > 1 else 1
    across = prod(n for _, n in cut) // down
    x_step, y_step = width / min(across, 12), height / min(down, 8)
    parts = [_rect(1, 1, width, height, "#f2f5fa"), _rect(1, 1, x_step, y_step, "#4878cf")]
    for k in range(1, min(across, 12)):
        parts.append(_line(1 + k * x_step, 1, 1 + k * x_step, height + 1))
    for k in range(1, min(down, 8)):
        parts.append(_line(1, 1 + k * y_step, width + 1, 1 + k * y_step))
    return _svg(width + 2, height + 2, parts, " × ".join(map(str, ways)))


def bars(
    items: Sequence[tuple[str, float]], limit: float, spell: Callable[[float], str], note: str
) -> str:
    """One stacked bar up to a limit, with a legend."""
    width, height = 620, 22
    total = max(limit, sum(size for _, size in items)) or 1.0
    x, parts = 0.0, [_rect(0, 4, width, height, "#eef1f5")]
    for k, (name, size) in enumerate(items):
        span = width * size / total
        label = escape(f"{name} {spell(size)}")
        parts.append(
            f"<g><title>{label}</title>{_rect(x, 4, span, height, COLOURS[k % len(COLOURS)])}</g>"
        )
        x += span
    end = width * min(1.0, limit / total)
    parts.append(
        f'<line x1="{end}" y1="0" x2="{end}" y2="{height + 8}" stroke="#c0392b" stroke-width="2"/>'
    )
    for k, (name, size) in enumerate(items):
        column, row = k % 3, k // 3
        left, base = column * 210, height + 26 + row * 17
        parts.append(_rect(left, base - 9, 10, 10, COLOURS[k % len(COLOURS)]))
        parts.append(
            f'<text x="{left + 15}" y="{base}">{escape(name)} {escape(spell(size))}</text>'
        )
    rows = -(-len(items) // 3)
    base = height + 26 + rows * 17
    parts.append(f'<text x="0" y="{base}">red line: {escape(note)}</text>')
    return _svg(width + 4, base + 6, parts, note)


def proof_picture(bound: float, objective: float) -> str:
    """The plan's time with the part below the bound filled: what is left is the gap."""
    width = 620
    proven = width * (bound / objective if objective else 1.0)
    parts = [
        _rect(0, 4, width, 16, "#f3d9b8"),
        _rect(0, 4, proven, 16, "#59a14f"),
        f'<text x="0" y="36">no plan in the searched space takes less than {format_seconds(bound)}</text>',
        f'<text x="{width}" y="36" text-anchor="end">this plan: {format_seconds(objective)}</text>',
    ]
    return _svg(width + 4, 42, parts, "proof")


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}" stroke="#9aa7b8" stroke-width="0.5"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#9aa7b8" stroke-width="0.7"/>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
