"""Attention as one op: what becomes of the graph, and that it runs as the plain step does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla import emit_composite, spmd
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.replay import replay
from meshwright.ir.analysis.attention import attentions
from meshwright.ir.composites.attention_op import with_attention
from meshwright.ir.composites.bodies import BACKWARD, FORWARD
from meshwright.ir.errors import PlanError
from meshwright.ir.graph import Graph, Op
from meshwright.ir.ops import ATTENTION
from meshwright.ir.rules import rule_of
from meshwright.ir.text import parse, show
from meshwright.ir.verify import verify
from meshwright.planner.request import Request

B, T, S, D, N, K, H = (
    4,
    16,
    24,
    32,
    4,
    2,
    8,
)  # batch, queries, keys, width, heads, heads of keys, width of a head
Array = jax.Array
Params = dict[str, Array]


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.2, jnp.float32)


def weights(kv: int = N, **more: Array) -> Params:
    sizes = {"q": (D, N, H), "k": (D, kv, H), "v": (D, kv, H), "o": (N, H, D)}
    return {**{name: normal(i, *shape) for i, (name, shape) in enumerate(sizes.items())}, **more}


def projected(params: Params, x: Array, y: Array) -> list[Array]:
    return [
        jnp.einsum("btd,dnh->btnh", a, params[n]) for n, a in zip("qkv", (x, y, y), strict=True)
    ]


def causal_grouped(params: Params, x: Array) -> Array:
    q, k, v = projected(params, x, x)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return x + jnp.einsum("btnh,nhd->btd", mixed, params["o"])


def divided_late(params: Params, x: Array) -> Array:
    """Weights are divided by their sum after the product with values: the sum is read outside."""
    q, k, v = projected(params, x, x)
    p = jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k))
    mixed = jnp.einsum("bnts,bsnh->btnh", p, v) / p.sum(-1).swapaxes(1, 2)[..., None]
    return x + jnp.einsum("btnh,nhd->btd", mixed, params["o"])


def crossed(params: Params, x: Array, y: Array) -> Array:
    q, k, v = projected(params, x, y)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / H**0.5
    return x + jnp.einsum("bnts,bsnh,nhd->btd", jax.nn.softmax(scores), v, params["o"])


def biased_and_dropped(params: Params, x: Array, key: Array) -> Array:
    q, k, v = projected(params, x, x)
    p = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) + params["b"])
    p = jnp.where(jax.random.bernoulli(key, 0.8, p.shape), p / 0.8, 0)
    return x + jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", p, v), params["o"])


def trained(loss: Callable[..., Array]) -> Callable[..., Any]:
    """One step of gradient descent, so that gradients show."""

    def step(params: Params, *batch: Array) -> tuple[Params, Array]:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda w, g: w - g, params, gradients), value

    return step


def squared(layer: Callable[..., Array]) -> Callable[..., Array]:
    return lambda params, *batch: (layer(params, *batch) ** 2).mean()


def layers(params: Params, x: Array) -> Array:
    return (jax.lax.scan(lambda x, p: (causal_grouped(p, x), None), x, params)[0] ** 2).mean()


def four_layers(params: Any, x: Array) -> Array:
    x = jnp.tanh(x @ params["first"])
    for layer in params["layers"]:
        x = causal_grouped(layer, x)
    return ((x @ params["last"]) ** 2).mean()


def again(params: Params, x: Array) -> Array:
    one = jax.checkpoint(causal_grouped)  # type: ignore[reportPrivateImportUsage]
    return (jax.lax.scan(lambda x, p: (one(p, x), None), x, params)[0] ** 2).mean()


def masked(params: Params, x: Array, y: Array, mask: Array) -> Array:
    q, k, v = projected(params, x, y)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) + jnp.where(mask, 0.0, -1e9)
    return x + jnp.einsum("bnts,bsnh,nhd->btd", jax.nn.softmax(scores), v, params["o"])


def padded(params: Params, x: Array, length: Array) -> Array:
    """The same mask in every layer, made of an input."""
    mask = (jnp.arange(T) < length[:, None])[:, None, None]
    return (jax.lax.scan(lambda x, p: (masked(p, x, x, mask), None), x, params)[0] ** 2).mean()


def windows(params: Params, x: Array, wide: Array) -> Array:
    """A mask of its own in every layer, which the backward pass is not handed; two loops, one in the other."""

    def layer(x: Array, rows: Any) -> tuple[Array, None]:
        layer, flag = rows
        apart = jnp.arange(T)[:, None] - jnp.arange(T)
        return masked(layer, x, x, (apart >= 0) & (flag | (apart < 3))), None

    rows = jax.tree.map(lambda w: w.reshape(2, -1, *w.shape[1:]), (params, jnp.arange(4) >= wide))
    return (jax.lax.scan(lambda x, two: jax.lax.scan(layer, x, two), x, rows)[0] ** 2).mean()


def stacked(params: Params) -> Params:
    return jax.tree.map(lambda w: jnp.stack([w, 0.5 * w, -w]), params)


X = normal(10, B, T, D)
STEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "grouped, causal": (trained(squared(causal_grouped)), (weights(K), X)),
    "crossed": (trained(squared(crossed)), (weights(), X, normal(11, B, S, D))),
    "bias, dropout": (
        trained(squared(biased_and_dropped)),
        (weights(b=normal(12, N, T, T)), X, jax.random.key(3)),
    ),
    "layers in a loop": (trained(layers), (stacked(weights(K)), X)),
    "padded, in a loop": (trained(padded), (stacked(weights()), X, jnp.arange(B) + 9)),
    "windows, in loops": (
        trained(windows),
        (jax.tree.map(lambda w: jnp.stack([w, -w, w, w]), weights()), X, jnp.asarray(2)),
    ),
    "computed again": (trained(again), (stacked(weights(K)), X)),
}


def fused(name: str) -> Graph:
    step, args = STEPS[name]
    return with_attention(capture(step, *args).graph)


def close(have: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", STEPS)
def test_nothing_as_large_as_the_scores_is_left(name: str):
    graph = fused(name)
    sizes = (T, S) if name == "crossed" else (T, T)
    large = [
        str(kind)
        for visit in graph.visits
        for v in visit.op.outputs
        if (kind := graph.types[v]).size >= B * N * T * sizes[1]
        and all(kind.shape.count(size) >= sizes.count(size) for size in sizes)
    ]
    assert large == []
    assert {visit.op.kind for visit in graph.visits} >= ATTENTION
    assert parse(show(graph)) == graph


@pytest.mark.parametrize("name", STEPS)
def test_a_composite_is_what_it_stands_for(name: str):
    step, args = STEPS[name]
    captured = capture(step, *args)
    again = replace(captured, graph=with_attention(captured.graph))
    close(replay(again)(*args), jax.jit(step)(*args))


def test_closings_far_apart_are_results_of_one_op():
    step, args = STEPS["crossed"]
    graph = capture(step, *args).graph
    first = next(iter(attentions(graph)[0].closings))
    at = next(i for i, op in enumerate(graph.ops) if first in op.outputs) + 1
    new, source = max(graph.types) + 1, graph.inputs[0]
    between = tuple(Op("neg", (source,), (new + k,)) for k in range(100))
    types = {**graph.types, **{op.outputs[0]: graph.types[source] for op in between}}
    for split in range(
        at, len(graph.ops)
    ):  # after every op that follows, between any two closings too
        ops = (*graph.ops[:split], *between, *graph.ops[split:])
        found = with_attention(replace(graph, types=types, ops=ops))
        verify(found)
        assert [op.kind for op in found.ops if op.kind in ATTENTION] == [FORWARD, BACKWARD]


def test_queries_heads_and_batch_are_free_and_keys_are_whole():
    graph = fused("crossed")
    ops = {visit.op.kind: visit.op for visit in graph.visits if visit.op.kind in ATTENTION}
    forward, backward = (rule_of(ops[kind], graph.types) for kind in (FORWARD, BACKWARD))
    assert sorted((f.size, f.kind) for f in forward.factors if f.divisible) == [
        (B, "parallel"), (N, "parallel"), (T, "parallel"),
    ]  # fmt: skip
    assert sorted((f.size, f.kind) for f in backward.factors if f.divisible) == [
        (B, "parallel"), (N, "parallel"), (T, "reduced"),
    ]  # fmt: skip
    assert backward.linear == ((0,),)  # in the gradient of the result


@pytest.mark.parametrize("mesh", ["2x4", "8"])
@pytest.mark.parametrize("name", STEPS)
def test_fused_steps_equal_plain_jax_on_eight_devices(
    name: str, mesh: str, monkeypatch: pytest.MonkeyPatch
):
    """In blocks so small that every free dim is cut."""
    monkeypatch.setattr(emit_composite, "BLOCK", 128)
    step, args = STEPS[name]
    ours = mw.parallelize(step, cluster="8xcpu", mesh=mesh, attention="fused")
    close(ours(*args), jax.jit(step)(*args))
    plan = ours.plan(*args)
    assert plan.attention == "fused" and any(
        "scores are never whole" in note for note in plan.notes
    )


@pytest.mark.parametrize(
    "request_", [{"microbatches": 2}, {"recompute": "full"}, {"recompute": "selective"}]
)
def test_fused_steps_with_microbatches_and_recomputation(request_: dict[str, Any]):
    step, args = STEPS["layers in a loop"]
    ours = mw.parallelize(step, cluster="8xcpu", mesh="2x4", attention="fused", **request_)
    close(ours(*args), jax.jit(step)(*args))


@pytest.mark.parametrize(
    "request_",
    [
        {"microbatches": 2, "program": "single"},
        {"microbatches": 4, "program": "stages", "schedule": "zb-h1"},
        {"microbatches": 2, "program": "stages", "recompute": "full"},
    ],
    ids=str,
)
def test_fused_steps_in_stages(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    kinds = set()
    run = spmd.run_composite

    def noted(op: Op, *more: Any) -> Any:
        kinds.add(op.kind)
        return run(op, *more)

    monkeypatch.setattr(spmd, "run_composite", noted)
    params = {"first": normal(20, D, D), "last": normal(21, D, D)}
    step, args = trained(four_layers), ({**params, "layers": [weights(K)] * 4}, X)
    ours = mw.parallelize(step, cluster="4xcpu", pp=2, attention="fused", **request_)
    close(ours(*args), jax.jit(step)(*args))
    plan = ours.plan(*args)
    assert plan.attention == "fused" and plan.pipeline is not None and kinds == ATTENTION
    assert any("scores are never whole" in note for note in plan.notes)


def test_a_compiled_program_holds_no_scores():
    """Sixteen heads of 1024 by 1024: 64 MiB of scores, twice and more in the plain program."""
    q = jax.ShapeDtypeStruct((1, 1024, 16, 8), jnp.float32)

    def step(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        return jax.grad(lambda *qkv: (jax.nn.dot_product_attention(*qkv) ** 2).sum(), (0, 1, 2))(
            q, k, v
        )

    taken = {}
    for kind in ("plain", "fused"):
        plan = mw.plan(step, q, q, q, cluster="1xcpu", request=Request(attention=kind))  # type: ignore[arg-type]
        lowered = mw.lower(plan, step, q, q, q)
        taken[kind] = lowered.audit().parts["temporaries"]
    assert taken["plain"] > 120 << 20
    assert taken["fused"] < 40 << 20


def test_a_plan_in_a_file_runs_fused_again(tmp_path):
    step, args = STEPS["crossed"]
    plan = mw.plan(step, *args, cluster="8xcpu", request=Request(attention="fused"))
    mw.save_plan(plan, tmp_path / "a.plan.json")
    read = mw.load_plan(tmp_path / "a.plan.json")
    assert read.attention == "fused" and read.graph == plan.graph
    close(mw.lower(read, step, *args)(*args), jax.jit(step)(*args))


def test_what_cannot_be_fused_is_said():
    step = trained(lambda params, x: ((x @ params["a"]) ** 2).mean())
    plan = mw.plan(
        step, {"a": normal(1, D, D)}, X, cluster="8xcpu", request=Request(attention="fused")
    )
    assert any("no attention was found" in note for note in plan.notes)
    late = mw.plan(
        trained(squared(divided_late)),
        weights(),
        X,
        cluster="8xcpu",
        request=Request(attention="fused"),
    )
    told = [note for note in late.notes if "attention" in note]
    assert len(told) == 1
    assert "stays plain: `reduce_sum` reads what is as large as its scores" in told[0]
    with pytest.raises(PlanError, match="attention cannot be 'flash'"):
        Request(attention="flash")  # type: ignore[arg-type]
