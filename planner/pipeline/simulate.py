"""A discrete-event simulator: tasks on the streams of devices, as a runtime would issue them.

Each device has streams ("compute", "send", "gather", ...) that run their tasks in the order
given, like the streams of a GPU; a loose task may be overtaken while it waits, and overtake what waits. A task
starts when its stream is free and what it waits for is done; of several, the first in order. While a device
computes and communicates at once, both may slow down. Equal input gives equal times, to the last bit.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from ...ir.errors import PlanError
from ...ir.pipeline.schedule import Schedule, Step, needs

COMPUTE = "compute"
Stream = tuple[int, str]  # of a device
# While a device computes and communicates at once, both take this much longer. Source: Galvatron,
# hardware_configs, overlap_coe 1.1256 on A100 hosts.
SLOWDOWN = 1.1256


@dataclass(frozen=True, slots=True)
class Task:
    """`seconds` of work on one stream of one device, after the tasks at these positions.

    `loose`: in no order with others on its stream.
    """

    name: str
    device: int
    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    kind: str = "forward"
    loose: bool = False


@dataclass(frozen=True)
class Run:
    """When each task started and ended, in seconds."""

    tasks: Sequence[Task]
    start: list[float]
    end: list[float]

    @property
    def makespan(self) -> float:
        return max(self.end, default=0.0)

    def span(self, device: int) -> float:
        """From the first start to the last end on one device."""
        mine = [i for i, task in enumerate(self.tasks) if task.device == device]
        return max(self.end[i] for i in mine) - min(self.start[i] for i in mine) if mine else 0.0

    def busy(self, device: int, stream: str = COMPUTE) -> float:
        """Seconds in which a stream works."""
        return sum(e - s for s, e in self.pieces(device, stream))

    def exposed(self, device: int) -> float:
        """Seconds in which a device communicates and does not compute."""
        computing = self.pieces(device, COMPUTE)
        moving = _joined(
            (s, e)
            for task, s, e in zip(self.tasks, self.start, self.end, strict=True)
            if task.device == device and task.stream != COMPUTE
        )
        return sum(e - s for s, e in moving) - _overlap(moving, computing)

    def idle(self, device: int) -> float:
        """Seconds of the makespan in which a device does not compute."""
        return self.makespan - self.busy(device)

    def pieces(self, device: int, stream: str) -> list[tuple[float, float]]:
        """When a stream works, as intervals in order."""
        return _joined(
            (s, e)
            for task, s, e in zip(self.tasks, self.start, self.end, strict=True)
            if task.device == device and task.stream == stream
        )


def simulate(tasks: Sequence[Task], slowdown: float = 1.0) -> Run:
    """Run all tasks.

    Args:
        slowdown: factor (1 or more) by which computing and communicating both take longer
            while a device does both.

    Raises:
        PlanError: a task waits for itself, through others or in its stream's order.
    """
    if slowdown < 1:
        raise PlanError(f"slowdown cannot be {slowdown}.", where="slowdown", fix="1 (none) or more")
    in_order = slowdown == 1 and not any(task.loose for task in tasks)
    run = _longest_path(tasks) if in_order else _Events(tasks, slowdown).run()
    if len(run.end) < len(tasks) or any(e < 0 for e in run.end):
        stuck = next(task.name for task, e in zip(tasks, run.end, strict=True) if e < 0)
        raise PlanError(
            f"`{stuck}` waits for itself.", where="simulation", fix="an order without a cycle"
        )
    return run


def _waits(tasks: Sequence[Task]) -> tuple[list[list[int]], list[int]]:
    """For each task those that wait for it, and how many it waits for itself."""
    followers: list[list[int]] = [[] for _ in tasks]
    waiting = [0] * len(tasks)
    last: dict[tuple[int, str], int] = {}
    for i, task in enumerate(tasks):
        before = None if task.loose else last.get((task.device, task.stream))
        if not task.loose:
            last[task.device, task.stream] = i
        for j in task.after if before is None else (*task.after, before):
            followers[j].append(i)
            waiting[i] += 1
    return followers, waiting


def _longest_path(tasks: Sequence[Task]) -> Run:
    followers, waiting = _waits(tasks)
    start, end = [0.0] * len(tasks), [-1.0] * len(tasks)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    while ready:
        i = ready.pop()
        end[i] = done = start[i] + tasks[i].seconds
        for j in followers[i]:
            if done > start[j]:
                start[j] = done
            waiting[j] -= 1
            if waiting[j] == 0:
                ready.append(j)
    return Run(tasks, start, end)


@dataclass
class _Events:
    """Tasks in progress, at rates that change when something starts or ends on their device."""

    tasks: Sequence[Task]
    slowdown: float
    now: float = 0.0
    # Of tasks in progress: seconds of work.
    left: dict[int, float] = field(default_factory=lambda: {})
    since: dict[int, float] = field(default_factory=lambda: {})
    rate: dict[int, float] = field(default_factory=lambda: {})
    version: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    queue: list[tuple[float, int, int]] = field(default_factory=lambda: [])
    ready: dict[Stream, list[int]] = field(default_factory=lambda: defaultdict(list))  # heaps
    busy: set[Stream] = field(default_factory=lambda: set())
    active: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # by device

    def run(self) -> Run:
        followers, waiting = _waits(self.tasks)
        start, end = [0.0] * len(self.tasks), [-1.0] * len(self.tasks)
        freed: set[Stream] = self._ready([i for i, count in enumerate(waiting) if count == 0])
        arrived: list[int]
        while freed or self.queue:
            for stream in sorted(freed - self.busy):
                if self.ready[stream]:
                    i = heapq.heappop(self.ready[stream])
                    start[i] = self.now
                    self._begin(i, stream)
            freed, arrived = set(), []
            for i in self._ended(end):
                freed.add(self._stream(i))
                for j in followers[i]:
                    waiting[j] -= 1
                    if waiting[j] == 0:
                        arrived.append(j)
            self.busy -= freed
            freed |= self._ready(arrived)
        return Run(self.tasks, start, end)

    def _stream(self, i: int) -> Stream:
        return self.tasks[i].device, self.tasks[i].stream

    def _ready(self, arrived: Iterable[int]) -> set[Stream]:
        """Tasks that wait for their streams alone; which those are."""
        for i in arrived:
            heapq.heappush(self.ready[self._stream(i)], i)
        return {self._stream(i) for i in arrived}

    def _ended(self, end: list[float]) -> list[int]:
        """What ends next, all that end at the same moment."""
        found: list[int] = []
        while self.queue and (not found or self.queue[0][0] == self.now):
            at, i, version = heapq.heappop(self.queue)
            if version == self.version[i] and end[i] < 0:
                self.now = end[i] = at
                here = self.active[self.tasks[i].device]
                here.discard(i)
                self._pace(here)
                found.append(i)
        return found

    def _begin(self, i: int, stream: Stream) -> None:
        here = self.active[stream[0]]
        self.busy.add(stream)
        self.left[i], self.since[i], self.rate[i] = self.tasks[i].seconds, self.now, 0.0
        here.add(i)
        self._pace(here)

    def _pace(self, here: set[int]) -> None:
        """Work done so far at the old rate; from now on at the new one."""
        working = [i for i in here if self.tasks[i].seconds > 0]
        both = len({self.tasks[i].stream == COMPUTE for i in working}) == 2
        rate = 1 / self.slowdown if both else 1.0
        for i in sorted(here):
            if rate != self.rate[i]:
                self.left[i] -= (self.now - self.since[i]) * self.rate[i]
                self.since[i], self.rate[i] = self.now, rate
                self.version[i] += 1
                heapq.heappush(
                    self.queue, (self.now + max(0.0, self.left[i]) / rate, i, self.version[i])
                )


def _joined(pieces: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, end in sorted(pieces):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif end > start:
            found.append((start, end))
    return found


def _overlap(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


# ---------------------------------------------------------------- pipelines


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one microbatch on one stage; `send` to the next stage, `back` to the one before (as `send`
    where it is None).

    A backward pass with no weight pass of its own takes `backward + weight`.
    """

    forward: float
    backward: float
    weight: float = 0.0
    send: float = 0.0
    back: float | None = None

    def sending(self, kind: str) -> float:
        """Of the result of one pass to the other stage that needs it."""
        return self.send if kind == "forward" or self.back is None else self.back

    def of(self, schedule: Schedule, step: Step) -> float:
        return getattr(self, step.kind) + (self.weight if schedule.whole(step) else 0.0)


def pipeline_tasks(
    schedule: Schedule,
    stages: Sequence[StageSeconds],
    tail: Mapping[int, float] | None = None,
    blocking: bool = False,
    together: float = 1.0,
) -> list[Task]:
    """The tasks of one step: every pass of the schedule, the sends between stages, a tail per rank.

    Args:
        tail: seconds that a rank works after its last pass (reduce gradients, update).
        blocking: a rank computes nothing while it sends, as without asynchronous transfers.
        together: two steps that run as one take this part of the sum of their seconds.
    """
    tasks: list[Task] = []
    sends = {step for step in schedule.rank_of if _sends(schedule, stages, step)}
    first = _positions(schedule, sends)
    for rank, slots in enumerate(schedule.slots):
        for slot in slots:
            at = len(tasks)
            after = tuple(
                first[before][rank != schedule.rank_of[before]]
                for step in slot
                for before in needs(schedule, step)
            )
            seconds = sum(stages[step.stage].of(schedule, step) for step in slot)
            kind = slot[0].kind if len(slot) == 1 else "together"
            name = "+".join(map(str, slot))
            tasks.append(
                Task(
                    name, rank, COMPUTE, seconds * (together if len(slot) > 1 else 1.0), after, kind
                )
            )
            for step in slot:
                if step in sends:
                    stream, took = (
                        COMPUTE if blocking else "send",
                        stages[step.stage].sending(step.kind),
                    )
                    tasks.append(Task(f"send {step}", rank, stream, took, (at,), "send"))
    for rank, seconds in (tail or {}).items():
        tasks.append(Task("update", rank, COMPUTE, seconds, (), "update"))
    return tasks


def _sends(schedule: Schedule, stages: Sequence[StageSeconds], step: Step) -> bool:
    """Whether another rank waits for the result of this step."""
    kind, stage, microbatch = step
    if kind == "weight" or stages[stage].sending(kind) == 0:
        return False
    to = Step(kind, stage + (1 if kind == "forward" else -1), microbatch)
    here = schedule.rank_of[step]
    return schedule.rank_of.get(to, here) != here


def _positions(schedule: Schedule, sends: Set[Step]) -> dict[Step, tuple[int, int]]:
    """Where each pass will stand among the tasks, and its send, if it has one."""
    found, at = dict[Step, tuple[int, int]](), 0
    for slots in schedule.slots:
        for slot in slots:
            send = at
            for step in slot:
                send += (extra := int(step in sends))
                found[step] = (at, send if extra else at)
            at = send + 1
    return found
