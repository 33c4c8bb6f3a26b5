"""When each pass of a pipelined step really ran.

    with Recorder(driver) as recorder:
        driver.run(leaves)
    recorder.passes          # [Passed(rank=0, step=0F0, start=0.0, seconds=0.0021), ...]

The step is dispatched as ever. A thread per rank waits for the operands and for the token of each pass in
turn: a pass starts when its operands have come and the rank's pass before it has ended.

Error: an end is seen when its thread gets to run, or sooner where another sees what comes after it; the
interpreter is told to change threads every 50 microseconds while it records. With one rank, so that
nothing runs beside a pass, its median was within 0.7 ms of that of the same program waited for by itself
where passes take 2 to 3 ms, and within 10 % where they take 14 to 24 ms (gpt-tiny, batch 64 and 512, two
cores, jax 0.10.2). Emulated devices share cores: a pass takes longer, the more of them run beside it. What
passes keep is held until a thread has seen it read, so memory is not what it is otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any

from ...ir.pipeline.schedule import Passed, Step, needs
from .driver import PipelineDriver

SWITCH_SECONDS = 5e-5


@dataclass
class Recorder:
    """Watches a pipeline while it is entered; `passes` are complete when it is left."""

    driver: PipelineDriver
    passes: list[Passed] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._seen: dict[
            Step, tuple[float, float]
        ] = {}  # when its operands were there, and its token
        self._queues = [SimpleQueue[Any]() for _ in range(self.driver.schedule.ranks)]
        self._threads = [
            Thread(target=self._look, args=(rank,), daemon=True)
            for rank in range(len(self._queues))
        ]
        for thread in self._threads:
            thread.start()
        self._begin = perf_counter()
        self.driver.watch = self._hear
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.watch = None
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        sys.setswitchinterval(self._interval)
        self.passes = self._settled()

    def _hear(
        self, rank: int, step: Step, taken: Sequence[Any], token: Any, began: float | None
    ) -> None:
        self._queues[rank].put((step, taken, token, began))

    def _look(self, rank: int) -> None:
        while (heard := self._queues[rank].get()) is not None:
            step, taken, token, began = heard
            self.driver.devices.wait(taken)
            ready = (began or perf_counter()) - self._begin
            self.driver.devices.wait(token)
            ready, _ = self._seen.get(step, (ready, ready))  # of two passes the first
            self._seen[step] = (ready, perf_counter() - self._begin)
            del heard, taken, token

    def _settled(self) -> list[Passed]:
        """The passes in the order of their dispatch; none ended later than what was seen to come after it."""
        ends = {step: end for step, (_, end) in self._seen.items()}
        order = [(rank, step) for rank, step in self.driver.order if step in self._seen]
        before = self._before()
        for _, step in reversed(order):
            ready = min(self._seen[step][0], ends[step])
            ends |= {
                need: min(ready, ends[need])
                for need in needs(self.driver.schedule, step)
                if need in ends
            }
            if step in before:
                ends[before[step]] = min(ends[step], ends[before[step]])
        found = []
        for rank, step in order:
            free = ends[before[step]] if step in before else 0.0
            start = max(free, min(self._seen[step][0], ends[step]))
            found.append(Passed(rank, step, start, ends[step] - start))
        return found

    def _before(self) -> dict[Step, Step]:
        """The pass before each on its rank, of those that were seen."""
        rows = [
            [step for step in order if step in self._seen] for order in self.driver.schedule.orders
        ]
        return {after: step for row in rows for step, after in pairwise(row)}
