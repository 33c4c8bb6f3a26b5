"""Pipelines on torch ranks: every schedule gives what one device gives, over several steps."""

from __future__ import annotations

import functools
import math
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Timer
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from meshwright.api import plan_captured  # noqa: E402
from meshwright.backends.runtime.programs import Route  # noqa: E402
from meshwright.backends.torch.collectives import part  # noqa: E402
from meshwright.backends.torch.handover import Handover, RankMesh, pieces  # noqa: E402
from meshwright.backends.torch.lower import arrays_in, lower  # noqa: E402
from meshwright.backends.torch.lower_pipeline import StagedProgram  # noqa: E402
from meshwright.backends.torch.ranks import Ranks  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import LoweringError, ProcessError  # noqa: E402
from meshwright.ir.local.pipeline import Move  # noqa: E402
from meshwright.ir.mesh import Mesh  # noqa: E402
from meshwright.ir.passes.localize_pipeline import localize_pipeline  # noqa: E402
from meshwright.ir.pipeline.schedule import Schedule  # noqa: E402
from meshwright.ir.plan import Plan  # noqa: E402
from meshwright.ir.sharding import Sharding  # noqa: E402
from meshwright.planner.pipeline.schedules import (  # noqa: E402
    gpipe,
    interleaved,
    one_f_one_b,
    zb_h1,
)
from meshwright.planner.request import Request  # noqa: E402

from .pipelines import half_split, pipelined, shuffled  # noqa: E402
from .test_cli import run  # noqa: E402, F401
from .test_torch_local import close, drawn, in_f32, tensors_of  # noqa: E402
from .torch_pipelines import QueuePost, World, run_pipeline  # noqa: E402

STEPS = 3


@functools.cache
def captured_of(name: str) -> Any:
    return in_f32(name)


@functools.cache
def stage_plan(name: str, mesh: tuple[int, ...], microbatches: int, memory: float = 0.0) -> Plan:
    """What the planner decides for one stage's ranks; with `memory` (a share of the free plan's) state is cut."""
    words: dict[str, Any] = {
        "mesh": mesh,
        "microbatches": microbatches,
        "loss": "plain",
        "recompute": "none",
    }
    if memory:
        words["memory"] = memory * stage_plan(name, mesh, microbatches).estimate.peak_bytes
    cluster, request = (
        Cluster.parse(f"{np.prod(mesh)}xcpu"),
        Request(time_limit=20, gap=0.05, **words),
    )
    return plan_captured(captured_of(name), cluster, request, name)


@functools.cache
def wanted(name: str) -> list[np.ndarray]:
    """What one device gives in the last of some steps."""
    captured = captured_of(name)
    graph, inputs = captured.graph, given(name)
    found: Any = ()
    for _ in range(STEPS):
        found = replay(graph, constants_of(name), inputs)
        for into, out in graph.state:
            inputs[into] = found[out]
    return [x.numpy() for x in found]


def given(name: str) -> list[Any]:
    graph = captured_of(name).graph
    return tensors_of(graph, drawn(graph, 3))


def constants_of(name: str) -> dict[int, Any]:
    return {v: torch.tensor(np.asarray(x)) for v, x in captured_of(name).binding.arrays.items()}


def check_alike(name: str, found: Sequence[np.ndarray]) -> None:
    for output, x, y in zip(captured_of(name).graph.output_names, found, wanted(name), strict=True):
        close(x, y, output)


def check_in_memory(name: str, plan: Plan, ranks: int) -> None:
    program = lower(plan, captured_of(name).graph)
    assert isinstance(program, StagedProgram) and program.rank_count == ranks
    state = captured_of(name).graph.state
    check_alike(name, run_pipeline(program, given(name), constants_of(name), state, STEPS))


SCHEDULES = {
    "1f1b": one_f_one_b(2, 4),
    "gpipe": gpipe(2, 4),
    "interleaved": interleaved(2, 4, 2),
    "zb-h1": zb_h1(2, 4),
    "half of the weights apart": half_split(2, 4),
    "one microbatch": one_f_one_b(2, 1),
    "shuffled": shuffled(2, 4, 1),
}


@pytest.mark.parametrize("how", SCHEDULES)
def test_two_stages_of_two_ranks_give_what_one_device_gives(how: str):
    schedule = SCHEDULES[how]
    plan = stage_plan("gpt-tiny", (2,), schedule.microbatches)
    check_in_memory("gpt-tiny", pipelined(plan, captured_of("gpt-tiny"), schedule), 4)


@pytest.mark.parametrize(
    ("name", "schedule", "mesh", "memory"),
    [
        pytest.param("gpt-tiny", one_f_one_b(4, 4), (1,), 0.0, id="four stages"),
        pytest.param("mixtral-tiny", one_f_one_b(2, 4), (2,), 0.0, id="mixtral"),
        pytest.param("llama-tiny", zb_h1(2, 4), (2,), 0.75, id="llama, state cut"),
        pytest.param("gpt-tiny", interleaved(2, 4, 2), (2, 2), 0.6, id="eight ranks, state cut"),
    ],
)
def test_other_models_and_meshes_give_what_one_device_gives(
    name: str, schedule: Schedule, mesh: tuple[int, ...], memory: float
):
    plan = stage_plan(name, mesh, schedule.microbatches, memory)
    ranks = schedule.ranks * int(np.prod(mesh))
    check_in_memory(name, pipelined(plan, captured_of(name), schedule), ranks)


@pytest.mark.parametrize("meshes", [((2,), (1,)), ((1,), (2, 2)), ((2, 2), (2,))])
def test_stages_of_unlike_meshes_give_what_one_device_gives(meshes: tuple[tuple[int, ...], ...]):
    plans = [stage_plan("gpt-tiny", mesh, 4) for mesh in meshes]
    plan = pipelined(plans[0], captured_of("gpt-tiny"), one_f_one_b(2, 4))
    assert plan.pipeline is not None
    own = [
        stage.model_copy(
            update={"mesh": each.mesh, "strategies": each.strategies, "slots": each.slots}
        )
        for stage, each in zip(plan.pipeline.stages, plans, strict=True)
    ]
    update = {"stages": tuple(own), "first": (0, plans[0].mesh.size)}
    plan = plan.model_copy(update={"pipeline": plan.pipeline.model_copy(update=update)})
    check_in_memory("gpt-tiny", plan, sum(each.mesh.size for each in plans))


# ---------------------------------------------------------------- from stage to stage

MESHES = [Mesh.of(x=1), Mesh.of(x=3), Mesh.of(x=2, y=2), Mesh.of(x=2, y=3), Mesh.of(x=4)]


@st.composite
def layouts(draw: Any, mesh: Mesh) -> Sharding:
    """Of a value of two dims; every axis cuts one of them, or none."""
    dims: tuple[list[str], ...] = ([], [])
    for axis in draw(st.permutations(mesh.names)):
        where = draw(st.integers(0, 2))
        if where < 2:
            dims[where].append(axis)
    return Sharding(tuple(map(tuple, dims)))


@given_by(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_handed_over_arrives_whole_and_once(data: Any):
    one, other = (data.draw(st.sampled_from(MESHES)) for _ in range(2))
    leaves, arrives = data.draw(layouts(one)), data.draw(layouts(other))
    first = data.draw(st.sampled_from([0, one.size]))  # the same ranks, or others
    value = torch.arange(24 * 12).reshape(24, 12)
    routes = [Route((24, 12), "s64", leaves, arrives)]
    sender, receiver, world = RankMesh(one, 0), RankMesh(other, first), World()
    held = {r: part(value, leaves, one, r) for r in sender.ranks}
    transfers = {
        r: Handover(routes, sender, receiver, r, QueuePost(world, r))
        for r in {*sender.ranks, *receiver.ranks}
    }
    with ThreadPoolExecutor(len(transfers)) as pool:
        found = dict(
            zip(
                transfers,
                pool.map(lambda r: transfers[r]([held[r]] if r in held else None)[0], transfers),
                strict=True,
            )
        )
    for rank, arrays in found.items():
        if rank not in receiver.ranks:
            assert arrays is None
            continue
        assert arrays is not None
        assert torch.equal(arrays[0], part(value, arrives, other, rank - first))
    assert all(queue.empty() for queue in world.queues.values())


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    captured = captured_of("gpt-tiny")
    plan = pipelined(stage_plan("gpt-tiny", (2,), 4), captured, interleaved(2, 4, 2))
    arrays = {v: np.asarray(x) for v, x in captured.binding.arrays.items()}
    program = lower(plan, captured.graph)
    with Ranks(program, arrays_in(program, captured.graph, arrays), captured.graph.state) as ranks:
        yield ranks


def test_processes_that_meet_over_gloo_give_what_one_device_gives(processes: Ranks):
    graph = captured_of("gpt-tiny").graph
    processes.give({k: x.numpy() for k, x in enumerate(given("gpt-tiny"))})
    for _ in range(STEPS):
        assert processes.step() > 0
    check_alike("gpt-tiny", processes.results(range(len(graph.outputs))))
    for rank, met in enumerate(processes.met()):
        kinds = [kind for kind, _, _ in met]
        assert "all_reduce" in kinds
        sent = Counter((kind, n) for kind, _, n in met if kind in ("send", "receive"))
        assert sent and sent == handed(rank)


def handed(rank: int) -> Counter[tuple[str, int]]:
    """What one of four processes sends and takes in a step, as the program of the pipeline says."""
    captured = captured_of("gpt-tiny")
    plan = pipelined(stage_plan("gpt-tiny", (2,), 4), captured, interleaved(2, 4, 2))
    program = localize_pipeline(plan, captured.graph)
    found = Counter[tuple[str, int]]()
    moves = [op for each in program.ranks for op in each.ops if isinstance(op, Move)]
    for move in (move for move in moves if move.kind == "send"):
        first = {stage: 2 * (stage % 2) for stage in range(4)}
        ends = [RankMesh(program.meshes[s], first[s]) for s in (move.sender, move.receiver)]
        kind = move.leaves.whole
        shape = (len(move.values),) if len(move.values) > 1 else kind.shape
        if move.leaves.time is not None:
            shape = tuple(n // 4 if d == move.leaves.time else n for d, n in enumerate(shape))
        if owed := move.leaves.sharding.partial:
            shape = (program.meshes[move.sender].ways(owed), *shape)
        route = Route(shape, kind.dtype, move.leaves.sharding, move.arrives.sharding)
        for piece in pieces(route, *ends):
            size = math.prod(end - begin for begin, end in piece.box) * 4
            found["send", size] += piece.sender == rank != piece.receiver
            found["receive", size] += piece.receiver == rank != piece.sender
    return +found


def test_a_rank_that_is_killed_ends_all_and_others_say_what_they_waited_for(processes: Ranks):
    processes.give({k: x.numpy() for k, x in enumerate(given("gpt-tiny"))})
    os.kill(processes._processes[2].pid, signal.SIGSTOP)  # so that the others wait for it
    Timer(1.0, os.kill, (processes._processes[2].pid, signal.SIGKILL)).start()
    with pytest.raises(ProcessError, match="rank 2 ended by signal 9") as found:
        processes.step()
    assert re.match(
        r"rank \d at `[^`]+` failed while it waited for process", str(found.value.origin)
    )
    for process in processes._processes:
        process.join(10)
        assert not process.is_alive()


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_told_of_by_what_waits_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MESHWRIGHT_DEADLINE", "20")
    captured = captured_of("gpt-tiny")
    plan = pipelined(stage_plan("gpt-tiny", (1,), 4), captured, one_f_one_b(2, 4))
    with Ranks(lower(plan, captured.graph), {}, captured.graph.state) as ranks:
        ranks.give({k: x.numpy() for k, x in enumerate(given("gpt-tiny"))})
        os.kill(ranks._processes[1].pid, signal.SIGSTOP)
        with pytest.raises(
            ProcessError,
            match=r"rank 0 at `receive backward .* microbatch 0` failed while it waited for process 1",
        ):
            ranks.step()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("update", "told"),
    [
        ({"unstacked": True}, "layers that come from a loop cannot run on torch yet"),
        ({"program": "single"}, "as a single program cannot run on torch yet"),
    ],
)
def test_pipelines_that_torch_cannot_run_are_refused_by_name(update: dict[str, Any], told: str):
    captured = captured_of("gpt-tiny")
    plan = pipelined(stage_plan("gpt-tiny", (2,), 4), captured, one_f_one_b(2, 4))
    assert plan.pipeline is not None
    plan = plan.model_copy(update={"pipeline": plan.pipeline.model_copy(update=update)})
    with pytest.raises(LoweringError, match=told):
        lower(plan, captured.graph)


@pytest.mark.slow
def test_the_command_line_trains_a_pipeline_on_torch(run: Any):  # noqa: F811
    code, out, err = run(
        "run", "--model", "gpt-tiny", "--devices", "4", "--pin", "pp=2", "--backend", "torch", "--verify",
        "--steps", "2",
    )  # fmt: skip
    assert code == 0, err
    first, second = out.splitlines()
    assert first.endswith("equals the unsharded step") and second.startswith("step    2  loss ")
