"""Kernels as XLA makes them on GPUs: what products multiply in, what recomputation costs, what profilers show."""

import jax
import jax.numpy as jnp
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.mesh import Mesh
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.cost.products import multiplied_as
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build as build_space


@pytest.mark.parametrize(
    ("precision", "cluster", "dtype"),
    [
        (None, "h100x1", "tf32"),
        ("highest", "h100x1", "f32"),
        (jax.lax.DotAlgorithmPreset.BF16_BF16_F32, "h100x1", "bf16"),
        (None, "1xcpu", "f32"),
    ],
)
def test_f32_products_are_multiplied_as_xla_does(precision, cluster, dtype):
    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    graph = capture(
        lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision), square, square
    ).graph
    (product,) = (op for op in graph.ops if op.kind == "dot_general")
    cost = Roofline(Cluster.parse(cluster))
    found = multiplied_as(product, graph.types, cost.device, cost.execution_model)
    assert found == dtype


def test_the_more_is_recomputed_the_longer_a_step_takes():
    example = build("gpt2", layers=4, batch=8)
    small = fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph).small
    cost, seconds = Roofline(Cluster.parse("h100x1")), []
    for policy in ("none", "elementwise", "full"):
        space = build_space(
            prepare(small, policy), 1, cost, Layouts(cost.collectives(Mesh.of(x=1)))
        )
        seconds.append(sum(float(own[0]) * space.runs[tag] for tag, own in space.own.items()))
    assert seconds == sorted(seconds) and seconds[-1] > 1.1 * seconds[0]


def test_profilers_see_the_phase_and_tag_of_an_op(small_plan):
    example = build("gpt-tiny")
    hlo = mw.lower(small_plan, example.step, example.state, example.batch, donate_argnums=0).hlo()
    assert all(f"/{phase}/" in hlo for phase in ("forward", "backward", "update"))
