"""One truth: a layout given as numbers costs what the same layout costs as a plan, and no bound lies above it."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import pytest

from meshwright import pricing
from meshwright.api import plan_captured
from meshwright.backends.xla.capture import Captured
from meshwright.ir.analysis.blocks import Folded, fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import AttentionKind, composed
from meshwright.ir.program import prepare
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.request import HEADROOM, Request
from meshwright.recipe import make

LAYERS = {"gpt3-1.3b": 8, "mixtral-8x7b": 8}  # where what lies at both ends weighs little
RECOMPUTE = {"none": "everything", "full": "blocks"}  # words of plans, and of prices as XLA does it


@lru_cache(maxsize=16)
def captured(model: str, batch: int, seq: int, **more: int) -> Captured:
    return make({"model": model, "batch": batch, "seq": seq, **more}).capture(True)


def folded(
    model: str, batch: int, seq: int, attention: AttentionKind = "fused", **more: int
) -> Folded:
    return fold(composed(captured(model, batch, seq, **more).graph, attention))


FLAT = [
    ("llama3-8b", "h100x8", 8, 8192, Parallelism(dp=8, zero=3), "full", 1),
    ("llama3-8b", "h100x8", 1, 65536, Parallelism(cp=8, zero=3), "full", 1),
    ("gpt3-1.3b", "a100x8", 16, 2048, Parallelism(dp=2, tp=4), "none", 1),
    ("gpt3-1.3b", "a100x8", 16, 2048, Parallelism(dp=4, tp=2, zero=1, sequence_parallel=True), "none", 2),
    ("gpt3-1.3b", "a100x8", 16, 2048, Parallelism(dp=8, zero=1), "full", 1),
    ("gpt3-1.3b", "a100x8", 16, 2048, Parallelism(dp=8, zero=2), "none", 2),
    ("mixtral-8x7b", "4xh100x8@ib400", 32, 4096, Parallelism(dp=32, ep=8, zero=1), "none", 1),
    ("mixtral-8x7b", "4xh100x8@ib400", 64, 4096, Parallelism(dp=32, ep=4, zero=3), "full", 1),
    ("mixtral-8x7b", "h100x4", 8, 4096, Parallelism(tp=4, sequence_parallel=True), "full", 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "seq", "layout", "recompute", "microbatches"), FLAT
)
def test_a_layout_costs_the_same_as_a_plan_and_as_a_job(
    model, cluster, batch, seq, layout, recompute, microbatches
):
    """Seconds and bytes. Only ZeRO-3 of several microbatches differs: a plan gathers its weights once per step."""
    layers = {"layers": LAYERS[model]} if model in LAYERS else {}
    plan = fixed_plan(
        folded(model, batch, seq, **layers), Cluster.parse(cluster), layout, recompute=recompute, attention="fused",
        microbatches=microbatches, name=model, fingerprint="",
    )  # fmt: skip
    setting = pricing.Setting(RECOMPUTE[recompute], reduce_in_fp32=False, redone_inside=False)
    price = pricing.price_job(
        pricing.shape_of(model, seq, **layers), layout, Cluster.parse(cluster), global_batch=batch,
        microbatch=batch // layout.dp // microbatches, setting=setting,
    )  # fmt: skip
    assert price.step == pytest.approx(plan.estimate.step_seconds, rel=0.05)
    assert price.peak == pytest.approx(plan.estimate.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Parallelism(dp=8, zero=3), marks=pytest.mark.slow),
        Parallelism(dp=4, tp=2, zero=1),
    ],
)
def test_a_layout_costs_the_same_with_a_fused_loss(layout):
    """All recomputed, so that logits were most of the activations."""
    graph = composed(captured("llama3-8b", 16, 8192).graph, "fused", loss="fused")
    where, many = Cluster.parse("h100x8"), 8 // layout.dp
    plan = fixed_plan(
        fold(graph), where, layout, recompute="full", attention="fused", loss="fused", microbatches=many,
        name="llama3-8b", fingerprint="",
    )  # fmt: skip
    setting = pricing.Setting(RECOMPUTE["full"], reduce_in_fp32=False, redone_inside=False, loss="fused")  # fmt: skip
    price = pricing.price_job(
        pricing.shape_of("llama3-8b", 8192), layout, where, global_batch=16,
        microbatch=16 // layout.dp // many, setting=setting,
    )  # fmt: skip
    assert price.step == pytest.approx(plan.estimate.step_seconds, rel=0.05)
    assert price.peak == pytest.approx(plan.estimate.peak_bytes, rel=0.1)


def test_no_layout_of_long_sequences_is_priced_below_what_is_proven():
    """Attention is most of this step: its kernels and what they compute again count alike on both sides."""
    plan = plan_captured(
        captured("llama3-8b", 8, 131072, layers=8), Cluster.parse("h100x8"),
        Request(attention="fused", overlap="all", recompute="full", microbatches=4), "llama3-8b",
    )  # fmt: skip
    setting = pricing.Setting(
        "blocks", redone_inside=False, overlap=frozenset({"parameters", "gradients", "tensor"})
    )
    price = pricing.price_job(
        pricing.shape_of("llama3-8b", 131072, 8), Parallelism(cp=8, zero=3), Cluster.parse("h100x8"),
        global_batch=8, microbatch=2, setting=setting,
    )  # fmt: skip
    assert plan.proof.lower_bound <= price.step <= 1.05 * plan.estimate.step_seconds


def test_what_waits_for_all_gradients_is_not_hidden_by_a_price():
    """Behind the backward pass gradients are reduced, not sums of what the update makes of them (their norm)."""
    where, layout = Cluster.parse("2xh200x8@roce400"), Parallelism(dp=16, zero=1)
    cut = make({"model": "mixtral-8x7b", "batch": 64, "seq": 4096, "layers": 6}).capture(True)
    plan = plan_captured(cut, where, Request(mesh=(16,), microbatches=1, recompute="none"), "mixtral-8x7b")  # fmt: skip
    setting = pricing.Setting(
        "everything", overlap=pricing.overlaps("parameters,gradients"), reduce_in_fp32=False,
        redone_inside=False,
    )  # fmt: skip
    price = pricing.price_job(
        pricing.shape_of("mixtral-8x7b", 4096, 6), layout, where, global_batch=64, microbatch=4, setting=setting,
    )  # fmt: skip
    assert plan.proof.lower_bound <= price.step


def test_one_example_has_the_same_update_with_attention_fused():
    """Where the batch is one sequence its positions tell the passes apart, those of keys too."""
    plain = prepare(folded("llama-tiny", 1, 64, "plain").small, "none")
    fused = prepare(folded("llama-tiny", 1, 64, "fused").small, "none")
    assert fused.phases.count("update") == plain.phases.count("update") > 0


@pytest.mark.parametrize("model", ["mixtral-tiny", "deepseek-tiny"])
def test_gradients_of_experts_are_made_in_the_backward_pass_of_one_sequence_too(model):
    """What is dispatched to experts is in no order of its own: no dim of it tells the sequence."""

    def products(batch):
        program = prepare(folded(model, batch, 64, "plain").whole, "none")
        pairs = zip(program.graph.ops, program.phases, strict=True)
        return [phase for op, phase in pairs if op.kind == "dot_general"]

    assert products(1).count("backward") == products(2).count("backward")
    assert "update" not in products(1)


JOBS = [
    ("gpt3-1.3b", "h100x8", 32, 2048),
    ("llama3-8b", "h100x8", 32, 8192),
    ("llama3-8b", "4xh100x8@ib400", 128, 8192),
]


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["none", "all"])
@pytest.mark.parametrize(("model", "cluster", "batch", "seq"), JOBS)
def test_no_layout_that_fits_is_priced_below_a_bound(model, cluster, batch, seq, overlap):
    """All of tensor and data parallelism, ZeRO and microbatches, under the execution model of the plan."""
    where = Cluster.parse(cluster)
    plan = plan_captured(
        captured(model, batch, seq), where, Request(attention="fused", overlap=overlap), model
    )
    beside = pricing.overlaps("" if overlap == "none" else "parameters,gradients,tensor")
    for tp, zero, microbatch, recompute in product(
        (1, 2, 4, 8), (0, 1, 3), (1, 2, 4), RECOMPUTE.values()
    ):
        layout = Parallelism(tp=tp, dp=where.size // tp, zero=zero, sequence_parallel=tp > 1)
        if batch % (microbatch * layout.dp):
            continue
        price = pricing.price_job(
            pricing.shape_of(model, seq), layout, where, global_batch=batch, microbatch=microbatch,
            setting=pricing.Setting(
                recompute, overlap=beside, reduce_in_fp32=False, redone_inside=False
            ),
        )  # fmt: skip
        if price.peak <= where.memory_per_device * (1 - HEADROOM):
            assert plan.proof.lower_bound <= price.step, (layout, microbatch, recompute)


JOB_OF = {
    "llama3-8b": ("h200x8", 16, 4096),
    "mixtral-8x7b": ("2xh200x8@roce400", 64, 4096),
    "gpt2": ("2xa100x4@eth25", 64, 1024),
}
SLOW = pytest.mark.slow
GIVEN = [
    pytest.param("llama3-8b", {"dp": 8}, marks=SLOW),
    ("mixtral-8x7b", {"dp": 16}),
    ("gpt2", {"dp": 8}),
    pytest.param("llama3-8b", {"dp": 4, "tp": 2}, marks=SLOW),
    pytest.param("llama3-8b", {"dp": 4, "cp": 2}, marks=SLOW),
    pytest.param("mixtral-8x7b", {"dp": 16, "ep": 8}, marks=SLOW),
    pytest.param("gpt2", {"dp": 2, "tp": 4}, marks=SLOW),
]


@pytest.mark.parametrize("overlap", [pytest.param("none", marks=SLOW), "all"])
@pytest.mark.parametrize(
    ("microbatches", "recompute"),
    [
        (2, "none"),
        *(pytest.param(*each, marks=SLOW) for each in ((1, "none"), (4, "none"), (2, "full"))),
    ],
)
@pytest.mark.parametrize(("model", "sizes"), GIVEN)
def test_no_given_layout_is_faster_than_the_bound_of_its_mesh(
    model, sizes, microbatches, recompute, overlap
):
    """Prices of one kind on both sides, so no layout may be faster at all: what it decides must be open to plans."""
    cluster, batch, seq = JOB_OF[model]
    where, cut = Cluster.parse(cluster), captured(model, batch, seq, layers=2)
    graphs = fold(composed(cut.graph, "fused", where))
    same = {
        "microbatches": microbatches,
        "recompute": recompute,
        "attention": "fused",
        "overlap": overlap,
    }
    outer = sizes["dp"] // sizes.get("ep", 1)
    mesh = tuple(n for n in (outer, *(sizes.get(k, 1) for k in ("ep", "cp", "tp"))) if n > 1)
    plan = plan_captured(cut, where, Request(mesh=mesh, gap=1e-7, time_limit=20, **same), model)
    for zero, sequence in product((0, 1, 2, 3), (False, True)[: 1 + ("tp" in sizes)]):
        layout = Parallelism(**sizes, zero=zero, sequence_parallel=sequence)
        given = fixed_plan(graphs, where, layout, **same, name=model, fingerprint="")
        seconds = given.estimate.step_seconds
        if given.estimate.peak_bytes <= where.memory_per_device * (1 - HEADROOM):
            assert plan.proof.lower_bound <= seconds * (1 + 1e-9), (layout, seconds)
