"""Pipelines over unlike devices: never worse than one kind alone, a bound that holds, and they train."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

import meshwright as mw
from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import InfeasibleError, PlanError
from meshwright.ir.pipeline.schedule import check
from meshwright.models import build
from meshwright.planner.request import Request
from meshwright.planner.search.islands import Islands

TWO_KINDS = """
name: two-kinds
devices:
  fast: {{kind: cpu, memory: 4 GiB, reserve: 0 GiB, peak_flops: {{f32: 200 GFLOP/s}}, memory_bandwidth: 40 GB/s}}
  slow: {{kind: cpu, memory: 2 GiB, reserve: 0 GiB, peak_flops: {{f32: 70 GFLOP/s}}, memory_bandwidth: 20 GB/s}}
groups:
  - {{device: fast, hosts: 1, per_host: 4}}
  - {{device: slow, hosts: 2, per_host: 2}}
fabric:
  - {{tier: shm, scope: host, bandwidth: 4 GB/s, latency: 20 us}}
  - {{tier: net, scope: all, bandwidth: {net}, latency: 50 us}}
"""
REQUEST = Request(pp="auto", recompute="none", microbatches=4, schedule="zb-h1")
EXACT = replace(REQUEST, gap=0.0, time_limit=20)


def cluster(tmp_path, net: str = "1 GB/s") -> Cluster:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_KINDS.format(net=net))
    return Cluster.load(path)


@cache
def captured():
    example = build("gpt-tiny", batch=16, optimizer="sgd", dtype="f32")
    return capture(example.step, example.state, example.batch, donate_argnums=0)


def test_one_group_of_a_cluster_by_itself(tmp_path):
    whole = cluster(tmp_path)
    fast, slow = whole.only(0), whole.only(1)
    assert (fast.size, slow.size, slow.hosts) == (4, 4, 2)
    assert fast.device == whole.devices["fast"] and [t.name for t in fast.fabric] == ["shm"]
    assert [t.name for t in slow.fabric] == ["shm", "net"]
    assert slow.provenance["groups.0.hosts"] == "declared"
    assert whole.tier_joining(0, 4).name == "shm" and whole.tier_joining(4, 6).name == "shm"
    assert whole.tier_joining(3, 5).name == whole.tier_joining(4, 8).name == "net"


def test_a_pipeline_over_both_kinds_beats_either_alone(tmp_path):
    whole, found = cluster(tmp_path), captured()
    plan = plan_captured(found, whole, REQUEST, "gpt")
    alone = [
        plan_captured(found, whole.only(i), REQUEST, "gpt").estimate.step_seconds for i in range(2)
    ]
    assert plan.cluster == whole and plan.pipeline is not None
    assert set(plan.pipeline.programs) == {"stages"}
    assert plan.proof.lower_bound <= plan.estimate.step_seconds < min(alone)
    check(plan.pipeline.read(4))
    groups = [int(first >= 4) for first in plan.pipeline.first]
    assert set(groups) == {0, 1}
    layers = {kind: sum(s.blocks.count("layer") for s, g in zip(plan.pipeline.stages, groups, strict=True) if g == kind)
              for kind in (0, 1)}  # fmt: skip
    assert layers[0] > 0 and layers[1] > 0
    for stage, group in zip(plan.pipeline.stages, groups, strict=True):
        assert stage.peak_bytes <= 0.9 * whole.only(group).memory_per_device and stage.strategies
    assert "stages 1 on fast then 1 on slow" in "\n".join(plan.proof.searched) or len(groups) > 2


def test_every_combination_looked_at_is_no_better(tmp_path):
    """Oracle: without the estimate that ends the search."""
    graph = fold(captured().graph)
    islands = Islands(graph, cluster(tmp_path), EXACT, "gpt", "", print, print)
    islands._explore()
    every = Islands(graph, cluster(tmp_path), EXACT, "gpt", "", print, print)
    combinations = every._combinations()
    assert len(combinations) > 10
    for each in combinations:
        every.best = float("inf")
        every._look(each)
        assert every.found is not None and every.found[2].seconds >= islands.best * (1 - 1e-9)
        assert every.found[2].seconds >= islands.lower_bound()


def test_over_a_link_too_slow_one_kind_works_alone(tmp_path):
    plan = plan_captured(captured(), cluster(tmp_path, net="1 MB/s"), REQUEST, "gpt")
    assert plan.cluster.size == 4
    assert any("4 devices are left idle" in note for note in plan.notes)
    assert plan.proof.lower_bound < plan.estimate.step_seconds


def test_requests_that_unlike_devices_cannot_meet(tmp_path):
    whole, found = cluster(tmp_path), captured()
    with pytest.raises(mw.MeshwrightError, match="--pp auto"):
        plan_captured(found, whole, Request(), "gpt")
    with pytest.raises(PlanError, match="recompute cannot be"):
        plan_captured(found, whole, Request(pp="auto", recompute="some"), "gpt")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="interleaved puts several stages on a rank"):
        plan_captured(found, whole, replace(REQUEST, pp=8, schedule="interleaved"), "gpt")
    plan = plan_captured(found, whole, replace(REQUEST, schedule="interleaved"), "gpt")
    assert (
        plan.cluster.size == 4
        and plan.pipeline is not None
        and plan.pipeline.schedule == "interleaved"
    )
    assert any("4 devices are left idle" in note for note in plan.notes)
    assert "several stages on one rank, where groups are unlike" in plan.proof.left_out
    with pytest.raises(InfeasibleError, match="neither on one group of devices nor on all"):
        plan_captured(found, whole, replace(REQUEST, memory=1e5), "gpt")


@pytest.mark.slow
def test_it_trains_as_one_device_does(tmp_path):
    example = build("gpt-tiny", batch=16, optimizer="sgd", dtype="f32")
    step = mw.parallelize(
        example.step, cluster=cluster(tmp_path), pp="auto", microbatches=4, recompute="none", verify=True,
        donate_argnums=0,
    )  # fmt: skip
    plain, state = jax.jit(example.step), example.init(jax.random.key(0))
    other, batch = (
        jax.tree.map(lambda x: x.copy(), state),
        example.make_batch(np.random.default_rng(0)),
    )
    for _ in range(3):
        state, loss = step(state, batch)
        other, expected = plain(other, batch)
        np.testing.assert_allclose(loss["loss"], expected["loss"], rtol=1e-4)
    for mine, known in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(mine, known, rtol=2e-3, atol=1e-5)
