"""Local programs on torch: all ranks together give what one device gives, whatever the layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from meshwright.api import plan_captured  # noqa: E402
from meshwright.backends.torch import emit_composite  # noqa: E402
from meshwright.backends.torch.dtypes import torch_dtype  # noqa: E402
from meshwright.backends.torch.lower import arrays_in, local_program  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.backends.xla.capture import capture  # noqa: E402
from meshwright.backends.xla.dtypes import jax_dtype  # noqa: E402
from meshwright.backends.xla.replay import Walk  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.graph import Graph  # noqa: E402
from meshwright.ir.local.program import COLLECTIVES  # noqa: E402
from meshwright.ir.passes.localize import localize  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402
from meshwright.recipe import make  # noqa: E402

from .local_interpreter import evaluate  # noqa: E402
from .random_graphs import random_graph, random_layouts  # noqa: E402
from .test_context_parallel import even, everywhere, inputs, pinned, rows, trained  # noqa: E402
from .test_localize import MESHES, numbers  # noqa: E402
from .test_ring import RINGS, ring  # noqa: E402
from .torch_ranks import run_ranks  # noqa: E402

ZOO = (
    "gpt-tiny",
    "gpt-tiny-scan",
    "llama-tiny",
    "mixtral-tiny",
    "deepseek-tiny",
    "vit-tiny",
    "wrn-tiny",
    "dlrm-tiny",
)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_random_layouts_of_random_graphs_give_what_one_device_gives(microbatches: int):
    met = set[str]()
    for seed in range(60):
        graph = random_graph(seed, microbatches > 1)
        program, plan = random_layouts(graph, MESHES[seed % len(MESHES)], seed, microbatches)
        local = localize(program, plan)
        met |= {op.kind for op in local.walk()}
        given = numbers(graph, seed)
        tensors = [
            torch.tensor(x, dtype=torch_dtype(graph.types[v].dtype))
            for x, v in zip(given, graph.inputs, strict=True)
        ]
        for found, wanted in zip(run_ranks(local, tensors), evaluate(graph, given), strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert met >= COLLECTIVES | (
        {"microbatches", "take_microbatch", "join_microbatches"} if microbatches > 1 else set()
    )


def drawn(graph: Graph, seed: int) -> list[np.ndarray]:
    """Inputs of a step: small numbers, none below zero, and few different ids."""
    rng = np.random.default_rng(seed)
    found = []
    for value in graph.inputs:
        kind = graph.types[value]
        if kind.dtype == "bool":
            found.append(rng.random(kind.shape) > 0.5)
        elif kind.dtype.startswith("s"):
            found.append(rng.integers(0, 8, kind.shape).astype(np.int32))
        else:
            found.append(np.abs(rng.normal(size=kind.shape)).astype(np.float32) / 10)
    return found


def in_f32(name: str) -> Any:
    return make({"model": name, "dtype": "f32"}).capture(True)


def tensors_of(graph: Graph, given: list[np.ndarray]) -> list[Any]:
    return [
        torch.tensor(x).to(torch_dtype(graph.types[v].dtype))
        for x, v in zip(given, graph.inputs, strict=True)
    ]


@pytest.mark.parametrize("name", ZOO)
def test_a_step_of_jax_gives_the_same_on_torch(name: str):
    import jax
    import jax.numpy as jnp

    captured = in_f32(name)
    graph, binding, given = captured.graph, captured.binding, drawn(captured.graph, 0)
    arrays = [
        jnp.asarray(x, jax_dtype(graph.types[v].dtype))
        for x, v in zip(given, graph.inputs, strict=True)
    ]
    wanted = jax.jit(Walk(graph, binding.ops, binding.arrays))(*arrays)
    constants = {v: torch.tensor(np.asarray(x)) for v, x in binding.arrays.items()}
    found = replay(graph, constants, tensors_of(graph, given))
    for output, x, y in zip(graph.output_names, found, wanted, strict=True):
        close(x.numpy(), np.asarray(y), output)


def close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, what
    size = np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4 * size, err_msg=what)


PLANS: dict[str, dict[str, Any]] = {
    "dp": {"mesh": (4,)},
    "2x2": {"mesh": (2, 2)},
    "2x2x2": {"mesh": (2, 2, 2)},
    "microbatches": {"mesh": (4,), "microbatches": 2, "recompute": "full"},
    "squeezed": {"mesh": (2, 2), "memory": 0.6},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", PLANS)
@pytest.mark.parametrize(
    "name",
    [
        "gpt-tiny",
        "llama-tiny",
        "mixtral-tiny",
        "deepseek-tiny",
        "vit-tiny",
        "wrn-tiny",
        "dlrm-tiny",
    ],
)
def test_planned_steps_give_what_one_device_gives(name: str, how: str, fused: bool):
    if (name, how) == ("wrn-tiny", "microbatches"):
        pytest.skip("its means over the batch allow no microbatches")
    captured = in_f32(name)
    request = dict(PLANS[how])
    ranks = int(np.prod(request["mesh"]))
    words = (
        {"attention": "fused", "loss": "fused"}
        if fused
        else {"attention": "plain", "loss": "plain"}
    )
    if "memory" in request:
        free = plan_captured(
            captured, Cluster.parse(f"{ranks}xcpu"), Request(mesh=(2, 2), **words), name
        )
        request["memory"] *= free.estimate.peak_bytes
    plan = plan_captured(captured, Cluster.parse(f"{ranks}xcpu"), Request(**request, **words), name)
    local = local_program(plan, captured.graph)
    given = tensors_of(captured.graph, drawn(captured.graph, 1))
    constants = {v: torch.tensor(np.asarray(x)) for v, x in captured.binding.arrays.items()}
    wanted = replay(captured.graph, constants, given)
    found = run_ranks(local, given, arrays_in(local, captured.graph, constants))
    for output, x, y in zip(captured.graph.output_names, found, wanted, strict=True):
        close(x.numpy(), y.numpy(), output)


@pytest.mark.parametrize(
    ("name", "mesh", "code"),
    [
        ("documents", "8", even), ("causal", "2x4", even), ("causal", "4", rows), ("biased", "2x4", even),
        ("full", "2", ring), ("causal", "2x4", ring), ("documents", "8", ring), ("masked out", "4", ring),
        ("no maximum", "4", ring), ("windowed", "8", ring),
    ],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["fused", "ring"])
def test_rows_of_attention_cut_over_ranks_equal_one_device(
    name: str, mesh: str, code: Any, attention: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(emit_composite, "BLOCK", 512)
    step, args = trained(RINGS[name]), inputs()
    plan = pinned(step, args, mesh, everywhere(code, mesh), attention=attention)
    captured = capture(step, *args)
    graph = captured.graph
    arrays = {v: torch.tensor(np.asarray(x)) for v, x in captured.binding.arrays.items()}
    given = [torch.tensor(np.asarray(x)) for x in args]
    wanted = replay(graph, arrays, given)
    local = local_program(plan, graph)
    assert any(op.joint for op in local.walk()) == (code is not rows)
    for output, x, y in zip(
        graph.output_names,
        run_ranks(local, given, arrays_in(local, graph, arrays)),
        wanted,
        strict=True,
    ):
        close(x.numpy(), y.numpy(), output)
