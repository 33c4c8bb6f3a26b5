"""A plan in one terminal screen, as plain text."""

from __future__ import annotations

from collections.abc import Iterable

from ..backends.xla.audit import Audit
from ..ir.plan import Plan
from ..ir.units import format_bytes, format_seconds

MOST_ROWS = 24


def plan_text(plan: Plan) -> str:
    """Mesh, estimate, memory by cause, shardings, communication, proof."""
    blocks = [
        _head(plan),
        _memory(plan),
        _table("parameters and inputs", _tensor_rows(plan)),
        _table("communication per step", _collective_rows(plan)),
        _proof(plan),
    ]
    return "\n\n".join(block for block in blocks if block)


def _head(plan: Plan) -> str:
    e = plan.estimate
    return "\n".join(
        [
            f"plan for {plan.name} on {plan.cluster.name}",
            f"  mesh          {plan.mesh}   ({plan.mesh.size} devices)",
            f"  step          {format_seconds(e.step_seconds)}   compute {format_seconds(e.compute_seconds)}, "
            f"communication {format_seconds(e.communication_seconds)}",
            f"  memory        {format_bytes(e.peak_bytes)} of {format_bytes(e.limit_bytes)} per device",
            f"  microbatches  {plan.microbatches}",
            f"  recompute     {plan.recompute}",
        ]
    )


def _memory(plan: Plan) -> str:
    rows = [(cause, format_bytes(size)) for cause, size in plan.estimate.memory.items() if size > 0]
    return _table("memory at the peak, by cause", rows)


def _tensor_rows(plan: Plan) -> list[tuple[str, ...]]:
    kept = [t for t in plan.tensors if t.role != "optimizer"]
    kept.sort(key=lambda t: (t.role == "activation", -t.local_bytes))
    rows = [
        (
            t.name,
            t.role,
            f"{t.dtype}{list(t.shape)}",
            f"{list(t.local_shape)}",
            t.sharding,
            f"×{t.count}",
            format_bytes(t.local_bytes),
        )
        for t in kept[:MOST_ROWS]
    ]
    left = len(plan.tensors) - len(rows)
    return [*rows, (f"... {left} more",)] if left else rows


def _collective_rows(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            c.kind,
            "·".join(c.axes),
            format_bytes(c.nbytes),
            f"×{c.count}",
            format_seconds(c.seconds),
            c.phase,
            c.what,
        )
        for c in plan.collectives[:12]
    ]


def _proof(plan: Plan) -> str:
    p = plan.proof
    lines = [
        f"proof: {p.status}, stopped by {p.stopped_by}; bound {format_seconds(p.lower_bound)}, gap {p.gap:.2%}; "
        f"{p.seconds:.1f} s of search, seed {p.seed}",
        f"  cost model {p.cost_model}: {p.band}",
        f"  not searched: {'; '.join(p.left_out)}",
    ]
    lines += [f"  opaque: {op}" for op in plan.opaque]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def audit_text(audit: Audit) -> str:
    """Predicted against compiled bytes, by kind and axes."""
    rows = [
        (
            line.kind,
            "·".join(line.axes) or "other groups",
            format_bytes(line.predicted_bytes),
            format_bytes(line.compiled_bytes),
            f"{line.predicted_count} -> {line.compiled_count}",
            f"{line.difference:+.1%}",
        )
        for line in audit.lines
    ]
    total = f"total {format_bytes(audit.predicted_bytes)} predicted, {format_bytes(audit.compiled_bytes)} compiled ({audit.difference:+.1%})"
    peak = f"memory {format_bytes(audit.predicted_peak)} predicted, {format_bytes(audit.compiled_peak)} compiled"
    return "\n".join([_table("collectives per step: predicted, compiled", rows), total, peak])


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    lines = [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
    return "\n".join([title, *lines])
