"""Keys that go round a ring of devices: attention runs as planned, and as on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import pricing
from meshwright.backends.xla import emit_composite, emit_ring
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.hlo import collectives
from meshwright.ir.audit import compare
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import AttentionKind, composed
from meshwright.ir.composites.bodies import BACKWARD, FORWARD
from meshwright.ir.composites.ring import given, passes, ring_of, travels
from meshwright.ir.errors import PlanError
from meshwright.ir.graph import Op
from meshwright.ir.ops import ATTENTION
from meshwright.ir.plan import Plan
from meshwright.ir.program import Program
from meshwright.ir.rules import rule_of
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.request import Request

from .test_context_parallel import (
    FORMS,
    MASKS,
    Array,
    B,
    H,
    K,
    N,
    T,
    causal,
    close,
    everywhere,
    full,
    halves_of,
    inputs,
    layered,
    normal,
    pinned,
    trained,
)
from .test_truth import folded


def ring(op: Op, program: Program) -> int:
    """The code of an axis that keys go round."""
    rule = rule_of(op, program.graph.types)
    codes = enumerate(rule.joints, len(rule.factors))
    return next(code for code, joint in codes if joint.how == "ring")


def without_maximum(q: Array, k: Array, v: Array) -> Array:
    scores = jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // k.shape[2], 2)) / 9)
    weights = scores / scores.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // v.shape[2], 2))


def dropped(q: Array, k: Array, v: Array) -> Array:
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // k.shape[2], 2))
    weights = jax.nn.softmax(scores)
    kept = jax.random.bernoulli(jax.random.key(0), 0.7, weights.shape)
    weights = jnp.where(kept, weights / 0.7, 0)
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // v.shape[2], 2))


def masked_out(q: Array, k: Array, v: Array) -> Array:
    """By -inf, as data says: the blocks of keys that a query sees nothing of have no finite maximum."""
    kept = (jnp.arange(T) < 20) | (k[:, :, 0, 0] > 1e9)
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // k.shape[2], 2))
    weights = jax.nn.softmax(jnp.where(kept[:, None, None], scores, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // v.shape[2], 2))


RINGS: dict[str, Callable[..., Array]] = {
    **FORMS, "no maximum": without_maximum, "dropped": dropped, "masked out": masked_out
}  # fmt: skip


def check(plan: Plan, step: Any, args: Any) -> None:
    """It runs as on one device, and what goes round is what was planned."""
    lowered = mw.lower(plan, step, *args)
    close(lowered(*args), jax.jit(step)(*args))
    lines = compare(plan, collectives(lowered.hlo(), plan.mesh))
    (line,) = [line for line in lines if line.kind == "permute"]
    assert line.compiled_count == line.predicted_count > 0
    assert line.compiled_bytes == line.predicted_bytes


QUICK = [
    ("full", "2", "fused"),
    ("causal", "2x4", "ring"),
    ("documents", "8", "ring"),
    ("masked out", "4", "fused"),
]
MORE = [
    ("full", "8", "ring"), ("causal", "4", "fused"), ("biased", "4", "ring"), ("made again", "4", "ring"),
    ("windowed", "8", "ring"), ("no maximum", "4", "ring"), ("dropped", "4", "ring"), ("masked out", "4", "ring"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mesh", "attention"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)],
)
def test_a_ring_equals_one_device(
    name: str, mesh: str, attention: AttentionKind, monkeypatch: pytest.MonkeyPatch
):
    """Under "ring" sums of the forward pass are kept for the backward pass, else they are worked out again."""
    monkeypatch.setattr(emit_composite, "BLOCK", 512)
    monkeypatch.setattr(emit_ring, "UNROLLED", 2)
    step, args = trained(RINGS[name]), inputs()
    check(pinned(step, args, mesh, everywhere(ring, mesh), attention=attention), step, args)


@pytest.mark.parametrize("name", [name for name in RINGS if name != "made again"])
def test_keys_go_round_once_where_sums_are_kept(name: str):
    """Where attention alone is computed again, no forward attention is beside its gradients."""
    step, args = trained(RINGS[name]), inputs()
    found = {}
    for kind in ("fused", "ring"):
        graph = composed(capture(step, *args).graph, kind, Cluster.parse("1xcpu"))
        (back,) = [visit.op for visit in graph.visits if visit.op.kind == BACKWARD]
        found[kind] = passes(back), given(back)
    assert found == {"fused": (2, 0), "ring": (1, 1 if name == "no maximum" else 2)}


def test_other_weights_than_the_gradients_have_are_not_kept():
    """Both attentions have the same values, but not the same scores."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        return full(q, k, v) + full(2 * q, k, v)

    step, args = trained(attend), inputs()
    graph = composed(capture(step, *args).graph, "ring")
    ops = [visit.op for visit in graph.visits if visit.op.kind in ATTENTION]
    kept = {op.outputs[1:]: op.inputs for op in ops if op.kind == FORWARD}
    backs = [op for op in ops if op.kind == BACKWARD]
    assert len(kept) == len(backs) == 2
    assert {op.inputs[-3:-1] for op in backs} == {*kept}
    for op in backs:
        assert {*kept[op.inputs[-3:-1]]} <= {*op.inputs}


@pytest.mark.slow
def test_a_trained_bias_has_the_gradient_of_its_own_rows():
    """Of rows by all keys: cut along the rows, whole along the keys."""

    def attend(q: Array, k: Array, v: Array, bias: Array) -> Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) + bias
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    step = jax.value_and_grad(lambda *args: (attend(*args) ** 2).sum(), (0, 1, 2, 3))
    args = (*inputs(heads=N), normal(3, 1, N, T, T))
    check(pinned(step, args, "4", everywhere(ring, "4")), step, args)


def test_keys_of_another_sequence_go_round():
    step, args = trained(full), inputs(keys=3 * T)
    check(pinned(step, args, "4", everywhere(ring, "4")), step, args)


def test_heads_are_cut_beside_a_ring():
    step, args = trained(causal), inputs()

    def codes(op: Op, program: Program) -> tuple[int, int]:
        heads = rule_of(op, program.graph.types).factors
        return next(f for f, factor in enumerate(heads) if factor.size == K), ring(op, program)

    plan = pinned(step, args, "2x4", codes)
    check(plan, step, args)
    assert {c.axes for c in plan.collectives if c.kind == "permute"} == {("y",)}


@pytest.mark.parametrize(
    "request_",
    [
        {"microbatches": 2, "recompute": "full"},
        pytest.param({"pp": 2, "microbatches": 2, "program": "stages"}, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_rings_in_layers(request_: dict[str, Any]):
    step, args = layered(2 if "pp" in request_ else 1)
    plan = pinned(step, args, "4", everywhere(ring, "4"), attention="ring", **request_)
    close(mw.lower(plan, step, *args)(*args), jax.jit(step)(*args))


def test_rings_in_a_loop_of_layers_computed_again():
    def loss(w: Array, x: Array) -> Array:
        def layer(x: Array, w: Array) -> tuple[Array, None]:
            q, k, v = jnp.split(jnp.einsum("btnh,hk->btnk", x, w), 3, -1)
            return x + causal(q, k, v), None

        again = jax.checkpoint(layer)  # type: ignore[reportPrivateImportUsage]
        return (jax.lax.scan(again, x, w)[0] ** 2).mean()

    step, args = jax.value_and_grad(loss), (normal(1, 3, H, 3 * H) / 3, normal(9, B, T, N, H))
    plan = pinned(step, args, "2x4", everywhere(ring, "2x4"), attention="ring")
    check(plan, step, args)


def test_short_floats_are_as_near_to_float64_as_on_one_device():
    step, args = trained(causal), inputs()
    short = [a.astype(jnp.bfloat16) for a in args]
    plan = pinned(step, short, "8", everywhere(ring, "8"), attention="ring")
    have = mw.lower(plan, step, *short)(*short)
    with jax.enable_x64(True):
        want = jax.jit(step)(*(jnp.asarray(np.asarray(a, np.float64)) for a in short))
        assert want[0].dtype == jnp.float64
    for a, b, one in zip(*map(jax.tree.leaves, (have, want, jax.jit(step)(*short))), strict=True):
        far, near = (np.abs(np.asarray(x, np.float64) - b).max() for x in (a, one))
        assert far <= 2 * near + 1e-2 * np.abs(b).max()


def test_no_device_holds_all_keys_or_the_scores_of_its_rows():
    """Of 4096 keys and 8 heads a device has 1 MiB; whole they are 8, with values and both gradients 32."""
    q = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    step = trained(causal)
    codes = everywhere(ring, "8")
    plan = pinned(step, (q, q, q), "8", codes, around=True, attention="ring")
    assert mw.lower(plan, step, q, q, q).audit().parts["temporaries"] < 24 << 20


def op_of(name: str, ways: int) -> Op:
    """Attention of the form of a mask, over 96 rows and keys."""
    spans, _ = halves_of(MASKS[name], ways)
    attrs = {"blocks": 96, "spans": spans, "ring": 0, "rows": 0, "sizes": (96,), "keys": 96}
    return Op(FORWARD, (), (), tuple(sorted(attrs.items())))


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_under_a_causal_mask_every_step_after_the_first_is_as_long(ways: int):
    found = ring_of(op_of("causal", ways), ways)
    first, *others = found.work
    assert len(others) == ways - 1
    assert others == pytest.approx([0.5 / ways**2] * len(others), rel=1e-9)
    assert first == pytest.approx(0.5 / ways**2 + 0.5 / 96 / ways, rel=1e-9)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("ways", [2, 4, 6])
def test_all_pairs_that_a_mask_keeps_meet(name: str, ways: int):
    """Each in one step, on the device that has the row."""
    found = ring_of(op_of(name, ways), ways)
    kept = MASKS[name](np.arange(96)[:, None], np.arange(96)[None])
    width = 96 // ways // found.pieces
    partners = found.partners or range(ways)
    numbers = [[2 * i, 2 * partners[i] + 1] if found.partners else [i] for i in range(ways)]
    met = np.zeros((96, 96), int)
    for device in range(ways):
        for step in range(found.steps):
            for row in numbers[device]:
                for key in numbers[(device - step) % ways]:
                    rows, keys = (slice(n * width, (n + 1) * width) for n in (row, key))
                    met[rows, keys] += found.meets[row][key]
    assert (met <= 1).all() and (met[kept] == 1).all()


def test_a_window_ends_a_ring_early():
    """Keys as far back as the rows of a device are long come from the one before it."""
    step, args = trained(FORMS["windowed"]), inputs()
    graph = composed(capture(step, *args).graph, "ring")
    ops = [visit.op for visit in graph.visits if visit.op.kind in ATTENTION]
    assert {ring_of(op, 4).steps for op in ops} == {2}
    assert {sent.hops for op in ops for sent in travels(op, 4)} <= {1, 2}


def test_a_search_lets_keys_go_round_where_that_is_asked_for():
    """One head of one sequence: only the sequence can be cut. Gathered keys would wait for their gradients' sum."""
    q, step = jax.ShapeDtypeStruct((1, 1 << 17, 1, 128), jnp.bfloat16), trained(causal)

    def planned(**request: Any) -> Plan:
        return mw.plan(step, q, q, q, cluster="h100x8", request=Request(mesh=(8,), **request))

    plan, waits = planned(attention="ring", overlap="all"), planned(attention="ring")
    for one in (plan, waits):
        hops = [c for c in one.collectives if c.kind == "permute"]
        assert sum(c.count for c in hops if c.nbytes == 8 << 20) == 2 * 8  # gradients, in 32 bits
        assert sum(c.count for c in hops if c.nbytes == 4 << 20) >= 4 * 7
    whole = planned(attention="fused", overlap="all")
    assert plan.estimate.step_seconds < whole.proof.lower_bound
    assert plan.estimate.step_seconds < waits.proof.lower_bound


@pytest.mark.parametrize("overlap", ["", "parameters,gradients,tensor"])
def test_a_ring_costs_the_same_as_a_plan_and_as_a_job(overlap: str):
    layout = Parallelism(cp=8, zero=3, cp_kind="p2p")
    plan = fixed_plan(
        folded("llama3-8b", 1, 65536, "ring", layers=8), Cluster.parse("h100x8"), layout, recompute="full",
        attention="ring", overlap=overlap or (), name="llama3-8b", fingerprint="",
    )  # fmt: skip
    beside = frozenset(pricing.overlaps(overlap)) if overlap else frozenset[str]()
    setting = pricing.Setting("blocks", reduce_in_fp32=False, redone_inside=False, overlap=beside)
    price = pricing.price_job(
        pricing.shape_of("llama3-8b", 65536, 8), layout, Cluster.parse("h100x8"), global_batch=1, microbatch=1,
        setting=setting,
    )  # fmt: skip
    assert price.step == pytest.approx(plan.estimate.step_seconds, rel=0.05)


def test_a_layout_whose_keys_cannot_go_round_is_refused():
    with pytest.raises(PlanError, match="cannot go round 16 devices"):
        fixed_plan(
            folded("llama-tiny", 1, 24, "ring"), Cluster.parse("2xh100x8@ib400"), Parallelism(cp=16, cp_kind="p2p"),
            attention="ring", name="llama-tiny", fingerprint="",
        )  # fmt: skip
