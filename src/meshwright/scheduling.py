"""One pipeline schedule looked at closely: `meshwright schedule`.

A schedule by name, from a file or searched for, with seconds of its passes and memory of its microbatches as a
user gives them; simulated, and held against its closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .ir.errors import InfeasibleError, UsageError
from .ir.files import MIB, FileKind, is_file, read_text
from .ir.pipeline.schedule import Schedule, peak_held
from .ir.pipeline.torch_csv import from_torch_csv
from .ir.units import format_bytes, parse_bytes, parse_seconds
from .planner.pipeline.limited import Searched, search_schedule
from .planner.pipeline.schedules import entry, schedule_named
from .planner.pipeline.schedules.closed_forms import FORMS, Case, ClosedForm
from .planner.pipeline.simulate import Run, StageSeconds, pipeline_tasks, simulate
from .planner.pipeline.tighten import ActivationMemory
from .planner.pipeline.timeline import Timeline

SEARCH = "search"
FILE = FileKind(
    "schedule", 16 * MIB, "a CSV file of torch's pipelining, as `-o` writes it, or a name"
)
MOST_PASSES = 200_000  # forward passes, all stages and microbatches


@dataclass(frozen=True)
class Size:
    """What was asked for; nothing where a file says it."""

    ranks: int | None
    microbatches: int | None
    chunks: int | None


@dataclass(frozen=True)
class Seconds:
    """As written: `5ms`, `2`, or one per stage with commas. Of one microbatch on one rank, all its stages together;
    given per stage, of that stage. `send`: from a stage to its neighbour."""

    forward: str = "1"
    backward: str = "1"
    weight: str = "1"
    send: str = "0"


@dataclass(frozen=True)
class Memory:
    """As written. `held`: what one microbatch's forward pass leaves on a rank; without it memory is counted in
    microbatches. `kept`: the share of it that waits for the weight pass. `limit` and `static` are per rank."""

    limit: str | None = None
    held: str | None = None
    kept: float = 1.0
    static: str = "0"

    def show(self, amount: float) -> str:
        if self.held is not None:
            return format_bytes(amount)
        return f"{amount:.4g} {'microbatch' if amount == 1 else 'microbatches'}"


@dataclass(frozen=True)
class Study:
    """A schedule and what it takes. `form` is its closed form, if it has one."""

    schedule: Schedule
    stages: list[StageSeconds]
    run: Run
    memory: Memory
    held: ActivationMemory
    searched: Searched | None
    form: ClosedForm | None

    @property
    def timeline(self) -> Timeline:
        return Timeline.of(self.run)

    @property
    def peaks(self) -> list[float]:
        """Per rank, the most that it holds, what it always holds included."""
        s, held = self.schedule, self.held
        return [
            peak_held(s, r, held.forward, held.kept) + static
            for r, static in enumerate(held.static)
        ]

    @property
    def chunks(self) -> int:
        return max(1, self.schedule.stages // self.schedule.ranks)

    @property
    def case(self) -> Case | None:
        """What the closed form is of: equal stages and transfers that take no time."""
        first = self.stages[0]
        if first.send or first.back or any(each != first for each in self.stages):
            return None
        s, v = self.schedule, self.chunks
        return Case(
            s.ranks, s.microbatches, v, first.forward * v, first.backward * v, first.weight * v
        )

    def check_limit(self) -> None:
        """
        Raises:
            InfeasibleError: the rank that is furthest above its limit.
        """
        over = [peak - limit for peak, limit in zip(self.peaks, self.held.limits, strict=True)]
        rank = max(range(len(over)), key=lambda r: over[r])
        if not self.held.fits(self.schedule):
            peak, limit = (self.memory.show(each[rank]) for each in (self.peaks, self.held.limits))
            raise InfeasibleError(
                f"{self.schedule.name} holds {peak} on rank {rank}, the limit is {limit}.",
                where="--memory-limit", fix=f"{peak} or more, or `meshwright schedule {SEARCH}`",
                needed_bytes=self.peaks[rank], limit_bytes=self.held.limits[rank],
            )  # fmt: skip


def study(name: str, size: Size, seconds: Seconds, memory: Memory) -> Study:
    """Make, read or search a schedule, and simulate it.

    Raises:
        UsageError: options that say nothing, or contradict the file.
        PlanError: no such schedule, or not for these numbers.
        InfeasibleError: a search finds no room for one microbatch.
    """
    ranks, schedule = 0, None
    if name == SEARCH:
        ranks, microbatches, chunks = _whole(size)
        stages = ranks * chunks
    else:
        schedule = _read(name, size) if _is_file(name) else _named(name, size)
        ranks, stages, microbatches = schedule.ranks, schedule.stages, schedule.microbatches
    each = _stage_seconds(seconds, stages, ranks)
    held = _held(memory, stages, ranks, microbatches)
    found = None
    if schedule is None:
        found = search_schedule(each, held, microbatches, memory.show)
        schedule = found.schedule
    run = found.run if found else simulate(pipeline_tasks(schedule, each))
    return Study(schedule, each, run, memory, held, found, FORMS.get(schedule.name))


# ---------------------------------------------------------------- the schedule


def _is_file(name: str) -> bool:
    return "." in name or "/" in name or is_file(name)


def _read(name: str, size: Size) -> Schedule:
    found = from_torch_csv(read_text(name, FILE), Path(name).stem)
    said = {
        "--stages": found.ranks,
        "--microbatches": found.microbatches,
        "--chunks": found.stages // found.ranks,
    }
    asked = (size.ranks, size.microbatches, size.chunks)
    for (option, there), here in zip(said.items(), asked, strict=True):
        if here not in (None, there):
            raise UsageError(f"{name} has {there}, not {here}.", where=option, fix="leave it out")
    return found


def _named(name: str, size: Size) -> Schedule:
    entry(name)  # an unknown name comes before a missing size
    ranks, microbatches, _ = _whole(size)
    return schedule_named(name, ranks, microbatches, size.chunks)


def _whole(size: Size) -> tuple[int, int, int]:
    """Ranks, microbatches, stages per rank."""
    if size.ranks is None or size.microbatches is None:
        raise UsageError(
            "a schedule needs its size.",
            where="--stages, --microbatches",
            fix="--stages 4 --microbatches 8",
        )
    found = (size.ranks, size.microbatches, 1 if size.chunks is None else size.chunks)
    for option, count in zip(("--stages", "--microbatches", "--chunks"), found, strict=True):
        if count < 1:
            raise UsageError(f"{count} is no number of them.", where=option, fix="1 or more")
    if found[0] * found[1] * found[2] > MOST_PASSES:
        raise UsageError(
            f"{found[0]} ranks with {found[1]} microbatches and {found[2]} stages each are too many to simulate.",
            where="--stages, --microbatches", fix=f"at most {MOST_PASSES} forward passes",
        )  # fmt: skip
    return found


# ---------------------------------------------------------------- seconds and memory


def _stage_seconds(seconds: Seconds, stages: int, ranks: int) -> list[StageSeconds]:
    part = 1 / max(1, stages // ranks)
    forward, backward, weight = (
        _per_stage(f"--{kind}", getattr(seconds, kind), _seconds, stages, part)
        for kind in ("forward", "backward", "weight")
    )
    send = _per_stage("--send", seconds.send, _seconds, stages, 1.0)
    if not any([*forward, *backward, *weight]):
        raise UsageError(
            "no pass takes any time.", where="--forward, --backward, --weight", fix="1 each, or 5ms"
        )
    return [StageSeconds(*each) for each in zip(forward, backward, weight, send, strict=True)]


def _held(memory: Memory, stages: int, ranks: int, microbatches: int) -> ActivationMemory:
    if not 0 <= memory.kept <= 1:
        raise UsageError(f"{memory.kept} is no share.", where="--kept", fix="from 0 to 1")
    amount = _count if memory.held is None else parse_bytes
    forward = _per_stage("--held", memory.held or "1", amount, stages, 1 / max(1, stages // ranks))
    most = sum(forward) * microbatches
    static = _per_stage("--static", memory.static, _zero_or(amount), ranks, 1.0)
    limits = [taken + most for taken in static]
    if memory.limit is not None:
        if memory.held is None and any(char.isalpha() for char in memory.limit):
            raise UsageError(
                f"a limit of {memory.limit} says nothing without what a microbatch holds.", where="--memory-limit",
                fix="--held 1GiB beside it, or a number of microbatches",
            )  # fmt: skip
        limits = _per_stage("--memory-limit", memory.limit, amount, ranks, 1.0)
    return ActivationMemory(forward, [memory.kept * each for each in forward], limits, static)


def _per_stage(
    option: str, text: str, parse: Callable[[str], float], many: int, part: float
) -> list[float]:
    """One value for all, of which each takes `part`; or as many as there are."""
    try:
        values = [float(parse(word.strip())) for word in text.split(",")]
    except UsageError as error:
        raise UsageError.at(error, option, None) from error
    if any(value < 0 or value == float("inf") or value != value for value in values):
        raise UsageError(
            f"`{text}` is less than nothing, or no number.", where=option, fix="0 or more"
        )
    if len(values) not in (1, many):
        raise UsageError(
            f"{len(values)} values for {many}.",
            where=option,
            fix=f"one value, or {many} with commas",
        )
    return values if len(values) > 1 else [values[0] * part] * many


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return parse_seconds(text)


def _count(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"`{text}` is no number of microbatches.", fix="a number, or --held for bytes"
        ) from None


def _zero_or(parse: Callable[[str], float]) -> Callable[[str], float]:
    return lambda text: 0.0 if text == "0" else parse(text)
