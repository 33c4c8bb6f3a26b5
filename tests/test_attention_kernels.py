"""Attention by kernels of the device: which runs what, that it runs as the plain step does, and its price."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import meshwright as mw
from meshwright.backends.xla import attention_kernels, lower, lower_pipeline
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.emit_composite import run_composite
from meshwright.backends.xla.shard import ShardPart
from meshwright.backends.xla.topology import topology_devices
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_form import form_of
from meshwright.ir.composites.attention_kernels import products_made
from meshwright.ir.composites.attention_op import composed, with_attention
from meshwright.ir.ops import ATTENTION
from meshwright.ir.rules import rule_of
from meshwright.planner.request import Request

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not to be had here"
)
B, T, D, N, K, H = 4, 256, 32, 4, 2, 16
Array = jax.Array


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.2, dtype)


def attend(**options: Any) -> Callable[..., Array]:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def trained(core: Callable[..., Array]) -> Callable[..., Any]:
    """Grouped attention behind projections; plain SGD, so that gradients show."""

    def loss(params: dict[str, Array], x_BTD: Array) -> Array:
        q, k, v = (jnp.einsum("btd,dnh->btnh", x_BTD, params[name]) for name in "qkv")
        return (
            jnp.einsum("btnh,nhd->btd", core(q, k, v), params["o"]).astype(jnp.float32) ** 2
        ).mean()

    def step(params: dict[str, Array], x_BTD: Array) -> tuple[Any, Array]:
        value, grads = jax.value_and_grad(loss)(params, x_BTD)
        return jax.tree.map(lambda w, g: w - 0.5 * g, params, grads), value

    return step


def weights(dtype: Any = jnp.float32, width: int = H) -> dict[str, Array]:
    many = {"q": N, "k": K, "v": K}
    found = {name: normal(k, D, n, width, dtype=dtype) for k, (name, n) in enumerate(many.items())}
    return {**found, "o": normal(9, N, width, D, dtype=dtype)}


X = normal(10, B, T, D)


@pytest.fixture
def on_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are lowered as for TPUs, and kernels run without one."""
    for module in (lower, lower_pipeline):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "tpu")
    monkeypatch.setattr(attention_kernels, "INTERPRET", True)


def close(have: Any, want: Any, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("core", "pins"),
    [
        (attend(is_causal=True), {"mesh": "2x4"}),
        (attend(), {"mesh": "8"}),
    ],
)
def test_splash_attention_equals_the_plain_step(core: Any, pins: Any, on_tpus: None):
    step, args = trained(core), (weights(), X)
    ours = mw.parallelize(step, cluster="8xcpu", attention="fused", mesh=pins["mesh"])
    close(ours(*args), jax.jit(step)(*args))


def runner(core: Callable[..., Array], *qkv: Array) -> Callable[..., dict[int, Array]]:
    """Runs the attention, or its gradient, over `ways` devices that share its rows; values by their ids."""
    step = jax.value_and_grad(lambda *a: (core(*a).astype(jnp.float32) ** 2).sum(), (0, 1, 2))
    captured = capture(step, *qkv)
    graph = with_attention(captured.graph)
    ops = {visit.op.kind: visit.op for visit in graph.visits if visit.op.kind in ATTENTION}

    def run(
        kind: str, platform: str, ways: int = 1, even: tuple[str, ...] = (), known: Any = None
    ) -> dict[int, Array]:
        op, types, known = ops[kind], graph.types, known or {}
        form, rule = form_of(op), rule_of(op, types)
        given = [known[v] if v in known else normal(v, *types[v].shape) for v in op.inputs]
        rows = next(f for f, each in enumerate(rule.factors) if each.size == qkv[0].shape[1])

        def local(*operands: Array) -> list[Array]:
            cuts = {rows: ShardPart(jax.lax.axis_index("x"), ways)} if ways > 1 else {}
            bound = lambda inner: captured.binding.ops.get((inner.kind, inner.attrs))  # noqa: E731
            found = run_composite(op, bound, operands, rule, cuts, even, platform)
            whole = (form.rows not in sum(labels, ()) for labels in form.results_labels)
            return [jax.lax.psum(a, "x") if w else a for a, w in zip(found, whole, strict=True)]

        mesh = Mesh(np.array(jax.devices()[:ways]), ("x",))
        specs = [
            [P(*("x" if dim == (form.rows,) else None for dim in labels)) for labels in side]
            for side in (form.operands, form.results_labels)
        ]
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=tuple(specs[0]), out_specs=specs[1], check_vma=False
        )
        return dict(zip(op.outputs, jax.jit(sharded)(*map(np.asarray, given)), strict=True))

    return run


@pytest.mark.parametrize("even", [(), ("x",)], ids=["in order", "dealt out"])
def test_rows_of_a_causal_attention_on_devices_of_their_own(even: Any, monkeypatch: Any):
    """A device sees the keys before its rows by one call of the kernel, and a square of rows and keys by another."""
    monkeypatch.setattr(attention_kernels, "INTERPRET", True)
    long = 512 if even else 256
    q, k, v = (normal(n, 1, long, heads, H) for n, heads in enumerate((2, 1, 1)))
    run = runner(attend(is_causal=True), q, k, v)
    forward = run("attention", "cpu")
    close(run("attention", "tpu", 2, even), forward)
    gradient = run("attention_grad", "cpu", known=forward)
    close(run("attention_grad", "tpu", 2, even, forward), gradient)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are lowered as for CUDA devices; cuDNN, which jax asks for its version, is not here."""
    monkeypatch.setattr(lower, "platform_of", lambda mesh: "cuda")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def cuda_calls(plan: mw.Plan, step: Any, args: Any) -> list[str]:
    """Custom calls of the program as it is lowered for CUDA devices, in order."""
    lowered = lower.lower(plan, capture(step, *args))
    avals = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval, sharding in zip(
            lowered.captured.binding.in_avals, lowered.input_shardings, strict=True
        )
    ]
    text = lowered.jitted.trace(*avals).lower(lowering_platforms=("cuda",)).as_text()  # type: ignore[attr-defined]
    return re.findall(r"custom_call @(\S+?)\(", text)


def planned(step: Any, args: Any, cluster: str = "h100x8", mesh: tuple[int, ...] = (8,)) -> mw.Plan:
    return mw.plan(step, *args, cluster=cluster, request=Request(attention="fused", mesh=mesh))


SHORT = {"dtype": jnp.bfloat16}
SHORT_ARGS = weights(**SHORT), normal(10, 8, T, D, **SHORT)


def looped(core: Callable[..., Array]) -> tuple[Any, Any]:
    """Layers in a loop, of which nothing is computed again."""

    def layer(x: Array, p: dict[str, Array]) -> tuple[Array, None]:
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
        return x + jnp.einsum("btnh,nhd->btd", core(q, k, v), p["o"]), None

    def loss(params: Any, x: Array) -> Array:
        return jax.lax.scan(layer, x, params)[0].astype(jnp.float32).mean()

    params = jax.tree.map(lambda w: jnp.stack([w] * 3), SHORT_ARGS[0])
    return jax.value_and_grad(loss), (params, SHORT_ARGS[1])


def test_cudnn_runs_attention_and_its_gradient_once_each(on_cuda: None):
    step = trained(attend(is_causal=True))
    plan = planned(step, SHORT_ARGS)
    calls = cuda_calls(plan, step, SHORT_ARGS)
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert any("run by cuDNN" in note for note in plan.notes)
    assert not any("no kernel" in note or "seven products" in note for note in plan.notes)


def test_a_loop_that_keeps_nothing_for_gradients_makes_seven_products(on_cuda: None):
    step, args = looped(attend(is_causal=True))
    plan = planned(step, args)
    calls = cuda_calls(plan, step, args)
    assert calls == ["__cudnn$fmhaSoftmax"] * 2 + ["__cudnn$fmhaSoftmaxBackward"]
    assert any("seven products for five" in note for note in plan.notes)
    (grad,) = (
        v.op
        for v in composed(capture(step, *args).graph, "fused").visits
        if v.op.kind == "attention_grad"
    )
    assert products_made(grad, "cuDNN") == 7 / 5 and products_made(grad, None) == 1


def biased(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, bias=jnp.ones((1, N, T, T), q.dtype))


def capped(q: Array, k: Array, v: Array) -> Array:
    s = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, 2))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.tanh(s)), jnp.repeat(v, N // K, 2))


@pytest.mark.parametrize(
    ("core", "args", "reason"),
    [
        (attend(), (weights(), normal(10, 8, T, D)), "f32, where cuDNN takes bf16 and f16"),
        (attend(), (weights(width=12, **SHORT), SHORT_ARGS[1]), "heads of 12 features"),
        (biased, SHORT_ARGS, "a bias"),
        (capped, SHORT_ARGS, "scores that `tanh` changes"),
    ],
)  # fmt: skip
def test_what_cudnn_cannot_do_runs_block_by_block_and_is_said(
    core: Any, args: Any, reason: str, on_cuda: None
):
    step = trained(core)
    plan = planned(step, args)
    assert any("no kernel runs the attention" in note and reason in note for note in plan.notes)
    assert not any("run by" in note for note in plan.notes)
    assert cuda_calls(plan, step, args) == []


def test_blocks_cost_what_they_write_and_read():
    """A cap takes attention off the kernel, not off the device."""
    q = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.bfloat16)

    def slow(q: Array, k: Array, v: Array) -> Array:
        weights = jax.nn.softmax(jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k)))
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    fused = Request(attention="fused")
    plans = [mw.plan(core, q, q, q, cluster="h100x1", request=fused) for core in (attend(), slow)]
    seconds = [plan.estimate.step_seconds for plan in plans]
    assert seconds[1] > 3 * seconds[0]


@needs_libtpu
def test_splash_attention_compiles_for_tpus():
    """For a slice that is not here."""
    cluster = Cluster.parse("v5e-8")
    step = trained(attend(is_causal=True))
    plan = mw.plan(
        step, *SHORT_ARGS, cluster=cluster, request=Request(attention="fused", mesh=(8,))
    )
    text = lower.lower(plan, capture(step, *SHORT_ARGS), topology_devices("v5e:2x4", cluster)).hlo()
    kernels = re.findall(r"splash_m\w+?_(fwd|dq|dkv)", text)
    assert {*kernels} == {"fwd", "dq", "dkv"}
    assert any("run by splash attention" in note for note in plan.notes)
