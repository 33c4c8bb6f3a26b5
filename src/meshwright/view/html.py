"""A plan as static HTML and SVG, for notebooks and reports: no scripts, nothing fetched.

Sections: headline, mesh picture, what each axis cuts, memory by cause, tensors
with a drawing of their cut, communication, proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import prod

from ..ir.execution import Execution
from ..ir.plan import Plan, Tensor
from ..ir.units import format_bytes, format_seconds
from ..pipeline_view import parts_of_step
from .svg import bars, cut_picture, mesh_picture, proof_picture
from .text import largest
from .words import claim, duty, ended, enough, lasted, share, words

TENSORS, COLLECTIVES = 16, 10

STYLE = """
.mw{font:14px/1.45 system-ui,sans-serif;color:#1c2430;background:#fff;padding:16px 20px;
 border:1px solid #d8dee6;border-radius:8px;max-width:980px}
.mw h3{margin:0 0 2px;font-size:17px}
.mw h4{margin:18px 0 6px;font-size:14px;color:#48566a;font-weight:600}
.mw .lead{color:#48566a;margin:0 0 10px}
.mw .facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:10px 0}
.mw .facts div{min-width:110px}
.mw .facts b{display:block;font-size:18px;font-weight:600;color:#1c2430}
.mw .facts span{color:#48566a;font-size:12px}
.mw table{border-collapse:collapse;margin:0;font-size:12.5px}
.mw table th{text-align:left;font-weight:600;color:#48566a;border-bottom:1px solid #d8dee6;
 padding:3px 12px 3px 0;background:none}
.mw table td{text-align:left;padding:3px 12px 3px 0;border-bottom:1px solid #eef1f5;
 vertical-align:middle;background:none;color:#1c2430}
.mw table td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.mw code{font:12px ui-monospace,monospace;background:none;color:#1c2430;padding:0}
.mw .row{display:flex;flex-wrap:wrap;gap:28px;align-items:flex-start}
.mw .scroll{overflow-x:auto}
.mw details summary{cursor:pointer;color:#48566a;font-size:13px;margin-top:6px}
.mw ul{margin:4px 0 4px 18px;padding:0;font-size:12.5px}
.mw svg text{font:11px system-ui,sans-serif;fill:#1c2430}
"""


def plan_html(plan: Plan) -> str:
    """The plan as one `<div>`; safe to put in any page."""
    return "\n".join(
        [
            f"<style>{STYLE}</style>",
            '<div class="mw">',
            _head(plan),
            '<div class="row">',
            f"<div><h4>Mesh</h4>{mesh_picture(plan)}</div>",
            f"<div><h4>What each axis cuts</h4>{_uses(plan)}</div>",
            "</div>",
            f"<h4>Memory per device at the peak, by cause</h4>{_memory(plan)}",
            f"<h4>Tensors: the part that each device holds</h4>{_tensors(plan)}",
            f"<h4>Communication per step and device</h4>{_collectives(plan)}",
            f"<h4>Proof</h4>{_proof(plan)}",
            "</div>",
        ]
    )


def page(plan: Plan) -> str:
    """A whole HTML document with the plan."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(plan.name)} on {escape(plan.cluster.name)}</title></head>"
        f'<body style="margin:24px;background:#f6f8fa">{plan_html(plan)}</body></html>\n'
    )


def _head(plan: Plan) -> str:
    e, p = plan.estimate, plan.proof
    facts = [
        (format_seconds(e.step_seconds), "predicted step"),
        *_parts_of_step(plan),
        (format_bytes(e.peak_bytes), f"of {format_bytes(e.limit_bytes)} per device"),
        (share(p.gap), f"gap, {claim(p)}"),
    ]
    cells = "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in facts)
    return (
        f"<h3>{escape(plan.name)} on {escape(plan.cluster.name)}</h3>"
        f'<p class="lead">{escape("; ".join([*words(plan), *_assumed(plan)]))}</p>'
        f'<div class="facts">{cells}</div>'
    )


def _assumed(plan: Plan) -> list[str]:
    assumed = [] if plan.execution == Execution() else [f"assumes {plan.execution}"]
    return [*([] if plan.backend == "xla" else [f"run by {plan.backend}"]), *assumed]


def _parts_of_step(plan: Plan) -> list[tuple[str, str]]:
    e = plan.estimate
    if plan.pipeline is None:
        parts = {"compute": e.compute_seconds, "communication": e.communication_seconds}
        if e.hidden_seconds:
            parts["saved by overlap"] = e.hidden_seconds
    else:
        found = parts_of_step(plan)
        parts = {f"rank {found.rank} works": found.passes + found.update, "bubble": found.bubble}
    return [(format_seconds(seconds), f"of it {name}") for name, seconds in parts.items()]


def _uses(plan: Plan) -> str:
    rows = [
        (
            f"<code>{escape(use.axis)}</code>", f"{use.size}", duty(use),
            _share(use.batch), _share(use.sequence), _share(use.experts),
            _share(use.columns), _share(use.sums), _share(use.idle),
        )
        for use in plan.uses
    ]  # fmt: skip
    head = ("axis", "size", "use", "batch", "sequence", "experts", "columns", "sums", "idle")
    return _table(head, rows) + '<p class="lead">shares of the FLOP of all products</p>'


def _share(share: float) -> str:
    return f"{share:.0%}" if share > 0.004 else "–"


def _memory(plan: Plan) -> str:
    e = plan.estimate
    causes = sorted(e.memory.items(), key=lambda item: -item[1])
    kept = [(cause, size) for cause, size in causes if size >= 0.001 * max(1.0, e.peak_bytes)]
    return bars(kept, e.limit_bytes, format_bytes, f"limit {format_bytes(e.limit_bytes)}")


def _tensors(plan: Plan) -> str:
    shown = largest(plan, TENSORS)
    head = ("tensor", "role", "whole", "sharding", "cut", "part", "bytes each")
    table = _table(head, map(_tensor, shown))
    rest = [t for t in plan.tensors if t not in shown]
    if not rest:
        return table
    more = _table(head, map(_tensor, rest))
    return f"{table}<details><summary>{len(rest)} more</summary>{more}</details>"


def _tensor(tensor: Tensor) -> tuple[str, ...]:
    ways = [whole // part for whole, part in zip(tensor.shape, tensor.local_shape, strict=True)]
    place = f' title="{escape(tensor.where)}"' if tensor.where else ""
    return (
        f"<code{place}>{escape(tensor.name)}</code>",
        tensor.role,
        f"<code>{tensor.dtype}[{', '.join(map(str, tensor.shape))}]</code>",
        f"<code>{escape(tensor.sharding)}</code>",
        cut_picture(ways),
        f"1/{prod(ways)}" if prod(ways) > 1 else "all",
        f"<!--n-->{tensor.count} × {format_bytes(tensor.local_bytes / tensor.count)}",
    )


def _collectives(plan: Plan) -> str:
    if not plan.collectives:
        return "<p>none: nothing is communicated</p>"
    head = ("collective", "axes", "times", "bytes each", "seconds", "phase", "value")
    rows = [
        (
            f"<code>{item.kind}</code>", f"<code>{'·'.join(item.axes)}</code>", f"<!--n-->{item.count}",
            f"<!--n-->{format_bytes(item.nbytes)}", f"<!--n-->{format_seconds(item.seconds)}",
            item.phase, f"<code>{escape(item.what.partition(' -> ')[0])}</code>",
        )
        for item in plan.collectives
    ]  # fmt: skip
    table = _table(head, rows[:COLLECTIVES])
    if len(rows) <= COLLECTIVES:
        return table
    seconds = sum(item.seconds for item in plan.collectives[COLLECTIVES:])
    label = f"{len(rows) - COLLECTIVES} more, {format_seconds(seconds)} together"
    return f"{table}<details><summary>{label}</summary>{_table(head, rows[COLLECTIVES:])}</details>"


def _proof(plan: Plan) -> str:
    p = plan.proof
    searched = "".join(f"<li>{escape(line)}</li>" for line in p.searched)
    left_out = "".join(f"<li>{escape(line)}</li>" for line in p.left_out)
    kept = [*(f"kept whole, as no rule describes it: {op}" for op in plan.opaque), *plan.notes]
    notes = "".join(f"<li>{escape(line)}</li>" for line in kept)
    return (
        f"{proof_picture(p.lower_bound, p.objective)}"
        f"<p>{escape(claim(p) + enough(p))}, {escape(ended(p))}{lasted(p, ' after')}, seed {p.seed}. "
        f"Prices: {escape(p.cost_model)}, {escape(p.band)}.</p>"
        + (f"<ul>{notes}</ul>" if notes else "")
        + f"<details open='open'><summary>not searched</summary><ul>{left_out}</ul></details>"
        f"<details><summary>how the search went</summary><ul>{searched}</ul></details>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; one that starts with `<!--n-->` is a number."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cell(cell: str) -> str:
    if cell.startswith("<!--n-->"):
        return f'<td class="n">{escape(cell.removeprefix("<!--n-->"))}</td>'
    return f"<td>{cell}</td>"
