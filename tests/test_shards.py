"""Jobs given as numbers: groups that share ZeRO's shards, wide heads, lean ends of a pipeline."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from meshwright import pricing
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import PlanError
from meshwright.models import gpt, llama
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.pricing import Setting, Shape, price_job

GPT22B = Shape("gpt", 48, 6144, 64, 64, 24576, 51200, 2048)
SLICES = "2xv5p-128@dcn"  # two of 4 x 4 x 4 chips
SHALLOW = replace(GPT22B, layers=4)


def _sharded(cluster: str, dp: int, group: int | None):
    known = pricing._Known(Cluster.parse(cluster))
    parallelism = Parallelism(dp=dp, zero=3, shard_group=group)
    return pricing._parts(replace(GPT22B, layers=pricing.TRACED), 1, parallelism, Setting(), known)


def test_shards_of_a_group_are_those_of_its_ranks_alone():
    """Two slices that shard inside themselves hold what one slice holds, and gather no slower."""
    one, two, over = (
        _sharded("v5p-128", 64, None),
        _sharded(SLICES, 128, 64),
        _sharded(SLICES, 128, None),
    )
    assert (
        two["layer"].state == one["layer"].state == pytest.approx(2 * over["layer"].state, rel=0.02)
    )
    assert two["layer"].forward.gather == pytest.approx(one["layer"].forward.gather)
    assert over["layer"].forward.gather > one["layer"].forward.gather


def test_gradients_are_scattered_inside_a_group_and_summed_across_groups():
    """What the second slice adds: an all-reduce of each rank's shard over the data-centre network."""
    large = [e for e in _sharded(SLICES, 128, 64)["layer"].update.collectives if e.nbytes > 1e6]
    assert {(e.kind, e.axes) for e in large} == {
        ("reduce_scatter", ("dp",)),
        ("all_reduce", ("copy",)),
    }
    shard, adapter, latency = (
        2 * 12 * 6144**2 / 64,
        50e9 / 8,
        30e-6,
    )  # bytes of a rank; bytes/s and s of its network
    added = sum(e.seconds for e in large if e.axes == ("copy",)) / pricing.TRACED
    assert added == pytest.approx(2 * (1 / 2) * shard / adapter + 4 * 2 * latency)  # four matrices


def test_a_group_of_all_ranks_is_no_group():
    cluster, steps = Cluster.parse("2xa100x8@eth100"), []
    for group in (None, 16, 8):
        par = Parallelism(dp=16, zero=3, shard_group=group)
        steps.append(
            price_job(SHALLOW, par, cluster, global_batch=16, microbatch=1, setting=Setting("full"))
        )
    assert steps[0].step == steps[1].step and steps[0].memory == steps[1].memory
    assert steps[2].step < steps[0].step  # nothing is gathered between hosts
    assert steps[2].peak > steps[0].peak


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"dp": 8, "shard_group": 4}, "without ZeRO"),
        ({"dp": 8, "zero": 3, "shard_group": 3}, "8 data ranks cannot be grouped by 3"),
        ({"dp": 8, "zero": 3, "shard_group": 0}, "cannot be grouped by 0"),
        ({"dp": 8, "ep": 4, "zero": 1, "shard_group": 2}, "cannot be grouped by 2"),
    ],
)
def test_groups_that_cannot_be_are_refused(degrees, message):
    with pytest.raises(PlanError, match=message):
        Parallelism(**degrees)


def test_gradients_hide_only_where_gradients_overlap():
    """Sharded parameters gathered ahead say nothing of the gradients that are reduced after."""
    cluster, steps = Cluster.parse("2xa100x8@hdr200"), []
    for overlap in ((), ("parameters",), ("parameters", "gradients")):
        setting = Setting("none", overlap=frozenset(overlap))
        par = Parallelism(dp=16, zero=3)
        steps.append(
            price_job(
                SHALLOW, par, cluster, global_batch=16, microbatch=1, setting=setting
            ).seconds["travel"]
        )
    assert steps[0] > steps[1] > steps[2]


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_heads_may_be_wider_than_the_stream(family):
    """4 h n d of attention weights; products with them count as any other."""
    h, n, d, f = 1024, 8, 256, 3072
    shape = Shape(family, pricing.TRACED, h, n, n, f, 4096, 512, d)
    layer = pricing._parts(
        shape, 1, Parallelism(), Setting("none"), pricing._Known(Cluster.parse("a100x1"))
    )["layer"]
    ways = 2 if family == "gpt" else 3
    matrices = 4 * h * n * d + ways * h * f
    assert layer.weights == pytest.approx(matrices, rel=0.01)
    assert layer.forward.flop == pytest.approx(2 * 512 * (matrices + 2 * 512 * n * d))
    square = pricing._parts(
        replace(shape, head_dim=None),
        1,
        Parallelism(),
        Setting("none"),
        pricing._Known(Cluster.parse("a100x1")),
    )["layer"]
    assert square.weights < layer.weights and square.forward.compute < layer.forward.compute


def test_lean_ends_make_room_for_embedding_and_head():
    """Two layers fewer, taken from the ends: the stages between keep what they had."""
    cluster, memory, steps = Cluster.parse("a100x8"), [], []
    setting = Setting("full", attention="plain")
    for layers, lean in ((16, False), (14, True), (14, False)):
        found = price_job(
            replace(GPT22B, layers=layers), Parallelism(pp=8, lean_ends=lean), cluster,
            global_batch=32, microbatch=1, setting=setting,
        )  # fmt: skip
        memory.append([stage["state"] for stage in found.memory])
        steps.append(found.step)
    whole, lean, uneven = memory
    assert lean[1:7] == whole[1:7] and lean[0] < whole[0] and lean[7] < whole[7]
    assert uneven[6] < lean[6] and sum(uneven) == pytest.approx(sum(lean))
    assert steps[1] < steps[0]


@pytest.mark.parametrize(
    "example",
    [
        gpt.make("wide", replace(gpt.CONFIGS["gpt-tiny"], head_dim=16, hidden=96)),
        llama.make("wide", replace(llama.CONFIGS["llama-tiny"], head_dim=16)),
    ],
    ids=["gpt", "llama"],
)
def test_models_with_wide_heads_train(example):
    """Heads of 8 x 16 on a stream of 64: a step runs and lowers the loss that it reads."""
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    step, losses = jax.jit(example.step), []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
