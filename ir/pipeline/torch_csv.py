"""Schedules as the CSV files of torch's pipelining, which torchtitan reads (`pipeline_parallel_schedule_csv`).

    0F0,0F1,,0I0,0W0,(0F2;3B0)OVERLAP_F_B

A row per rank, a cell per action: stage, kind, microbatch. `F` is forward, `B` a whole backward pass,
`I` and `W` its halves; an empty cell is a bubble. torch adds communication to what it reads, so files
of passes alone are complete. Source: torch.distributed.pipelining.schedules (`_Action`,
`_format_pipeline_order`, `_load_csv`).
"""

from __future__ import annotations

import csv
import io
import re

from ..errors import PlanError
from .schedule import Kind, Schedule, Step, check

PASSES: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "backward", "W": "weight"}
PASS = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")
OVERLAP = re.compile(r"\(([0-9]{1,9}F[0-9]{1,9});([0-9]{1,9}[BI][0-9]{1,9})\)OVERLAP_F_B")
# What follows from the passes, and is not kept.
BESIDE = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def to_torch_csv(schedule: Schedule) -> str:
    """The passes of a schedule, a row per rank.

    Raises:
        PlanError: a stage lies on several ranks, which torch does not know.
    """
    for stage in range(schedule.stages):
        if (found := sum(stage in held for held in schedule.held)) > 1:
            raise PlanError(
                f"stage {stage} of schedule {schedule.name} lies on {found} ranks; torch's pipelining holds each once.",
                where="torch CSV", fix="dualpipe-v, which is dualpipe with each stage once",
            )  # fmt: skip
    rows = [",".join(_cell(schedule, slot) for slot in slots) for slots in schedule.slots]
    return "\n".join(rows) + "\n"


def from_torch_csv(text: str, name: str = "torch-csv") -> Schedule:
    """What `to_torch_csv` or torch wrote, checked.

    Raises:
        PlanError: a cell that is no action, passes that are missing, repeated or in a deadlock.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        what = f"this is no CSV: {error}."
        raise PlanError(what, where="torch CSV", fix="a row per rank, a cell per action") from None
    cells = [
        [_slot(cell.strip(), r, c) for c, cell in enumerate(row, 1)]
        for r, row in enumerate(rows, 1)
    ]
    read = [[slot for slot in row if slot] for row in cells]
    words = [word for row in read for slot in row for word in slot]
    if not words:
        raise PlanError("no pass in it.", where="torch CSV", fix="cells as in 0F0,0F1,0B0,0B1")
    steps = {word: _step(word) for word in words}
    orders = tuple(tuple(steps[word] for slot in row for word in slot) for row in read)
    together = frozenset(steps[slot[0]] for row in read for slot in row if len(slot) > 1)
    stages = max(step.stage for step in steps.values()) + 1
    microbatches = max(step.microbatch for step in steps.values()) + 1
    schedule = Schedule(name, stages, microbatches, orders, together)
    check(schedule)
    _halves(schedule, words)
    return schedule


def _cell(schedule: Schedule, slot: tuple[Step, ...]) -> str:
    words = [_word(schedule, step) for step in slot]
    return words[0] if len(words) == 1 else f"({';'.join(words)})OVERLAP_F_B"


def _word(schedule: Schedule, step: Step) -> str:
    mark = {"forward": "F", "weight": "W"}.get(step.kind) or ("B" if schedule.whole(step) else "I")
    return f"{step.stage}{mark}{step.microbatch}"


def _slot(cell: str, row: int, column: int) -> tuple[str, ...]:
    """The passes of a cell: none, one, or two that overlap."""
    if not cell or BESIDE.fullmatch(cell):
        return ()
    if PASS.fullmatch(cell):
        return (cell,)
    if found := OVERLAP.fullmatch(cell):
        return found.groups()
    raise PlanError(
        f"`{' '.join(cell.split()):.60}` is no action.", where=f"torch CSV, row {row}, column {column}",
        fix="stage, kind, microbatch, as in 3F5, 3B5, 3I5, 3W5 or (3F5;4B2)OVERLAP_F_B",
    )  # fmt: skip


def _step(word: str) -> Step:
    mark = re.sub(r"\d", "", word)
    stage, microbatch = word.split(mark)
    return Step(PASSES[mark], int(stage), int(microbatch))


def _halves(schedule: Schedule, words: list[str]) -> None:
    """`I` has its `W`, and `B` has none."""
    for word in words:
        step = _step(word)
        if step.kind == "backward" and schedule.whole(step) != ("B" in word):
            odd = "has no weight pass" if "I" in word else "is whole, yet has a weight pass"
            raise PlanError(f"{word} {odd}.", where="torch CSV", fix="3B5 alone, or 3I5 and 3W5")
