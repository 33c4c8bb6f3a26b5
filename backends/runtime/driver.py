"""Run a step as a pipeline of stages, each on devices of its own, from one process or from several.

    driver = PipelineDriver(devices, schedule, ranks, graph, cut, stages, passes, in_turn=False)
    results = driver.run(leaves)

The driver walks the programs of all ranks (`ir/local/pipeline.py`), the same that `show --program` prints, in one
common order and dispatches what its process takes part in. Dispatch is asynchronous: programs of different devices
run side by side, and a program starts when its operands have arrived. A forward result lives until the last pass
that reads it; gradients are added up on the devices; the optimizer runs once, in rounds.

With several processes each calls the same step. Arrays of the host are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any, Literal

import numpy as np

from ...ir.graph import Graph
from ...ir.local.pipeline import Move, RankProgram, Run, name_rank_op
from ...ir.local.turns import Turns, answer
from ...ir.pipeline.borders import Message
from ...ir.pipeline.schedule import Schedule, Step
from ...ir.pipeline.stages import Stages
from ...ir.sharding import replicated
from .devices import Devices
from .programs import Route, StageDevices, StageProgram, Transfer
from .rendezvous import Rendezvous

Watch = Callable[[int, Step, Sequence[Any], Any, float | None], None]
Store = dict[int, Any]
Moves = tuple[Move, ...]  # from one stage to another, of one microbatch
Part = Literal["start", "passes", "updates"]  # of what a rank does in a step
PARTS: dict[str, Part] = {"start": "start", "prepare": "start", "update": "updates"}


@dataclass(frozen=True)
class Channel:
    """The way of some arrays from one stage to another, and the processes that take part."""

    transfer: Transfer
    processes: frozenset[int]


@dataclass(frozen=True)
class Turn:
    """What comes next in the common order, and `what` to say of this process if it waits there in vain.

    Of a send and its receive it is the send, whose rank it is; `channel` is the way of moves.
    """

    rank: int
    op: Run | Moves
    what: str
    channel: Channel | None = None


@dataclass(eq=False)
class PipelineDriver:
    """A pipelined step on flat leaves; each result lies on the devices of its stage.

    `peaks[rank]` is how many forward results a rank held at most in the last run, counted per stage
    and microbatch, for the ranks of this process. `watch(rank, step, taken, token, began)` is told of each
    pass of this process when it is dispatched, with what it takes of its microbatch; the token is ready when
    the pass is done. `began` is the clock (`time.perf_counter`) before its dispatch if all was there by then.
    A step of a schedule may be two passes.

    Args:
        ranks: what each rank runs.
        graph: of the step, prepared, with the numbers of values that the programs know.
        passes: by name.
        in_turn: of what several processes run together, wait for each before the next.
    """

    devices: Devices
    schedule: Schedule
    ranks: Sequence[RankProgram]
    graph: Graph
    cut: Stages
    stages: Sequence[StageDevices]
    passes: Mapping[str, StageProgram]
    in_turn: bool
    watch: Watch | None = None
    peaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owners = [self.devices.processes_of(stage.mesh) for stage in self.stages]
        self.here = [self.devices.process in owners for owners in self.owners]
        self.rendezvous = Rendezvous(self.devices, self.in_turn)
        self.late: list[set[int]] = [set() for _ in self.stages]
        for program in self.passes.values():
            if program.fragment.kind == "update":
                self.late[program.fragment.stage].update(program.fragment.takes)
        self.copies: dict[tuple[int, int, tuple[int, ...]], Channel] = {}
        self.turns = self._turns()

    @cached_property
    def moments(self) -> list[Sequence[Any]]:
        """Per stage the numbers of the microbatches, on its devices."""
        count = self.schedule.microbatches
        numbers = [np.int32(m) for m in range(count)]
        return [
            self.devices.place(numbers, stage.mesh, [replicated(0)] * count) if here else []
            for stage, here in zip(self.stages, self.here, strict=True)
        ]

    @cached_property
    def messages(self) -> dict[tuple[int, tuple[int, ...]], Message]:
        """By the stage that sends and the values."""
        return {
            (program.fragment.stage, message.values): message
            for program in self.passes.values()
            for message in program.messages
        }

    def _turns(self) -> list[Turn]:
        """The common order; the way of what moves is the same for all microbatches."""
        turns, channels = list[Turn](), dict[object, Channel]()
        for rank, op in Turns(self.ranks):
            if isinstance(op, Run):
                turns.append(Turn(rank, op, f"rank {rank} at `{name_rank_op(op)}`"))
                continue
            first = op[0]
            way = first.phase, first.sender, first.receiver, *(move.values for move in op)
            if way not in channels:
                routes = [self._route(move) for move in op]
                channels[way] = self._channel(routes, first.sender, first.receiver)
            turns.append(Turn(rank, op, self._told(rank, first), channels[way]))
        return turns

    def _told(self, rank: int, move: Move) -> str:
        """At what a rank of this process is: the receiving one, if it is here."""
        if move.rank is not None and self.here[move.receiver]:
            return f"rank {move.rank} at `{name_rank_op(answer(move, rank))}`"
        return f"rank {rank} at `{name_rank_op(move)}`"

    def _route(self, move: Move) -> Route:
        arrives = move.arrives.sharding
        if move.phase == "start":
            kind = move.leaves.whole
            return Route(kind.shape, kind.dtype, move.leaves.sharding, arrives)
        message = self.messages[move.sender, move.values]
        return Route(message.shape, message.dtype, message.leaves, message.arrivals[move.receiver])

    def _channel(self, routes: Sequence[Route], sender: int, receiver: int) -> Channel:
        transfer = self.devices.transfer(
            routes, self.stages[sender].mesh, self.stages[receiver].mesh
        )
        return Channel(transfer, frozenset(self.owners[sender] | self.owners[receiver]))

    @cached_property
    def order(self) -> list[tuple[int, Step]]:
        """All steps of the schedule in the order of their dispatch."""
        runs = ((turn.rank, turn.op) for turn in self.turns if isinstance(turn.op, Run))
        return [*dict.fromkeys((r, step) for r, run in runs if (step := self.step_of(run)))]

    def step_of(self, run: Run) -> Step | None:
        """The step of the schedule that a pass is part of: gradients of weights may be of a whole backward step."""
        fragment = self.passes[run.name].fragment
        if run.microbatch is None or fragment.kind in ("prepare", "update"):
            return None
        step = Step(fragment.kind, fragment.stage, run.microbatch)
        return step if step in self.schedule.rank_of else step._replace(kind="backward")

    @cached_property
    def joint(self) -> bool:
        """Whether the stages lie in several processes."""
        return len(set[int]().union(*self.owners)) > 1

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """One step from leaves that lie anywhere; donated ones are given up. Results that lie with other
        processes are None."""
        return StepRun(self, self.placed(leaves)).step()

    # ------------------------------------------------------------ inputs

    def placed(self, leaves: Sequence[Any]) -> list[Store]:
        """Per stage the inputs that it has at the start, on its devices. What only the first of those processes can
        read, it hands to the others."""
        stores = [Store() for _ in self.stages]
        by_value = dict(zip(self.graph.inputs, leaves, strict=True))
        homes = dict(zip(self.graph.inputs, self.cut.homes, strict=True))
        moves: dict[tuple[int, int], list[int]] = {}
        put: list[list[int]] = [[] for _ in self.stages]
        for each in (each for rank in self.ranks for each in rank.inputs):
            home, leaf = homes[each.value][0], by_value[each.value]
            alone = self.joint and self.devices.lies_on(leaf, self.stages[home].mesh)
            if alone and each.stage != home:
                moves.setdefault((home, each.stage), []).append(each.value)
            else:
                put[each.stage].append(each.value)
        for stage, values in enumerate(put):
            if self.here[stage]:
                to = self.stages[stage]
                given, layouts = [by_value[v] for v in values], [to.inputs[v] for v in values]
                arrays = self.devices.place(given, to.mesh, layouts)
                stores[stage] |= zip(values, arrays, strict=True)
        for (home, stage), values in sorted(moves.items()):
            self._copy(home, stage, values, stores)
        return stores

    def _copy(self, home: int, stage: int, values: list[int], stores: list[Store]) -> None:
        """Inputs from the stage where they lie to another that reads them too."""
        key = (home, stage, tuple(values))
        if key not in self.copies:
            types, a, b = self.graph.types, self.stages[home].inputs, self.stages[stage].inputs
            routes = [Route(types[v].shape, types[v].dtype, a[v], b[v]) for v in values]
            self.copies[key] = self._channel(routes, home, stage)
        arrays = [stores[home][v] for v in values] if self.here[home] else None
        found = self.carry(
            self.copies[key], arrays, f"stage {home}'s inputs on their way to stage {stage}"
        )
        if found is not None:
            stores[stage].update(zip(values, found, strict=True))

    # ------------------------------------------------------------ together

    def carry(
        self, channel: Channel, arrays: Sequence[Any] | None, what: str
    ) -> Sequence[Any] | None:
        """Hand arrays over, as far as this process takes part; what arrives here."""
        if self.devices.process not in channel.processes:
            return None
        return self._together(channel.processes, what, lambda: channel.transfer(arrays))

    def call(self, program: StageProgram, what: str, *operands: Any) -> Any:
        """Dispatch a stage's program, with the other processes that hold a part of the stage."""

        def call() -> tuple[Any, Any]:
            found = program.call(*operands)
            return found, found[0]

        return self._together(self.owners[program.fragment.stage], what, call)

    def _together(
        self, group: Collection[int], what: str, call: Callable[[], tuple[Any, Any]]
    ) -> Any:
        """The result of what one or several processes run."""
        return call()[0] if len(group) == 1 else self.rendezvous.run(what, group, call)


@dataclass
class StepRun:
    """One step on its way: `steady` lives for the step, `flight` for one microbatch on one stage.

    `leaving` is what passes made for other stages that have not come to take it: by the stage that made it, the
    values, the microbatch and the stage that takes it.
    """

    driver: PipelineDriver
    steady: list[Store]

    def __post_init__(self) -> None:
        driver = self.driver
        self.flight = [
            [Store() for _ in range(driver.schedule.microbatches)] for _ in driver.stages
        ]
        self.leaving: dict[tuple[int, tuple[int, ...], int | None, int], Any] = {}
        self.pieces: list[dict[int, list[Any]]] = [{} for _ in driver.stages]
        self.begun: list[set[tuple[int, int]]] = [set() for _ in driver.ranks]
        self.part: list[Part] = ["start" for _ in driver.ranks]
        self.sums: list[Store] = [
            self._zeros(s) if driver.here[s] else {} for s in range(len(driver.stages))
        ]
        driver.peaks = [0] * driver.schedule.ranks

    def _zeros(self, stage: int) -> Store:
        """Totals before the first microbatch."""
        found = self.driver.stages[stage]
        return dict(zip(found.totals, found.zeros(), strict=True)) if found.totals else {}

    def step(self) -> list[Any]:
        """The step's results, as far as they lie in this process; None for others."""
        results: list[Any] = [None] * len(self.driver.cut.ends)
        for turn in self.driver.turns:
            if isinstance(turn.op, Run):
                self._run(turn, turn.op, results)
            else:
                self._move(turn, turn.op)
        return results

    def _come_to(self, rank: int, part: Part) -> None:
        """What a rank does between the parts of its step."""
        if part != "start" and self.part[rank] == "start":
            for stage in filter(self.driver.here.__getitem__, self.driver.schedule.held[rank]):
                store, same = self.steady[stage], self.driver.stages[stage].same
                store |= {v: store[source] for v, source in same.items()}
        if part == "updates" and self.part[rank] != "updates":
            for stage in self.driver.schedule.held[rank]:
                self._settle(stage)
        self.part[rank] = part

    # ------------------------------------------------------------ passes

    def _run(self, turn: Turn, run: Run, results: list[Any]) -> None:
        program = self.driver.passes[run.name]
        kind = program.fragment.kind
        self._come_to(turn.rank, PARTS.get(kind, "passes"))
        if not self.driver.here[program.fragment.stage]:
            return
        if kind == "prepare":
            self._prepare(program, turn.what)
        elif kind == "update":
            self._update(program, turn.what, results)
        else:
            self._pass(turn, run, program)

    def _prepare(self, program: StageProgram, what: str) -> None:
        stage, driver = program.fragment.stage, self.driver
        kept = [self.steady[stage][v] for v in program.keeps]
        _, _, gives, _, _ = driver.call(program, what, driver.moments[stage][0], [], kept)
        self.steady[stage] |= zip(program.fragment.gives, gives, strict=True)

    def _pass(self, turn: Turn, run: Run, program: StageProgram) -> None:
        """Dispatch a pass, then let go of what it was the last to read."""
        driver, fragment, m = self.driver, program.fragment, run.microbatch
        assert m is not None
        stage, step = fragment.stage, driver.step_of(run)
        assert step is not None
        flight, sums, store = self.flight[stage][m], self.sums[stage], self.steady[stage]
        taken = [flight[v] if v in flight else store[v] for v in program.keeps]
        totals = [sums.pop(v) for v in fragment.totals]
        moving = [flight[v] for v in program.keeps if v in flight]
        began = (
            perf_counter()
            if driver.watch is not None and all(map(driver.devices.is_ready, moving))
            else None
        )
        token, totals, gives, sent, _ = driver.call(
            program, turn.what, driver.moments[stage][m], totals, taken
        )
        sums |= zip(fragment.totals, totals, strict=True)
        flight |= zip(fragment.gives, gives, strict=True)
        self._leave(program, sent, m)
        for value in fragment.drops:
            flight.pop(value, None)
        if driver.watch is not None:
            driver.watch(turn.rank, step, moving, token, began)
        self._count(turn.rank, step)

    def _leave(self, program: StageProgram, sent: Sequence[Any], microbatch: int | None) -> None:
        """What a pass sends waits for its moves."""
        for message, array in zip(program.messages, sent, strict=True):
            for to in message.arrivals:
                self.leaving[program.fragment.stage, message.values, microbatch, to] = array

    def _count(self, rank: int, step: Step) -> None:
        begun = self.begun[rank]
        if step.kind == "forward":
            begun.add((step.stage, step.microbatch))
        elif not self.flight[step.stage][step.microbatch]:
            begun.discard((step.stage, step.microbatch))
        self.driver.peaks[rank] = max(self.driver.peaks[rank], len(begun))

    # ------------------------------------------------------------ moves

    def _move(self, turn: Turn, moves: Moves) -> None:
        """What one stage hands to another: a copy, or a send and its receive."""
        driver, first = self.driver, moves[0]
        assert turn.channel is not None
        for rank in (turn.rank, *([] if first.rank is None else [first.rank])):
            self._come_to(rank, PARTS.get(first.phase, "passes"))
        arrays = [self._left(move) for move in moves] if driver.here[first.sender] else None
        found = driver.carry(turn.channel, arrays, turn.what)
        store = self.steady[first.receiver]
        if first.microbatch is not None:
            store = self.flight[first.receiver][first.microbatch]
        for move, array in zip(moves, found or (), strict=found is not None):
            several = len(move.values) > 1
            store |= zip(
                move.values, driver.devices.scalars(array) if several else [array], strict=True
            )

    def _left(self, move: Move) -> Any:
        if move.phase == "start":
            return self.steady[move.sender][move.values[0]]
        return self.leaving.pop((move.sender, move.values, move.microbatch, move.receiver))

    # ------------------------------------------------------------ updates

    def _settle(self, stage: int) -> None:
        """What the passes leave for the updates: totals, and values of each microbatch; the rest is let go of."""
        steady, sums, pieces = self.steady[stage], self.sums[stage], self.pieces[stage]
        steady |= sums
        sums.clear()
        for flight in self.flight[stage]:
            for value, array in flight.items():
                pieces.setdefault(value, []).append(array)
            flight.clear()
        steady |= {v: arrays[-1] for v, arrays in pieces.items()}
        late = self.driver.late[stage]
        for value in steady.keys() - late:
            del steady[value]
        for value in pieces.keys() - late:
            del pieces[value]

    def _update(self, program: StageProgram, what: str, results: list[Any]) -> None:
        """Run a program of a round."""
        fragment, stage, driver = program.fragment, program.fragment.stage, self.driver
        store = self.steady[stage]
        kept = [self.pieces[stage][v] if v in program.joins else store[v] for v in program.keeps]
        given_up = [store[v] for v in program.donates]
        for value in fragment.drops:
            store.pop(value, None)
            self.pieces[stage].pop(value, None)
        _, _, gives, sent, made = driver.call(
            program, what, driver.moments[stage][0], given_up, kept
        )
        store |= zip(fragment.gives, gives, strict=True)
        self._leave(program, sent, None)
        for position, array in zip(fragment.results, made, strict=True):
            results[position] = array
