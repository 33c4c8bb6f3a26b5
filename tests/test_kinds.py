"""Kinds of ops that models seldom use are treated as their better known kin: run, kept, priced, and told to choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.rounding import chooses, moved_sums
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.graph import Graph, Op
from meshwright.ir.mesh import Mesh
from meshwright.ir.ops import KINDS
from meshwright.ir.passes.early import dear_values
from meshwright.ir.passes.recompute import AGAIN
from meshwright.ir.program import prepare
from meshwright.planner.cost.kernels import LEADERS, kernels_of, work
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build
from meshwright.planner.memory.storage import is_fused
from meshwright.planner.report.moves import spoken

N, D = 16, 8
X, W = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, D, D), (D, D)))


def pooled(start: float, combine: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda x: lax.reduce_window(x, start, combine, (1, 2, 1), (1, 1, 1), "SAME")


def into_rows(update: str) -> Callable[[Any], Any]:
    return lambda x: getattr(jnp.ones((4, D, D)).at[jnp.arange(N) % 4], update)(x)


MADE: dict[str, Callable[[Any], Any]] = {
    "scatter-sub": into_rows("subtract"),
    "scatter-mul": into_rows("multiply"),
    "scatter-max": into_rows("max"),
    "cummax": lambda x: lax.cummax(x, axis=1),
    "cumprod": lambda x: jnp.cumprod(x, axis=1),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, axis=1),
    "reduce_window_min": pooled(jnp.inf, lax.min),
    "reduce_window_max": pooled(-jnp.inf, lax.max),
    "reduce_window_sum": pooled(0.0, lax.add),
    "approx_top_k": lambda x: lax.approx_max_k(x, 2)[0],
    "cholesky": lambda x: jnp.linalg.cholesky(x @ x.swapaxes(1, 2) + D * jnp.eye(D)),
    "random_gamma": lambda x: jax.random.gamma(jax.random.key(0), x),
    "reduce_prod": lambda x: jnp.prod(x, 1),
    "argmin": lambda x: jnp.argmin(x, 1),
    "tan": jnp.tan,
    "atan2": lambda x: jnp.arctan2(x, 2 * x),
}


def seen(kind: str) -> tuple[Graph, Op]:
    """A graph with one op of a kind, behind an op that is fused with what reads it."""
    graph = fold(capture(lambda x: jnp.sin(MADE[kind](jnp.sin(x) + 2)), X).graph).small
    return graph, next(visit.op for visit in graph.visits if visit.op.kind == kind)


def having(trait: str) -> list[str]:
    return [kind for kind in MADE if trait in KINDS[kind].traits]


@pytest.mark.parametrize("kind", having("kernel"))
def test_runs_by_itself_and_in_a_layout_of_its_own(kind: str):
    graph, op = seen(kind)
    assert kernels_of(prepare(graph, "none")).ends.issuperset((*op.inputs, *op.outputs))
    assert kind in LEADERS


@pytest.mark.parametrize("kind", having("reduction") + having("transcendental"))
def test_xla_stores_it_and_does_not_make_it_again(kind: str):
    assert not is_fused(seen(kind)[1])


@pytest.mark.parametrize("kind", having("transcendental"))
def test_takes_as_long_as_an_exponential(kind: str):
    graph, op = seen(kind)
    assert work(op, graph.types) == 16 * N * D * D


@pytest.mark.parametrize("kind", ["reduce_window_max", "scatter-max", "cholesky"])
def test_is_kept_where_only_chains_of_cheap_ops_are_made_again(kind: str):
    def step(w: Any, x: Any) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(
            lambda w: jnp.sum(jnp.tanh(MADE[kind](jnp.sin(x @ w)) @ w) ** 2)
        )(w)
        return w - 0.1 * gradient, value

    program = prepare(fold(capture(step, W, X).graph).small, "elementwise")
    again = {visit.op.kind for visit in program.graph.visits if AGAIN in visit.op.tag}
    assert "tanh" in again and kind not in again


def test_a_decomposition_is_not_done_twice_for_a_total():
    graph = capture(jnp.linalg.cholesky, X).graph
    (op,) = (op for op in graph.ops if op.kind == "cholesky")
    assert dear_values(graph, {0: 0}).issuperset(op.outputs)


def test_a_squeezed_input_is_named_as_the_input():
    graph = fold(
        capture(lambda w, x: x @ jnp.squeeze(w, 0), W.update(shape=(1, D, D)), X).graph
    ).small
    cost = Roofline(Cluster.parse("h100x1"))
    space = build(prepare(graph, "none"), 1, cost, Layouts(cost.collectives(Mesh.of(x=1))))
    (squeeze,) = (op for op in space.program.graph.ops if op.kind == "squeeze")
    assert spoken(space)[squeeze.tag] == graph.input_tags[0]


@pytest.mark.parametrize("kind", having("choosing"))
def test_it_chooses(kind: str):
    assert chooses(seen(kind)[0])


@pytest.mark.parametrize("kind", having("summing"))
def test_rounding_may_move_a_sum(kind: str):
    ones, op = np.ones(64, np.float32), Op(kind, (0,), (1,))
    (moved,) = moved_sums(op, (), [jnp.asarray(ones)], jnp.uint32(1), jnp.float32(4))
    assert (np.asarray(moved) != ones).any()
