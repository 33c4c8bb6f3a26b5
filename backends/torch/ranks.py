"""The ranks of a step as processes of this host, which meet over gloo.

    with Ranks(program, arrays, state) as ranks:
        ranks.give(inputs)                 # whole arrays, by position; each rank keeps its part
        ranks.step()                       # results that are state are the next step's inputs
        ranks.results([3])                 # whole arrays again

A rank that ends or fails ends all, with its reason.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from .collectives import ProcessGroups, Recording, part_of, places_of
from .dtypes import array_of, tensor_of
from .local_step import LocalStep, axes_met

Array = np.ndarray[Any, Any]
_ENDING = 5.0  # seconds in which a rank may end by itself


class Ranks:
    """One process for each device of a program's mesh.

    Args:
        arrays: constants of the program that are arrays.
        state: positions of inputs, and of the outputs that take their place in the next step.

    Raises:
        LoweringError: torch has no such op or element type.
        ProcessError: a rank ended, or did not answer by the deadline.
    """

    def __init__(
        self, program: LocalProgram, arrays: Mapping[int, Array], state: Sequence[tuple[int, int]]
    ):
        self.program, self.deadline = program, deadline_seconds()
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / "ranks")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(program.mesh.size):
            mine, theirs = context.Pipe()
            args = (rank, theirs, store, program, dict(arrays), tuple(state), self.deadline)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._answers("the start")

    def give(self, inputs: Mapping[int, Array]) -> None:
        """Whole inputs by position, of which each rank keeps its part."""
        self._ask("give", dict(inputs))

    def step(self) -> float:
        """One step; the seconds that the slowest rank took."""
        return max(self._ask("step", None))

    def results(self, positions: Sequence[int]) -> list[Array]:
        """Outputs of the last step as whole arrays; those of types that numpy has not as the bits of their elements."""
        parts = self._ask("results", list(positions))
        layouts = [self.program.shards[self.program.outputs[k]].sharding for k in positions]
        return [
            together([each[k] for each in parts], layout, self.program.mesh)
            for k, layout in enumerate(layouts)
        ]

    def met(self) -> list[tuple[str, tuple[str, ...], int]]:
        """What the first rank met for in the last step: kind, axes, bytes of the larger side."""
        return self._ask("met", None)[0]

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
        until = time.monotonic() + self.deadline
        while len(found) < len(self._pipes):
            open_ = {
                self._pipes[rank]: rank for rank in range(len(self._pipes)) if rank not in found
            }
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
                try:
                    good, answer = pipe.recv()
                except (EOFError, OSError):
                    self._gone(open_[pipe], what)
                if not good:
                    self._stop()
                    raise answer
                found[open_[pipe]] = answer
        return [found[rank] for rank in range(len(self._pipes))]

    def _gone(self, rank: int, what: str) -> NoReturn:
        self._processes[rank].join(_ENDING)
        code = self._processes[rank].exitcode
        self._stop()
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        raise ProcessError(
            f"rank {rank} ended {how}.",
            where=what,
            fix="see what it printed; signal 9 is often the kernel, out of memory",
        )

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()


def part(x: torch.Tensor, layout: Sharding, mesh: Mesh, rank: int) -> torch.Tensor:
    """The part of a value that a rank has."""
    place = places_of(mesh)[rank]
    for dim, axes in enumerate(layout.dims):
        size = x.shape[dim] // mesh.ways(axes)
        x = x.narrow(dim, part_of(axes, place, mesh) * size, size)
    return x


def together(parts: Sequence[Array], layout: Sharding, mesh: Mesh) -> Array:
    """What the ranks hold of one value, as a whole."""
    shape = [n * mesh.ways(axes) for n, axes in zip(parts[0].shape, layout.dims, strict=True)]
    found = np.empty(shape, parts[0].dtype)
    for piece, place in zip(parts, places_of(mesh), strict=True):
        numbers = [part_of(axes, place, mesh) for axes in layout.dims]
        where = (slice(i * n, (i + 1) * n) for i, n in zip(numbers, piece.shape, strict=True))
        found[tuple(where)] = piece
    return found


# ---------------------------------------------------------------- in the ranks


def _serve(
    rank: int, pipe: Connection, store: str, program: LocalProgram, arrays: Mapping[int, Array],
    state: Sequence[tuple[int, int]], deadline: float,
) -> None:  # fmt: skip
    """Do what the asking process asks, until it ends."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            f"file://{store}",
            rank=rank,
            world_size=program.mesh.size,
            timeout=timedelta(seconds=deadline),
        )
        groups = ProcessGroups(program.mesh, rank)
        groups.prepare(axes_met(program))
        rank_step = _Rank(program, arrays, state, rank, Recording(groups))
        pipe.send((True, None))
        while True:
            try:
                what, given = pipe.recv()
            except EOFError:
                return
            if what == "end":
                return
            pipe.send((True, getattr(rank_step, what)(given)))
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
    """What one rank holds between steps."""

    def __init__(
        self, program: LocalProgram, arrays: Mapping[int, Array], state: Sequence[tuple[int, int]], rank: int,
        communicator: Recording,
    ):  # fmt: skip
        self.program, self.state, self.rank, self.communicator = program, state, rank, communicator
        tensors = {value: tensor_of(array) for value, array in arrays.items()}
        self.local = LocalStep(program, tensors, rank, communicator)
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: tuple[torch.Tensor, ...] = ()

    def give(self, inputs: Mapping[int, Array]) -> None:
        for position, array in inputs.items():
            layout = self.program.shards[self.program.inputs[position]].sharding
            self.inputs[position] = part(
                tensor_of(array), layout, self.program.mesh, self.rank
            ).clone()

    def step(self, _: None) -> float:
        self.communicator.met.clear()
        begin = time.perf_counter()
        self.outputs = self.local(*(self.inputs[k] for k in range(len(self.program.inputs))))
        self.inputs |= {into: self.outputs[out] for into, out in self.state}
        return time.perf_counter() - begin

    def results(self, positions: Sequence[int]) -> list[Array]:
        return [array_of(self.outputs[k]) for k in positions]

    def met(self, _: None) -> list[tuple[str, tuple[str, ...], int]]:
        return list(self.communicator.met)
