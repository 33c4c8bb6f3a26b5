"""Laws of the one-hot solver: it agrees with brute force, and never says more than it knows."""

import itertools
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshwright.planner.solver.elimination import eliminate, elimination_order, min_marginals
from meshwright.planner.solver.exact import (
    Edge,
    MemoryRow,
    OneHotProblem,
    evaluate,
    fits,
    relative_gap,
    solve,
)
from meshwright.planner.solver.messages import Messages
from meshwright.planner.solver.mip import solve_mip
from meshwright.planner.solver.multipliers import Prices
from meshwright.planner.solver.reductions import reduced_from


def random_problem(seed: int, *, rows: int = 3, forbidden: float = 0.15) -> OneHotProblem:
    """A graph of up to 5 nodes with integer costs, so that sums are exact."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    sizes = rng.integers(1, 5, count)

    def table(*shape: int) -> np.ndarray:
        costs = rng.integers(-5, 20, shape).astype(float)
        return np.where(rng.random(shape) < forbidden, inf, costs)

    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    edges = [Edge(a, b, table(sizes[a], sizes[b])) for a, b in pairs if rng.random() < 0.35]
    points = [
        MemoryRow(
            f"point {r}",
            float(rng.integers(0, 5 * count + 1)),
            {i: rng.integers(0, 10, sizes[i]).astype(float) for i in range(count)},
        )
        for r in range(rng.integers(0, rows + 1))
    ]
    return OneHotProblem(tuple(table(size) for size in sizes), tuple(edges), tuple(points))


def brute_force(problem: OneHotProblem) -> float:
    everything = itertools.product(*[range(cost.size) for cost in problem.costs])
    return min((evaluate(problem, x) for x in everything if fits(problem, x)), default=inf)


def transformer_like(
    nodes: int, dims: int, seed: int = 0, *, rows: int = 20, tightness: float = 0.5
) -> OneHotProblem:
    """A chain of ops with skip connections, sharded over axes of 2, 4 and 8 devices.

    A choice gives each axis one of `dims` dims, the last of which means replicated:
    dims**3 choices. Nodes pay compute / shards and an all-reduce when the contracted
    dim is split; edges pay for each axis that moves. Each row holds all weights and
    the activations of a window of nodes; its limit lies `tightness` of the way from
    the least usage to that of the optimum without rows.
    """
    rng = np.random.default_rng(seed)
    axes = np.array([2, 4, 8])
    assigned = np.array(list(itertools.product(range(dims), repeat=len(axes))))
    split = np.stack([np.prod(np.where(assigned == d, axes, 1), axis=1) for d in range(dims)], 1)
    ways = split[:, : dims - 1].prod(axis=1)
    latency, seconds_per_byte = 1e-5, 1e-11

    def node() -> np.ndarray:
        size, over = 10 ** rng.uniform(7, 8.5), split[:, rng.integers(dims - 1)]
        reduce = latency + 2 * seconds_per_byte * size * (over - 1) / ways
        compute = 10 ** rng.uniform(-3, -1.5) / ways
        return (compute + np.where(over > 1, reduce, 0.0)) * (1 + 0.02 * rng.random(ways.size))

    def edge(a: int, b: int) -> Edge:
        renamed = np.append(rng.permutation(dims - 1), dims - 1)[assigned]
        seconds = np.zeros((ways.size, ways.size))
        for axis, size in enumerate(axes):
            moved = (renamed[:, None, axis] != assigned[None, :, axis]) & (
                renamed[:, None, axis] != dims - 1
            )
            moving = seconds_per_byte * 10 ** rng.uniform(7, 8.5) * (size - 1) / ways
            seconds += np.where(moved, latency + moving[:, None], 0.0)
        return Edge(a, b, seconds)

    chain = [(i - 1, i) for i in range(1, nodes)]
    skips = [(i, i + 4) for i in range(0, nodes - 4, 4)] + [
        (i, i + 6) for i in range(0, nodes - 6, 9)
    ]
    problem = OneHotProblem(
        tuple(node() for _ in range(nodes)), tuple(edge(a, b) for a, b in chain + skips)
    )
    weights = [10 ** rng.uniform(8, 9.5) / split[:, rng.integers(dims - 1)] for _ in range(nodes)]
    activations = [10 ** rng.uniform(7, 8.5) / ways for _ in range(nodes)]
    if not rows:
        return problem
    free = solve(replace(problem, rows=())).choices
    assert free is not None
    return replace(
        problem,
        rows=tuple(
            _window(f"point {r}", r * nodes // rows, weights, activations, free, tightness)
            for r in range(rows)
        ),
    )


def _window(name, middle, weights, activations, free, tightness) -> MemoryRow:
    usage = {
        i: weight + (activation if abs(i - middle) <= 10 else 0.0)
        for i, (weight, activation) in enumerate(zip(weights, activations, strict=True))
    }
    least = sum(float(held.min()) for held in usage.values())
    taken = sum(float(held[free[i]]) for i, held in usage.items())
    return MemoryRow(name, least + tightness * (taken - least), usage)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6))
@example(4422)  # the one assignment that fits does so to the byte: 13 of 13
def test_solver_matches_brute_force(seed):
    problem = random_problem(seed)
    best, found = brute_force(problem), solve(problem, gap=1e-6)
    if best == inf:
        assert (found.status, found.choices) == ("infeasible", None)
        return
    assert (found.status, found.stopped_by) == ("optimal", "proof")
    assert found.choices is not None
    assert fits(problem, found.choices)
    assert found.objective == evaluate(problem, found.choices) == best
    assert found.lower_bound <= best


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 150))
def test_cutoff_never_hides_a_better_answer(seed, cutoff):
    problem = random_problem(seed, forbidden=0.0)
    best, found = brute_force(problem), solve(problem, gap=1e-6, cutoff=cutoff)
    nearly = cutoff * (1 - 1e-6) - 1e-9
    if best < nearly:
        assert found.objective == best
    elif best < inf:
        assert nearly <= found.lower_bound <= best


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_relaxing_never_costs_more(seed):
    problem = random_problem(seed)
    found = solve(replace(problem, rows=()))
    if found.status != "infeasible":
        assert found.lower_bound <= brute_force(problem)
        assert found.objective == pytest.approx(brute_force(replace(problem, rows=())), rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_min_marginals_are_the_optimum_with_one_choice_fixed(seed):
    problem = random_problem(seed, rows=0, forbidden=0.0)
    edges = tuple({frozenset((e.a, e.b)): e for e in problem.edges}.values())
    order = elimination_order([cost.size for cost in problem.costs], edges)
    found = min_marginals(problem.costs, edges, order)
    for node, marginals in enumerate(found.nodes):
        for choice, marginal in enumerate(marginals):
            fixed = list(problem.costs)
            fixed[node] = np.where(np.arange(marginals.size) == choice, fixed[node], inf)
            assert marginal == brute_force(OneHotProblem(tuple(fixed), edges))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_messages_bound_every_choice_from_below(seed):
    problem = random_problem(seed, rows=0, forbidden=0.0)
    sizes = [cost.size for cost in problem.costs]
    messages = Messages(sizes, problem.edges)
    last = [messages.sweep(np.concatenate(problem.costs)) for _ in range(6)][-1]
    reduced_costs = np.split(last.reduced, np.cumsum(sizes)[:-1])
    order = elimination_order(sizes, problem.edges)
    assert last.bound <= eliminate(problem.costs, problem.edges, order)[0] + 1e-9
    for node, reduced in enumerate(reduced_costs):
        for choice, more in enumerate(reduced):
            fixed = list(problem.costs)
            fixed[node] = np.where(np.arange(reduced.size) == choice, fixed[node], inf)
            assert (
                last.floor + more <= brute_force(OneHotProblem(tuple(fixed), problem.edges)) + 1e-9
            )


def test_an_order_knows_how_large_it_is_beyond_64_bits():
    edges = [Edge(a, b, np.zeros((0, 0))) for a, b in itertools.combinations(range(8), 2)]
    order = elimination_order(np.full(8, 1000), edges)
    assert order.largest == 1000**8 and order.entries > 1000**8


def test_elimination_of_a_table_too_large_for_one_chunk():
    rng = np.random.default_rng(0)
    tables = [rng.random((100, 100)) for _ in range(3)]
    edges = [Edge(0, 1, tables[0]), Edge(1, 2, tables[1]), Edge(0, 2, tables[2])]
    whole = tables[0][:, :, None] + tables[1][None] + tables[2][:, None, :]
    value, choices = eliminate([np.zeros(100)] * 3, edges, elimination_order([100] * 3, edges))
    assert value == pytest.approx(whole.min())
    assert whole[choices] == whole.min()


def test_prices_climb_to_the_top_of_the_lagrangian():
    """Cost 0 and usage 2, or cost 1 and usage 0, at limit 1: the dual is 0.5, at price 0.5."""
    bundle, price = Prices(np.zeros(1), -inf), np.zeros(1)
    for _ in range(20):
        cost, overflow = min((0.0, 1.0), (1.0, -1.0), key=lambda c: c[0] + price[0] * c[1])
        bundle.observe(price, cost + price[0] * overflow)
        bundle.add_cut(cost, np.array([overflow]))
        proposed = bundle.propose(1.0, 1e-9)
        if proposed is None:
            break
        price = proposed
    assert bundle.bound == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_binding_memory_matches_the_integer_program_alone(seed):
    problem = transformer_like(12, 3, seed)
    whole = reduced_from(problem)
    everything = [np.ones(edge.costs.shape, dtype=bool) for edge in whole.edges]
    oracle = solve_mip(whole, everything, scale=1e-2, gap=0.0, seconds=60)
    assert solve(problem, gap=1e-6).objective == pytest.approx(oracle.bound, rel=1e-5)


def test_mid_size_optimum_is_that_of_elimination():
    problem = transformer_like(40, 3, rows=0)
    order = elimination_order([cost.size for cost in problem.costs], problem.edges)
    best, _ = eliminate(problem.costs, problem.edges, order)
    assert solve(problem, gap=1e-9).objective == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_binding_memory_is_closed_to_the_gap(seed):
    problem = transformer_like(40, 4, seed)
    found = solve(problem, time_limit=30)
    assert found.status == "optimal"
    assert found.choices is not None and found.objective is not None
    assert fits(problem, found.choices)
    assert not fits(problem, solve(replace(problem, rows=())).choices or ())
    assert relative_gap(found.objective, found.lower_bound) <= 1e-4


def test_same_problem_same_answer():
    problem = transformer_like(30, 3)
    assert solve(problem, time_limit=60) == solve(problem, time_limit=60)


def test_scale_of_seconds_does_not_matter():
    problem = transformer_like(20, 3)
    tiny = OneHotProblem(
        tuple(cost * 1e-6 for cost in problem.costs),
        tuple(Edge(e.a, e.b, e.costs * 1e-6) for e in problem.edges),
        problem.rows,
    )
    assert solve(tiny).objective == pytest.approx(1e-6 * (solve(problem).objective or 0), rel=2e-4)


def test_interrupt_returns_the_incumbent(ctrl_c):
    problem = transformer_like(150, 5, rows=0)
    cheapest = tuple(int(cost.argmin()) for cost in problem.costs)
    ctrl_c(0.3)
    found = solve(problem, incumbent=cheapest, time_limit=60, gap=0.0)
    assert (found.status, found.stopped_by) == ("feasible", "interrupt")
    assert found.choices is not None and found.objective is not None
    assert found.lower_bound <= found.objective <= evaluate(problem, cheapest)


def test_no_time_still_returns_the_incumbent():
    problem = random_problem(1, rows=0, forbidden=0.0)
    choices = tuple(0 for _ in problem.costs)
    found = solve(problem, incumbent=choices, time_limit=0.0, gap=0.0)
    assert found.choices is not None
    assert found.lower_bound <= (found.objective or 0.0) <= evaluate(problem, choices)


def test_incumbent_over_a_limit_is_ignored():
    rows = (MemoryRow("stage 0", 1.0, {0: np.array([2.0, 1.0])}),)
    problem = OneHotProblem((np.array([0.0, 1.0]),), (), rows)
    assert solve(problem, incumbent=(0,), time_limit=0.0).choices != (0,)


def test_infeasible_row_says_how_many_bytes_it_needs():
    held = {0: np.array([6e9, 7e9]), 1: np.array([5e9, 8e9])}
    problem = OneHotProblem((np.zeros(2), np.zeros(2)), (), (MemoryRow("stage 3", 1e10, held),))
    found = solve(problem)
    assert found.status == "infeasible"
    assert found.reason == (
        "row 'stage 3' needs at least 1.1e+10 bytes, 1e+09 more than its limit of 1e+10"
    )


def test_forbidden_pairs_and_a_row_can_be_infeasible_together():
    either = np.array([[inf, 0.0], [0.0, inf]])
    held = {0: np.array([1.0, 3.0]), 1: np.array([1.0, 3.0])}
    problem = OneHotProblem(
        (np.zeros(2), np.zeros(2)), (Edge(0, 1, either),), (MemoryRow("m", 3, held),)
    )
    assert solve(problem).status == "infeasible"
