"""Cross-entropy as one op per pass: what becomes of the graph, and that it runs as the plain step does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product as product_of
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla import spmd
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.hlo import collectives
from meshwright.backends.xla.replay import replay
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.audit import compare
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites import loss_blocks
from meshwright.ir.composites.bodies import BOTH, LOSS, LOSS_GRAD
from meshwright.ir.composites.loss_blocks import hidden_of
from meshwright.ir.composites.losses import with_losses
from meshwright.ir.errors import InfeasibleError, PlanError
from meshwright.ir.execution_model import execution_model
from meshwright.ir.graph import Graph, Op
from meshwright.ir.ops import LOSSES
from meshwright.ir.plan import Plan
from meshwright.ir.program import prepare
from meshwright.ir.rules import rule_of
from meshwright.ir.rules.rule import NONE, Rule, cuttable
from meshwright.ir.text import parse, show
from meshwright.ir.verify import verify
from meshwright.planner.cost.loss import least_loss_seconds, loss_seconds
from meshwright.planner.cost.model import Roofline
from meshwright.planner.cost.ways import Ways
from meshwright.planner.report.of_plan import collectives_of
from meshwright.planner.request import Request, parse_mesh

from .test_context_parallel import priced
from .test_cross_entropy import LOSSES as FORMS
from .test_cross_entropy import (
    B,
    D,
    Params,
    T,
    V,
    checkpoint,
    integers,
    logits_of,
    mean_of,
    microbatched,
    trained,
)

Array = jax.Array


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.4, jnp.float32)


X_BTD, M_BT = normal(0, B, T, D), jnp.asarray(np.random.default_rng(1).integers(0, 2, (B, T)), jnp.float32)  # fmt: skip
Y_BT = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, T)), jnp.int32)


def numbers(name: str) -> tuple[Any, ...]:
    """Arguments of a form, of our sizes and with random numbers."""
    params, *rest = FORMS[name][1]
    made = {k: normal(3 + i, *w.shape) + (k == "t") for i, (k, w) in enumerate(params.items())}
    return (made, X_BTD, Y_BT, *((M_BT,) if len(rest) > 2 else ()))


def close(have: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=2e-6)


def composites(graph: Graph) -> dict[str, Op]:
    return {v.op.kind: v.op for v in graph.visits if v.op.kind in LOSSES}


STEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **{name: (trained(loss), numbers(name)) for name, (loss, _) in FORMS.items()},
    "computed again": (trained(checkpoint(mean_of(integers))), numbers("optax, integers")),
    "microbatches of its own": (microbatched(mean_of(integers)), numbers("optax, integers")),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_logits_are_left_whole(name: str):
    step, args = STEPS[name]
    graph = with_losses(capture(step, *args).graph)
    verify(graph)
    made = {v for visit in graph.visits for v in visit.op.outputs}
    few = B // 2 if name == "microbatches of its own" else B
    assert [str(graph.types[v]) for v in made if graph.types[v].size >= few * T * V] == []
    apart = name in ("weighted by loss", "computed again")
    assert composites(graph).keys() == ({LOSS, LOSS_GRAD} if apart else {BOTH})
    assert parse(show(graph)) == graph


@pytest.mark.parametrize("name", STEPS)
def test_a_composite_is_what_it_stands_for(name: str):
    step, args = STEPS[name]
    captured = capture(step, *args)
    again = replace(captured, graph=with_losses(captured.graph))
    close(replay(again)(*args), jax.jit(step)(*args))


def test_tokens_and_vocabulary_may_be_cut_and_widths_are_whole():
    """A loss has nothing of the vocabulary left and owes nothing; gradients owe sums over what they have not."""
    step, args = STEPS["computed again"]
    graph = with_losses(capture(step, *args).graph)
    ops = composites(graph)
    forward, backward = (rule_of(ops[kind], graph.types) for kind in (LOSS, LOSS_GRAD))
    assert divisible(forward) == [(B, ""), (T, ""), (V, "inside")]
    assert divisible(backward) == [(B, "sum"), (T, "sum"), (V, "sum")]


def divisible(rule: Rule) -> list[tuple[int, str]]:
    assert [f for f, factor in enumerate(rule.factors) if factor.divisible] == [*cuttable(rule)]
    return [(factor.size, factor.reduction) for factor in rule.factors if factor.divisible]


def test_both_passes_are_one_op_where_the_gradient_does_not_wait_for_the_loss():
    """Its loss owes sums as gradients do: one of the devices that share the vocabulary has it, the others nothing."""
    step, args = STEPS["optax, integers"]
    graph = with_losses(capture(step, *args).graph)
    (op,) = composites(graph).values()
    assert op.kind == BOTH and op.attr("complete") == (0,)
    assert divisible(rule_of(op, graph.types)) == [(B, "sum"), (T, "sum"), (V, "sum")]
    phases = prepare(fold(graph).small, "none")
    found = {o.kind: phase for o, phase in zip(phases.graph.ops, phases.phases, strict=True)}
    assert found[BOTH] == "backward" and found["tanh"] == "forward"


def pinned(step: Any, args: Any, mesh: str, cut: str, **request: Any) -> Plan:
    """A plan whose losses are cut as told, axis by axis: b(atch), t(okens), v(ocabulary), or - for nothing."""
    plan = mw.plan(
        step, *args, cluster=f"{prod(map(int, mesh.split('x')))}xcpu",
        request=Request(**{"loss": "fused", "mesh": parse_mesh(mesh), **request}),
    )  # fmt: skip
    program = prepare(fold(with_losses(capture(step, *args).graph)).small, plan.recompute)
    told = {}
    for op in (v.op for v in program.graph.visits if v.op.kind in LOSSES):
        factors = {"b": 0, "t": len(op.attr("sizes")) - 2, "v": op.attr("vocabulary"), "-": NONE}  # type: ignore[arg-type]
        told[op.tag] = tuple(factors[c] for c in cut)
    assert told.keys() <= plan.strategies.keys()
    return plan.model_copy(update={"strategies": {**plan.strategies, **told}})


CUTS = [("8", "b"), ("8", "v"), ("4x2", "bv"), ("4x2", "vt"), ("2x2x2", "btv"), ("2x2x2", "vvb")]


@pytest.mark.parametrize(("mesh", "cut"), CUTS)
@pytest.mark.parametrize(
    "name", ["optax, integers", "log_softmax, take_along_axis", "one-hot", "tied, bias"]
)
def test_fused_steps_equal_plain_jax_on_eight_devices(
    name: str, mesh: str, cut: str, monkeypatch: pytest.MonkeyPatch
):
    """In blocks so small that tokens are cut again on each device."""
    monkeypatch.setattr(loss_blocks, "LEAST", 16)
    monkeypatch.setattr(loss_blocks, "WIDE", 0.25)
    step, args = STEPS[name]
    lowered = mw.lower(pinned(step, args, mesh, cut), step, *args)
    close(lowered(*args), jax.jit(step)(*args))


@pytest.mark.parametrize(("mesh", "cut"), CUTS)
def test_what_devices_bring_together_is_what_was_planned(
    mesh: str, cut: str, monkeypatch: pytest.MonkeyPatch
):
    """To the byte, all blocks of tokens together."""
    monkeypatch.setattr(loss_blocks, "LEAST", 16)
    monkeypatch.setattr(loss_blocks, "WIDE", 0.25)
    step, args = STEPS["log_softmax, take_along_axis"]
    plan = pinned(step, args, mesh, cut)
    program = prepare(fold(with_losses(capture(step, *args).graph)).small, plan.recompute)
    moved = tuple(collectives_of(plan, priced(plan, program), Roofline(plan.cluster)))
    plan = plan.model_copy(update={"collectives": moved})
    lines = compare(plan, collectives(mw.lower(plan, step, *args).hlo(), plan.mesh))
    found = [line for line in lines if line.kind == "all_reduce"]
    assert [line.predicted_bytes for line in found] == [line.compiled_bytes for line in found]
    inside = [c for c in moved if c.what.startswith("cross_entropy") and c.count > 2]
    assert bool(inside) == ("v" in cut)


def numbers_of(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


HEAD = (
    {"w": numbers_of(jnp.bfloat16, 4096, 128256)},
    numbers_of(jnp.bfloat16, 2, 8192, 4096),
    numbers_of(jnp.int32, 2, 8192),
)


def head(params: Params, x: Array, y: Array) -> Array:
    return integers((x @ params["w"]).astype(jnp.float32), y).mean()


@pytest.mark.parametrize("waits", [False, True])
def test_a_fused_loss_takes_a_product_more_where_the_gradient_waits_for_it(waits: bool):
    """Of Llama 3 8B, 16384 tokens on one H100; and a fraction of the memory."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        return (head(params, x, y) - 2) ** 2 if waits else head(params, x, y)

    step, cluster = jax.value_and_grad(loss, (0, 1)), Cluster.parse("h100x1")
    plain, fused = (
        mw.plan(step, *HEAD, cluster=cluster, request=Request(loss=kind)).estimate
        for kind in ("plain", "fused")
    )
    product = 2 * 16384 * 4096 * 128256
    assert fused.flop == plain.flop + waits * product
    seconds = product / cluster.device.peak_flops["bf16"] / cluster.device.efficiency
    more = (fused.step_seconds - plain.step_seconds) / seconds
    assert waits < more < waits + 0.4 if waits else abs(more) < 0.2
    assert fused.peak_bytes < 0.65 * plain.peak_bytes


def test_a_refusal_says_that_a_fused_loss_would_fit():
    """The least memory without is 8.0 GiB, with two microbatches."""
    step, cluster = trained(head), Cluster.parse("h100x1")
    with pytest.raises(InfeasibleError, match=r"loss=fused, with which a plan fits \(6\.\d+ GiB"):
        mw.plan(step, *HEAD, cluster=cluster, request=Request(memory=7 * 2.0**30))
    with pytest.raises(InfeasibleError, match="at least") as refused:
        mw.plan(step, *HEAD, cluster=cluster, request=Request(memory=4 * 2.0**30))
    assert "loss=fused" not in str(refused.value)


def test_no_way_to_cut_a_loss_takes_less_than_the_bound():
    graph = with_losses(capture(jax.value_and_grad(head, (0, 1)), *HEAD).graph)
    for op in composites(graph).values():
        for name in ("h100x8", "8xcpu"):
            device = Cluster.parse(name).device
            model = execution_model(device.kind)
            least = least_loss_seconds(op, device, model, None)
            for tokens, classes in product_of((1, 2, 8, 64), (1, 3, 8)):
                cut = np.array([float(tokens)]), np.array([float(classes)])
                hidden = hidden_of(op)
                operands = [cut[0] if k == hidden else cut[1] for k in range(len(op.inputs))]
                ways = Ways(operands, [np.ones(1)] * len(op.outputs), cut[0] * cut[1])
                assert loss_seconds(op, device, ways, model, None) >= least / ways.work


@pytest.mark.parametrize(
    "request_",
    [
        {"microbatches": 2},
        {"recompute": "full"},
        {"recompute": "selective", "microbatches": 4},
        {"pp": 2, "mesh": "4", "microbatches": 2, "program": "single"},
        {"pp": 2, "mesh": "4", "microbatches": 4, "program": "stages", "schedule": "zb-h1"},
        {"pp": 2, "mesh": "2x2", "microbatches": 2, "program": "stages", "recompute": "full"},
    ],
    ids=str,
)
def test_fused_steps_with_microbatches_recomputation_and_stages(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Equal layers before the head, so that there is something to cut into stages."""
    monkeypatch.setattr(loss_blocks, "LEAST", 16)
    monkeypatch.setattr(loss_blocks, "WIDE", 0.25)
    kinds = set[str]()
    run = spmd.run_loss

    def noted(op: Op, *more: Any) -> Any:
        kinds.add(op.kind)
        return run(op, *more)

    monkeypatch.setattr(spmd, "run_loss", noted)

    def loss(params: Any, x: Array, y: Array) -> Array:
        x = jnp.tanh(x @ params["first"])
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return integers(jnp.tanh(x) @ params["w"], y).mean()

    layers = [{"up": normal(k, D, 2 * D), "down": normal(k + 9, 2 * D, D)} for k in range(4)]
    step, args = (
        trained(loss),
        ({"first": normal(4, D, D), "layers": layers, "w": normal(5, D, V)}, X_BTD, Y_BT),
    )
    given: dict[str, Any] = {"mesh": "2x4", **request_}
    ours = mw.parallelize(step, cluster="8xcpu", loss="fused", **given)
    close(ours(*args), jax.jit(step)(*args))
    assert ours.plan(*args).loss == "fused" and kinds == {BOTH}


def test_short_floats_are_as_near_to_exact_numbers_as_the_plain_step(
    monkeypatch: pytest.MonkeyPatch,
):
    """Gradients in bf16 against those in float64, root mean square; what blocks add up is added up in fp32."""
    monkeypatch.setattr(loss_blocks, "LEAST", 16)
    monkeypatch.setattr(loss_blocks, "WIDE", 0.25)
    _, (params, x, y) = STEPS["cast, capped"]

    def loss(params: Params, x: Array, y: Array) -> Array:
        logits = x @ params["w"]
        wide = logits.astype(jnp.float32) if logits.dtype == jnp.bfloat16 else logits
        return integers(wide, y).mean()

    step = jax.grad(loss, (0, 1))
    narrow = {"w": params["w"].astype(jnp.bfloat16)}, x.astype(jnp.bfloat16)
    with jax.enable_x64():
        exact = jax.jit(step)(*jax.tree.map(lambda a: a.astype(jnp.float64), narrow), y)

    def error(plan: Plan) -> np.ndarray:
        have = mw.lower(plan, step, *narrow, y)(*narrow, y)
        pairs = zip(jax.tree.leaves(have), jax.tree.leaves(exact), strict=True)
        return np.array([((np.asarray(a, np.float64) - np.asarray(b)) ** 2).mean() for a, b in pairs])  # fmt: skip

    plain = mw.plan(step, *narrow, y, cluster="1xcpu")
    assert (error(pinned(step, (*narrow, y), "1", "-")) <= 1.02 * error(plain)).all()
    plain = mw.plan(step, *narrow, y, cluster="8xcpu", request=Request(mesh=(8,)))
    assert plain.uses[0].batch == 1
    assert (error(pinned(step, (*narrow, y), "8", "b")) <= 1.02 * error(plain)).all()


def test_a_compiled_program_holds_no_logits():
    """Of 4096 tokens and 4096 classes: 64 MiB, twice and more in the plain program, and an eighth of each at a time."""
    params = {name: jax.ShapeDtypeStruct((64, n), jnp.float32) for name, n in (("h", 64), ("w", 4096))}  # fmt: skip
    tokens = jax.ShapeDtypeStruct((8, 512, 64), jnp.float32), jax.ShapeDtypeStruct((8, 512), jnp.int32)  # fmt: skip
    step, taken = trained(mean_of(integers)), {}
    for loss in ("plain", "fused"):
        plan = mw.plan(step, params, *tokens, cluster="1xcpu", request=Request(loss=loss))  # type: ignore[arg-type]
        lowered = mw.lower(plan, step, params, *tokens)
        taken[loss] = lowered.audit()
        whole = [line for line in lowered.hlo().splitlines() if "f32[8,512,4096]" in line]
        assert bool(whole) == (loss == "plain")
    assert taken["plain"].parts["temporaries"] > 120 << 20
    assert taken["fused"].parts["temporaries"] < 16 << 20
    assert taken["fused"].compiled_peak == pytest.approx(taken["fused"].predicted_peak, rel=0.15)


def test_a_plan_in_a_file_runs_fused_again(tmp_path: Path):
    step, args = STEPS["tied, bias"]
    plan = mw.plan(step, *args, cluster="8xcpu", request=Request(loss="fused"))
    assert any("logits are never whole" in note for note in plan.notes)
    assert "loss fused" in str(plan.execution)
    mw.save_plan(plan, tmp_path / "a.plan.json")
    read = mw.load_plan(tmp_path / "a.plan.json")
    assert read.loss == "fused" and read.graph == plan.graph
    close(mw.lower(read, step, *args)(*args), jax.jit(step)(*args))


def test_what_cannot_be_fused_is_said():
    def watched(params: Params, x: Array, y: Array) -> tuple[Array, Array]:
        logits = logits_of(params, x)
        return integers(logits, y).mean(), (logits.argmax(-1) == y).mean()

    def step(params: Params, x: Array, y: Array) -> Any:
        value, gradients = jax.value_and_grad(watched, has_aux=True)(params, x, y)
        return jax.tree.map(lambda w, g: w - g, params, gradients), value

    args, request = numbers("optax, integers"), Request(loss="fused")
    plan = mw.plan(step, *args, cluster="8xcpu", request=request)
    assert any("stays plain: `argmax` reads its logits [8, 8, 96]" in note for note in plan.notes)
    none = trained(lambda params, x, y: (logits_of(params, x) ** 2).mean())
    plan = mw.plan(none, *args, cluster="8xcpu", request=request)
    assert any("no cross-entropy was found" in note for note in plan.notes)
    with pytest.raises(PlanError, match="loss cannot be 'chunked'"):
        Request(loss="chunked")  # type: ignore[arg-type]
