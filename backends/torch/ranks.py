"""The ranks of a step as processes of this host, which meet over gloo.

    with Ranks(program, arrays, state) as ranks:
        ranks.give(inputs)                 # whole arrays, by position; each rank keeps its part
        ranks.step()                       # results that are state are the next step's inputs
        ranks.results([3])                 # whole arrays again

Ranks of a pipeline (`lower`) run the programs of their stages. A rank that ends or fails ends all, with its reason, and
what others waited for.
"""

from __future__ import annotations

import multiprocessing
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from ...ir.errors import MeshwrightError, ProcessError
from ...ir.local.program import LocalProgram
from ...ir.mesh import Mesh
from ...ir.sharding import Sharding
from ..runtime.rendezvous import deadline_seconds
from . import held
from .allocator import keep_freed_memory
from .collectives import Axes, Communicator, Met, ProcessGroups, Recording, part, part_of, places_of
from .dtypes import array_of, tensor_of
from .handover import ProcessPost, RankMesh, RecordingPost
from .held import Name, Shard
from .local_step import LocalStep, axes_met
from .lower_pipeline import StagedProgram
from .memory import LiveStorages
from .pipeline import PipelineSteps

Array = np.ndarray[Any, Any]
AnyProgram = LocalProgram | StagedProgram
_ENDING = 5.0  # seconds in which a rank may end by itself
_TELLING = 1.0  # seconds in which ranks may tell what they waited for


class Ranks:
    """One process for each device of a program's mesh, or of its stages' meshes.

    Args:
        program: as `lower` gives it.
        arrays: constants of the program that are arrays.
        state: positions of inputs, and of the outputs that take their place in the next step.

    Raises:
        LoweringError: torch has no such op or element type.
        ProcessError: a rank ended, or did not answer by the deadline.
    """

    def __init__(
        self, program: AnyProgram, arrays: Mapping[int, Array], state: Sequence[tuple[int, int]]
    ):
        self.deadline, self._outputs = deadline_seconds(), outputs_of(program)
        self._folder = tempfile.TemporaryDirectory()
        # Ranks begin as copies of one process that has imported all this, and runs no thread.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        store = str(Path(self._folder.name) / "ranks")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        with _library_first():
            for rank in range(_count(program)):
                mine, theirs = context.Pipe()
                # What is large is sent after: a process that dies as it starts would never take it.
                args = (rank, theirs, store, _count(program), self.deadline)
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(mine)
                self._processes.append(process)
        self._ask("start", (program, dict(arrays), tuple(state)))

    def give(self, inputs: Mapping[int, Array]) -> None:
        """Whole inputs by position, of which each rank keeps its part."""
        self._ask("give", dict(inputs))

    def step(self) -> float:
        """One step; the seconds that the slowest rank took."""
        return max(self._ask("step", None))

    def peak(self) -> int:
        """One step more, in which memory is counted: bytes on the rank that takes most, at its fullest moment."""
        return max(self._ask("peak", None))

    def results(self, positions: Sequence[int]) -> list[Array]:
        """Outputs of the last step as whole arrays; those of types that numpy has not as the bits of their elements."""
        parts = self._ask("results", list(positions))
        found: list[Array] = []
        for k, position in enumerate(positions):
            place, layout = self._outputs[position]
            found.append(together([parts[rank][k] for rank in place.ranks], layout, place.mesh))
        return found

    def save(self, folder: Path, names: Mapping[Name, int], others: Mapping[Name, Array]) -> None:
        """Write inputs of the next step by name, each rank what it holds, and whole arrays beside them.

        Raises:
            UsageError, LoweringError: as `state.save`.
        """
        self._ask("save", (folder, dict(names), dict(others)))

    def met(self) -> list[list[Met]]:
        """What each rank met for in the last step: kind, axes, bytes of the larger side; sends and receives too, which
        go along no axes."""
        return self._ask("met", None)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(("end", None))
            pipe.close()
        until = time.monotonic() + _ENDING
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def _ask(self, what: str, given: Any) -> list[Any]:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((what, given))
            except OSError:
                self._gone(rank, what)
        return self._answers(f"`{what}`")

    def _answers(self, what: str) -> list[Any]:
        """What all ranks answer; the first that fails or ends, ends all."""
        found: dict[int, Any] = {}
        until = time.monotonic() + self.deadline + _TELLING
        while len(found) < len(self._pipes):
            open_ = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(open_), max(0.0, until - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank in open_.values())
                self._stop()
                raise ProcessError(
                    f"rank {late} did not answer within {self.deadline:g} s.",
                    where=what,
                    fix="look whether it is stopped; a longer MESHWRIGHT_DEADLINE for slow steps",
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answer = _heard(pipe)
                if answer is None:
                    self._gone(open_[pipe], what)
                if isinstance(answer[1], ProcessError) and (killed := self._killed()) is not None:
                    self._gone(killed, what, answer[1])
                if not answer[0]:
                    self._stop()
                    raise answer[1]
                found[open_[pipe]] = answer[1]
        return [found[rank] for rank in range(len(self._pipes))]

    def _killed(self) -> int | None:
        """A rank that ended by a signal: others fail because of it, and may say so first."""
        until = time.monotonic() + _TELLING
        while time.monotonic() < until:
            for rank, process in enumerate(self._processes):
                if (process.exitcode or 0) < 0:
                    return rank
            time.sleep(_TELLING / 20)
        return None

    def _gone(self, rank: int, what: str, told: MeshwrightError | None = None) -> NoReturn:
        """A rank has ended; `told` is what another said that waited for it."""
        self._processes[rank].join(_ENDING)
        code = self._processes[rank].exitcode
        told = told or self._told_by_others(rank)
        self._stop()
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        raise ProcessError(
            f"rank {rank} ended {how}.",
            where=what,
            origin=None if told is None else told.what,
            fix="see what it printed; signal 9 is often the kernel, out of memory",
        )

    def _told_by_others(self, rank: int) -> MeshwrightError | None:
        """The first failure that ranks other than one that ended tell of in time."""
        until = time.monotonic() + _TELLING
        others = {pipe for k, pipe in enumerate(self._pipes) if k != rank}
        while others and (ready := wait(list(others), max(0.0, until - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answer = _heard(pipe)
                if answer is not None and not answer[0]:
                    return answer[1]
                others.discard(pipe)
        return None

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_ENDING)


@contextmanager
def _library_first() -> Iterator[None]:
    """Python's own modules before those of other folders: a child looks where its parent does, and a user's file may be
    called as one of them."""
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    own |= {str(Path(each) / "lib-dynload") for each in own}
    before = list(sys.path)
    sys.path.sort(key=lambda each: each not in own)
    try:
        yield
    finally:
        sys.path[:] = before


def _heard(pipe: Connection) -> tuple[bool, Any] | None:
    """Whether a rank did what it was asked, and the result or the error; None where it has ended."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def together(parts: Sequence[Array], layout: Sharding, mesh: Mesh) -> Array:
    """What the ranks hold of one value, as a whole."""
    shape = [n * mesh.ways(axes) for n, axes in zip(parts[0].shape, layout.dims, strict=True)]
    found = np.empty(shape, parts[0].dtype)
    for piece, place in zip(parts, places_of(mesh), strict=True):
        numbers = [part_of(axes, place, mesh) for axes in layout.dims]
        where = (slice(i * n, (i + 1) * n) for i, n in zip(numbers, piece.shape, strict=True))
        found[tuple(where)] = piece
    return found


def _count(program: AnyProgram) -> int:
    """How many ranks run it."""
    return program.mesh.size if isinstance(program, LocalProgram) else program.rank_count


def outputs_of(program: AnyProgram) -> Sequence[tuple[RankMesh, Sharding]]:
    """Where each output lies, and how."""
    if isinstance(program, StagedProgram):
        return program.outputs
    everywhere = RankMesh(program.mesh, 0)
    return [(everywhere, program.shards[value].sharding) for value in program.outputs]


# ---------------------------------------------------------------- in the ranks


def _serve(
    rank: int, pipe: Connection, store: str, count: int, deadline: float
) -> None:  # fmt: skip
    """Do what the asking process asks, until it ends."""
    try:
        torch.set_num_threads(1)
        keep_freed_memory()
        dist.init_process_group(
            "gloo",
            f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=deadline),
        )
        served = _Rank(rank)
        while True:
            try:
                what, given = pipe.recv()
            except EOFError:
                return
            if what == "end":
                return
            pipe.send((True, getattr(served, what)(given)))
    except BaseException as error:
        with suppress(OSError):
            pipe.send((False, _told(error, rank)))


def _told(error: BaseException, rank: int) -> MeshwrightError:
    """What went wrong, for the process that asks."""
    if isinstance(error, MeshwrightError):
        return error
    last = traceback.extract_tb(error.__traceback__)[-1]
    return ProcessError(
        f"rank {rank} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        where=f"{last.filename}:{last.lineno}",
        fix="if another rank ended first, see why; else report this step",
    )


class _Rank:
    """What one rank does when it is asked."""

    steps: WholeSteps | PipelineSteps
    met_by: Sequence[Recording | RecordingPost]

    def __init__(self, rank: int):
        self.rank = rank

    def start(
        self, given: tuple[AnyProgram, Mapping[int, Array], Sequence[tuple[int, int]]]
    ) -> None:
        program, arrays, state = given
        tensors = {value: tensor_of(array) for value, array in arrays.items()}
        self.steps, self.met_by = steps_of(program, tensors, state, self.rank)

    def give(self, inputs: Mapping[int, Array]) -> None:
        for position, array in inputs.items():
            self.steps.give(position, tensor_of(array))

    def step(self, _: None) -> float:
        for each in self.met_by:
            each.met.clear()
        begin = time.perf_counter()
        self.steps.run()
        return time.perf_counter() - begin

    def peak(self, _: None) -> int:
        with LiveStorages(self.steps.living()) as live:
            self.step(None)
        return live.peak

    def results(self, positions: Sequence[int]) -> list[Array | None]:
        parts = [self.steps.result(k) for k in positions]
        return [None if x is None else array_of(x) for x in parts]

    def save(self, given: tuple[Path, Mapping[Name, int], Mapping[Name, Array]]) -> None:
        from .state import save  # which imports much that a step needs not

        folder, names, others = given
        leaves = {name: held.whole(tensor_of(array)) for name, array in others.items()}
        found = {name: self.steps.held(position) for name, position in names.items()}
        save(folder, leaves | {name: x for name, x in found.items() if x is not None})

    def met(self, _: None) -> list[Met]:
        return [met for each in self.met_by for met in each.met]


def steps_of(
    program: AnyProgram, arrays: Mapping[int, torch.Tensor], state: Sequence[tuple[int, int]], rank: int
) -> tuple[WholeSteps | PipelineSteps, list[Recording | RecordingPost]]:  # fmt: skip
    """Step after step of a program in this process, one rank of `torch.distributed`'s default group, and what notes its
    meetings. All ranks call it alike."""
    meetings = _meetings(program, rank)
    if isinstance(program, LocalProgram):
        [communicator] = meetings.values()
        return WholeSteps(program, arrays, state, rank, communicator), [communicator]
    meet, post = meetings.__getitem__, RecordingPost(ProcessPost())
    steps = PipelineSteps(program, arrays, state, rank, meet, post)
    return steps, [*meetings.values(), post]


def _meetings(program: AnyProgram, rank: int) -> dict[RankMesh, Recording]:
    """How a rank meets others, on each mesh that it belongs to. Every rank makes the groups of all meshes."""
    axes: dict[RankMesh, list[Axes]] = {}
    if isinstance(program, LocalProgram):
        axes[RankMesh(program.mesh, 0)] = axes_met(program)
    else:
        for each in program.passes:
            place = program.stages[each.program.stage].ranks
            axes.setdefault(place, []).extend(axes_met(each.program.program))
    found: dict[RankMesh, Recording] = {}
    for place, every in axes.items():
        groups = ProcessGroups(place.mesh, rank - place.first, place.first)
        groups.prepare(every)
        if rank in place.ranks:
            found[place] = Recording(groups)
    return found


class WholeSteps:
    """Step after step of a whole local program on one rank."""

    def __init__(
        self, program: LocalProgram, arrays: Mapping[int, torch.Tensor], state: Sequence[tuple[int, int]], rank: int,
        communicator: Communicator,
    ):  # fmt: skip
        self.program, self.state, self.rank = program, state, rank
        self.local = LocalStep(program, arrays, rank, communicator)
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: tuple[torch.Tensor, ...] = ()

    def give(self, position: int, whole: torch.Tensor) -> None:
        layout = self.program.shards[self.program.inputs[position]].sharding
        self.inputs[position] = part(whole, layout, self.program.mesh, self.rank).clone()

    def run(self) -> None:
        self.outputs = self.local(*(self.inputs[k] for k in range(len(self.program.inputs))))
        self.inputs |= {into: self.outputs[out] for into, out in self.state}

    def result(self, position: int) -> torch.Tensor:
        return self.outputs[position]

    def held(self, position: int) -> Shard:
        """The part of an input of the next step that this rank holds."""
        layout = self.program.shards[self.program.inputs[position]].sharding
        return held.held(self.inputs[position], layout, self.program.mesh, self.rank)

    def room(self, position: int) -> Shard:
        """A place for what this rank is to hold of an input."""
        shard = self.program.shards[self.program.inputs[position]]
        return held.room(shard.whole, shard.sharding, self.program.mesh, self.rank)

    def put(self, position: int, shard: Shard | None) -> None:
        """An input as `room` said, filled."""
        assert shard is not None
        self.inputs[position] = shard.tensor

    def living(self) -> list[torch.Tensor]:
        """What is there between two steps."""
        return [*self.inputs.values(), *self.outputs, *self.local.constants.values()]
