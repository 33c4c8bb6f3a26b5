"""Where a forward pass without equal layers, and a layer, may be cut; pipelines of such parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import inf

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.pipeline import narrow
from meshwright.planner.pipeline.choices import PipelineConfig
from meshwright.planner.pipeline.narrow import _least_across
from meshwright.planner.pipeline.search import Found
from meshwright.planner.pipeline.units import find_units
from meshwright.planner.problem import Problem
from meshwright.planner.request import Request

from .pipelines import pipelines_on

WIDTHS = (16, 64, 32, 96, 48, 128, 24, 80, 8)


def unlike_chain(params, batch):
    """One SGD step of a chain of products of different widths."""

    def loss(params):
        x = batch["x"]
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean((x - batch["y"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return [p - 0.1 * g for p, g in zip(params, gradients, strict=True)], {"loss": value}


def chain_problem(
    cluster: str, request: Request, batch: int = 1024, widths: Sequence[int] = WIDTHS
) -> Problem:
    shape = jax.ShapeDtypeStruct
    params = [shape(pair, jnp.float32) for pair in pairwise(widths)]
    data = {
        "x": shape((batch, widths[0]), jnp.float32),
        "y": shape((batch, widths[-1]), jnp.float32),
    }
    graph = fold(capture(unlike_chain, params, data, donate_argnums=0).graph)
    where = Cluster.parse(cluster)
    return Problem(graph, where, request, Roofline(where), "chain", "x")


def units_of(name: str, stages: int = 0):
    example = build(name)
    graph = fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph)
    return find_units(graph, prepare(graph.small, "none"), stages)


# ---------------------------------------------------------------- places


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(4, 20),
)
def test_cuts_at_narrow_places_equal_trying_all(pairs, most):
    """Parts have at most so much work; one atom may be more than that, with a quarter of it besides."""
    atoms, across = [float(a) for a, _ in pairs], [float(c) for _, c in pairs[1:]]
    inside = range(1, len(atoms))

    def allowed(cut):
        parts = [atoms[a:b] for a, b in zip((0, *cut), (*cut, len(atoms)), strict=True)]
        return all(sum(part) <= most or sum(part) - max(part) <= most / 4 for part in parts)

    every = [cut for n in range(len(atoms)) for cut in combinations(inside, n) if allowed(cut)]
    found = _least_across(atoms, across, most)
    width = lambda cut: sum(across[i - 1] for i in cut)  # noqa: E731
    assert allowed(found) and width(found) == min(map(width, every))


@pytest.mark.parametrize(("name", "fewest"), [("wrn-tiny", 8), ("dlrm", 5)])
def test_models_without_equal_layers_have_parts(name, fewest):
    units = units_of(name)
    assert fewest <= len(units) <= 40 and set(units.names) == {"part"}
    assert units.kinds == tuple(range(len(units)))
    assert units.words(0, 2) == "parts 1-2" and units.words(2, 3) == "part 3"
    assert max(units.work) < 0.35 * sum(units.work)


def test_between_layers_too_where_much_lies_there():
    """Downsampling blocks of a wide ResNet lie between its layers; none is more than two of its parts may be."""
    units = units_of("wrn-50-2")
    assert units.words(0, len(units)) == (
        "start, layers 1-2, between, layers 3-5, between, layers 6-10, between, layers 11-12, end"
    )
    assert units.repeats == 5  # of the longest run; the others are no repeats of it


def test_few_layers_are_cut_in_two():
    whole, cut = units_of("gpt-tiny", 2), units_of("gpt-tiny", 4)
    assert len(whole) == 6 and len(cut) == 10
    assert cut.words(0, 10) == "start, layers 1-4, end"
    assert cut.words(2, 6) == "second half of layer 1, layer 2, first half of layer 3"
    assert cut.words(1, 2) == "first half of layer 1"


def test_logits_are_no_place_to_cut():
    """Most of gpt2's head is one product; what it makes is 65 times as wide as what layers hand on."""
    assert [name for name in units_of("gpt2").names if name != "layer"] == ["start", "end"]


# ---------------------------------------------------------------- the oracle


def test_parts_lose_little_against_every_cut_of_every_op(monkeypatch):
    """Oracle: every op a part, every cut of them on every mesh priced, one by one."""
    request = Request(pp="auto", microbatches=4, recompute="none", schedule="1f1b", gap=0.0)
    coarse = pipelines_on(chain_problem("4xcpu", request))
    coarse.explore()
    monkeypatch.setattr(narrow, "FINEST", 1e-9)
    fine = pipelines_on(chain_problem("4xcpu", request))
    count, best = len(fine.choices.units), inf
    assert len(coarse.choices.units) == 8 and count == 28
    for family in fine.choices.families():
        shape, fine.best = PipelineConfig(family.stages, family.mesh, family.policy, 4), Found()
        fine.solve_shape(shape)
        pricing, (schedule,) = fine.best.pricing, fine.choices.schedules_for(shape)
        assert pricing is not None
        for cut in combinations(range(1, count), shape.stages - 1):
            priced = pricing.with_cut(schedule, (0, *cut), best)
            best = min(best, priced.seconds if priced else inf)
    assert coarse.lower_bound() <= best <= coarse.best.seconds * (1 + 1e-9)
    assert coarse.best.seconds <= 1.05 * best
