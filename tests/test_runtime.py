"""The driver of pipelines on devices that are numpy arrays, with threads as processes; no framework."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import numpy as np
import pytest

from meshwright.backends.runtime import rendezvous
from meshwright.backends.runtime.driver import PipelineDriver
from meshwright.backends.runtime.programs import StageDevices, StageProgram
from meshwright.backends.runtime.recorder import Recorder
from meshwright.ir.errors import ProcessError
from meshwright.ir.graph import Graph, Op, TensorType
from meshwright.ir.local.pipeline import Move, RankOp, RankProgram, Run, StageInput
from meshwright.ir.local.program import Shard
from meshwright.ir.pipeline.borders import Message
from meshwright.ir.pipeline.instructions import events
from meshwright.ir.pipeline.schedule import Schedule, in_flight
from meshwright.ir.pipeline.stages import Fragment, Stages
from meshwright.ir.sharding import replicated
from meshwright.planner.pipeline.schedules import one_f_one_b

ROWS, WIDTH, MICROBATCHES = 8, 3, 4
GONE = object()  # what is in a mailbox whose sender has ended


class NumpyDevices:
    """The devices of one process; a mesh is the processes that have it, and transfers lie in mailboxes."""

    failure = ConnectionError

    def __init__(self, process: int, process_count: int, mailboxes):
        self.process, self.process_count, self.mailboxes = process, process_count, mailboxes

    def wait(self, results):
        pass

    def gather(self, array):
        raise NotImplementedError

    def processes_of(self, mesh):
        return set(mesh)

    def place(self, leaves, mesh, layouts):
        return [np.array(leaf) for leaf in leaves]

    def lies_on(self, leaf, mesh):
        return False

    def transfer(self, routes, sender, receiver):
        return partial(self._transfer, sender, receiver)

    def _transfer(self, sender, receiver, arrays):
        if self.process in sender:
            self.mailboxes[sender, receiver].put(arrays)
        if self.process not in receiver:
            return None, ()
        found = self.mailboxes[sender, receiver].get(timeout=60)
        if found is GONE:
            raise ConnectionError("the peer is gone")
        return found, ()

    def scalars(self, vector):
        return list(vector)

    def is_ready(self, array):
        return True


# ---------------------------------------------------------------- layers tanh(x w), half the square of the last one


def sequential(x, weights):
    """One step of gradient descent, all rows at once."""
    values = [x]
    for w in weights:
        values.append(np.tanh(values[-1] @ w))
    gradient, found = values[-1], []
    for w, before, after in reversed([*zip(weights, values, values[1:], strict=False)]):
        inner = gradient * (1 - after**2)
        found.insert(0, w - before.T @ inner)
        gradient = inner @ w.T
    return found


def rows(x, moment):
    size = ROWS // MICROBATCHES
    return x[moment * size : (moment + 1) * size] if len(x) == ROWS else x


def forward(moment, given_up, kept):
    x, w = kept
    y = np.tanh(rows(x, moment) @ w)
    return (), [], [y], [y], []


def backward(moment, given_up, kept):
    x, w, y, gradient = kept if len(kept) == 4 else (*kept, kept[-1])
    inner = gradient * (1 - y**2)
    return (), [given_up[0] + rows(x, moment).T @ inner], [], [inner @ w.T], []


def update(moment, given_up, kept):
    w, total = kept
    return (), [], [], [], [w - total]


class Layers:
    """Values: `x` of each stage (0 of the first: the step's input), its weights, its gradient, its total."""

    def __init__(self, count: int):
        self.count = count
        self.x, self.w, self.gradient, self.total = (
            [k * (count + 1) + s for s in range(count + 1)] for k in range(4)
        )

    def fragment(self, kind, stage, takes=(), **border) -> Fragment:
        ops = () if kind == "prepare" else (Op(kind, takes, ()),)
        empty = dict.fromkeys(("gives", "sends", "totals", "drops", "results"), ())
        return Fragment(kind, stage, ops, takes, **{**empty, **border})

    def program(self, call, fragment: Fragment) -> StageProgram:
        size = (ROWS // MICROBATCHES, WIDTH)
        messages = tuple(
            Message((value,), size, "f64", replicated(2), {to: replicated(2)})
            for value, to in fragment.sends
        )

        def run(*operands):
            token, totals, gives, sent, results = call(*operands)
            return token, totals, gives, sent[: len(messages)], results

        return StageProgram(fragment, (), fragment.takes, frozenset(), messages, run)

    def passes(self, s: int) -> dict[str, StageProgram]:
        last = s == self.count - 1
        gradient = () if last else (self.gradient[s + 1],)
        here = () if s == 0 else (self.x[s],)
        found = [
            (forward, self.fragment(
                "forward", s, (self.x[s], self.w[s]), gives=(self.x[s + 1],),
                sends=() if last else ((self.x[s + 1], s + 1),),
            )),
            (backward, self.fragment(
                "backward", s, (self.x[s], self.w[s], self.x[s + 1], *gradient), totals=(self.total[s],),
                sends=() if s == 0 else ((self.gradient[s], s - 1),), drops=(*here, self.x[s + 1], *gradient),
            )),
        ]  # fmt: skip
        each = {f"{f.kind} {s}": self.program(call, f) for call, f in found}
        late = self.fragment("update", s, (self.w[s], self.total[s]), results=(s,))
        return each | {f"update 0 {s}": self.program(update, late)}

    def ranks(self, schedule: Schedule) -> list[RankProgram]:
        """A stage on each rank."""
        whole, rows = (TensorType("f64", (n, WIDTH)) for n in (WIDTH, ROWS))
        shard, moved = Shard(whole, replicated(2)), Shard(rows, replicated(2), time=0)
        inputs = [[StageInput(self.w[s], s, shard)] for s in range(self.count)]
        inputs[0].append(StageInput(self.x[0], 0, Shard(rows, replicated(2))))
        ops: list[list[RankOp]] = [[] for _ in inputs]
        for event in events(schedule):
            (rank, each), *others = event
            if each.what in ("forward", "backward"):
                ops[rank].append(Run(f"{each.what} {each.stage}", each.microbatch))
            for there, _ in others:
                phase = "forward" if each.what == "send-activation" else "backward"
                value = self.x[each.other] if phase == "forward" else self.gradient[each.stage]
                ends = (value,), each.stage, each.other
                for kind, here, other in (("send", rank, there), ("receive", there, rank)):
                    move = Move(kind, phase, *ends, other, moved, moved, each.microbatch)
                    ops[here].append(move)
        for s, found in enumerate(ops):
            found.append(Run(f"update 0 {s}"))
        return [RankProgram(tuple(i), tuple(o)) for i, o in zip(inputs, ops, strict=True)]

    def driver(self, devices: NumpyDevices, meshes) -> PipelineDriver:
        each = range(self.count)
        passes = {name: program for s in each for name, program in self.passes(s).items()}
        inputs = (self.x[0], *self.w[: self.count])
        types = {v: TensorType("f64", (WIDTH, WIDTH)) for v in inputs}
        cut = Stages((), (), (), (), (), homes=((0,), *((s,) for s in each)), ends=tuple(each))
        stages = [
            StageDevices(
                meshes[s], dict.fromkeys(inputs, replicated(2)), {}, (self.total[s],),
                lambda: [np.zeros((WIDTH, WIDTH))],
            )
            for s in each
        ]  # fmt: skip
        schedule = one_f_one_b(self.count, MICROBATCHES)
        graph = Graph(types, inputs, (), tuple(each))
        ranks = self.ranks(schedule)
        return PipelineDriver(devices, schedule, ranks, graph, cut, stages, passes, True)


def drivers(stages: int, processes: int) -> tuple[list[PipelineDriver], dict]:
    """One for each process, which have the stages in equal shares; and their mailboxes."""
    mailboxes = defaultdict(SimpleQueue)
    meshes = [frozenset({s * processes // stages}) for s in range(stages)]
    found = [
        Layers(stages).driver(NumpyDevices(process, processes, mailboxes), meshes)
        for process in range(processes)
    ]
    return found, mailboxes


def leaves(stages: int) -> list[np.ndarray]:
    rng = np.random.default_rng(stages)
    return [rng.normal(size=(ROWS, WIDTH)), *rng.normal(size=(stages, WIDTH, WIDTH))]


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("stages, processes", [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_a_pipeline_equals_the_sequential_step(stages, processes):
    given, (each, _) = leaves(stages), drivers(stages, processes)
    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(lambda driver: driver.run(given), each))
    for s, want in enumerate(sequential(given[0], given[1:])):
        owner = s * processes // stages
        np.testing.assert_allclose(results[owner][s], want, rtol=1e-12)
        assert all(found[s] is None for k, found in enumerate(results) if k != owner)


@pytest.mark.parametrize("stages", [2, 4])
def test_what_is_held_and_recorded_is_what_the_schedule_says(stages):
    (driver,), _ = drivers(stages, 1)
    with Recorder(driver) as recorder:
        driver.run(leaves(stages))
    assert driver.peaks == [in_flight(driver.schedule, rank) for rank in range(stages)]
    for rank, order in enumerate(driver.schedule.orders):
        mine = sorted(
            (each for each in recorder.passes if each.rank == rank), key=lambda p: p.start
        )
        assert [each.step for each in mine] == list(order)


# ---------------------------------------------------------------- processes that are late or gone


@pytest.fixture
def at_exit(monkeypatch):
    """What would end this process when it exits."""
    found = []
    monkeypatch.setattr(rendezvous.atexit, "register", found.append)
    return found


def test_a_late_process_is_named_with_the_instruction_that_waits(monkeypatch, at_exit):
    (driver, _), mailboxes = drivers(2, 2)
    driver.rendezvous.deadline, said = 1.0, []

    def leave(error):  # in place of the end of this process
        said.append(error)
        mailboxes[frozenset({1}), frozenset({0})].put(GONE)

    monkeypatch.setattr(rendezvous, "leave", leave)
    with pytest.raises(ProcessError):
        driver.run(leaves(2))
    assert (
        said[0].what
        == "rank 0 at `receive backward v7 from stage 1 of rank 1 to stage 0 microbatch 0` waited 1 s for process 1."
    )
    assert said[0].where == "process 0 of 2" and "MESHWRIGHT_DEADLINE=SECONDS" in said[0].fix


def test_a_process_that_ended_is_named_with_the_instruction_that_failed(at_exit):
    (*_, driver), mailboxes = drivers(4, 4)
    mailboxes[frozenset({2}), frozenset({3})].put(GONE)
    with pytest.raises(ProcessError) as found:
        driver.run(leaves(4))
    waits = "receive forward v3 from stage 2 of rank 2 to stage 3 microbatch 0"
    assert found.value.what == f"rank 3 at `{waits}` failed while it waited for process 2."
    assert (
        at_exit
        and found.value.origin == "the peer is gone"
        and found.value.where == "process 3 of 4"
    )
