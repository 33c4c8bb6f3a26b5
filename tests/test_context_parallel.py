"""Attention whose sequence is cut over devices: it runs as planned, and as on one device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla import emit_composite
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.hlo import collectives
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.audit import compare
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import composed
from meshwright.ir.composites.bodies import FORWARD
from meshwright.ir.composites.evenly import is_uneven, pairs_kept, partners
from meshwright.ir.errors import LoweringError
from meshwright.ir.graph import Op
from meshwright.ir.ops import ATTENTION
from meshwright.ir.plan import Layout, Plan
from meshwright.ir.program import Program, prepare
from meshwright.ir.rules import rule_of
from meshwright.ir.rules.rule import NONE, cuttable
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import Space, build
from meshwright.planner.report.instructions import PlanDecisions
from meshwright.planner.report.of_plan import collectives_of
from meshwright.planner.request import Request, parse_mesh

B, T, N, K, H = 2, 32, 4, 2, 8  # batch, positions, heads, heads of keys, width of a head
Array = jax.Array


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def causal(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def full(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v)


def biased(q: Array, k: Array, v: Array) -> Array:
    i = jnp.arange(T)
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // k.shape[2], 2)) / 3
    scores = scores - 0.1 * jnp.abs(i[:, None] - i)
    weights = jax.nn.softmax(jnp.where(i[:, None] >= i, scores, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // v.shape[2], 2))


def documents(q: Array, k: Array, v: Array) -> Array:
    """Of 20 and 12 positions: halves go round in a ring of devices, not in pairs."""
    i = jnp.arange(T)
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // k.shape[2], 2))
    kept = (i[:, None] >= i) & ((i[:, None] < 20) == (i < 20))
    weights = jax.nn.softmax(jnp.where(kept, scores, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // v.shape[2], 2))


def windowed(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(8, 0))


MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda r, c: r >= c,
    "to the end": lambda r, c: r <= c,
    "prefix": lambda r, c: (r >= c) | (c < 24),
    "window": lambda r, c: abs(r - c) < 8,
}
FORMS: dict[str, Callable[..., Array]] = {
    "causal": causal, "documents": documents, "full": full, "biased": biased, "windowed": windowed,
    "made again": jax.checkpoint(causal),  # type: ignore[reportPrivateImportUsage]
}  # fmt: skip


def trained(attend: Callable[..., Array]) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2))


def inputs(keys: int = T, heads: int = K) -> tuple[Array, ...]:
    return normal(0, B, T, N, H), normal(1, B, keys, heads, H), normal(2, B, keys, heads, H)


def close(have: Any, want: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


Codes = Callable[[Op, Program], tuple[int, ...]]


def everywhere(code: Callable[[Op, Program], int], mesh: str) -> Codes:
    """On all axes of a mesh."""
    return lambda op, program: (code(op, program),) * (mesh.count("x") + 1)


def rows(op: Op, program: Program) -> int:
    """The factor of queries: of all that are as long as the sequence, those of q."""
    rule = rule_of(op, program.graph.types)
    return next(f for f, factor in enumerate(rule.factors) if factor.size == T)


def sized(op: Op, program: Program, size: int) -> int:
    """The factor of this size that may be cut, if there is one."""
    rule = rule_of(op, program.graph.types)
    return next((f for f in cuttable(rule) if rule.factors[f].size == size), NONE)


def even(op: Op, program: Program) -> int:
    return len(rule_of(op, program.graph.types).factors)


def pinned(
    step: Any, args: Any, mesh: str, codes: Codes, around: bool = False, **request: Any
) -> Plan:
    """A plan whose attention is cut as told, and all `around` it along the sequence; what it moves is priced anew."""
    plan = mw.plan(
        step, *args, cluster=f"{prod(map(int, mesh.split('x'))) * request.get('pp', 1)}xcpu",
        request=Request(**{"attention": "fused", "mesh": parse_mesh(mesh), **request}),
    )  # fmt: skip
    program = prepare(
        fold(composed(capture(step, *args).graph, plan.attention, Cluster.parse("1xcpu"))).small,
        plan.recompute,
    )
    ops = {v.op.tag: v.op for v in program.graph.visits if v.op.kind in ATTENTION}
    told = {tag: codes(op, program) for tag, op in ops.items()}
    assert {*told} <= {*plan.strategies}
    if around:
        plan, many = along_the_sequence(plan), len(plan.mesh.axes)
        told = {v.op.tag: (sized(v.op, program, T),) * many for v in program.graph.visits} | told
        told = {tag: told[tag] for tag in plan.strategies}
    plan = plan.model_copy(update={"strategies": {**plan.strategies, **told}})
    if plan.pipeline:
        stages = tuple(
            stage.model_copy(update={"strategies": {**stage.strategies, **told}})
            if stage.strategies
            else stage
            for stage in plan.pipeline.stages
        )
        return plan.model_copy(
            update={"pipeline": plan.pipeline.model_copy(update={"stages": stages})}
        )
    moved = collectives_of(plan, priced(plan, program), Roofline(plan.cluster))
    return plan.model_copy(update={"collectives": tuple(moved)})


def along_the_sequence(plan: Plan) -> Plan:
    """Inputs cut so."""
    layout = Layout(dims=((), plan.mesh.names, (), ()))
    return plan.model_copy(update={"slots": dict.fromkeys(plan.slots, layout)})


def priced(plan: Plan, program: Program) -> Space:
    cost = Roofline(plan.cluster)
    layouts = Layouts(cost.collectives(plan.mesh))
    return build(program, plan.microbatches, cost, layouts, PlanDecisions(plan))


@pytest.mark.parametrize(
    ("name", "mesh", "code"),
    [
        ("documents", "8", even), ("causal", "2x4", even), ("causal", "4", rows), ("biased", "2x4", even),
        ("made again", "4", even), ("windowed", "8", rows), ("full", "8", rows),
    ],
)  # fmt: skip
def test_rows_cut_over_devices_equal_one_device(
    name: str, mesh: str, code: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(emit_composite, "BLOCK", 512)
    monkeypatch.setattr(emit_composite, "CHOICES", 4)
    step, args = trained(FORMS[name]), inputs()
    plan = pinned(step, args, mesh, everywhere(code, mesh))
    assert any(c.kind == "permute" for c in plan.collectives) == (code is even)
    close(mw.lower(plan, step, *args)(*args), jax.jit(step)(*args))


def halves_of(mask: Callable[..., Any], ways: int) -> tuple[tuple[tuple[int, int], ...], Any]:
    """Spans of keys by row under a mask, and pairs kept in each half of the rows of so many devices."""
    kept = mask(np.arange(96)[:, None], np.arange(96)[None])
    spans = tuple((int(row.argmax()), 96 - int(row[::-1].argmax())) for row in kept)
    return spans, np.array([end - first for first, end in spans]).reshape(ways, 2, -1).sum(axis=2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("ways", [2, 4, 6])
def test_no_exchange_of_halves_leaves_the_busiest_device_less(name: str, ways: int):
    spans, pairs = halves_of(MASKS[name], ways)
    first, second = pairs.T
    best = min((first + second[list(order)]).max() for order in permutations(range(ways)))
    assert (first + second[list(partners(spans, 96, ways))]).max() == best
    op = Op(FORWARD, (), (), (("blocks", 96), ("spans", spans)))
    assert pairs_kept(op, ways, even=True) == pytest.approx(best * ways / 96**2)
    assert pairs_kept(op, ways) == pytest.approx(pairs.sum(axis=1).max() * ways / 96**2)
    assert is_uneven(dict(op.attrs)) == (name != "window")


@pytest.mark.parametrize("ways", [2, 3, 8])
def test_all_devices_have_the_same_work_under_a_causal_mask(ways: int):
    spans, pairs = halves_of(MASKS["causal"], ways)
    work = pairs[:, 0] + pairs[list(partners(spans, 96, ways)), 1]
    assert {*work} == {96 * 97 // 2 // ways}


def layered(many: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step of layers, and what it takes."""

    def loss(params: Any, x: Array) -> Array:
        x = jnp.tanh(x @ params["first"])
        for w in params["layers"]:
            x = x + jnp.einsum("btnh,hk->btnk", causal(x @ w[0], x @ w[1], x @ w[2]), w[3])
        return ((x @ params["last"]) ** 2).mean()

    def step(params: Any, x: Array) -> tuple[Any, Array]:
        value, found = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda w, g: w - g, params, found), value

    ends = {"first": normal(8, H, H), "last": normal(7, H, H)}
    layers = [normal(seed, 4, H, H) / 3 for seed in range(many)]
    return step, ({**ends, "layers": layers}, normal(9, 4, T, N, H))


@pytest.mark.parametrize(
    "request_",
    [
        {"microbatches": 2},
        {"recompute": "full"},
        {"pp": 2, "microbatches": 2, "program": "stages"},
    ],
    ids=str,
)
def test_rows_dealt_out_evenly_in_layers(request_: dict[str, Any]):
    step, args = layered(2 if "pp" in request_ else 1)
    plan = pinned(step, args, "4", everywhere(even, "4"), **request_)
    close(mw.lower(plan, step, *args)(*args), jax.jit(step)(*args))


def test_one_program_for_all_stages_exchanges_no_rows():
    """XLA's CPU backend mixes up permutes of which the devices of one stage skip a turn."""
    step, args = layered(4)
    request = {"pp": 2, "microbatches": 2, "program": "single"}
    plan = pinned(step, args, "4", everywhere(even, "4"), **request)
    with pytest.raises(LoweringError, match="exchange rows of attention"):
        mw.lower(plan, step, *args)
    plan = pinned(step, args, "4", everywhere(rows, "4"), **request)
    close(mw.lower(plan, step, *args)(*args), jax.jit(step)(*args))
    cost = Roofline(plan.cluster, exchanges=False)
    program = prepare(
        fold(composed(capture(step, *args).graph, "fused", Cluster.parse("1xcpu"))).small,
        plan.recompute,
    )
    space = build(program, 2, cost, Layouts(cost.collectives(plan.mesh)))
    for tag, own in space.own.items():
        rule = next(d.rule for d in space.frame.outline.decides if d.op.tag == tag)
        dealt = [any(map(rule.joint, s.axes)) for s in space.strategies[tag]]
        assert np.array_equal(np.isinf(own), dealt)


def test_rows_dealt_out_evenly_in_a_loop_of_layers_computed_again():
    def loss(w: Array, x: Array) -> Array:
        def layer(x: Array, w: Array) -> tuple[Array, None]:
            q, k, v = jnp.split(jnp.einsum("btnh,hk->btnk", x, w), 3, -1)
            return x + causal(q, k, v), None

        again = jax.checkpoint(layer)  # type: ignore[reportPrivateImportUsage]
        return (jax.lax.scan(again, x, w)[0] ** 2).mean()

    step, args = jax.value_and_grad(loss), (normal(1, 3, H, 3 * H) / 3, normal(9, B, T, N, H))
    plan = pinned(step, args, "2x4", everywhere(even, "2x4"))
    lowered = mw.lower(plan, step, *args)
    close(lowered(*args), jax.jit(step)(*args))
    lines = compare(plan, collectives(lowered.hlo(), plan.mesh))
    exchanges = [line for line in lines if line.kind == "permute"]
    assert exchanges and all(x.compiled_bytes == x.predicted_bytes for x in exchanges)


def test_short_floats_are_as_near_to_float64_as_on_one_device():
    step, args = trained(causal), inputs()
    short = [a.astype(jnp.bfloat16) for a in args]
    plan = pinned(step, short, "8", everywhere(even, "8"))
    have = mw.lower(plan, step, *short)(*short)
    with jax.enable_x64(True):
        want = jax.jit(step)(*(jnp.asarray(np.asarray(a, np.float64)) for a in short))
        assert want[0].dtype == jnp.float64
    for a, b, one in zip(*map(jax.tree.leaves, (have, want, jax.jit(step)(*short))), strict=True):
        far, near = (np.abs(np.asarray(x, np.float64) - b).max() for x in (a, one))
        assert far <= 2 * near + 1e-2 * np.abs(b).max()


def test_rows_are_exchanged_where_that_costs_less_than_it_saves():
    """One sequence, one head: long ones are dealt out evenly, short ones are not."""
    found = {}
    for many in (256, 1 << 17):
        q = jax.ShapeDtypeStruct((1, many, 1, 128), jnp.bfloat16)
        plan = mw.plan(
            trained(causal), q, q, q, cluster="h100x8",
            request=Request(attention="fused", mesh=(8,)),
        )  # fmt: skip
        found[many] = [c for c in plan.collectives if c.kind == "permute"]
    assert found[256] == []
    # q, o, log of the sum; for the gradient of q also what comes in and, again, these three
    assert sum(c.count for c in found[1 << 17]) == 8


@pytest.mark.parametrize(
    ("mesh", "of_keys"), [("8", 8), ("4", 4), ("2x4", 2)], ids=["own keys", "groups", "few keys"]
)
def test_the_sequence_is_cut_outside_and_heads_inside_by_one_exchange(mesh: str, of_keys: int):
    """Where there are fewer heads of keys than devices, these are gathered over the axis that cuts their groups."""
    step = trained(causal)
    q, k, v = (normal(seed, 1, T, n, H) for seed, n in enumerate((8, of_keys, of_keys)))
    sizes = tuple(map(int, mesh.split("x")))
    plan = pinned(
        step,
        (q, k, v),
        mesh,
        lambda op, program: tuple(sized(op, program, n) for n in sizes),
        around=True,
    )
    lowered = mw.lower(plan, step, q, k, v)
    close(lowered(q, k, v), jax.jit(step)(q, k, v))
    lines = compare(plan, collectives(lowered.hlo(), plan.mesh))
    lines = [line for line in lines if line.kind != "all_reduce"]  # of the loss
    gathered = {line.axes for line in lines if line.kind in ("all_gather", "reduce_scatter")}
    assert gathered == ({("y",)} if of_keys < prod(sizes) else set())
    swapped = [line for line in lines if line.kind == "all_to_all"]
    assert sum(line.predicted_count for line in swapped if line.axes[0] == "x") == 11
    assert all(line.compiled_count for line in swapped)  # XLA finds the forward pass's three again
    assert {line.kind for line in lines} <= {"all_to_all", "all_gather", "reduce_scatter"}


def test_no_device_holds_the_scores_of_its_rows():
    """Four devices of 512 rows by 2048 keys and 8 heads: 32 MiB of scores each, a few times in the plain program."""
    q = jax.ShapeDtypeStruct((1, 2048, 8, 8), jnp.float32)
    step = trained(causal)
    plan = pinned(step, (q, q, q), "4", everywhere(even, "4"))
    assert mw.lower(plan, step, q, q, q).audit().parts["temporaries"] < 16 << 20
