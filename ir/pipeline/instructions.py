"""What each rank of a pipeline does, one instruction after another, communication included.

    rank 0   0F0  0SEND_F0>1  0F1  0SEND_F1>1  0RECV_B0<1  0B0 ...  0REDUCE  UPDATE
    rank 1   1RECV_F0<0  1F0  1B0  1SEND_B0>0 ...

A send and its receive, and the reduction of a stage that several ranks hold, are one event that all its
ranks take part in at once: nobody needs a buffer or a thread of its own. Lists are free of deadlock by
construction: all events of all ranks stand in one common order, of which each rank has its part; the
first event not yet done is the next one of all its ranks. Processes that share the work walk this order,
each doing its part. `check_instructions` proves of given lists that they end, by carrying them out with
sends that wait for their receives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ..errors import PlanError
from .schedule import Kind, Schedule, Step, needs

What = Literal[
    "forward", "backward", "input-grad", "weight-grad",
    "send-activation", "receive-activation", "send-gradient", "receive-gradient",
    "reduce", "update",
]  # fmt: skip
PASSES: dict[What, str] = {"forward": "F", "backward": "B", "input-grad": "I", "weight-grad": "W"}
MOVES: dict[What, str] = {
    "send-activation": "SEND_F", "receive-activation": "RECV_F",
    "send-gradient": "SEND_B", "receive-gradient": "RECV_B",
}  # fmt: skip


class Instruction(NamedTuple):
    """One thing that a rank does.

    forward, backward (whole), input-grad, weight-grad: a pass of `microbatch` through `stage`.
    send-activation, send-gradient: what `stage` made of `microbatch`, to the rank `peers[0]`.
    receive-activation, receive-gradient: what `stage` takes, from the rank `peers[0]`.
    reduce: the gradients of `stage` are complete; `peers` are the other ranks that hold it, if any.
    update: the optimizer, for all stages of the rank.

    `other` is the stage at the far end of a send or receive.
    """

    what: What
    stage: int = -1
    microbatch: int = -1
    peers: tuple[int, ...] = ()
    other: int = -1

    def __str__(self) -> str:
        if self.what in PASSES:
            return f"{self.stage}{PASSES[self.what]}{self.microbatch}"
        if self.what in MOVES:
            side = ">" if "send" in self.what else "<"
            return f"{self.stage}{MOVES[self.what]}{self.microbatch}{side}{self.peers[0]}"
        if self.what == "reduce":
            return f"{self.stage}REDUCE" + "".join(f"={rank}" for rank in self.peers)
        return "UPDATE"


Event = tuple[tuple[int, Instruction], ...]  # (rank, what it does), for each rank that takes part
Routes = Mapping[tuple[Kind, int], Collection[int]]


def instructions(
    schedule: Schedule, seconds: dict[Kind, float] | None = None
) -> tuple[tuple[Instruction, ...], ...]:
    """The lists of all ranks: each its part of `events`, and an update at the end."""
    lists: list[list[Instruction]] = [[] for _ in schedule.orders]
    for event in events(schedule, seconds):
        for rank, each in event:
            lists[rank].append(each)
    return tuple((*found, Instruction("update")) for found in lists)


def events(
    schedule: Schedule, seconds: dict[Kind, float] | None = None, routes: Routes | None = None
) -> list[Event]:
    """What all ranks do until their updates, in one common order, for a schedule that `check` accepts.

    Where a receive stands depends on what its rank does until then, so passes are timed.

    Args:
        seconds: of one pass of each kind, more than 0; 1 each if not given. The order in which ranks
            communicate differs with them, the passes' order and the results do not.
        routes: (kind, stage) -> the stages that take what such a pass makes; by default its neighbour.
            Stages of the same rank hand over without an instruction.
    """
    seconds = seconds or {"forward": 1.0, "backward": 1.0, "weight": 1.0}
    if min(seconds.values()) <= 0:
        raise PlanError(
            f"a pass cannot take {min(seconds.values())} s.",
            where="instructions",
            fix="more than 0",
        )
    ends = _ends(schedule, seconds)
    found: list[tuple[tuple[float, int, int, int], Event]] = []
    for rank, order in enumerate(schedule.orders):
        for at, step in enumerate(order):
            start, end = ends[step]
            found.append(((start, _PASS, rank, at), ((rank, _pass(schedule, step)),)))
            for to in _takers(schedule, step, routes):
                found.append(
                    ((end, _MOVE, _number(schedule, step), to.stage), _move(schedule, step, to))
                )
    for stage in range(schedule.stages):
        ranks = [rank for rank, held in enumerate(schedule.held) if stage in held]
        done = max(end for step, (_, end) in ends.items() if step.stage == stage)
        each = tuple(
            (r, Instruction("reduce", stage, peers=tuple(o for o in ranks if o != r)))
            for r in ranks
        )
        found.append(((done, _REDUCE, stage, 0), each))
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]


_MOVE, _REDUCE, _PASS = range(3)  # what comes first of what happens at one time


def _ends(schedule: Schedule, seconds: dict[Kind, float]) -> dict[Step, tuple[float, float]]:
    """Start and end of each step when nothing waits without need; steps that run as one follow each other."""
    slot_of = {step: slot for slots in schedule.slots for slot in slots for step in slot}
    times: dict[Step, tuple[float, float]] = {}
    free, place = [0.0] * schedule.ranks, [0] * schedule.ranks
    waiting = list(range(schedule.ranks))
    while waiting:
        rank = waiting.pop()
        while place[rank] < len(schedule.slots[rank]):
            slot = schedule.slots[rank][place[rank]]
            wanted = [need for step in slot for need in needs(schedule, step) if need not in slot]
            if not all(need in times for need in wanted):
                break
            now = max((times[need][1] for need in wanted), default=0.0)
            free[rank] = max(free[rank], now)
            for step in slot:
                long = seconds[step.kind] + (seconds["weight"] if schedule.whole(step) else 0.0)
                times[step] = (free[rank], free[rank] + long)
                free[rank] += long
            place[rank] += 1
            waiting += {schedule.rank_of[to] for step in slot for to in _takers(schedule, step)}
    assert len(times) == len(slot_of), "the schedule was not checked"
    return times


def _takers(schedule: Schedule, step: Step, routes: Routes | None = None) -> list[Step]:
    """Steps on other ranks, one per stage, that take this one's result."""
    if routes is None:
        along = {"forward": step.stage + 1, "backward": step.stage - 1}
        stages: Collection[int] = (
            {along[step.kind]} & set(range(schedule.stages)) if step.kind in along else ()
        )
    else:
        stages = routes.get((step.kind, step.stage), ())
    found = [
        Step("forward" if step.kind == "forward" else "backward", stage, step.microbatch)
        for stage in stages
    ]
    return [to for to in found if schedule.rank_of[to] != schedule.rank_of[step]]


def _number(schedule: Schedule, step: Step) -> int:
    """One number per transfer, the same on both ranks."""
    return (
        (step.kind == "backward") * schedule.stages + step.stage
    ) * schedule.microbatches + step.microbatch


def _pass(schedule: Schedule, step: Step) -> Instruction:
    what: What = "forward" if step.kind == "forward" else "weight-grad"
    if step.kind == "backward":
        what = "backward" if schedule.whole(step) else "input-grad"
    return Instruction(what, step.stage, step.microbatch)


def _move(schedule: Schedule, step: Step, to: Step) -> Event:
    """A send and its receive."""
    here, there = schedule.rank_of[step], schedule.rank_of[to]
    what: tuple[What, What] = (
        ("send-activation", "receive-activation")
        if step.kind == "forward"
        else ("send-gradient", "receive-gradient")
    )
    sent = Instruction(what[0], step.stage, step.microbatch, (there,), to.stage)
    return (here, sent), (there, Instruction(what[1], to.stage, to.microbatch, (here,), step.stage))


# ---------------------------------------------------------------- the checker


def check_instructions(lists: Sequence[Sequence[Instruction]]) -> None:
    """Carry out the lists with sends that wait for their receives: all end, and no pass lacks an input.

    Raises:
        PlanError: who waits for whom for ever, or the pass whose input is not there.
    """
    place = [0] * len(lists)
    has: list[set[tuple[str, int, int]]] = [set() for _ in lists]
    last = max((each.stage for one in lists for each in one), default=0)
    moved = True
    while moved:
        moved = False
        for rank in range(len(lists)):
            while (ranks := _meeting(lists, place, rank)) is not None:
                for one in ranks:
                    _carry_out(lists[one][place[one]], has[one], last)
                    place[one] += 1
                moved = True
    stuck = [
        f"rank {r} at {one[at]}"
        for r, (one, at) in enumerate(zip(lists, place, strict=True))
        if at < len(one)
    ]
    if stuck:
        raise PlanError(
            f"ranks wait for ever: {', '.join(stuck)}.", where="instructions",
            fix="sends and receives of two ranks in the same order on both",
        )  # fmt: skip


def _meeting(
    lists: Sequence[Sequence[Instruction]], place: list[int], rank: int
) -> list[int] | None:
    """The ranks that take part in a rank's next instruction, if all of them have come to it."""
    if place[rank] == len(lists[rank]):
        return None
    mine = lists[rank][place[rank]]
    for peer in mine.peers:
        if place[peer] == len(lists[peer]) or not _meets(mine, lists[peer][place[peer]], rank):
            return None
    return [rank, *mine.peers]


def _meets(mine: Instruction, theirs: Instruction, rank: int) -> bool:
    if rank not in theirs.peers or mine.microbatch != theirs.microbatch:
        return False
    if mine.what == "reduce":
        return theirs.what == "reduce" and mine.stage == theirs.stage
    other = mine.what.replace("send", "x").replace("receive", "send").replace("x", "receive")
    return theirs.what == other and (theirs.stage, theirs.other) == (mine.other, mine.stage)


def _carry_out(each: Instruction, has: set[tuple[str, int, int]], last: int) -> None:
    """What a rank holds after an instruction; a stage's neighbour on the same rank is fed at once."""
    m, stage = each.microbatch, each.stage
    for wanted in _takes(each, last):
        if wanted not in has:
            raise PlanError(
                f"{each} runs before its {wanted[0]} is there.",
                where="instructions",
                fix="receive first",
            )
    match each.what:
        case "forward":
            has |= {("activation", stage + 1, m), ("result", stage, m)}
        case "backward" | "input-grad":
            has |= {("gradient", stage - 1, m), ("half", stage, m)}
        case "receive-activation":
            has.add(("activation", stage, m))
        case "receive-gradient":
            has.add(("gradient", stage, m))
        case _:
            pass


def _takes(each: Instruction, last: int) -> Iterator[tuple[str, int, int]]:
    m, stage = each.microbatch, each.stage
    match each.what:
        case "forward" if stage > 0:
            yield ("activation", stage, m)
        case "backward" | "input-grad":
            yield ("result", stage, m)
            if stage < last:
                yield ("gradient", stage, m)
        case "weight-grad":
            yield ("half", stage, m)
        case "send-activation":
            yield ("activation", stage + 1, m)
        case "send-gradient":
            yield ("gradient", stage - 1, m)
        case _:
            pass
