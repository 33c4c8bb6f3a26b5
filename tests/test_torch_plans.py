"""Plans for torch: they say so, and their memory is what its ranks take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.api import plan_captured
from meshwright.backends.xla.capture import Captured
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import load_plan, save_plan
from meshwright.ir.errors import PlanError, UsageError
from meshwright.ir.execution_model import _MODELS, execution_model
from meshwright.ir.mesh import Axis, Mesh
from meshwright.ir.plan import Plan
from meshwright.planner.cost.collectives import Collectives
from meshwright.planner.memory.by_op import row_by_row, strides_as
from meshwright.planner.request import Request
from meshwright.view.text import plan_text

from .pipelines import captured_of
from .test_cli import QUICK, run  # noqa: F401

BAR = 0.10  # of a step's memory


def squares(w: jax.Array, x: jax.Array) -> jax.Array:
    return w - 0.1 * jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)


def plan_of(backend: Any, cluster: str = "2xcpu", **words: Any) -> Plan:
    given = jnp.ones((8, 8)), jnp.ones((16, 8))
    return mw.plan(squares, *given, cluster=cluster, request=Request(backend=backend, **words))


# ---------------------------------------------------------------- what backend a plan is for


def test_a_plan_says_which_backend_it_is_for(tmp_path):
    plan, other = plan_of("torch"), plan_of("xla")
    save_plan(plan, tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json").backend == "torch" and other.backend == "xla"
    assert "backend torch, a process for each device" in plan_text(plan)
    assert "backend" not in plan_text(other)


def test_plans_of_older_files_are_for_xla():
    data = json.loads(plan_of("xla").model_dump_json())
    del data["backend"]
    assert Plan.model_validate(data).backend == "xla"


def test_a_plan_that_another_backend_runs_is_told_in_a_line():
    plan = plan_of("torch")
    given = jnp.ones((8, 8)), jnp.ones((16, 8))
    with pytest.warns(
        UserWarning, match="planned for torch, run by xla: the .* are those of torch"
    ):
        step = mw.lower(plan, squares, *given)
    np.testing.assert_allclose(step(*given), squares(*given), rtol=1e-5)
    assert not plan.read_elsewhere("torch")


@pytest.mark.parametrize(
    "words, told",
    [
        ({"backend": "gloo"}, "backend cannot be 'gloo'"),
        ({"cluster": "v5e-4"}, "torch on v5e-4: it does not run on v5e, which is tpu"),
        ({"overlap": "parameters"}, "as our torch backend computes and communicates in turn"),
        ({"pp": 2, "program": "single"}, "program cannot be single with backend=torch"),
    ],
)
def test_what_torch_cannot_do_is_refused_before_planning(words: dict[str, Any], told: str):
    with pytest.raises(PlanError, match=told):
        plan_of(**{"backend": "torch", **words})


def test_parallelize_runs_on_xla_alone():
    with pytest.raises(UsageError, match="parallelize runs a step on xla, not 'torch'"):
        mw.parallelize(squares, backend="torch")


def test_the_command_line_plans_for_torch(run: Any):  # noqa: F811
    words = ("plan", "--model", "gpt-tiny", "--layers", "1", "--cluster", "8xcpu", *QUICK)
    code, out, err = run(*words, "--backend", "torch", "-o", "p.json")
    assert code == 0, err
    assert "backend torch, a process for each device" in out
    code, _, err = run("run", "p.json", "--coordinator", "127.0.0.1:9")
    assert code == 2 and "the ranks of torch are processes of this host" in err
    code, _, err = run("audit", "p.json", "--emulate")
    assert code == 2 and "the plan is for torch, and an audit compiles for xla" in err


# ---------------------------------------------------------------- what torch does


def counted(plan: Plan, captured: Captured) -> float:
    """Bytes that live at most on the first of a plan's ranks, whose meetings bring zeros."""
    torch = pytest.importorskip("torch")
    from meshwright.backends.torch.dtypes import tensor_of
    from meshwright.backends.torch.lower import arrays_in, local_program
    from meshwright.backends.torch.memory import LiveStorages
    from meshwright.backends.torch.ranks import WholeSteps

    class Zeros:
        """Takes the memory that `ProcessGroups` takes."""

        def all_reduce(self, x: Any, reduction: str, axes: Any) -> Any:
            return x.contiguous()

        def all_gather(self, x: Any, axes: Any) -> list[Any]:
            ways = program.mesh.ways(axes)
            return [c.view(x.shape) for c in x.new_zeros(ways * x.numel()).chunk(ways)]

        def reduce_scatter(self, parts: Sequence[Any], axes: Any) -> Any:
            return torch.stack(self.all_to_all(parts, axes)).sum(0)

        def all_to_all(self, parts: Sequence[Any], axes: Any) -> list[Any]:
            return list(torch.zeros_like(torch.stack(list(parts))))

        def permute(self, x: Any, pairs: Any, axes: Any) -> Any:
            return torch.zeros_like(x)

    graph, program = captured.graph, local_program(plan, captured.graph)
    arrays = {v: tensor_of(np.asarray(x)) for v, x in captured.binding.arrays.items()}
    steps = WholeSteps(program, arrays_in(program, graph, arrays), graph.state, 0, Zeros())
    for position, value in enumerate(graph.inputs):
        kind = graph.types[value]
        steps.give(position, tensor_of(np.zeros(kind.shape, jnp.dtype(_NAMES[kind.dtype]))))
    steps.run()
    with LiveStorages(steps.living()) as live:
        steps.run()
    return live.peak


_NAMES = {"f32": "float32", "bf16": "bfloat16", "s32": "int32", "u32": "uint32", "bool": "bool"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name, words",
    [
        ("gpt-tiny", {"mesh": (2,)}),
        pytest.param("gpt-tiny", {"mesh": (4,), "attention": "fused"}, marks=SLOW),
        pytest.param("llama-tiny", {"mesh": (4,), "loss": "fused"}, marks=SLOW),
        pytest.param("llama-tiny", {"mesh": (2, 2), "memory": 2.5e6}, marks=SLOW),
        pytest.param("vit-tiny", {"mesh": (2,)}, marks=SLOW),
    ],
)
def test_the_memory_of_a_plan_is_what_its_ranks_take(name: str, words: dict[str, Any]):
    planned, taken = memory(name, words)
    assert planned == pytest.approx(taken, rel=BAR)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("gpt-tiny", {"mesh": (2,), "microbatches": 4}),
        ("gpt-tiny", {"mesh": (2, 2), "recompute": "full"}),
        ("mixtral-tiny", {"mesh": (4,)}),
    ],
)
def test_what_travels_in_buckets_lies_there_twice_beside_the_plan(name: str, words: dict[str, Any]):
    """Where the update is the peak, and all state together is less than a bucket."""
    planned, taken = memory(name, words)
    graph = captured_of(name).graph
    state = sum(graph.types[graph.inputs[into]].nbytes for into, _ in graph.state)
    assert planned <= taken <= planned + state


def memory(name: str, words: dict[str, Any]) -> tuple[float, float]:
    """Bytes of a rank at its peak, planned and counted."""
    captured, size = captured_of(name), int(np.prod(words["mesh"]))
    plan = plan_captured(captured, f"{size}xcpu", Request(backend="torch", **words), name)
    assert plan.estimate.peak_bytes is not None
    return plan.estimate.peak_bytes, counted(plan, captured)


@pytest.mark.parametrize(
    "shape, strides, made, found",
    [
        ((2, 3, 4), (12, 4, 1), (6, 4), (4, 1)),
        ((2, 3, 4), (12, 4, 1), (2, 1, 12), (12, 12, 1)),
        ((4, 6), (6, 1), (4, 2, 3), (6, 3, 1)),
        ((3, 4), (1, 3), (12,), None),
        ((3, 4), (0, 1), (12,), None),
        ((2, 3, 4), (1, 2, 6), (2, 12), None),
        ((1, 5), (0, 1), (5, 1), (1, 1)),
    ],
)
def test_a_reshape_shows_memory_where_torch_shows_it(
    shape: Any, strides: Any, made: Any, found: Any
):
    torch = pytest.importorskip("torch")
    assert strides_as(shape, strides, made) == found
    x = torch.arange(100.0).as_strided(shape, strides)
    shown = x.reshape(made)
    assert (shown.data_ptr() == x.data_ptr()) == (found is not None)
    if found is not None:
        assert torch.equal(torch.arange(100.0).as_strided(made, found), shown)


def test_elements_lie_row_by_row():
    assert row_by_row((2, 3, 4)) == (12, 4, 1) and row_by_row(()) == ()


def test_processes_meet_slower_than_threads_the_more_of_them_there_are():
    where = Cluster.parse("4xcpu")
    mesh = Mesh((Axis("x", 4),))
    threads, processes = Collectives(mesh, where), Collectives(mesh, where, "torch")
    meeting = execution_model("cpu", "torch").meeting
    assert meeting is not None
    hop = meeting.hop_bytes / (meeting.share * 1e9)
    for kind, hops in (("all_reduce", 6), ("all_gather", 3), ("reduce_scatter", 2), ("permute", 1)):
        line = processes.line(kind, ("x",))
        assert (
            line.fixed == pytest.approx(hops * hop)
            and line.slope > threads.line(kind, ("x",)).slope
        )


def test_a_host_that_dispatches_beside_its_device_bounds_the_step(monkeypatch):
    """Of a host that is slow, a step takes so long for each op, whatever the device computes."""
    model, slow = execution_model("cuda", "torch"), 1e-3
    monkeypatch.setitem(_MODELS["torch"], "cuda", replace(model, dispatch_seconds=slow))
    plan = plan_of("torch", "2xh100")
    ops = plan.estimate.step_seconds / slow
    assert ops == pytest.approx(round(ops)) and 4 <= ops < 100
    assert plan.proof.objective == plan.proof.lower_bound == plan.estimate.step_seconds
