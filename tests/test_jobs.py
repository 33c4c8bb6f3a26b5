"""Jobs given as numbers: context and expert parallelism, mixtures of experts, what is not fused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import PlanError, UsageError
from meshwright.models import build
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.parts import Parts, Work
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.jobs.positions import Attention, Positions
from meshwright.pricing import Experts, Latent, Setting, Shape, price_job

HOST = Cluster.parse("b200x8")
LLAMA = Shape("llama", 8, 4096, 32, 8, 14336, 32768, 8192)
MIXTRAL = Shape("mixtral", 8, 4096, 32, 8, 14336, 32768, 4096, experts=Experts(8, 2, 14336))
DEEPSEEK = Shape(
    "deepseek",
    8,
    2048,
    16,
    16,
    8192,
    32768,
    2048,
    experts=Experts(32, 4, 1024, 1024, 1),
    latent=Latent(),
)


def parts(shape: Shape, parallelism: Parallelism, setting: Setting | None = None) -> Parts:
    traced = replace(shape, layers=4 + (shape.experts.dense if shape.experts else 0))
    return pricing._parts(traced, 1, parallelism, setting or Setting(), pricing._Known(HOST))


def price(shape: Shape, parallelism: Parallelism, setting: Setting | None = None, batch: int = 8):
    return price_job(
        shape, parallelism, HOST, global_batch=batch, microbatch=1, setting=setting or Setting()
    )


def moved(work: Work, kind: str, axis: str) -> float:
    """Bytes of one layer that one device has of these collectives, small ones left out."""
    return sum(
        c.nbytes for c in work.collectives if (c.kind, c.axes) == (kind, (axis,)) and c.nbytes > 1e6
    )


# ---------------------------------------------------------------- context parallelism

QUERY, KEY = (
    8192 * 4096 * 2 / 8,
    8192 * 1024 * 2 / 8,
)  # bytes of q (or the result) and of k (or v) on one of 8 devices


def test_heads_are_cut_by_all_to_all_before_and_after_attention():
    """q, k, v there and the result back; gradients of all four in the backward pass. 8 kv heads, 8 ranks."""
    layer = parts(LLAMA, Parallelism(cp=8, cp_kind="a2a"))["layer"]
    for work in (layer.forward, layer.backward):
        assert moved(work, "all_to_all", "cp") == 2 * QUERY + 2 * KEY
        assert moved(work, "all_gather", "cp") == moved(work, "reduce_scatter", "cp") == 0


def test_tensor_parallelism_leaves_each_rank_its_own_heads_to_exchange():
    layer = parts(LLAMA, Parallelism(tp=2, cp=4, cp_kind="a2a"))["layer"]
    assert moved(layer.forward, "all_to_all", "cp") == 2 * QUERY + 2 * KEY


def test_keys_and_values_are_gathered_and_their_gradients_scattered():
    layer = parts(LLAMA, Parallelism(cp=8))["layer"]
    assert moved(layer.forward, "all_gather", "cp") == 2 * 8 * KEY
    assert moved(layer.backward, "all_gather", "cp") == 2 * 8 * KEY
    assert moved(layer.backward, "reduce_scatter", "cp") == 2 * 8 * KEY
    assert (
        moved(layer.forward, "all_to_all", "cp") == moved(layer.backward, "all_to_all", "cp") == 0
    )


def test_all_kinds_of_context_parallelism_compute_the_same():
    """A rank's work is an eighth of the whole; exchange is what a kind adds, and a ring hides it."""
    seconds = {
        k: price(LLAMA, Parallelism(cp=8, cp_kind=k)).seconds for k in ("all_gather", "p2p", "a2a")
    }
    assert seconds["all_gather"]["compute"] == pytest.approx(seconds["a2a"]["compute"], rel=0.02)
    assert seconds["p2p"]["exchange"] < 0.5 * seconds["all_gather"]["exchange"]
    whole = parts(LLAMA, Parallelism())["layer"].forward
    share = parts(LLAMA, Parallelism(cp=8))["layer"].forward
    assert share.flop == whole.flop
    assert (
        whole.compute / 8 < share.compute < whole.compute / 5
    )  # small products reach less of the peak


def test_zero_cuts_state_over_data_and_context_ranks():
    across = [
        price(LLAMA, Parallelism(dp=8 // cp, cp=cp, zero=1)).memory[0]["state"] for cp in (1, 2, 8)
    ]
    assert across == pytest.approx([across[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("shape", [LLAMA, DEEPSEEK], ids=["llama", "deepseek"])
def test_queries_are_told_from_keys(shape):
    """A softmax reduces over keys: of every score the dim of the queries survives."""
    program = pricing._program(replace(shape, layers=5), 1, "fused-selective", "plain", "plain")
    positions, scores = Positions(program.graph), Attention(program).scores
    both = {v for v in scores if len(positions.both.dims.get(v, {})) == 2}
    assert both and both <= positions.queries.keys()
    for op in program.graph.ops:
        if op.kind == "reduce_max" and op.inputs[0] in scores:
            over = dict(op.attrs)["axes"]
            assert positions.queries[op.inputs[0]] not in over


def test_kinds_that_heads_or_words_do_not_allow_are_refused():
    with pytest.raises(PlanError, match="key-value heads cannot be cut 16 ways"):
        price_job(
            LLAMA, Parallelism(tp=2, cp=8, cp_kind="a2a"), Cluster.parse("2xb200x8@ib400"),
            global_batch=1, microbatch=1, setting=Setting(),
        )  # fmt: skip
    with pytest.raises(PlanError, match="cp kind cannot be `ring`"):
        Parallelism(cp=2, cp_kind="ring")
    example = build("llama-tiny")
    with pytest.raises(PlanError, match="by `a2a` can be priced, not run"):
        fixed_plan(example, HOST, Parallelism(cp=8, cp_kind="a2a"), name="x", fingerprint="")  # type: ignore[arg-type]


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("shape", [MIXTRAL, DEEPSEEK], ids=["mixtral", "deepseek"])
def test_tokens_travel_to_their_experts_and_back(shape):
    """Each pass sends every choice of a device's tokens out and back."""
    layer, experts = parts(shape, Parallelism(dp=8, ep=8))["layer"], shape.experts
    choices = shape.seq * experts.choices * shape.hidden * 2
    for work in (layer.forward, layer.backward):
        assert moved(work, "all_to_all", "ep") == pytest.approx(2 * choices, rel=1e-6)


def test_experts_compute_the_choices_and_no_more():
    layer = parts(MIXTRAL, Parallelism(dp=8, ep=8))["layer"].forward
    tokens, d, f = 8 * 4096, 4096, 14336
    attention = 2 * tokens * d * (2 * d + 2 * 1024) + 4 * tokens * 4096 * d
    assert layer.flop == pytest.approx(attention + 2 * tokens * (2 * 3 * d * f + 8 * d), rel=1e-3)


def test_experts_are_cut_over_their_ranks_the_rest_over_all():
    """Weights that a device holds: its experts, and everything else whole; state: an eighth of all."""
    alone, spread = (parts(MIXTRAL, Parallelism(dp=8, ep=ep, zero=1))["layer"] for ep in (1, 8))
    experts = 8 * 3 * 4096 * 14336
    assert alone.weights - spread.weights == pytest.approx(experts * 7 / 8)
    assert spread.shard == pytest.approx(alone.weights / 8, rel=1e-3)


def test_leading_layers_are_on_the_first_stage():
    flat = price(DEEPSEEK, Parallelism(dp=8, zero=1))
    deep = price(replace(DEEPSEEK, layers=9), Parallelism(dp=8, zero=1))
    deeper = price(replace(DEEPSEEK, layers=10), Parallelism(dp=8, zero=1))
    assert deep.step - flat.step == pytest.approx(deeper.step - deep.step)
    three = replace(DEEPSEEK, experts=replace(DEEPSEEK.experts, dense=3))
    with pytest.raises(PlanError, match="3 leading layers do not fit the first of 4 stages"):
        price(three, Parallelism(dp=2, pp=4))


def test_experts_that_are_not_there_are_refused():
    with pytest.raises(PlanError, match="ep is 2, but the model has no experts"):
        price(LLAMA, Parallelism(dp=8, ep=2))
    with pytest.raises(PlanError, match="6 experts cannot be cut 4 ways"):
        price(replace(MIXTRAL, experts=Experts(6, 2, 14336)), Parallelism(dp=8, ep=4))
    with pytest.raises(UsageError, match="a mixtral has experts"):
        replace(MIXTRAL, experts=None)
    with pytest.raises(UsageError, match="9 choices are more than 8 experts"):
        Experts(8, 9, 64)


# ---------------------------------------------------------------- what is not fused


def test_less_fusion_is_slower_and_holds_more():
    found = {
        f: price(LLAMA, Parallelism(dp=8, zero=3), Setting("full", fusion=f))
        for f in ("all", "layers", "none")
    }
    assert found["all"].step < found["layers"].step < found["none"].step
    assert found["all"].peak < found["layers"].peak


def test_a_loss_that_is_not_fused_holds_three_wide_copies_of_the_logits():
    logits = 8192 * 32768 * 4
    fused, eager = (
        parts(LLAMA, Parallelism(dp=8), Setting("full", fusion=f)) for f in ("all", "layers")
    )
    held = [p.transient + p["head"].saved for p in (fused, eager)]
    assert held[0] < 2 * logits
    assert 3 * logits < held[1] < 4 * logits


def test_compiled_layers_cost_the_same_whatever_becomes_of_the_loss():
    fused, eager = (
        parts(LLAMA, Parallelism(dp=8), Setting("full", fusion=f))["layer"]
        for f in ("all", "layers")
    )
    assert (fused.forward.compute, fused.backward.compute) == pytest.approx(
        (eager.forward.compute, eager.backward.compute), rel=0.01
    )


def test_gathers_in_fp8_carry_half_the_bytes():
    wide, narrow = (
        price(
            LLAMA,
            Parallelism(tp=8, sequence_parallel=True),
            Setting("full", products="fp8", gathers=g),
        ).seconds
        for g in ("bf16", "fp8")
    )
    assert 0.5 * wide["exchange"] < narrow["exchange"] < 0.9 * wide["exchange"]
    with pytest.raises(PlanError, match="gathers in `fp8` do not go with products in `bf16`"):
        Setting(gathers="fp8")


def test_attention_with_few_heads_leaves_multiprocessors_idle():
    """An eighth of the heads takes more than an eighth of the seconds."""
    wide, narrow = (
        parts(replace(LLAMA, seq=2048), Parallelism(tp=tp, sequence_parallel=tp > 1))[
            "layer"
        ].forward.attention
        for tp in (1, 8)
    )
    assert narrow > 1.3 * wide / 8


def test_gradients_of_experts_with_few_tokens_take_as_long_as_their_bytes():
    """Two tokens per expert: the backward pass reads and writes every gradient in fp32."""
    few = replace(MIXTRAL, seq=128, experts=Experts(64, 1, 14336))
    gradients = 64 * 3 * 4096 * 14336 / 8
    assert parts(few, Parallelism(dp=8, ep=8))[
        "layer"
    ].backward.compute > HOST.device.stream_seconds(8 * gradients)


def test_what_the_embedding_owes_is_paid_once_whatever_the_depth():
    """Vocabulary cut over tp: one sum of the embedding, four of each layer; dropout moves nothing."""
    gpt = Shape("gpt", 8, 4096, 32, 32, 16384, 51200, 2048)
    for shape in (gpt, replace(gpt, dropout=0.1)):
        found = parts(shape, Parallelism(tp=8))
        sums = {
            place: moved(found[place].forward, "all_reduce", "tp")
            for place in ("embedding", "layer")
        }
        assert sums["embedding"] == pytest.approx(2 * 2048 * 4096, rel=0.01)
        assert sums["layer"] == pytest.approx(2 * 2 * 2048 * 4096, rel=0.01)
