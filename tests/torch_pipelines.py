"""All ranks of a pipeline in one process, a thread each: they meet in memory and hand values over in queues."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Barrier, Event
from typing import Any

import numpy as np

from meshwright.backends.torch.handover import RankMesh
from meshwright.backends.torch.lower_pipeline import StagedProgram
from meshwright.backends.torch.pipeline import PipelineSteps
from meshwright.backends.torch.ranks import together

from .torch_ranks import InMemory

LOOKS = 0.2  # seconds between two looks whether another rank has failed


class Done:
    def wait(self) -> None:
        pass


@dataclass
class World:
    """What all ranks share."""

    failed: Event = field(default_factory=Event)
    errors: list[BaseException] = field(default_factory=list)
    queues: dict[tuple[int, int], SimpleQueue[Any]] = field(
        default_factory=lambda: defaultdict(SimpleQueue)
    )
    boards: dict[RankMesh, tuple[list[Any], Barrier]] = field(default_factory=dict)

    def meet(self, place: RankMesh, rank: int) -> InMemory:
        board, barrier = self.boards[place]
        return InMemory(place.mesh, rank - place.first, board, barrier)

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)
        self.failed.set()
        for _, barrier in self.boards.values():
            barrier.abort()


@dataclass
class QueuePost:
    world: World
    rank: int

    def send(self, x: Any, to: int) -> Done:
        self.world.queues[self.rank, to].put(x.clone())
        return Done()

    def receive(self, x: Any, since: int) -> Any:
        return Coming(self.world, self.world.queues[since, self.rank], x)


@dataclass
class Coming:
    world: World
    queue: SimpleQueue[Any]
    into: Any

    def wait(self) -> None:
        while not self.world.failed.is_set():
            try:
                found = self.queue.get(timeout=LOOKS)
            except Empty:
                continue
            assert found.shape == self.into.shape and found.dtype == self.into.dtype
            self.into.copy_(found)
            return
        raise AssertionError("another rank has failed")


def run_pipeline(
    program: StagedProgram, inputs: Sequence[Any], arrays: Mapping[int, Any],
    state: Sequence[tuple[int, int]], steps: int,
) -> list[np.ndarray]:  # fmt: skip
    """Whole results of the last of some steps."""
    world, count = World(), program.rank_count
    for stage in program.stages:
        size = stage.ranks.mesh.size
        world.boards.setdefault(stage.ranks, ([None] * size, Barrier(size)))

    def one(rank: int) -> list[Any]:
        try:
            meet = lambda place: world.meet(place, rank)  # noqa: E731
            mine = PipelineSteps(program, arrays, state, rank, meet, QueuePost(world, rank))
            for position, whole in enumerate(inputs):
                mine.give(position, whole)
            for _ in range(steps):
                mine.run()
            return [mine.result(k) for k in range(len(program.outputs))]
        except BaseException as error:
            world.fail(error)
            return []

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(one, range(count)))
    if world.errors:  # the first; the others come of it
        raise world.errors[0]
    assert all(queue.empty() for queue in world.queues.values()), "something was sent to nobody"
    return [
        together([parts[rank][k].numpy() for rank in place.ranks], layout, place.mesh)
        for k, (place, layout) in enumerate(program.outputs)
    ]
