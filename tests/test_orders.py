"""Prices of other orders of dims, of kernels apart, and of small kernels: what XLA's CPU backend does."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.blocks import fold
from meshwright.ir.cluster import Cluster
from meshwright.ir.cluster_parts import Stream
from meshwright.ir.errors import InfeasibleError
from meshwright.ir.program import prepare
from meshwright.planner.cost.kernels import kernels_of
from meshwright.planner.cost.orders import (
    is_weight_gradient,
    moves_innermost,
    rewritten,
    transposes,
)
from meshwright.planner.meshes import meshes
from meshwright.planner.request import Request

PLAIN = Cluster.parse("2xcpu")


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def only(kind, function, *arguments):
    """The op of this kind in a function's graph, and the types around it."""
    graph = capture(function, *arguments).graph
    (op,) = [visit.op for visit in graph.visits if visit.op.kind == kind]
    return op, graph.types


@pytest.mark.parametrize(
    ("shape", "order", "moves"),
    [((4, 5), (1, 0), True), ((4, 5, 6), (1, 0, 2), False), ((4, 5, 1), (0, 2, 1), False), ((4, 1), (1, 0), False)],
)
def test_only_long_dims_count_as_innermost(shape, order, moves):
    assert moves_innermost(shape, order) == moves
    op, types = only("transpose", lambda x: jnp.transpose(x, order), f32(*shape))
    assert transposes(op, types) == moves


@pytest.mark.parametrize(
    ("dims", "again"),
    [
        ((((2,), (1,)), ((0,), (0,))), []),  # [b, m, k] x [b, k, n]
        ((((1,), (1,)), ((0,), (0,))), [0]),  # the left sums over its rows
        ((((2,), (2,)), ((0,), (0,))), [1]),  # the right over its columns
        ((((1, 2), (1, 2)), ((), ())), []),  # not batched
    ],
)
def test_batched_products_have_operands_written_again(dims, again):
    op, types = only("dot_general", lambda x, y: jax.lax.dot_general(x, y, dims), f32(4, 8, 8), f32(4, 8, 8))
    assert rewritten(op, types) == again


def test_a_weight_gradient_sums_over_the_tokens():
    def loss(w, x):
        return jnp.sum(jnp.sin(x @ w))

    graph = capture(jax.value_and_grad(loss), f32(8, 6), f32(2, 4, 8)).graph
    products = [v.op for v in graph.visits if v.op.kind == "dot_general"]
    assert [is_weight_gradient(op) for op in products] == [False, True]


def test_reductions_and_dear_ops_are_kernels_apart():
    """Softmax: one chain on a GPU; on a CPU the exponentials and both reductions are stored."""
    def softmax(x):
        return jax.nn.softmax(x @ x)

    program = prepare(fold(capture(softmax, f32(64, 64)).graph).small, "none")
    apart, whole = kernels_of(program, fusion="apart"), kernels_of(program)
    stored = {v.op.kind for v in program.graph.visits if apart.stores.issuperset(v.op.outputs)}
    assert {"exp", "reduce_max", "reduce_sum"} <= stored
    assert whole.ends < apart.ends


# ---------------------------------------------------------------- what they cost


def seconds(function, *arguments, **figures):
    """Predicted seconds of a function, its batch cut over two devices."""
    cluster = PLAIN
    for name, figure in figures.items():
        cluster = cluster.with_(f"device.{name}", figure)
    pins = Request(gap=0.0, mesh=(2,), microbatches=1, recompute="none")
    return plan_captured(capture(function, *arguments), cluster, pins, "f").estimate.step_seconds


def test_figures_left_out_change_nothing_and_slow_ones_cost():
    def turned(x):
        return jnp.swapaxes(x, 1, 2) * 2.0

    plain = seconds(turned, f32(2, 64, 64))
    assert seconds(turned, f32(2, 64, 64), transpose_bandwidth="1000 GB/s") == plain
    nbytes = 2 * 4 * 64 * 64  # of one device, read and written
    slow = seconds(turned, f32(2, 64, 64), transpose_bandwidth="1 MB/s")
    assert slow - plain == pytest.approx(nbytes / 1e6, rel=1e-2)

    def gradient(x, g):
        return jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())))

    work = [f32(64, 64, 64), f32(64, 64, 64)]
    assert seconds(gradient, *work, gradient_share=0.01) > 10 * seconds(gradient, *work)


def mlp(w, batch):
    def loss(w):
        return jnp.mean(jnp.tanh(batch["x"] @ w) @ w.T * batch["x"])

    value, gradient = jax.value_and_grad(loss)(w)
    return w - 0.1 * gradient, value


@pytest.mark.parametrize("memory", [None, 200e3])
def test_where_small_kernels_are_quicker_no_bound_carries_over_to_more_microbatches(memory):
    """A cache of 32 KiB: eight microbatches beat one, and the search finds and proves it."""
    streams = [Stream(size=32 * 1024, bandwidth=1e12), Stream(size=33 * 1024, bandwidth=1e8)]
    cluster = PLAIN.with_("device.streams", [s.model_dump() for s in streams]).with_("device.launch", "1 ns")
    cluster = cluster.with_("fabric.shared.latency", "1 ns")
    captured = capture(mlp, f32(64, 64), {"x": f32(128, 64)})
    found = plan_captured(captured, cluster, Request(gap=1e-6, memory=memory, recompute="none"), "mlp")
    best = {}
    for mesh, count in itertools.product(meshes(cluster), (1, 2, 4, 8, 16)):
        pins = Request(gap=1e-6, memory=memory, mesh=mesh.shape, recompute="none", microbatches=count)
        try:
            best[count] = plan_captured(captured, cluster, pins, "mlp").estimate.step_seconds
        except InfeasibleError:
            continue
    assert found.microbatches > 1 and min(best, key=lambda count: best[count]) > 1
    assert found.estimate.step_seconds <= min(best.values()) * (1 + 1e-5)
    assert found.proof.lower_bound <= min(best.values()) * (1 + 1e-9)
