"""Of plans that are as good as each other the plainest is taken, in the fewest bytes."""

import jax
import jax.numpy as jnp
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import Captured, capture
from meshwright.backends.xla.lower import lower
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.fingerprint import fingerprint
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.request import Request

CLUSTER = Cluster.parse("h100x8")


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def normed(x):
    mean = x.mean((0, 1, 2))
    return (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, (0, 1, 2)) + 1e-5)


def convnet(w, x):
    for kernel in w["convs"]:
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(normed(x))
    return x.mean((1, 2)) @ w["head"]


def mlp(w, x):
    return jnp.tanh(x @ w["up"]) @ w["head"]


CONVS = {"convs": [f32(3, 3, 64, 64), f32(3, 3, 64, 64)], "head": f32(64, 100)}
STEPS = {
    "convnet": (convnet, CONVS, f32(512, 56, 56, 64)),
    "mlp": (mlp, {"up": f32(2048, 4096), "head": f32(4096, 2048)}, f32(2**18, 2048)),
}


def captured(name: str) -> Captured:
    net, weights, x = STEPS[name]

    def step(w, x, label, weight):
        def loss(w):
            picked = jnp.take_along_axis(jax.nn.log_softmax(net(w, x)), label[:, None], 1)[:, 0]
            return -jnp.mean(picked * weight)

        value, grads = jax.value_and_grad(loss)(w)
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value

    label = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    return capture(step, weights, x, label, f32(x.shape[0]))


@pytest.mark.parametrize("name", STEPS)
def test_a_data_parallel_plan_holds_no_batch_input_whole(name):
    step = captured(name)
    plan = plan_captured(step, CLUSTER, Request(mesh=(8,), recompute="none", microbatches=1), name)
    rows = [row for row in plan.tensors if row.role == "batch"]
    assert [row.local_shape[0] * 8 for row in rows] == [row.shape[0] for row in rows]
    assert len(rows) == 3
    compiled = lower(plan, step).compiled.memory_analysis()
    inputs = [t for t in plan.tensors if t.role in ("batch", "parameter")]
    assert compiled.argument_size_in_bytes == pytest.approx(
        sum(t.local_bytes for t in inputs), rel=0.01
    )


@pytest.mark.parametrize("name", STEPS)
def test_no_plan_is_slower_than_naive_data_parallelism(name):
    """A mean over the batch that several ops read is summed over devices once."""
    step = captured(name)
    plan = plan_captured(step, CLUSTER, Request(), name)
    naive = fixed_plan(
        fold(step.graph), CLUSTER, Parallelism(dp=8), name=name, fingerprint=fingerprint(step.graph)
    )
    assert plan.estimate.step_seconds <= naive.estimate.step_seconds * 1.01
