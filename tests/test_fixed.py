"""Strategies given as numbers run, equal the unsharded step, and move what they should."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from meshwright import api
from meshwright.backends.xla import lower as lowering
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import AttentionKind, composed
from meshwright.ir.composites.losses import LossKind
from meshwright.ir.errors import PlanError
from meshwright.ir.fingerprint import fingerprint
from meshwright.models import build
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism


def captured(name: str, attention: AttentionKind = "plain", loss: LossKind = "plain", **options):
    example = build(name, dtype="f32", optimizer="sgd", **options)
    found = capture(example.step, example.state, example.batch, donate_argnums=0)
    return example, found, fold(composed(found.graph, attention, Cluster.parse("8xcpu"), loss))


def fixed(name: str, parallelism: Parallelism, dropout: float | None = None, **options):
    attention, loss = options.get("attention", "plain"), options.get("loss", "plain")
    example, found, folded = captured(name, attention, loss, dropout=dropout)
    plan = fixed_plan(
        folded,
        Cluster.parse("8xcpu"),
        parallelism,
        name=name,
        fingerprint=fingerprint(found.graph),
        **options,
    )
    return example, found, plan


CASES = [
    ("gpt-tiny", Parallelism(dp=8), {}),
    ("gpt-tiny", Parallelism(dp=2, tp=4, sequence_parallel=True), {"recompute": "full"}),
    ("gpt-tiny", Parallelism(dp=4, tp=2, zero=3), {"microbatches": 2}),
    ("gpt-tiny", Parallelism(dp=4, tp=2), {"recompute": "selective"}),
    (
        "gpt-tiny",
        Parallelism(dp=2, tp=4, sequence_parallel=True),
        {"recompute": "selective", "dropout": 0.2},
    ),
    ("gpt-tiny", Parallelism(dp=8, zero=3, shard_group=4), {}),
    ("llama-tiny", Parallelism(dp=4, tp=2, zero=1, shard_group=2), {}),
    ("llama-tiny", Parallelism(tp=4, dp=2, zero=1), {"recompute": "full"}),
    ("llama-tiny", Parallelism(dp=2, cp=4), {}),
    ("llama-tiny", Parallelism(dp=2, cp=4), {"attention": "fused"}),
    ("llama-tiny", Parallelism(dp=2, tp=4, sequence_parallel=True), {"loss": "fused"}),
    ("gpt-tiny", Parallelism(dp=4, tp=2, zero=3), {"loss": "fused", "microbatches": 2}),
    (
        "llama-tiny",
        Parallelism(dp=2, cp=4, cp_kind="p2p"),
        {"attention": "ring", "recompute": "full"},
    ),
    (
        "llama-tiny",
        Parallelism(dp=4, tp=2, zero=3, sequence_parallel=True),
        {"recompute": "elementwise"},
    ),
]


@pytest.mark.parametrize(("name", "parallelism", "options"), CASES)
def test_the_step_equals_the_unsharded_one(name, parallelism, options):
    """Updated parameters under SGD, relative to how far the step moved them."""
    example, found, plan = fixed(name, parallelism, **options)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    expected, _ = jax.jit(example.step)(state, batch)
    sharded, _ = api.RunningStep(lower(plan, found))(jax.tree.map(lambda x: x.copy(), state), batch)
    for old, mine, theirs in zip(*map(jax.tree.leaves, (state, sharded, expected)), strict=True):
        if np.issubdtype(old.dtype, np.floating):
            moved = np.abs(np.asarray(theirs) - np.asarray(old)).max()
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-3 * moved + 1e-9)


def test_sums_that_layers_hand_on_are_held_on_cpus(monkeypatch):
    """Nothing else is held where nothing is recomputed; other devices hold nothing."""
    _, found, plan = fixed("gpt-tiny", Parallelism(dp=8))
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in found.binding.in_avals]

    def barriers() -> int:
        return lower(plan, found).jitted.lower(*avals).as_text().count("optimization_barrier")

    assert barriers() >= 2 * 3  # at least the stream and its gradient, between four layers
    monkeypatch.setattr(lowering, "on_cpus", lambda mesh: False)
    assert barriers() == 0


def by_kind(plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in plan.collectives:
        if entry.nbytes > 64:
            found[entry.kind] = found.get(entry.kind, 0) + entry.count
    return found


def test_tensor_parallelism_moves_what_megatron_moves():
    """Four all-reduces per layer; with sequence parallelism gathers and scatters instead."""
    *_, plain = fixed("gpt-tiny", Parallelism(tp=8))
    inside = [c for c in plain.collectives if c.nbytes > 64 and c.phase in ("forward", "backward")]
    assert {c.kind for c in inside} == {"all_reduce"}
    layers = [c for c in inside if c.count == 4]  # gpt-tiny has 4 layers
    assert sum(c.count for c in layers) == 4 * 4
    *_, cut = fixed("gpt-tiny", Parallelism(tp=8, sequence_parallel=True))
    kinds = by_kind(cut)
    assert kinds["reduce_scatter"] >= 4 * 4 and kinds["all_gather"] >= 6 * 4


def test_context_parallelism_deals_queries_out_evenly():
    """Per layer q and o of the forward pass; q, its gradient and that of o of the backward pass."""
    *_, plan = fixed("llama-tiny", Parallelism(dp=2, cp=4), attention="fused")
    assert by_kind(plan)["permute"] == 5 * 2  # llama-tiny has 2 layers
    assert "permute" not in by_kind(fixed("llama-tiny", Parallelism(dp=2, cp=4))[2])


def test_zero_trades_an_all_reduce_for_a_scatter_and_gathers():
    *_, whole = fixed("gpt-tiny", Parallelism(dp=8))
    assert "reduce_scatter" not in by_kind(whole)
    *_, one = fixed("gpt-tiny", Parallelism(dp=8, zero=1))
    *_, three = fixed("gpt-tiny", Parallelism(dp=8, zero=3))
    assert by_kind(one)["reduce_scatter"] >= 4 * 4
    assert by_kind(three)["all_gather"] >= 1.8 * by_kind(one)["all_gather"]
    assert three.estimate.peak_bytes < one.estimate.peak_bytes < whole.estimate.peak_bytes


def test_degrees_that_do_not_fit_are_refused():
    with pytest.raises(PlanError, match="the cluster has 8 devices"):
        fixed("gpt-tiny", Parallelism(dp=4))
    with pytest.raises(PlanError, match="pp=1"):
        fixed("gpt-tiny", Parallelism(dp=4, pp=2))
    with pytest.raises(PlanError, match="recompute cannot be 'fused'"):
        fixed("gpt-tiny", Parallelism(dp=8), recompute="fused")
    with pytest.raises(PlanError, match="cannot be cut into 5"):
        fixed("gpt-tiny", Parallelism(dp=8), microbatches=5)
