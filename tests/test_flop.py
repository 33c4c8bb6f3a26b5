"""What ops cost where that is not plain: grouped products, decompositions, kernels by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.rules import rule_of
from meshwright.planner.cost.flop import flop

S = jax.ShapeDtypeStruct


def flop_of(step, *args, kind):
    graph = capture(step, *args).graph
    return [
        flop(v.op, rule_of(v.op, graph.types), graph.types)
        for v in graph.visits
        if v.op.kind == kind
    ]


def test_a_grouped_product_and_both_its_gradients_cost_two_per_row_column_and_term():
    m, k, n, groups = 96, 8, 16, 4
    step = jax.grad(lambda x, w, g: (jax.lax.ragged_dot(x, w, g) ** 2).sum(), argnums=(0, 1))
    args = S((m, k), jnp.float32), S((groups, k, n), jnp.float32), S((groups,), jnp.int32)
    assert flop_of(step, *args, kind="ragged_dot_general") == [2.0 * m * k * n] * 3


def test_a_grouped_product_over_a_batch_costs_what_the_batch_does():
    numbers = jax.lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ())

    def step(x, w, g):
        return jax.lax.ragged_dot_general(x, w, g, numbers)

    args = S((6, 8, 4), jnp.float32), S((6, 4, 16), jnp.float32), S((3,), jnp.int32)
    assert flop_of(step, *args, kind="ragged_dot_general") == [2.0 * 6 * 8 * 4 * 16]


def test_the_plan_of_a_grouped_product_has_its_flop_and_cuts_it():
    def step(w, x, g):
        return w - 0.1 * jax.grad(lambda w: jnp.mean(jax.lax.ragged_dot(x, w, g) ** 2))(w)

    m, k, n, groups = 8192, 1024, 2048, 8
    args = S((groups, k, n), jnp.bfloat16), S((m, k), jnp.bfloat16), S((groups,), jnp.int32)
    found = mw.plan(step, *args, cluster="h100x8")
    assert found.estimate.flop == 2 * 2 * m * k * n
    assert not any(use.batch + use.sequence + use.columns + use.sums < 0.99 for use in found.uses)


@pytest.mark.parametrize(
    ("step", "kind", "expected"),
    [
        (jnp.linalg.cholesky, "cholesky", 8**3 / 3),
        (lambda a: jax.lax.linalg.lu(a)[0], "lu", 2 * 8**3 / 3),
        (jnp.fft.fft, "fft", 5 * 64 * 3),
        (lambda a: jax.scipy.linalg.solve_triangular(a, a), "triangular_solve", 8**3),
    ],
)
def test_decompositions_cost_what_the_textbook_says(step, kind, expected):
    assert sum(flop_of(step, S((8, 8), jnp.float32), kind=kind)) == pytest.approx(expected)


def double(cost=None):
    def kernel(x, out):
        out[...] = x[...] * 2

    return lambda x: pl.pallas_call(kernel, out_shape=x, interpret=True, cost_estimate=cost)(x)


def planned(call, x):
    return mw.plan(lambda w: w - call(w), x, cluster="h100x8")


def test_a_kernel_by_hand_costs_what_it_says_and_the_plan_tells_so():
    x = S((64, 64), jnp.float32)
    told = pl.CostEstimate(flops=10**15, transcendentals=0, bytes_accessed=10**6)
    plain, slow = (planned(double(cost), x) for cost in (None, told))
    assert slow.estimate.step_seconds > 1 > 1e-3 > plain.estimate.step_seconds
    assert any("pallas_call" in note and "1e+15 FLOP" in note for note in slow.notes)
    assert any("pallas_call" in note and "FLOP are not known" in note for note in plain.notes)
