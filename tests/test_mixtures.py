"""Mixtures of experts: laid out as experts do, written as users do, run as on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import meshwright as mw
from meshwright import api
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.lower_pipeline import lower_pipeline
from meshwright.backends.xla.verify import verify_outputs
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.fingerprint import fingerprint
from meshwright.models.experts import routed_experts
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.pipeline.schedules import one_f_one_b

from .pipelines import case, pipelined

EXCHANGES = 4  # of a layer: tokens to their experts and back, and the gradients of both


def given(layout: Parallelism, cluster: str):
    captured = case("mixtral-tiny")[0]
    return fixed_plan(
        fold(captured.graph), Cluster.parse(cluster), layout, name="mixtral-tiny",
        fingerprint=fingerprint(captured.graph),
    )  # fmt: skip


def exchanged(lines) -> tuple[float, float]:
    """Bytes of all-to-alls, planned and compiled."""
    found = [line for line in lines if line.kind == "all_to_all"]
    return sum(line.predicted_bytes for line in found), sum(line.compiled_bytes for line in found)


@pytest.mark.parametrize(
    "layout", [Parallelism(dp=8, ep=8, zero=1), Parallelism(dp=8, ep=2)], ids=["ep8", "dp4 ep2"]
)
def test_experts_beside_data_parallelism_equal_one_device(layout):
    """Tokens go to their experts and come back by all-to-alls, as many and as large as planned."""
    captured, leaves, _, truth = case("mixtral-tiny")
    found = given(layout, "8xcpu")
    lowered = lower(found, captured)
    verify_outputs(truth, lowered.jitted(*leaves), captured.graph.output_names)
    planned, compiled = exchanged(api.RunningStep(lowered).audit().lines)
    slots = 16 * 64 * 64 * 4 / layout.dp  # B · E·C · D floats on each device
    assert planned == pytest.approx(EXCHANGES * 2 * slots, rel=0.02)  # weights of choices are small
    assert compiled == pytest.approx(planned, rel=0.01)


def test_experts_within_stages_equal_one_device():
    captured, leaves, _, truth = case("mixtral-tiny")
    schedule = one_f_one_b(2, 4)
    stages = pipelined(given(Parallelism(dp=4, ep=2), "4xcpu"), captured, schedule)
    stages = stages.model_copy(update={"device_count": 8})
    lowered = lower_pipeline(stages, captured)
    verify_outputs(truth, lowered.jitted(*leaves), captured.graph.output_names)
    _, compiled = exchanged(api.RunningStep(lowered).audit().lines)
    assert compiled == pytest.approx(EXCHANGES * 2 * 16 * 64 * 64 * 4 / 4, rel=0.02)


# ---------------------------------------------------------------- as users write them

B, S, D, F, E, J = 8, 16, 32, 64, 4, 2
CAPACITY = 8


def weights() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "router_DE": (D, E),
        "gate_EDF": (E, D, F),
        "up_EDF": (E, D, F),
        "down_EFD": (E, F, D),
    }
    return {
        name: jax.random.normal(key, shape) / 4
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def feed_forward(w, x, product=jnp.matmul):
    return product(jax.nn.silu(product(x, w["gate_EDF"])) * product(x, w["up_EDF"]), w["down_EFD"])


def looked_up(w, x, weight, expert):
    return routed_experts(x, expert, weight, w, CAPACITY)


def slots_of(expert):
    """In which of E·C slots each choice lies, out of range where the expert is full."""
    one_BXE = jax.nn.one_hot(expert.reshape(B, -1), E, dtype=jnp.int32)
    slot_BX = ((jnp.cumsum(one_BXE, 1) - 1) * one_BXE).sum(-1)
    return jnp.where(slot_BX < CAPACITY, expert.reshape(B, -1) * CAPACITY + slot_BX, E * CAPACITY)


def scattered(w, x, weight, expert):
    """Tokens written into the slots of each sequence, results read from them."""
    place_BX, tokens = slots_of(expert), jnp.repeat(x, J, axis=1)

    def write(place, token):
        return jnp.zeros((E * CAPACITY, D)).at[place].set(token, mode="drop")

    def read(rows, place):
        return rows.at[place].get(mode="fill", fill_value=0)

    y = feed_forward(w, jax.vmap(write)(place_BX, tokens).reshape(B, E, CAPACITY, D))
    y_BXD = jax.vmap(read)(y.reshape(B, -1, D), place_BX)
    return (y_BXD.reshape(B, S, J, D) * weight[..., None]).sum(2)


def one_hot(w, x, weight, expert):
    slot = jax.nn.one_hot(slots_of(expert).reshape(B, S, J), E * CAPACITY)
    x_EBCD = jnp.einsum("bsjec,bsd->ebcd", slot.reshape(B, S, J, E, CAPACITY), x)
    y = feed_forward(w, x_EBCD, lambda a, b: jnp.einsum("ebci,eio->ebco", a, b))
    combine = (slot * weight[..., None]).sum(2).reshape(B, S, E, CAPACITY)
    return jnp.einsum("bsec,ebcd->bsd", combine, y)


def grouped(w, x, weight, expert):
    """All tokens of the batch sorted, no capacity (`ragged_dot`)."""
    order = jnp.argsort(expert.reshape(-1))
    sizes = jnp.bincount(expert.reshape(-1), length=E)
    rows = x.reshape(-1, D)[order // J]
    y = feed_forward(w, rows, lambda a, b: jax.lax.ragged_dot(a, b, sizes))[jnp.argsort(order)]
    return (y.reshape(B, S, J, D) * weight[..., None]).sum(2)


FORMS = {f.__name__: f for f in (looked_up, scattered, one_hot, grouped)}


def step_of(mix):
    def loss(w, x):
        top, expert = jax.lax.top_k(x @ w["router_DE"], J)
        return jnp.mean((x + mix(w, x, jax.nn.softmax(top), expert)) ** 2)

    def step(w, x):
        value, grads = jax.value_and_grad(loss)(w, x)
        return jax.tree.map(lambda p, g: p - g, w, grads), value

    return step


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_experts_equals_one_device(form):
    mw.parallelize(step_of(FORMS[form]), cluster="8xcpu", mesh=(2, 4), verify=True)(
        weights(), jax.random.normal(jax.random.key(1), (B, S, D))
    )
