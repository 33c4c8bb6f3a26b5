"""A plan in one terminal screen, as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..ir.audit import Audit
from ..ir.execution import Execution
from ..ir.mesh import Mesh
from ..ir.pipeline.schedule import microbatches_held
from ..ir.plan import Plan, Tensor
from ..ir.units import counted, format_bytes, format_flops, format_seconds
from ..pipeline_view import parts_of_step
from .states import CAUSES
from .words import claim, duty, ended, enough, lasted, share, unlike, words

TENSORS, COLLECTIVES, CANDIDATES = 12, 6, 4  # rows shown unless all are asked for
WIDEST = 44  # columns of a name


def plan_text(plan: Plan, everything: bool = False) -> str:
    """Mesh, estimate, memory by cause, shardings, communication, proof.

    Args:
        everything: all rows of every table instead of the largest.
    """
    most, staged = None if everything else TENSORS, plan.pipeline is not None
    all_stages, fullest = (
        (", of all stages added up", " of the fullest rank") if staged else ("", "")
    )
    mesh = fullest if unlike(plan) else ""
    blocks = [
        plan_head(plan),
        _table("stages: seconds of one microbatch, and per step", _stage_rows(plan)),
        _table(f"what each axis cuts{mesh}, in shares of the products' FLOP", _axis_rows(plan)),
        _table(f"memory per device at the peak{fullest}, by cause", _memory_rows(plan)),
        _table(f"tensors: parts per device{all_stages}", _tensor_rows(plan, most)),
        _table(
            f"communication per step and device{all_stages}",
            _collective_rows(plan, None if everything else COLLECTIVES),
        ),
        _proof(plan, everything),
    ]
    return "\n\n".join(block for block in blocks if block)


def plan_head(plan: Plan) -> str:
    """Plan, step, memory and proof, a line each."""
    e = plan.estimate
    rate = e.flop / e.step_seconds if e.step_seconds else 0.0
    return "\n".join(
        [
            f"{plan.name} on {plan.cluster.name}: {counted(plan.device_count, 'device')} as {_shape(plan)}",
            f"  plan    {'; '.join(words(plan))}",
            *([] if plan.backend == "xla" else ["  backend torch, a process for each device"]),
            *([] if plan.execution == Execution() else [f"  assumes {plan.execution}"]),
            f"  step    {format_seconds(e.step_seconds)} predicted: {_parts_of_step(plan)}; "
            f"{format_flops(rate / plan.device_count)} per device",
            *_work_line(plan),
            *_programs(plan),
            f"  memory  {format_bytes(e.peak_bytes)} per device of {format_bytes(e.limit_bytes)} allowed",
            *([] if plan.batch is None else [f"  batch   {plan.batch}"]),
            f"  proof   {proof_line(plan)}",
        ]
    )


def _programs(plan: Plan) -> list[str]:
    """Which programs a pipeline runs, and what the other kind would take."""
    if plan.pipeline is None or not plan.pipeline.programs:
        return []
    names = {"stages": "programs of each stage", "single": "a single program for all stages"}
    here, seconds = plan.pipeline.program, plan.pipeline.programs
    other = [
        f"{names[kind]} would take {format_seconds(s)}"
        for kind, s in seconds.items()
        if kind != here
    ]
    return [
        f"  runs    {names[here]}, {format_seconds(seconds[here])} with the host's dispatch{_also(other)}"
    ]


def _also(others: list[str]) -> str:
    return f"; {others[0]}" if others else ""


def _parts_of_step(plan: Plan) -> str:
    e = plan.estimate
    if plan.pipeline is None:
        hidden = f", {format_seconds(e.hidden_seconds)} hidden" if e.hidden_seconds else ""
        moving = f"{format_seconds(e.communication_seconds)}{hidden}"
        return f"compute {format_seconds(e.compute_seconds)}, communication {moving}"
    parts = parts_of_step(plan)
    work = format_seconds(parts.passes + parts.update)
    return f"rank {parts.rank} works longest, {work}, bubble {format_seconds(parts.bubble)}"


def _work_line(plan: Plan) -> list[str]:
    if plan.pipeline is None:
        return []
    parts, collectives = parts_of_step(plan), format_seconds(plan.estimate.communication_seconds)
    return [
        f"  work    passes {format_seconds(parts.passes)}, update {format_seconds(parts.update)}; collectives in these "
        f"{collectives}, mean of ranks; between stages {format_seconds(parts.sent)}, "
        f"{format_seconds(parts.exposed)} of it exposed"
    ]


def _shape(plan: Plan) -> str:
    if plan.pipeline is None:
        return _mesh(plan.mesh)
    pipe = plan.pipeline
    meshes = {
        rank: pipe.stages[stage].mesh
        for stage, rank in enumerate(pipe.read(plan.microbatches).homes)
    }
    different = dict.fromkeys(_mesh(meshes[rank]) for rank in sorted(meshes))
    return f"{len(pipe.first)} ranks of {' and '.join(different)}"


def _mesh(mesh: Mesh) -> str:
    return str(mesh) if mesh.size > 1 else "one device"


STAGES = 16  # rows shown of a pipeline


def _stage_rows(plan: Plan) -> list[tuple[str, ...]]:
    if plan.pipeline is None:
        return []
    head = ("stage", "devices", "blocks", "forward", "backward", "update", "memory", "in flight")
    rows: list[tuple[str, ...]] = [head]
    schedule = plan.pipeline.read(plan.microbatches)
    homes, held = (
        schedule.homes,
        [microbatches_held(schedule, rank) for rank in range(schedule.ranks)],
    )
    for number, stage in enumerate(plan.pipeline.stages[:STAGES]):
        first = plan.pipeline.first[homes[number]]
        where = f"{first}-{first + stage.mesh.size - 1}" if stage.mesh.size > 1 else f"{first}"
        where += f" {plan.cluster.device_at(first).name}" if len(plan.cluster.devices) > 1 else ""
        times = map(
            format_seconds, (stage.forward_seconds, stage.backward_seconds, stage.once_seconds)
        )
        memory = format_bytes(stage.peak_bytes), f"{held[homes[number]]}"
        rows.append((f"{number}", where, stage.blocks, *times, *memory))
    more = len(plan.pipeline.stages) - STAGES
    return [*rows, (f"... and {more} more",)] if more > 0 else rows


def proof_line(plan: Plan) -> str:
    """Status, bound and gap in one line."""
    p = plan.proof
    status = f"feasible, {ended(p)}" if p.status == "feasible" else claim(p)
    return (
        f"{status}: no plan in the searched space is faster than {format_seconds(p.lower_bound)}, "
        f"gap {share(p.gap)}{enough(p)}"
    )


def _axis_rows(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            use.axis,
            f"{use.size}",
            duty(use),
            *(
                f"{label} {share:.0%}" if share else ""
                for label, share in (
                    ("batch", use.batch),
                    ("sequence", use.sequence),
                    ("experts", use.experts),
                    ("columns", use.columns),
                    ("sums", use.sums),
                    ("idle", use.idle if use.idle > 0.005 else 0.0),
                )
            ),
        )
        for use in plan.uses
        if use.size > 1
    ]


def _memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    causes = sorted(plan.estimate.memory.items(), key=lambda item: -item[1])
    total = sum(size for _, size in causes) or 1.0
    return [
        (cause, format_bytes(size), f"{size / total:.0%}", CAUSES.get(cause, ""))
        for cause, size in causes
        if size >= 0.001 * total
    ]


def _tensor_rows(plan: Plan, most: int | None) -> list[tuple[str, ...]]:
    shown = largest(plan, most)
    rows = [
        (
            short(tensor.name),
            tensor.role,
            f"{tensor.dtype}{list(tensor.shape)}",
            tensor.sharding,
            f"{tensor.count} × {format_bytes(tensor.local_bytes / tensor.count)}",
        )
        for tensor in shown
    ]
    left = len(plan.tensors) - len(shown)
    return [*rows, (f"... and {left} smaller ones",)] if left else rows


def largest(plan: Plan, most: int | None) -> list[Tensor]:
    """States first, then the batch, then activations; in each the largest first.

    With a limit, two thirds of the rows go to inputs and a third to activations,
    and optimizer states that lie like their parameter are left out.
    """
    order = sorted(plan.tensors, key=lambda t: (t.role == "activation", -t.local_bytes))
    if most is None:
        return order
    inputs = [t for t in order if t.role not in ("activation", "optimizer")]
    activations = [t for t in order if t.role == "activation"]
    third = min(most // 3, len(activations))
    return [*inputs[: most - third], *activations[:third]]


def short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= WIDEST else "…" + name[-(WIDEST - 1) :]


def _collective_rows(plan: Plan, most: int | None) -> list[tuple[str, ...]]:
    shown = plan.collectives[:most]
    rows = [
        (
            item.kind,
            "·".join(item.axes),
            f"{item.count} × {format_bytes(item.nbytes)}",
            format_seconds(item.seconds),
            item.phase,
            short(item.what.partition(" -> ")[0]),
        )
        for item in shown
    ]
    left = plan.collectives[len(shown) :]
    if left:
        seconds = format_seconds(sum(item.seconds for item in left))
        rows.append((f"... and {len(left)} more", "", "", seconds, "", ""))
    return rows


def _proof(plan: Plan, everything: bool) -> str:
    p = plan.proof
    lines = [
        f"searched{lasted(p, ' for')}, seed {p.seed}; found on the way:",
        *(f"  {line}" for line in _last(p.searched, None if everything else CANDIDATES)),
        f"  prices: {p.cost_model}, {p.band}",
        f"  not searched: {'; '.join(p.left_out)}",
        *(f"  kept whole, as no rule describes it: {op}" for op in plan.opaque),
        *(f"  note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _last(lines: Sequence[str], most: int | None) -> list[str]:
    improved = [line for line in lines if "does not fit" not in line]
    return list(lines) if most is None else improved[-most:]


def audit_text(audit: Audit) -> str:
    """Predicted against compiled bytes, by kind and axes."""
    rows = [
        (
            line.kind,
            "·".join(line.axes) or "other groups",
            f"{format_bytes(line.predicted_bytes)} in {line.predicted_count}",
            f"{format_bytes(line.compiled_bytes)} in {line.compiled_count}",
            _difference(line.difference),
        )
        for line in audit.lines
    ]
    head = [("collective", "axes", "predicted", "compiled", "difference")]
    total = (
        f"total: {format_bytes(audit.predicted_bytes)} predicted, "
        f"{format_bytes(audit.compiled_bytes)} compiled ({_difference(audit.difference)})"
    )
    peak = (
        f"memory{_fullest(audit)}: {format_bytes(audit.predicted_peak)} predicted, "
        f"{format_bytes(audit.compiled_peak)} compiled ({audit.memory_difference:+.1%}): "
        + ", ".join(f"{part} {format_bytes(nbytes)}" for part, nbytes in audit.parts.items())
    )
    table = _table(
        "audit: communication per step and device, plan against compiled program", head + rows
    )
    lines = [table, f"  {total}", f"  {peak}", *_ranks_of(audit)]
    if audit.compiled_peak > audit.limit:
        lines.append(
            f"  over the limit: the plan was allowed {format_bytes(audit.limit)}, the program takes more"
        )
    return "\n".join(lines)


def _fullest(audit: Audit) -> str:
    """Which rank the line of memory is of, and which was to hold most if that is another."""
    if audit.fullest is None:
        return ""
    found, planned = audit.fullest
    other = (
        f" (planned: rank {planned.rank}, {format_bytes(planned.predicted_peak)})"
        if planned != found
        else ""
    )
    return f" of the fullest rank, {found.rank}{other}"


def _ranks_of(audit: Audit) -> list[str]:
    """The ranks of a pipeline; the collectives above add up all of them."""
    rows = [
        (
            str(part.rank),
            ", ".join(map(str, part.stages)),
            format_bytes(part.compiled_bytes),
            format_bytes(part.predicted_peak),
            format_bytes(part.compiled_peak),
            f"{part.compiled_peak / part.predicted_peak - 1:+.1%}",
        )
        for part in audit.ranks
    ]
    head = [
        ("rank", "stages", "communication compiled", "memory predicted", "compiled", "difference")
    ]
    return [_table("ranks: collectives above are of all of them", head + rows)] if rows else []


def _difference(share: float) -> str:
    return "not predicted" if share == float("inf") else f"{share:+.1%}"


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    rows = [row for row in rows if row]
    if not rows:
        return ""
    full = [row for row in rows if len(row) > 1]
    widths = [
        max((len(row[k]) for row in full if k < len(row)), default=0)
        for k in range(max(map(len, rows)))
    ]
    lines = [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False) if w).rstrip()
        for row in rows
    ]
    return "\n".join([title, *lines])
