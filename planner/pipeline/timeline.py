"""What a simulated (or measured) step looks like: text rows, and a trace for Perfetto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ir.errors import PlanError
from .simulate import COMPUTE, Run

MARKS = {"forward": "F", "backward": "B", "weight": "W", "together": "X", "update": "U"}


@dataclass(frozen=True, slots=True)
class Slice:
    """One task on one stream, seconds from the start of the step."""

    name: str
    kind: str
    device: int
    stream: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """All slices of one step."""

    slices: tuple[Slice, ...]

    @classmethod
    def of(cls, run: Run) -> Timeline:
        return cls(
            tuple(
                Slice(task.name, task.kind, task.device, task.stream, start, end - start)
                for task, start, end in zip(run.tasks, run.start, run.end, strict=True)
            )
        )

    @property
    def seconds(self) -> float:
        return max((s.start + s.seconds for s in self.slices), default=0.0)

    def text(self, width: int = 96) -> str:
        """One row per device: what it computes most in each of `width` equal times, dots when idle."""
        devices, column = sorted({s.device for s in self.slices}), self.seconds / width
        rows: list[str] = []
        for device in devices:
            shares: list[dict[str, float]] = [{} for _ in range(width)]
            for s in self.slices:
                if s.device == device and s.stream == COMPUTE and s.seconds > 0:
                    _spread(s, shares, column)
            marks = [max(share, key=lambda k: share[k]) if share else "." for share in shares]
            rows.append(f"{device:>4} {''.join(marks)}")
        return "\n".join(rows)

    def perfetto(self) -> dict[str, Any]:
        """Chrome's trace-event format, which Perfetto opens: microseconds, a process per device,
        a thread per stream, the step as the outermost slice of each."""
        lanes = sorted(
            {(s.device, s.stream) for s in self.slices},
            key=lambda lane: (lane[0], lane[1] != COMPUTE, lane[1]),
        )
        number = {lane: i for i, lane in enumerate(lanes)}
        events: list[dict[str, Any]] = []
        for device, stream in lanes:
            tid = number[device, stream]
            events.append(_named("process_name", device, tid, f"device {device}"))
            events.append(_named("thread_name", device, tid, stream))
            events.append(_event("step", "step", device, tid, 0.0, self.seconds))
        for s in self.slices:
            events.append(
                _event(s.name, s.kind, s.device, number[s.device, s.stream], s.start, s.seconds)
            )
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _spread(s: Slice, shares: list[dict[str, float]], column: float) -> None:
    """Add to each column, so many seconds wide, what a slice takes of it: more than half, or beside its like."""
    mark = MARKS.get(s.kind, "s")
    first, last = int(s.start / column), min(len(shares) - 1, int((s.start + s.seconds) / column))
    for i in range(first, last + 1):
        part = min(s.start + s.seconds, (i + 1) * column) - max(s.start, i * column)
        if part > column / 2 or (part > 0 and mark in shares[i]):
            shares[i][mark] = shares[i].get(mark, 0.0) + part


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _event(
    name: str, kind: str, pid: int, tid: int, start: float, seconds: float
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": start * 1e6,
        "dur": seconds * 1e6,
    }


def check_nested(trace: dict[str, Any], slack: float = 1e-6) -> None:
    """Slices of one thread lie inside each other or apart.

    Raises:
        PlanError: two that overlap.
    """
    threads: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found = threads.setdefault((event["pid"], event["tid"]), [])
            found.append((event["ts"], event["ts"] + event["dur"], event["name"]))
    for slices in threads.values():
        stack: list[tuple[float, float, str]] = []
        for start, end, name in sorted(slices, key=lambda s: (s[0], -s[1])):
            while stack and stack[-1][1] <= start + slack:
                stack.pop()
            if stack and end > stack[-1][1] + slack:
                raise PlanError(
                    f"slices `{stack[-1][2]}` and `{name}` overlap.",
                    where="trace",
                    fix="one stream each",
                )
            stack.append((start, end, name))
