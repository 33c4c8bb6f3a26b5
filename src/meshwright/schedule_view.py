"""A schedule that was looked at, as text and as data."""

from __future__ import annotations

from typing import Any

from .ir.units import format_seconds
from .planner.pipeline.limited import Searched
from .planner.pipeline.schedules import SCHEDULES
from .planner.pipeline.schedules.closed_forms import FORMS, ClosedForm
from .planner.pipeline.simulate import Run
from .scheduling import Study


def rows(found: Study) -> list[dict[str, Any]]:
    """Per rank: seconds it works, from its first start to its last end, shares of the makespan and of that span
    in which it waits, the most it holds."""
    run, s, peaks = found.run, found.schedule, found.peaks
    return [
        {
            "rank": rank, "stages": list(s.held[rank]), "busy": run.busy(rank), "span": run.span(rank),
            "idle": run.idle(rank) / run.makespan, "idle_in_span": _idle_in_span(run, rank),
            "peak": peaks[rank],
        }
        for rank in range(s.ranks)
    ]  # fmt: skip


def _idle_in_span(run: Run, rank: int) -> float:
    return 1 - run.busy(rank) / run.span(rank) if run.span(rank) else 0.0


def closed_form(found: Study) -> dict[str, Any] | None:
    """The formula, what it says here, and what the simulator does; None where it is not known or does not hold."""
    case, idle = found.case, found.form and found.form.idle
    if case is None or idle is None or not idle.holds(case):
        return None
    run = found.run
    ranks = range(found.schedule.ranks)
    simulated = max(
        run.idle(r) if idle.of == "makespan" else run.span(r) - run.busy(r) for r in ranks
    )
    return {
        "formula": idle.formula,
        "of": idle.of,
        "seconds": idle.seconds(case),
        "simulated": simulated,
    }


def data(found: Study) -> dict[str, Any]:
    """For programs: seconds; memory in bytes with --held, else in microbatches."""
    s = found.schedule
    known = {
        "schedule": s.name,
        "ranks": s.ranks,
        "stages": s.stages,
        "microbatches": s.microbatches,
    }
    result: dict[str, Any] = known | {"makespan": found.run.makespan, "per_rank": rows(found)}
    if found.searched:
        result |= {"lower_bound": found.searched.lower_bound, "tried": found.searched.tried}
    return result | {"closed_form": closed_form(found), "orders": s.text()}


def text(found: Study, width: int = 96) -> str:
    s, run = found.schedule, found.run
    lines = [f"{s.name}: {s.ranks} ranks, {s.stages} stages, {s.microbatches} microbatches"]
    lines += [
        found.timeline.text(width),
        "F forward, B backward, W gradients of weights, X two at once, . idle",
        "",
    ]
    lines.append(f"makespan     {format_seconds(run.makespan)}{_searched(found.searched)}")
    lines += _closed(found)
    lines += [
        "",
        f"{'rank':<6}{'stages':<12}{'busy':>10}{'span':>10}{'idle':>8}{'in span':>9}  most held",
    ]
    for row in rows(found):
        stages = ", ".join(map(str, row["stages"]))
        lines.append(
            f"{row['rank']:<6}{stages:<12}{format_seconds(row['busy']):>10}{format_seconds(row['span']):>10}"
            f"{row['idle']:>8.1%}{row['idle_in_span']:>9.1%}  {found.memory.show(row['peak'])}"
        )
    return "\n".join(lines)


def _searched(found: Searched | None) -> str:
    if found is None:
        return ""
    bound, gap = format_seconds(found.lower_bound), 1 - found.lower_bound / found.seconds
    return f", the best of {found.tried} orders; none takes less than {bound} ({gap:.1%} less)"


def _closed(found: Study) -> list[str]:
    if found.form is None:
        return []
    peak = f"closed form  holds at most {found.form.peak} microbatches until backward passes"
    if found.form.grouped and found.schedule.microbatches % found.schedule.ranks:
        peak += ", for p divides m: not here"
    idle = found.form.idle
    if idle is None:
        return [peak]
    if (form := closed_form(found)) is None:
        where = " and ".join(filter(None, ["equal stages, no transfers", idle.where]))
        return [f"closed form  idle {idle.formula} of the {idle.of}, for {where}: not here", peak]
    value, simulated = format_seconds(form["seconds"]), format_seconds(form["simulated"])
    return [
        f"closed form  idle {idle.formula} of the {idle.of}: {value}; simulated {simulated}",
        peak,
    ]


def catalogue() -> list[dict[str, str]]:
    """Every schedule: stages per rank, idle seconds and memory on paper, what it needs, where it comes from."""
    return [
        {
            "name": each.name, "chunks": "any" if each.chunks is None else str(each.chunks),
            "idle": _paper(FORMS[each.name]), "holds": FORMS[each.name].peak, "needs": each.needs,
            "source": each.source,
        }
        for each in SCHEDULES
    ]  # fmt: skip


def _paper(form: ClosedForm) -> str:
    if form.idle is None:
        return ""
    return form.idle.formula + (" of the span" if form.idle.of == "span" else "")


def catalogue_text() -> str:
    lines = [f"{'schedule':<25}{'chunks':<8}{'idle':<34}{'holds at most':<21}source"]
    for each in catalogue():
        lines.append(
            f"{each['name']:<25}{each['chunks']:<8}{each['idle']:<34}{each['holds']:<21}{each['source']}"
        )
    return "\n".join([
        *lines, "",
        "p ranks, m microbatches, v chunks; F, B, W seconds of a rank's passes, T their sum.",
        "What is held is counted in microbatches, until their backward passes.",
    ])  # fmt: skip
