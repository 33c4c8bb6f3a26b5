"""Run a step as a pipeline of stages, each on devices of its own, from one process or from several.

    driver = PipelineDriver(devices, schedule, graph, cut, stages, passes, rounds, in_turn=False)
    results = driver.run(leaves)

The driver walks the events of all ranks in their common order and dispatches what its process takes part in.
Dispatch is asynchronous: programs of different devices run side by side, and a program starts when its operands
have arrived. A forward result lives until the last pass that reads it; gradients are added up on the devices;
the optimizer runs once, in rounds.

With several processes each calls the same step. Arrays of the host are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np

from ...ir.graph import Graph
from ...ir.pipeline.instructions import MOVES, PASSES, Event, Instruction, events
from ...ir.pipeline.schedule import Kind, Schedule, Step
from ...ir.pipeline.stages import Stages
from ...ir.sharding import replicated
from .devices import Devices
from .programs import Route, StageDevices, StageProgram, Transfer
from .rendezvous import Rendezvous

Watch = Callable[[int, Step, Sequence[Any], Any, float | None], None]
Store = dict[int, Any]
Place = tuple[str | int, int]  # a pass and its stage, or a round of updates and its stage
KINDS: dict[str, Kind] = {  # instruction -> the pass that it is, or whose result it sends
    "forward": "forward", "backward": "backward", "input-grad": "backward", "weight-grad": "weight",
    "send-activation": "forward", "send-gradient": "backward",
}  # fmt: skip


@dataclass(frozen=True)
class Channel:
    """The way of some arrays from one stage to another, and the processes that take part."""

    transfer: Transfer
    processes: frozenset[int]


@dataclass(eq=False)
class PipelineDriver:
    """A pipelined step on flat leaves; each result lies on the devices of its stage.

    `peaks[rank]` is how many forward results a rank held at most in the last run, counted per stage
    and microbatch, for the ranks of this process. `watch(rank, step, taken, token, began)` is told of each
    pass of this process when it is dispatched, with what it takes of its microbatch; the token is ready when
    the pass is done. `began` is the clock (`time.perf_counter`) before its dispatch if all was there by then.

    Args:
        graph: of the step, prepared, with the numbers of values that the programs know.
        passes: by kind and stage.
        rounds: of updates, each with a program per stage.
        in_turn: of what several processes run together, wait for each before the next.
    """

    devices: Devices
    schedule: Schedule
    graph: Graph
    cut: Stages
    stages: Sequence[StageDevices]
    passes: Mapping[tuple[str, int], StageProgram]
    rounds: Sequence[Sequence[StageProgram]]
    in_turn: bool
    watch: Watch | None = None
    peaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owners = [self.devices.processes_of(stage.mesh) for stage in self.stages]
        self.here = [self.devices.process in owners for owners in self.owners]
        self.rendezvous = Rendezvous(self.devices, self.in_turn)
        self.late = [
            {v for p in programs for v in p.fragment.takes}
            for programs in zip(*self.rounds, strict=True)
        ]
        self.messages = self._messages()
        self.copies: dict[tuple[int, int, tuple[int, ...]], Channel] = {}

    @cached_property
    def moments(self) -> list[Sequence[Any]]:
        """Per stage the numbers of the microbatches, on its devices."""
        count = self.schedule.microbatches
        numbers = [np.int32(m) for m in range(count)]
        return [
            self.devices.place(numbers, stage.mesh, [replicated(0)] * count) if here else []
            for stage, here in zip(self.stages, self.here, strict=True)
        ]

    def _messages(self) -> dict[tuple[Place, int], tuple[list[int], Channel]]:
        """(program, stage it sends to) -> which of its messages go there, and how."""
        programs: dict[Place, StageProgram] = {
            **self.passes,
            **{(k, p.fragment.stage): p for k, each in enumerate(self.rounds) for p in each},
        }
        found = {}
        for key, program in programs.items():
            for to in sorted({stage for message in program.messages for stage in message.arrivals}):
                sent = [k for k, message in enumerate(program.messages) if to in message.arrivals]
                messages = [program.messages[k] for k in sent]
                routes = [Route(p.shape, p.dtype, p.leaves, p.arrivals[to]) for p in messages]
                found[key, to] = sent, self._channel(routes, key[1], to)
        assert not any(kind == "weight" for (kind, _), _ in found), (
            "gradients of weights leave with the updates"
        )
        return found

    def _channel(self, routes: Sequence[Route], sender: int, receiver: int) -> Channel:
        transfer = self.devices.transfer(
            routes, self.stages[sender].mesh, self.stages[receiver].mesh
        )
        return Channel(transfer, frozenset(self.owners[sender] | self.owners[receiver]))

    @cached_property
    def events(self) -> list[Event]:
        """What all ranks do, in one common order."""
        routes: dict[tuple[Kind, int], list[int]] = {}
        kinds: tuple[Kind, ...] = ("forward", "backward")
        for (place, stage), to in self.messages:
            for kind in kinds:
                if place == kind:
                    routes.setdefault((kind, stage), []).append(to)
        return events(self.schedule, routes=routes)

    @cached_property
    def order(self) -> list[tuple[int, Step]]:
        """All passes in the order of their dispatch."""
        return [(rank, _step(each)) for ((rank, each), *_) in self.events if each.what in PASSES]

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
        """Per stage the inputs that it reads, on its devices."""
        stores = [Store() for _ in self.stages]
        moves: dict[tuple[int, int], list[int]] = {}
        put: list[list[tuple[int, Any]]] = [[] for _ in self.stages]
        for leaf, value, where in zip(leaves, self.graph.inputs, self.cut.homes, strict=True):
            home, *others = where
            there = self.joint and self.devices.lies_on(leaf, self.stages[home].mesh)
            for stage in where[:1] if there else where:
                put[stage].append((value, leaf))
            for stage in others if there else ():
                moves.setdefault((home, stage), []).append(value)
        for stage, found in enumerate(put):
            if self.here[stage]:
                stores[stage] |= self._put(stage, found)
        for (home, stage), values in moves.items():
            self._copy(home, stage, values, stores)
        return stores

    def _put(self, stage: int, found: Sequence[tuple[int, Any]]) -> Store:
        to, values = self.stages[stage], [value for value, _ in found]
        layouts = [to.inputs[value] for value in values]
        arrays = self.devices.place([leaf for _, leaf in found], to.mesh, layouts)
        return dict(zip(values, arrays, strict=True))

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


def _step(each: Instruction) -> Step:
    return Step(KINDS[each.what], each.stage, each.microbatch)


@dataclass
class StepRun:
    """One step on its way: `steady` lives for the step, `flight` for one microbatch on one stage.

    `leaving` is what passes made for stages of other ranks that have not come to take it.
    """

    driver: PipelineDriver
    steady: list[Store]

    def __post_init__(self) -> None:
        driver = self.driver
        self.flight = [
            [Store() for _ in range(driver.schedule.microbatches)] for _ in driver.stages
        ]
        self.leaving: dict[tuple[Place, int, int], list[Any]] = {}
        self.pieces: list[dict[int, list[Any]]] = [{} for _ in driver.stages]
        self.begun: list[set[tuple[int, int]]] = [set() for _ in driver.schedule.orders]
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
        driver = self.driver
        for stage in range(len(driver.stages)):
            if driver.here[stage]:
                self._prepare(stage)
        for event in driver.events:
            rank, each = event[0]
            if each.what in PASSES:
                self._pass(rank, _step(each))
            elif each.what in MOVES:
                self._move(event)
        self._settle()
        results: list[Any] = [None] * len(driver.cut.ends)
        for number, programs in enumerate(driver.rounds):
            for program in programs:
                self._update(number, program, results)
        return results

    def _prepare(self, stage: int) -> None:
        driver = self.driver
        program, store = driver.passes["prepare", stage], self.steady[stage]
        if program.fragment.gives:
            kept = [store[v] for v in program.keeps]
            _, _, gives, _, _ = driver.call(
                program, f"stage {stage} at its start", driver.moments[stage][0], [], kept
            )
            store |= zip(program.fragment.gives, gives, strict=True)
        store |= {v: store[source] for v, source in driver.stages[stage].same.items()}

    def _pass(self, rank: int, step: Step) -> None:
        """Dispatch a pass, then let go of what it was the last to read.

        Where some microbatches of a schedule have weight passes, a backward step without one is both programs.
        """
        driver, told = self.driver, None
        if not driver.here[step.stage]:
            return
        both = driver.schedule.splits and driver.schedule.whole(step)
        for each in (step, step._replace(kind="weight")) if both else (step,):
            program, flight = (
                driver.passes[each.kind, step.stage],
                self.flight[step.stage][step.microbatch],
            )
            if program.fragment.ops:
                taken, token, began = self._dispatch(program, rank, each)
                told = (taken, token, began) if told is None else (told[0], token, told[2])
            for value in program.fragment.drops:
                flight.pop(value, None)
        if driver.watch is not None and told is not None:
            driver.watch(rank, step, *told)
        self._count(rank, step)

    def _dispatch(
        self, program: StageProgram, rank: int, step: Step
    ) -> tuple[Sequence[Any], Any, float | None]:
        """What a pass takes of its microbatch, its token, and the clock before it if all was there by then."""
        driver, (_, stage, m), fragment = self.driver, step, program.fragment
        flight, sums, store = self.flight[stage][m], self.sums[stage], self.steady[stage]
        taken = [flight[v] if v in flight else store[v] for v in program.keeps]
        totals = [sums.pop(v) for v in fragment.totals]
        what, moving = f"rank {rank} at {step}", [flight[v] for v in program.keeps if v in flight]
        began = (
            perf_counter()
            if driver.watch is not None and all(map(driver.devices.is_ready, moving))
            else None
        )
        token, totals, gives, sent, _ = driver.call(
            program, what, driver.moments[stage][m], totals, taken
        )
        sums |= zip(fragment.totals, totals, strict=True)
        flight |= zip(fragment.gives, gives, strict=True)
        self._leave(program, rank, step, sent)
        return moving, token, began

    def _leave(self, program: StageProgram, rank: int, step: Step, sent: Sequence[Any]) -> None:
        """What a pass sends: at once to stages of its rank, else when the schedule says so."""
        key, driver = (step.kind, step.stage), self.driver
        for to in {stage for message in program.messages for stage in message.arrivals}:
            indices, channel = driver.messages[key, to]
            arrays = [sent[k] for k in indices]
            if to in driver.schedule.held[rank]:
                found = driver.carry(channel, arrays, f"rank {rank} at {step}")
                self._arrived(program, indices, found, self.flight[to][step.microbatch])
            else:
                self.leaving[key, step.microbatch, to] = arrays

    def _move(self, event: Event) -> None:
        """A send and its receive."""
        (rank, send), (there, receive) = event
        key, m, to = (KINDS[send.what], send.stage), send.microbatch, send.other
        driver, arrays = self.driver, self.leaving.pop((key, m, to), None)
        indices, channel = driver.messages[key, to]
        what = f"rank {there} at {receive}" if driver.here[to] else f"rank {rank} at {send}"
        found = driver.carry(channel, arrays, what)
        self._arrived(driver.passes[key], indices, found, self.flight[to][m])

    def _arrived(
        self,
        program: StageProgram,
        indices: Sequence[int],
        found: Sequence[Any] | None,
        store: Store,
    ) -> None:
        for k, array in zip(indices, found or (), strict=found is not None):
            values = program.messages[k].values
            store.update(
                zip(
                    values,
                    [array] if len(values) == 1 else self.driver.devices.scalars(array),
                    strict=True,
                )
            )

    def _count(self, rank: int, step: Step) -> None:
        begun = self.begun[rank]
        if step.kind == "forward":
            begun.add((step.stage, step.microbatch))
        elif not self.flight[step.stage][step.microbatch]:
            begun.discard((step.stage, step.microbatch))
        self.driver.peaks[rank] = max(self.driver.peaks[rank], len(begun))

    def _settle(self) -> None:
        """What the passes leave for the updates: totals, and values of each microbatch; the rest is let go of."""
        for stage, (steady, sums) in enumerate(zip(self.steady, self.sums, strict=True)):
            steady |= sums
            sums.clear()
            for flight in self.flight[stage]:
                for value, array in flight.items():
                    self.pieces[stage].setdefault(value, []).append(array)
                flight.clear()
            steady |= {v: arrays[-1] for v, arrays in self.pieces[stage].items()}
            late = self.driver.late[stage]
            for value in steady.keys() - late:
                del steady[value]
            for value in self.pieces[stage].keys() - late:
                del self.pieces[stage][value]

    def _update(self, number: int, program: StageProgram, results: list[Any]) -> None:
        fragment, stage, driver = program.fragment, program.fragment.stage, self.driver
        if not (fragment.ops or fragment.results or program.messages):
            return
        sent = self._updated(program, results) if driver.here[stage] else None
        for to in sorted({s for message in program.messages for s in message.arrivals}):
            indices, channel = driver.messages[(number, stage), to]
            arrays = None if sent is None else [sent[k] for k in indices]
            found = driver.carry(
                channel, arrays, f"the update of stage {to}, for what stage {stage} sends,"
            )
            self._arrived(program, indices, found, self.steady[to])

    def _updated(self, program: StageProgram, results: list[Any]) -> Sequence[Any]:
        """Run a program of a round; what it sends."""
        fragment, stage, driver = program.fragment, program.fragment.stage, self.driver
        store = self.steady[stage]
        kept = [self.pieces[stage][v] if v in program.joins else store[v] for v in program.keeps]
        given_up = [store[v] for v in program.donates]
        for value in fragment.drops:
            store.pop(value, None)
            self.pieces[stage].pop(value, None)
        what = f"the update of stage {stage}"
        _, _, gives, sent, made = driver.call(
            program, what, driver.moments[stage][0], given_up, kept
        )
        store |= zip(fragment.gives, gives, strict=True)
        for position, array in zip(fragment.results, made, strict=True):
            results[position] = array
        return sent
