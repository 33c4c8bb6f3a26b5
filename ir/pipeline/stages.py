"""A training step as the programs of pipeline stages, and what they hand to each other.

    stage 0   prepare   forward x M   backward x M   update 0   update 1
    stage 1   prepare   forward x M   backward x M   update 0   update 1

`cut_stages` takes a prepared program and the places where the forward pass is cut. Each `Fragment`
is run by one stage alone: once per step (prepare, update) or once per microbatch. Values keep their
numbers; what several stages need of scalars, masks and casts each makes for itself, so a value is
known by its number *and* stage. Updates go in rounds, with an exchange after each: norms of
gradients first, then what needs their sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ..errors import PlanError
from ..graph import Graph, Op
from ..ops import CONTRACTIONS
from ..passes.microbatch import Refusal, TimeAxis
from ..program import Program
from .stage_places import Classes, Places

Pass = Literal["prepare", "forward", "backward", "weight", "update"]


@dataclass(frozen=True)
class Fragment:
    """Ops that one stage runs together, and the values at their border.

    `takes` are read and not made here (constants apart), `gives` are read by later fragments of the
    stage, `sends` are (value, stage) read elsewhere. `totals` are joined over the microbatches where
    they are made. `drops` are taken here for the last time. `results` are positions of the step's
    outputs that this fragment completes.
    """

    kind: Pass
    stage: int
    ops: tuple[Op, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    sends: tuple[tuple[int, int], ...]
    totals: tuple[int, ...]
    drops: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Stages:
    """All fragments of a step; each tuple has one entry per stage, `updates` one tuple per round.

    `homes[position]`: the stages that read an input of the step, where carried state lives first.
    `ends[position]`: the stage that completes an output.
    """

    prepare: tuple[Fragment, ...]
    forward: tuple[Fragment, ...]
    backward: tuple[Fragment, ...]
    weight: tuple[Fragment, ...]  # empty where the schedule has no weight steps
    updates: tuple[tuple[Fragment, ...], ...]
    homes: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.forward)

    def of(self, kind: Pass, stage: int) -> Fragment:
        """The fragment of a pass that runs once per microbatch."""
        return {"forward": self.forward, "backward": self.backward, "weight": self.weight}[kind][
            stage
        ]


def cut_stages(
    program: Program, whole: Graph, cuts: Sequence[int], microbatches: int,
    splits: bool = False, folded: bool = False,
) -> Stages:  # fmt: skip
    """Cut a step into stages.

    Args:
        program: the whole graph, prepared.
        whole: the graph before, folded; `cuts` are positions of its ops, where each stage begins.
        microbatches: how many; 1 needs no time axis.
        splits: give gradients of weights a fragment of their own.
        folded: the program stands for a deeper one, in which more layers read what nobody reads in it.

    Raises:
        PlanError: stages without forward ops, or microbatches that cannot be.
    """
    _check_time(program.time, microbatches)
    classes = Classes(program)
    places = Places(classes, whole, cuts)
    _check_cuts(places, cuts)
    return _Cutter(classes, places, len(cuts), microbatches, splits, folded).cut()


def _check_time(time: TimeAxis | Refusal, microbatches: int) -> None:
    if microbatches == 1:
        return
    if isinstance(time, Refusal):
        raise PlanError(
            f"a pipeline of {microbatches} microbatches is not possible: {time.reason}.",
            where=time.where,
            fix="microbatches=1, or no pipeline",
        )
    if time.parts % microbatches:
        raise PlanError(
            f"a batch of {time.batch}{time.grouped} cannot be cut into {microbatches} microbatches.",
            where="pipeline",
            fix=f"a number of microbatches that divides {time.parts}",
        )


def _check_cuts(places: Places, cuts: Sequence[int]) -> None:
    full = {placed.stage for placed in places.forward}
    if empty := [stage for stage in range(len(cuts)) if stage not in full]:
        raise PlanError(
            f"stage {empty[0]} of {len(cuts)} has no op of the forward pass.",
            where=f"pipeline, cut at op {cuts[empty[0]]}",
            fix="fewer stages, or cuts within the forward pass",
        )


@dataclass
class _Draft:
    """A fragment whose border is not known yet."""

    kind: Pass
    stage: int
    ops: list[Op] = field(default_factory=lambda: [])
    # Values passed on that none of the ops reads.
    extra: list[int] = field(default_factory=lambda: [])
    results: list[int] = field(default_factory=lambda: [])


@dataclass
class _Cutter:
    classes: Classes
    places: Places
    count: int
    microbatches: int
    splits: bool
    folded: bool

    def __post_init__(self) -> None:
        self.graph = self.classes.graph
        self.inputs = set(self.graph.inputs)
        self.writer = {v: op for op in self.graph.ops for v in op.outputs}
        self.early = {v for op in self.classes.early for v in op.outputs}
        self.needs: set[tuple[int, int]] = set()  # (stage, value) that late ops and outputs need
        self.rounds: dict[tuple[int, int], int] = {}  # (stage, value) -> round that makes it there

    def cut(self) -> Stages:
        body = self._body()
        first = self._homes(body)
        self.late_at = self._place_late(first)
        ends = self._demand(first)
        updates = self._updates(ends)
        prepare = self._prepare([*body, *updates])
        drafts = [*prepare, *body, *updates]
        done = {
            id(draft): fragment for draft, fragment in zip(drafts, self._close(drafts), strict=True)
        }

        def pick(kind: Pass) -> tuple[Fragment, ...]:
            return tuple(done[id(d)] for d in drafts if d.kind == kind)

        flat = pick("update")
        rounds = tuple(flat[i : i + self.count] for i in range(0, len(flat), self.count))
        homes = self._places_of_inputs(drafts, first)
        return Stages(
            pick("prepare"), pick("forward"), pick("backward"), pick("weight"), rounds, homes, ends
        )

    # ------------------------------------------------------------ the body

    def _body(self) -> list[_Draft]:
        late_backward = self._weight_ops() if self.splits else set[int]()
        kinds: tuple[Pass, ...] = (
            ("forward", "backward", "weight") if self.splits else ("forward", "backward")
        )
        drafts = {(kind, s): _Draft(kind, s) for kind in kinds for s in range(self.count)}
        for placed in self.places.forward:
            drafts["forward", placed.stage].ops.append(placed.op)
        for placed in self.places.backward:
            kind = "weight" if id(placed) in late_backward else "backward"
            drafts[kind, placed.stage].ops.append(placed.op)
        return list(drafts.values())

    def _weight_ops(self) -> set[int]:
        """Placed backward ops on which no other stage and no product of activations waits."""
        time = self.classes.program.time
        totals: Mapping[int, str] = time.totals if isinstance(time, TimeAxis) else {}
        wanted = set[tuple[int, int]]()
        for placed in self.places.backward:
            wanted |= {
                (self.places.stage_of[v], v)
                for v in placed.op.inputs
                if self.places.stage_of.get(v, placed.stage) != placed.stage
            }
        found = set[int]()
        for placed in reversed(self.places.backward):
            here = {(placed.stage, v) for v in placed.op.outputs}
            product = (
                placed.op.kind in CONTRACTIONS
                and bool(totals)
                and totals.keys().isdisjoint(placed.op.outputs)
            )
            if product or not wanted.isdisjoint(here):
                wanted |= {(placed.stage, v) for v in placed.op.inputs}
            else:
                found.add(id(placed))
        return found

    def _homes(self, body: Iterable[_Draft]) -> dict[int, int]:
        """Input -> the stage of its first forward reader, else of its first reader in the body."""
        home: dict[int, int] = {}
        for kind in ("forward", "backward", "weight"):
            known = set(home)
            for draft in body:
                if draft.kind == kind:
                    read = self._early_closure(v for op in draft.ops for v in op.inputs)
                    for v in read & self.inputs - known:
                        home[v] = min(draft.stage, home.get(v, draft.stage))
        return home

    def _early_closure(self, values: Iterable[int]) -> set[int]:
        """The values, and all that early ops make them of."""
        found, stack = set[int](), list(values)
        while stack:
            value = stack.pop()
            if value not in found:
                found.add(value)
                stack.extend(self.writer[value].inputs if value in self.early else ())
        return found

    # ------------------------------------------------------------ after the last microbatch

    def _floats(self, op: Op) -> bool:
        """An op on scalars alone belongs nowhere; each stage that needs it runs it."""
        return all(self.graph.types[v].rank == 0 or v in self.classes.free for v in op.inputs)

    def _place_late(self, home: Mapping[int, int]) -> dict[int, int]:
        """Value -> stage of late ops that do not float: with their operands, else with their readers."""
        known: dict[int, int] = {v: s for v, s in home.items() if self.graph.types[v].rank}
        known |= self.places.stage_of
        late = [op for op in self.classes.late if not self._floats(op)]
        for op in late:
            stages = [known[v] for v in op.inputs if v in known and self.graph.types[v].rank]
            if stages:
                known |= dict.fromkeys(op.outputs, min(stages))
        carried = [(self.graph.inputs[i], self.graph.outputs[o]) for i, o in self.graph.state]
        readers: dict[int, int] = {new: home[old] for old, new in carried if old in home}
        for op in reversed(late):
            if op.outputs[0] not in known:
                stage = min((readers[v] for v in op.outputs if v in readers), default=0)
                known |= dict.fromkeys(op.outputs, stage)
            for v in op.inputs:
                readers[v] = min(known[op.outputs[0]], readers.get(v, self.count))
        return {v: known[v] for op in late for v in op.outputs} | {
            v: known.get(v, readers.get(v, 0)) for v in self.inputs
        }

    def _demand(self, home: Mapping[int, int]) -> tuple[int, ...]:
        """Which values are needed where; returns the stage of each output."""
        source = {o: self.graph.inputs[i] for i, o in self.graph.state}
        seats = self._seats()
        ends = tuple(
            self.late_at[source[o]] if o in source else seats.get(v, 0)
            for o, v in enumerate(self.graph.outputs)
        )
        self.needs |= {(stage, v) for stage, v in zip(ends, self.graph.outputs, strict=True)}
        self.needs |= {(self.late_at[v], v) for v in self._read_by_folded()}
        for op in reversed(self.classes.late):
            for stage in self._runs_on(op):
                self.needs |= {(stage, v) for v in op.inputs if v not in self.classes.free}
        return ends

    def _read_by_folded(self) -> Iterator[int]:
        """What late ops make for layers that are folded away, or for scalars for those (norms of gradients)."""
        read = set(self.graph.outputs)
        for op in reversed(self.classes.late if self.folded else ()):
            unread = read.isdisjoint(op.outputs)
            if unread and self._floats(op):
                continue
            read.update(op.inputs)
            yield from op.outputs if unread else ()

    def _runs_on(self, op: Op) -> list[int]:
        wanted = [s for s in range(self.count) if any((s, v) in self.needs for v in op.outputs)]
        return wanted if self._floats(op) else [self.late_at[op.outputs[0]]] * bool(wanted)

    def _seats(self) -> dict[int, int]:
        """The stage of each value that may be an output: where it, or the last of what it is made of, lies."""
        seats = {**self.late_at, **self.places.stage_of}
        for op in self.graph.ops:
            last = max((seats.get(v, 0) for v in op.inputs), default=0)
            seats |= {
                v: 0 if v in self.classes.free else last for v in op.outputs if v not in seats
            }
        return seats

    def _updates(self, ends: Sequence[int]) -> list[_Draft]:
        """Rounds in order, each with one draft per stage."""
        found: dict[tuple[int, int], _Draft] = {}

        def draft(number: int, stage: int) -> _Draft:
            return found.setdefault((number, stage), _Draft("update", stage))

        runs = [(op, self._runs_on(op)) for op in self.classes.late]
        for op, stages in runs:
            for stage in stages:
                number = max((self._round(stage, v) for v in op.inputs), default=0)
                self.rounds |= {(stage, v): number for v in op.outputs}
        self._put_off(runs, ends)
        for op, stages in runs:
            for stage in stages:
                draft(self.rounds[stage, op.outputs[0]], stage).ops.append(op)
        for position, (stage, value) in enumerate(zip(ends, self.graph.outputs, strict=True)):
            draft(self._round(stage, value), stage).results.append(position)
        for stage, value in sorted(self.needs):
            origin = self.places.stage_of.get(value, stage)
            if origin != stage:
                draft(0, origin).extra.append(value)
        most = max((number for number, _ in found), default=0)
        return [draft(number, stage) for number in range(most + 1) for stage in range(self.count)]

    def _put_off(self, runs: Sequence[tuple[Op, Sequence[int]]], ends: Sequence[int]) -> None:
        """Let ops wait for the round that reads what they make, where that holds no more between the rounds."""
        last, there = max(self.rounds.values(), default=0), self.inputs | self.classes.free
        outputs = set(zip(ends, self.graph.outputs, strict=True))
        sent = {v for stage, v in self.needs if self.late_at.get(v, stage) != stage}
        first_read: dict[tuple[int, int], int] = {}
        last_read: dict[tuple[int, int], int] = defaultdict(int)

        def nbytes(values: Iterable[int]) -> int:
            return sum(self.graph.types[v].nbytes for v in values)

        for op, stages in reversed(runs):
            for stage in stages:
                now = self.rounds[stage, op.outputs[0]]
                stays = any(v in sent or (stage, v) in outputs for v in op.outputs)
                then = min((first_read.get((stage, v), last + 1) for v in op.outputs), default=now)
                if not stays and now < then <= last:
                    held = {v for v in op.inputs if last_read[stage, v] < then} - there
                    if nbytes(held) <= nbytes(op.outputs):
                        self.rounds |= {(stage, v): then for v in op.outputs}
                        now = then
                for v in op.inputs:
                    first_read[stage, v] = min(now, first_read.get((stage, v), now))
                    last_read[stage, v] = max(now, last_read[stage, v])

    def _round(self, stage: int, value: int) -> int:
        """The first round in which a stage has a value."""
        if (stage, value) in self.rounds:
            return self.rounds[stage, value]
        if value in self.late_at and value not in self.inputs:
            return self.rounds[self.late_at[value], value] + 1
        return int(self.places.stage_of.get(value, stage) != stage)

    # ------------------------------------------------------------ prepare, borders

    def _prepare(self, drafts: Iterable[_Draft]) -> list[_Draft]:
        read: dict[int, set[int]] = defaultdict(set)
        for draft in drafts:
            read[draft.stage].update(v for op in draft.ops for v in op.inputs)
            read[draft.stage].update(self.graph.outputs[o] for o in draft.results)
        found: list[_Draft] = []
        for stage in range(self.count):
            needed = self._early_closure(read[stage] & self.early)
            ops = [op for op in self.classes.early if not needed.isdisjoint(op.outputs)]
            found.append(_Draft("prepare", stage, ops))
        return found

    def _close(self, drafts: Sequence[_Draft]) -> list[Fragment]:
        """Find what each fragment takes, gives and sends."""
        takes = [self._takes(draft) for draft in drafts]
        readers: dict[tuple[int, int], list[int]] = defaultdict(list)  # (stage, value) -> drafts
        for number, (draft, taken) in enumerate(zip(drafts, takes, strict=True)):
            for value in taken:
                readers[draft.stage, value].append(number)
        return [
            self._closed(number, drafts, takes[number], readers) for number in range(len(drafts))
        ]

    def _takes(self, draft: _Draft) -> tuple[int, ...]:
        made = {v for op in draft.ops for v in op.outputs}
        read = [*(v for op in draft.ops for v in op.inputs), *draft.extra]
        read += [self.graph.outputs[o] for o in draft.results]
        return tuple(dict.fromkeys(v for v in read if v not in made and v not in self.classes.free))

    def _closed(
        self, number: int, drafts: Sequence[_Draft], takes: tuple[int, ...],
        readers: Mapping[tuple[int, int], list[int]],
    ) -> Fragment:  # fmt: skip
        draft = drafts[number]
        made = {v: None for op in draft.ops for v in op.outputs}
        gives = tuple(v for v in made if (draft.stage, v) in readers)
        totals: tuple[int, ...] = ()
        if draft.kind in ("forward", "backward", "weight"):
            totals = tuple(
                v
                for v in gives
                if self.microbatches > 1
                and v in self._sums
                and any(drafts[k].kind == "update" for k in readers[draft.stage, v])
            )
            gives = tuple(v for v in gives if v not in totals)
        elsewhere = made if draft.kind != "update" else dict.fromkeys([*made, *draft.extra])
        sends = tuple(
            (v, stage)
            for v in elsewhere
            for stage in range(self.count)
            if stage != draft.stage and (stage, v) in readers and self._sent(draft, v, stage)
        )
        ops = (*self._free_ops(draft), *draft.ops)
        drops = tuple(v for v in takes if readers[draft.stage, v][-1] == number)
        return Fragment(
            draft.kind, draft.stage, ops, takes, gives, sends, totals, drops, tuple(draft.results)
        )

    @cached_property
    def _sums(self) -> Mapping[int, str]:
        time = self.classes.program.time
        return time.totals if isinstance(time, TimeAxis) else {}

    def _sent(self, draft: _Draft, value: int, stage: int) -> bool:
        """Whether another stage reads this stage's value rather than one of its own making."""
        if draft.kind == "prepare":
            return False
        if draft.kind == "update":
            return (stage, value) not in self.rounds and (stage, value) in self.needs
        return (stage, value) not in self.needs

    def _free_ops(self, draft: _Draft) -> list[Op]:
        """Ops on constants whose results this fragment reads."""
        wanted = {v for op in draft.ops for v in op.inputs} | {
            self.graph.outputs[o] for o in draft.results
        }
        found: list[Op] = []
        for op in reversed(self._constant_ops):
            if not wanted.isdisjoint(op.outputs):
                found.append(op)
                wanted.update(op.inputs)
        return found[::-1]

    @cached_property
    def _constant_ops(self) -> list[Op]:
        return [op for op in self.graph.ops if self.classes.free.issuperset(op.outputs)]

    def _places_of_inputs(
        self, drafts: Iterable[_Draft], home: Mapping[int, int]
    ) -> tuple[tuple[int, ...], ...]:
        read: dict[int, set[int]] = defaultdict(set)
        for draft in drafts:
            for value in self._takes(draft):
                read[value].add(draft.stage)
        first = {v: self.late_at[v] for v in self.inputs}
        return tuple(
            tuple(sorted(read[v] | {first[v]}, key=lambda s: (s != first[v], s)))
            for v in self.graph.inputs
        )
