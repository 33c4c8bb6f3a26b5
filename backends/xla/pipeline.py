"""Run a step as a pipeline of stages, each on devices of its own, from one process or from several.

    running = lower_pipeline(plan, captured)
    results = running.jitted(*leaves)

Each fragment of each stage is a program of its own (`fragments`). The driver walks the events of all ranks
in their common order and dispatches what its process takes part in; jax runs programs of different devices
side by side, and a program starts when its operands have arrived. A forward result lives until the last
pass that reads it; gradients are added up on the devices; the optimizer runs once, in rounds.

With several processes each calls the same step. Arrays of the host are the same in all of them. Results are
global arrays: state lies on its stage, and what is whole there and no state, as a loss, is whole everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ...ir.local.program import LocalProgram
from ...ir.pipeline.instructions import MOVES, PASSES, Event, Instruction, events
from ...ir.pipeline.schedule import Kind, Schedule, Step
from ...ir.pipeline.stages import Stages
from ...ir.plan import Plan
from ..runtime.rendezvous import Rendezvous
from .capture import Captured
from .devices import is_mine, nowhere, on_cpus, place, processes_of
from .dtypes import jax_dtype
from .everywhere import Everywhere
from .fragments import CompiledFragment, StagePrograms
from .handover import Handover, Route
from .runtime import JaxProcesses
from .unstack import Unstacked

Watch = Callable[[int, Step, Sequence[Any], Any, float | None], None]
Store = dict[int, Any]
Place = tuple[str | int, int]  # a pass and its stage, or a round of updates and its stage
KINDS: dict[str, Kind] = {  # instruction -> the pass that it is, or whose result it sends
    "forward": "forward", "backward": "backward", "input-grad": "backward", "weight-grad": "weight",
    "send-activation": "forward", "send-gradient": "backward",
}  # fmt: skip


@dataclass(eq=False)
class LoweredPipeline:
    """A pipelined step on flat leaves; each result lies on the devices of its stage.

    `peaks[rank]` is how many forward results a rank held at most in the last run, counted per stage
    and microbatch, for the ranks of this process. `watch(rank, step, taken, token, began)` is told of each
    pass of this process when it is dispatched, with what it takes of its microbatch; the token is ready when
    the pass is done. `began` is the clock (`time.perf_counter`) before its dispatch if all was there by then.
    """

    plan: Plan
    captured: Captured
    schedule: Schedule
    cut: Stages
    stages: Sequence[StagePrograms]
    passes: Mapping[tuple[str, int], CompiledFragment]
    rounds: Sequence[Sequence[CompiledFragment]]
    watch: Watch | None = None
    apart: Unstacked | None = None  # how the user's leaves were taken apart, layer by layer
    peaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.here = [is_mine(stage.mesh) for stage in self.stages]
        self.rendezvous = Rendezvous(JaxProcesses(), in_turn=on_cpus(self.stages[0].mesh))
        self.totals = [
            {kind: p.fragment.totals for (kind, s), p in self.passes.items() if s == stage}
            for stage in range(self.cut.count)
        ]
        self.zeros = [
            stage.zeros([v for values in totals.values() for v in values])
            for stage, totals in zip(self.stages, self.totals, strict=True)
        ]
        self.late = [
            {v for p in programs for v in p.fragment.takes}
            for programs in zip(*self.rounds, strict=True)
        ]
        self.messages = self._messages()
        self.copies: dict[tuple[int, int, tuple[int, ...]], Handover] = {}

    @cached_property
    def local_programs(self) -> dict[str, LocalProgram]:
        """What one device runs of each pass, by its name and stage: `forward 0`. Updates are in rounds."""
        named = {f"{kind} {stage}": p for (kind, stage), p in self.passes.items()}
        named |= {
            f"update {number} {p.fragment.stage}": p
            for number, programs in enumerate(self.rounds)
            for p in programs
        }
        return {
            name: self.stages[p.fragment.stage].local_program(p.fragment)
            for name, p in named.items()
        }

    @cached_property
    def moments(self) -> list[list[Any]]:
        """Per stage the numbers of the microbatches, on its devices."""
        count = range(self.schedule.microbatches)
        return [
            [place(np.int32(m), stage.replicated) for m in count] if here else []
            for stage, here in zip(self.stages, self.here, strict=True)
        ]

    def _messages(self) -> dict[tuple[Place, int], tuple[list[int], Handover]]:
        """(program, stage it sends to) -> which of its messages go there, and how."""
        programs: dict[Place, CompiledFragment] = dict(self.passes)  # type: ignore[arg-type]
        programs |= {
            (k, p.fragment.stage): p for k, programs in enumerate(self.rounds) for p in programs
        }
        found = {}
        for key, program in programs.items():
            for to in sorted({stage for message in program.messages for stage in message.arrivals}):
                sent = [k for k, message in enumerate(program.messages) if to in message.arrivals]
                messages = [program.messages[k] for k in sent]
                routes = [Route(p.shape, p.dtype, p.leaves, p.arrivals[to]) for p in messages]
                found[key, to] = (
                    sent,
                    Handover(routes, self.stages[key[1]].mesh, self.stages[to].mesh),
                )
        assert not any(kind == "weight" for (kind, _), _ in found), (
            "gradients of weights leave with the updates"
        )
        return found

    @cached_property
    def events(self) -> list[Event]:
        """What all ranks do, in one common order."""
        routes: dict[tuple[Kind, int], list[int]] = {}
        for (kind, stage), to in self.messages:
            if kind in ("forward", "backward"):
                routes.setdefault((kind, stage), []).append(to)  # type: ignore[arg-type]
        return events(self.schedule, routes=routes)

    @cached_property
    def order(self) -> list[tuple[int, Step]]:
        """All passes in the order of their dispatch."""
        return [(rank, _step(each)) for ((rank, each), *_) in self.events if each.what in PASSES]

    @cached_property
    def joint(self) -> bool:
        """Whether the stages lie in several processes."""
        return len(set[int]().union(*(processes_of(stage.mesh) for stage in self.stages))) > 1

    # ------------------------------------------------------------ as `Lowered`

    @property
    def by_tree(self) -> None:
        """There is no single program that jax could dispatch."""
        return None

    @property
    def compiled(self) -> Callable[..., Any]:
        """The step; its programs are compiled when they first run."""
        return self.jitted

    @property
    def input_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each leaf lies first; other stages that read it get copies."""
        graph = self.stages[0].local.graph
        homes = zip(graph.inputs, self.cut.homes, strict=True)
        return tuple(self.stages[where[0]].sharding_of(v) for v, where in homes)

    @cached_property
    def output_shardings(self) -> tuple[NamedSharding, ...]:
        ends = [
            self.stages[s].sharding(self.stages[s].ends(o)) for o, s in enumerate(self.cut.ends)
        ]
        return tuple(
            self.shared.layout if o in self.shared.sources else end for o, end in enumerate(ends)
        )

    @cached_property
    def shared(self) -> Everywhere:
        """Results that are whole on their stage and no state: with several processes, whole everywhere."""
        graph, state = self.stages[0].local.graph, {o for _, o in self.captured.graph.state}
        types = [graph.types[v] for v in graph.outputs]
        whole = {
            o: stage
            for o, stage in enumerate(self.cut.ends)
            if self.joint
            and o not in state
            and not any(self.stages[stage].ends(o).dims)
            and types[o].dtype != "key"
        }
        kinds = {o: (types[o].shape, jax_dtype(types[o].dtype)) for o in whole}
        return Everywhere(whole, kinds, [stage.mesh for stage in self.stages])

    def jitted(self, *leaves: Any) -> tuple[Any, ...]:
        """One step; donated leaves are given up."""
        return StepRun(self, self._placed(leaves)).step()

    def placed(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Leaves where they lie first; with several processes each stage puts its own."""
        return leaves if self.joint else jax.device_put(list(leaves), list(self.input_shardings))

    def run(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """One step from leaves that lie anywhere."""
        return self.jitted(*self.placed(leaves))

    # ------------------------------------------------------------ inputs

    def _placed(self, leaves: Sequence[Any]) -> list[Store]:
        """Per stage the inputs that it reads, on its devices."""
        graph, stores = self.stages[0].local.graph, [Store() for _ in self.stages]
        moves: dict[tuple[int, int], list[tuple[int, int]]] = {}
        put: list[tuple[int, int, int]] = []  # stage, value, position
        for k, (value, where) in enumerate(zip(graph.inputs, self.cut.homes, strict=True)):
            home, *others = where
            put += [
                (stage, value, k)
                for stage in (where if not self._lies(leaves[k], home) else where[:1])
            ]
            if self._lies(leaves[k], home):
                for stage in others:
                    moves.setdefault((home, stage), []).append((value, k))
        self._put(put, leaves, stores)
        for (home, stage), found in moves.items():
            self._copy(home, stage, [v for v, _ in found], stores)
        return stores

    def _lies(self, leaf: Any, home: int) -> bool:
        """Whether a leaf lies on its stage, for other processes to get it from there."""
        layout = leaf.sharding if isinstance(leaf, jax.Array) else None
        return (
            self.joint
            and isinstance(layout, NamedSharding)
            and layout.mesh == self.stages[home].mesh
        )

    def _put(
        self, wanted: Sequence[tuple[int, int, int]], leaves: Sequence[Any], stores: list[Store]
    ) -> None:
        here = [each for each in wanted if self.here[each[0]]]
        goals = [self.stages[stage].sharding_of(v) for stage, v, _ in here]
        if self.joint:
            arrays = [place(leaves[k], goal) for (_, _, k), goal in zip(here, goals, strict=True)]
        else:
            arrays = jax.device_put([leaves[k] for _, _, k in here], goals)
        for (stage, value, _), array in zip(here, arrays, strict=True):
            stores[stage][value] = array

    def _copy(self, home: int, stage: int, values: list[int], stores: list[Store]) -> None:
        """Inputs from the stage where they lie to another that reads them too."""
        key = (home, stage, tuple(values))
        if key not in self.copies:
            a, b, types = self.stages[home], self.stages[stage], self.stages[0].local.types
            routes = [
                Route(types[v].shape, types[v].dtype, a.sharding_of(v), b.sharding_of(v))
                for v in values
            ]
            self.copies[key] = Handover(routes, a.mesh, b.mesh)
        arrays = [stores[home][v] for v in values] if self.here[home] else None
        found = self.carry(
            self.copies[key], arrays, f"stage {home}'s inputs on their way to stage {stage}"
        )
        if found is not None:
            stores[stage].update(zip(values, found, strict=True))

    # ------------------------------------------------------------ together

    def carry(
        self, handover: Handover, arrays: Sequence[Any] | None, what: str
    ) -> list[Any] | None:
        """Hand arrays over, as far as this process takes part; what arrives here."""
        if not handover.mine:
            return None
        if not handover.joint:
            return handover(arrays)[0]
        group = processes_of(handover.sender) | processes_of(handover.receiver)
        return self.rendezvous.run(what, group, lambda: handover(arrays))

    def call(self, program: CompiledFragment, what: str, *operands: Any) -> Any:
        """Dispatch a stage's program, with the other processes that hold a part of the stage."""
        processes = processes_of(self.stages[program.fragment.stage].mesh)
        if len(processes) == 1:
            return program.call(*operands)

        def call() -> tuple[Any, Any]:
            found = program.call(*operands)
            return found, found[0]

        return self.rendezvous.run(what, processes, call)

    def zeros_of(self, stage: int) -> list[Any]:
        """Totals before the first microbatch."""
        return self.zeros[stage]()

    scalars = staticmethod(jax.jit(list))  # a vector as scalars, on the same devices


def _step(each: Instruction) -> Step:
    return Step(KINDS[each.what], each.stage, each.microbatch)


@dataclass
class StepRun:
    """One step on its way: `steady` lives for the step, `flight` for one microbatch on one stage.

    `leaving` is what passes made for stages of other ranks that have not come to take it.
    """

    lowered: LoweredPipeline
    steady: list[Store]

    def __post_init__(self) -> None:
        low = self.lowered
        self.flight = [[Store() for _ in range(low.schedule.microbatches)] for _ in low.stages]
        self.leaving: dict[tuple[Place, int, int], list[Any]] = {}
        self.pieces: list[dict[int, list[Any]]] = [{} for _ in low.stages]
        self.begun: list[set[tuple[int, int]]] = [set() for _ in low.schedule.orders]
        self.sums: list[Store] = [
            self._zeros(s) if low.here[s] else {} for s in range(len(low.stages))
        ]
        low.peaks = [0] * low.schedule.ranks

    def _zeros(self, stage: int) -> Store:
        values = [v for vs in self.lowered.totals[stage].values() for v in vs]
        return dict(zip(values, self.lowered.zeros_of(stage), strict=True)) if values else {}

    def step(self) -> tuple[Any, ...]:
        low = self.lowered
        for stage in range(len(low.stages)):
            if low.here[stage]:
                self._prepare(stage)
        for event in low.events:
            rank, each = event[0]
            if each.what in PASSES:
                self._pass(rank, _step(each))
            elif each.what in MOVES:
                self._move(event)
        self._settle()
        results: list[Any] = [None] * len(low.cut.ends)
        for number, programs in enumerate(low.rounds):
            for program in programs:
                self._update(number, program, results)
        self._share(results)
        return tuple(results)

    def _prepare(self, stage: int) -> None:
        low = self.lowered
        program, store = low.passes["prepare", stage], self.steady[stage]
        if program.fragment.gives:
            kept = [store[v] for v in program.keeps]
            _, _, gives, _, _ = low.call(
                program, f"stage {stage} at its start", low.moments[stage][0], [], kept
            )
            store |= zip(program.fragment.gives, gives, strict=True)
        store |= {v: store[source] for v, source in low.stages[stage].same.items()}

    def _pass(self, rank: int, step: Step) -> None:
        """Dispatch a pass, then let go of what it was the last to read.

        Where some microbatches of a schedule have weight passes, a backward step without one is both programs.
        """
        low, told = self.lowered, None
        if not low.here[step.stage]:
            return
        both = low.schedule.splits and low.schedule.whole(step)
        for each in (step, step._replace(kind="weight")) if both else (step,):
            program, flight = (
                low.passes[each.kind, step.stage],
                self.flight[step.stage][step.microbatch],
            )
            if program.fragment.ops:
                taken, token, began = self._dispatch(program, rank, each)
                told = (taken, token, began) if told is None else (told[0], token, told[2])
            for value in program.fragment.drops:
                flight.pop(value, None)
        if low.watch is not None and told is not None:
            low.watch(rank, step, *told)
        self._count(rank, step)

    def _dispatch(
        self, program: CompiledFragment, rank: int, step: Step
    ) -> tuple[Sequence[Any], Any, float | None]:
        """What a pass takes of its microbatch, its token, and the clock before it if all was there by then."""
        low, (_, stage, m), fragment = self.lowered, step, program.fragment
        flight, sums, store = self.flight[stage][m], self.sums[stage], self.steady[stage]
        taken = [flight[v] if v in flight else store[v] for v in program.keeps]
        totals = [sums.pop(v) for v in fragment.totals]
        what, moving = f"rank {rank} at {step}", [flight[v] for v in program.keeps if v in flight]
        began = (
            perf_counter()
            if low.watch is not None and all(array.is_ready() for array in moving)
            else None
        )
        token, totals, gives, sent, _ = low.call(
            program, what, low.moments[stage][m], totals, taken
        )
        sums |= zip(fragment.totals, totals, strict=True)
        flight |= zip(fragment.gives, gives, strict=True)
        self._leave(program, rank, step, sent)
        return moving, token, began

    def _leave(self, program: CompiledFragment, rank: int, step: Step, sent: Sequence[Any]) -> None:
        """What a pass sends: at once to stages of its rank, else when the schedule says so."""
        key, low = (step.kind, step.stage), self.lowered
        for to in {stage for message in program.messages for stage in message.arrivals}:
            indices, handover = low.messages[key, to]
            arrays = [sent[k] for k in indices]
            if to in low.schedule.held[rank]:
                found = low.carry(handover, arrays, f"rank {rank} at {step}")
                self._arrived(program, indices, found, self.flight[to][step.microbatch])
            else:
                self.leaving[key, step.microbatch, to] = arrays

    def _move(self, event: Event) -> None:
        """A send and its receive."""
        (rank, send), (there, receive) = event
        key, m, to = (KINDS[send.what], send.stage), send.microbatch, send.other
        low, arrays = self.lowered, self.leaving.pop((key, m, to), None)
        indices, handover = low.messages[key, to]
        what = f"rank {there} at {receive}" if low.here[to] else f"rank {rank} at {send}"
        found = low.carry(handover, arrays, what)
        self._arrived(low.passes[key], indices, found, self.flight[to][m])

    def _arrived(
        self,
        program: CompiledFragment,
        indices: Sequence[int],
        found: Sequence[Any] | None,
        store: Store,
    ) -> None:
        for k, array in zip(indices, found or (), strict=found is not None):
            values = program.messages[k].values
            store.update(
                zip(
                    values,
                    [array] if len(values) == 1 else self.lowered.scalars(array),
                    strict=True,
                )
            )

    def _count(self, rank: int, step: Step) -> None:
        begun = self.begun[rank]
        if step.kind == "forward":
            begun.add((step.stage, step.microbatch))
        elif not self.flight[step.stage][step.microbatch]:
            begun.discard((step.stage, step.microbatch))
        self.lowered.peaks[rank] = max(self.lowered.peaks[rank], len(begun))

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
            late = self.lowered.late[stage]
            for value in steady.keys() - late:
                del steady[value]
            for value in self.pieces[stage].keys() - late:
                del self.pieces[stage][value]

    def _update(self, number: int, program: CompiledFragment, results: list[Any]) -> None:
        fragment, stage, low = program.fragment, program.fragment.stage, self.lowered
        if not (fragment.ops or fragment.results or program.messages):
            return
        sent = self._updated(program, results) if low.here[stage] else None
        for to in sorted({s for message in program.messages for s in message.arrivals}):
            indices, handover = low.messages[(number, stage), to]
            arrays = None if sent is None else [sent[k] for k in indices]
            found = low.carry(
                handover, arrays, f"the update of stage {to}, for what stage {stage} sends,"
            )
            self._arrived(program, indices, found, self.steady[to])

    def _updated(self, program: CompiledFragment, results: list[Any]) -> Sequence[Any]:
        """Run a program of a round; what it sends."""
        fragment, stage, low = program.fragment, program.fragment.stage, self.lowered
        store, programs = self.steady[stage], low.stages[stage]
        kept = [
            self.pieces[stage][v] if programs.joins(fragment, v) else store[v]
            for v in program.keeps
        ]
        given_up = [store[v] for v in program.donates]
        for value in fragment.drops:
            store.pop(value, None)
            self.pieces[stage].pop(value, None)
        what = f"the update of stage {stage}"
        _, _, gives, sent, made = low.call(program, what, low.moments[stage][0], given_up, kept)
        store |= zip(fragment.gives, gives, strict=True)
        for position, array in zip(fragment.results, made, strict=True):
            results[position] = array
        return sent

    def _share(self, results: list[Any]) -> None:
        """With several processes: results that all shall have, and the places of those that lie elsewhere."""
        low = self.lowered
        if not low.joint:
            return
        if low.shared.sources:
            everyone = range(jax.process_count())
            made = low.rendezvous.run("the step's results", everyone, lambda: low.shared(results))
            for position, array in made.items():
                results[position] = array
        types, outputs = low.stages[0].local.types, low.stages[0].local.graph.outputs
        for position, layout in enumerate(low.output_shardings):
            if results[position] is None:
                kind = types[outputs[position]]
                results[position] = nowhere(kind.shape, jax_dtype(kind.dtype), layout)
