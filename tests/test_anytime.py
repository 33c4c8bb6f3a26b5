"""Laws of the solver for memory over time: brute force, published optima, nothing over a limit."""

import gzip
import itertools
import json
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from threading import Event
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.ir.errors import UsageError
from meshwright.planner.solver import anytime, branch
from meshwright.planner.solver.anytime import solve_live
from meshwright.planner.solver.ascent import Ascent
from meshwright.planner.solver.branch import Branching
from meshwright.planner.solver.contraction import contract
from meshwright.planner.solver.flat import cost_of
from meshwright.planner.solver.iopddl import read
from meshwright.planner.solver.live import Demand, Live, memory_rows, tighten
from meshwright.planner.solver.mcmc import walk
from meshwright.planner.solver.messages import Messages
from meshwright.planner.solver.onehot import Edge, row_usage
from meshwright.planner.solver.punctual import solve_until
from meshwright.planner.solver.region import RegionSearch
from meshwright.planner.solver.tree_moves import TreeMoves

DATA = Path(__file__).parents[2] / "shared" / "data"
GRAPHS = DATA / "iopddl"
# The best cost any team reached, as the contest published it.
CONTEST = {
    "A": 6548641531, "B": 532843, "G": 217039, "K": 2274276676,
    "L": 1970993742, "S": 1534613444, "U": 2569342178, "V": 1632051,
}  # fmt: skip


def random_live(seed: int, *, forbidden: float = 0.3, nodes: int = 6) -> Live:
    """A graph of up to 6 nodes with whole costs and bytes; functional edges are common."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, nodes + 1))

    def table(*shape: int) -> np.ndarray:
        costs = rng.integers(0, 20, shape).astype(float)
        return np.where(rng.random(shape) < forbidden * rng.integers(0, 3), inf, costs)

    pairs = itertools.combinations(range(sizes.size), 2)
    edges = [Edge(a, b, table(sizes[a], sizes[b])) for a, b in pairs if rng.random() < 0.45]
    demands = []
    for _ in range(rng.integers(0, 9)):
        node = int(rng.integers(sizes.size))
        first, last = sorted(int(t) for t in rng.integers(0, 7, 2))
        demands.append(Demand(node, first, last, rng.integers(0, 9, sizes[node]).astype(float)))
    limits = rng.integers(6, 16, 6).astype(float)
    return Live(tuple(table(size) for size in sizes), tuple(edges), tuple(demands), limits)


def everything(live: Live):
    return itertools.product(*(range(size) for size in live.sizes))


def used_by_hand(live: Live, choices) -> list[float]:
    return [
        sum(d.nbytes[choices[d.node]] for d in live.demands if d.first <= t < d.last)
        for t in range(live.limits.size)
    ]


def brute_force(live: Live) -> float:
    fitting = (x for x in everything(live) if all(np.array(used_by_hand(live, x)) <= live.limits))
    return min((live.cost(x) for x in fitting), default=inf)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_answers_are_those_of_brute_force(seed):
    live = random_live(seed)
    best, found = brute_force(live), solve_live(live, time_limit=20)
    if not isfinite(best):
        assert (found.status, found.choices) == ("infeasible", None)
        return
    assert (found.status, found.stopped_by) == ("optimal", "proof")
    assert found.choices is not None
    assert found.objective == live.cost(found.choices) == best
    assert all(np.array(used_by_hand(live, found.choices)) <= live.limits)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_contraction_keeps_every_assignment_and_its_cost(seed):
    live = random_live(seed)
    possible = {x for x in everything(live) if isfinite(live.cost(x))}
    small = contract(live)
    if small is None:
        assert not possible
        return
    lifted = {}
    for y in everything(small.live):
        if isfinite(cost := small.live.cost(y)):
            lifted[small.lift(y)] = cost
            assert np.allclose(small.live.used(y), used_by_hand(live, small.lift(y)))
            assert tuple(small.lower(small.lift(y))) == y
    assert set(lifted) == possible
    assert all(lifted[x] == pytest.approx(live.cost(x)) for x in possible)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_tightening_refuses_the_same_assignments(seed):
    live = random_live(seed, forbidden=0.0)
    small = tighten(live)
    assert small.limits.size <= live.limits.size
    for x in everything(live):
        assert small.fits(x) == live.fits(x)
        assert live.fits(x) == all(np.array(used_by_hand(live, x)) <= live.limits)


def test_a_chain_of_followers_becomes_one_node():
    same = np.where(np.eye(4, dtype=bool), 0.0, inf)
    live = Live(
        (np.array([3.0, 1, 2, 0]),) * 9,
        tuple(Edge(i, i + 1, same) for i in range(8)),
        (Demand(0, 0, 2, np.arange(4.0)), Demand(8, 1, 3, np.arange(4.0))),
        np.full(3, 5.0),
    )
    small = contract(live)
    assert small is not None and len(small.live.costs) == 1 and not small.live.edges
    assert (
        solve_live(live).choices == (1,) * 9
    )  # choice 3 is the cheapest and holds 6 bytes at moment 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_ascent_never_says_more_than_the_optimum(seed):
    live = random_live(seed, forbidden=0.0)
    best = brute_force(live)
    costs = np.concatenate(live.costs)
    fitting: list[np.ndarray] = []
    ascent = Ascent(live, costs, Messages(live.sizes, live.edges), fitting.append)
    for _ in range(30):
        ascent.step(2 * abs(ascent.reached) + 1)
    assert ascent.bound <= best + 1e-6
    assert all(live.fits(x) for x in fitting)
    bounds = np.split(ascent.choice_bounds(), live.starts[1:-1])
    for x in everything(live):
        if live.fits(x):
            assert all(b[p] <= live.cost(x) + 1e-6 for b, p in zip(bounds, x, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_branching_ends_at_the_optimum(seed):
    live = random_live(seed, forbidden=0.0)
    best = brute_force(live)
    met: list[float] = []
    bounds: list[float] = []

    def offer(choices: np.ndarray) -> None:
        assert live.fits(choices)
        met.append(live.cost(choices))

    branching = Branching(live, offer, lambda: min([*met, 1e3]), lambda: branching.steps > 50_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "LOOK", 10**9)  # it never gives up
        branching.run(np.zeros(live.limits.size), bounds.append)
    assert bounds == sorted(bounds) and bounds[-1] <= best + 1e-6
    if isfinite(best):
        assert min(met) == best and bounds[-1] >= best - 1e-6


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(-3, 3))
def test_nothing_beyond_a_cutoff_is_claimed(seed, beyond):
    live = random_live(seed)
    best = brute_force(live)
    cutoff = 40.0 if not isfinite(best) else best + beyond
    found = solve_live(live, time_limit=20, cutoff=cutoff)
    assert found.lower_bound <= min(best, cutoff) or found.status == "infeasible"
    if best < cutoff:
        assert found.objective == best and found.status == "optimal"
    elif found.choices is None and found.status != "infeasible":
        assert found.lower_bound == pytest.approx(cutoff) and found.stopped_by == "proof"


def copies(live: Live, times: int) -> Live:
    """Many times the same graph, in one memory."""
    shifts = range(0, times * len(live.costs), len(live.costs))
    return Live(
        live.costs * times,
        tuple(replace(e, a=e.a + k, b=e.b + k) for k in shifts for e in live.edges),
        tuple(replace(d, node=d.node + k) for k in shifts for d in live.demands),
        live.limits * 0.8 * times,
    )


def test_equal_seeds_give_equal_answers(monkeypatch):
    """Also where walks and branching do the work, not the exact solver."""
    monkeypatch.setattr(anytime, "SMALL", 0)
    live = copies(random_live(8, forbidden=0.0), 40)
    first, again = (solve_live(live, time_limit=16, gap=0.02, seed=3) for _ in range(2))
    assert first.choices == again.choices and first.stopped_by == "proof"


def in_seconds_and_bytes(live: Live) -> Live:
    """Milliseconds and gigabytes: chains weigh bytes over the limit against seconds."""
    return Live(
        tuple(cost * 1e-3 for cost in live.costs),
        tuple(replace(e, costs=e.costs * 1e-3) for e in live.edges),
        tuple(replace(d, nbytes=d.nbytes * 1e9) for d in live.demands),
        live.limits * 1e9,
    )


def test_chains_meet_most_optima_of_small_problems():
    """FlexFlow's search is a fair rival: what it returns fits, costs what it says, and is mostly best."""
    met = []
    for seed in range(30):
        live = in_seconds_and_bytes(random_live(seed, forbidden=0.0))
        best = brute_force(live)
        found = walk(live, (0,) * len(live.costs), time_limit=0.3, seed=seed)
        assert found.lower_bound == -inf and found.status == "feasible"
        if found.choices is not None:
            assert live.fits(found.choices) and found.objective == live.cost(found.choices)
        met.append(best == pytest.approx(found.objective if found.choices else inf))
    assert sum(met) >= 24


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 30))
def test_walks_stay_under_the_limits_and_know_their_cost(seed, tolerance):
    live = random_live(seed, forbidden=0.0)
    start = next((x for x in everything(live) if live.fits(x)), None)
    if start is None:
        return
    costs = np.concatenate(live.costs)
    flat = Messages(live.sizes, live.edges).flat
    moves = TreeMoves(live, flat, costs)
    last, best, cost = moves.run(
        np.array(start), np.zeros(live.limits.size), seed=seed, work=3000, most_nodes=6, tolerance=tolerance
    )  # fmt: skip
    assert live.fits(last) and live.fits(best)
    assert cost == pytest.approx(live.cost(best)) == pytest.approx(cost_of(flat, costs, best))
    assert cost <= live.cost(start) + 1e-9
    again = moves.run(
        np.array(start), np.zeros(live.limits.size), seed=seed, work=3000, most_nodes=6, tolerance=tolerance
    )  # fmt: skip
    assert (again[0] == last).all() and again[2] == cost


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_region_of_everything_is_the_optimum(seed):
    live = random_live(seed, forbidden=0.0)
    start = next((x for x in everything(live) if live.fits(x)), None)
    if start is None:
        return
    region = RegionSearch(np.random.default_rng(0))
    region.turn = 6  # all choices
    found = region.solve(live, np.zeros(live.starts[-1]), np.array(start), 10.0)
    assert live.cost(start if found is None else found) == pytest.approx(brute_force(live))


def test_rows_of_moments_are_the_demands_then():
    live = random_live(3)
    rows = memory_rows(live, np.ones(live.limits.size, bool))
    for x in everything(live):
        assert [row_usage(row, x) for row in rows] == used_by_hand(live, x)


def test_a_moment_that_cannot_fit_is_named():
    live = Live((np.zeros(2),), (), (Demand(0, 3, 5, np.array([7.0, 9.0])),), np.full(6, 5.0))
    found = solve_live(live)
    assert found.status == "infeasible"
    assert found.reason == "moment 3 needs at least 7 bytes, 2 more than its limit of 5"


# ---------------------------------------------------------------- published problems


def judged(path: Path, choices) -> tuple[int, int, int]:
    """Cost, peak usage and limit of an assignment, read from the file with nothing of ours."""
    raw = path.read_bytes()
    problem = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["problem"]
    nodes, edges = problem["nodes"], problem["edges"]
    cost = sum(costs[x] for costs, x in zip(nodes["costs"], choices, strict=True))
    for (a, b), costs in zip(edges["nodes"], edges["costs"], strict=True):
        cost += costs[choices[a] * len(nodes["costs"][b]) + choices[b]]
    change: dict[int, int] = {}
    for (first, last), usage, x in zip(nodes["intervals"], nodes["usages"], choices, strict=True):
        if first < last:
            change[first] = change.get(first, 0) + usage[x]
            change[last] = change.get(last, 0) - usage[x]
    peak = max(itertools.accumulate(change[t] for t in sorted(change)), default=0)
    return cost, peak, problem["usage_limit"]


@pytest.mark.skipif(not GRAPHS.exists(), reason="published cost graphs are not here")
@pytest.mark.parametrize("name", ["example", "B", "G"])
def test_small_contest_graphs_are_proven(name):
    path = GRAPHS / ("example.json" if name == "example" else f"asplos-2025-iopddl-{name}.json.gz")
    found = solve_live(read(path), time_limit=120, gap=1e-9)
    assert found.choices is not None and found.status == "optimal"
    cost, peak, limit = judged(path, found.choices)
    assert cost == found.objective == {"example": 445, **CONTEST}[name]
    assert peak <= limit


def test_only_the_order_of_times_matters(tmp_path):
    """Moments far apart cost no memory, and are named as the file names them."""
    far = 10**30
    nodes = {
        "intervals": [[5, far], [7, far + 1]],
        "costs": [[1, 9], [1, 9]],
        "usages": [[8, 2], [8, 2]],
    }
    text = {"problem": {"nodes": nodes, "edges": {"nodes": [], "costs": []}, "usage_limit": 10}}
    (tmp_path / "far.json").write_text(json.dumps(text))
    found = solve_live(read(tmp_path / "far.json"))
    assert found.objective == 10 and found.status == "optimal"
    text["problem"]["usage_limit"] = 3
    (tmp_path / "far.json").write_text(json.dumps(text))
    assert solve_live(read(tmp_path / "far.json")).reason.startswith(
        "moment 7 needs at least 4 bytes"
    )


@pytest.mark.slow
@pytest.mark.skipif(not GRAPHS.exists(), reason="published cost graphs are not here")
@pytest.mark.parametrize("name", sorted(set(CONTEST) - {"B", "G"}))
def test_large_contest_graphs_are_within_half_a_percent_of_the_best_team(name):
    path = GRAPHS / f"asplos-2025-iopddl-{name}.json.gz"
    found = solve_live(read(path), time_limit=120, gap=1e-9)
    assert found.choices is not None
    cost, peak, limit = judged(path, found.choices)
    assert cost == found.objective <= 1.005 * CONTEST[name]
    assert peak <= limit
    assert found.lower_bound <= cost


@pytest.mark.skipif(not GRAPHS.exists(), reason="published cost graphs are not here")
@pytest.mark.parametrize("after", [0.5, 3.0, 8.0])
def test_an_interrupt_ends_the_search_at_once(after, ctrl_c):
    """While prices rise, while walks run, and inside the exact solver, on a graph that stays open."""
    live = read(GRAPHS / "asplos-2025-iopddl-V.json.gz")
    begin = perf_counter()
    ctrl_c(after)
    found = solve_live(live, time_limit=20, gap=0.0)
    assert found.stopped_by == "interrupt" and perf_counter() - begin < after + 3
    if found.choices is not None:
        assert (
            live.fits(found.choices)
            and found.objective == live.cost(found.choices) >= found.lower_bound
        )


def alpa(name: str) -> list:
    path = DATA / "planners" / "alpa_oracle" / name
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("step", ["_reduce", "_improve", "_solve_core"])
def test_an_answer_comes_on_time_whatever_the_search_is_at(monkeypatch, step):
    """A step that looks at no clock: before anything is found, and with something in hand."""
    usual, late = getattr(anytime.Anytime, step), Event()

    def slow(self, *args, **options):
        late.wait(4)
        return usual(self, *args, **options)

    live = next(
        live
        for live in map(random_live, range(99))
        if solve_live(live, gap=0.0).choices is not None
    )
    monkeypatch.setattr(anytime, "SMALL", 0 if step == "_improve" else anytime.SMALL)
    monkeypatch.setattr(anytime.Anytime, step, slow)
    began = perf_counter()
    found = solve_until(live, until=began + 1.0, gap=0.0)
    assert perf_counter() - began < 2.0
    assert found.stopped_by == "time" and found.status == "feasible"
    if found.choices is not None:
        assert found.objective == live.cost(found.choices) >= found.lower_bound and live.fits(
            found.choices
        )
    assert (found.choices is None) == (step != "_improve")
    late.set()


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_on_time_is_the_usual_one(seed):
    live = random_live(seed)
    found, usual = solve_until(live, until=perf_counter() + 20, gap=0.0), solve_live(live, gap=0.0)
    assert (found.status, found.objective) == (usual.status, usual.objective)


@pytest.mark.parametrize(
    "case", alpa("intra_ilp_cases.json"), ids=lambda c: f"{c['N']}nodes-{c['alpa_ilp']}"
)
def test_alpas_intra_operator_optima(case):
    widths = case["s_len"]
    starts = np.cumsum([0, *widths])
    own = np.array(case["c"]) + np.array(case["d"])
    costs = tuple(own[starts[i] : starts[i + 1]] for i in range(case["N"]))
    held = [np.array(case["m"][starts[i] : starts[i + 1]]) for i in range(case["N"])]
    edges, at = [], 0
    for a, b in case["E"]:
        size = widths[a] * widths[b]
        edges.append(Edge(a, b, np.array(case["r"][at : at + size]).reshape(widths[a], widths[b])))
        at += size
    demands, at = [], 0
    for t, count in enumerate(case["L_len"]):
        demands += [Demand(i, t, t + 1, held[i]) for i in case["L"][at : at + count]]
        at += count
    limit = inf if case["M"] < 0 else case["M"]
    live = Live(costs, tuple(edges), tuple(demands), np.full(len(case["L_len"]), limit))
    found = solve_live(live, time_limit=30)
    if case["brute_force"] is None:
        assert found.status == "infeasible"
    else:
        assert found.status == "optimal"
        assert found.objective == pytest.approx(case["brute_force"], rel=1e-9)


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["nodes"]["costs"].pop(), "5 intervals, 4 costs and 5 usages"),
        (lambda p: p["nodes"]["costs"][1].pop(), "node 1 has 1 costs and 2 usages"),
        (lambda p: p["edges"]["costs"][2].pop(), "edge 2 has 3 costs; 2 x 2 are needed"),
        (lambda p: p["edges"]["nodes"].__setitem__(0, [0, 9]), "edge 0 joins nodes 0 and 9"),
        (
            lambda p: p["nodes"]["intervals"].__setitem__(0, [9, 2]),
            "node 0: [9, 2) is not an interval",
        ),
        (lambda p: p.__setitem__("limit", 3), "Extra inputs"),
        (lambda p: p["nodes"]["costs"][0].__setitem__(0, -1), "greater than or equal to 0"),
    ],
)
def test_a_bad_cost_graph_is_refused_by_name(tmp_path, change, says):
    data = {
        "problem": {
            "name": "example",
            "nodes": {
                "intervals": [[30, 70], [40, 70], [50, 120], [110, 140], [110, 150]],
                "costs": [[15], [55, 65], [25, 45, 35], [85, 75], [95]],
                "usages": [[10], [25, 25], [15, 20, 15], [10, 10], [15]],
            },
            "edges": {
                "nodes": [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]],
                "costs": [[30, 40], [50, 10, 40], [90, 10, 20, 80], [60, 20, 30], [70, 60]],
            },
            "usage_limit": 50,
        }
    }
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data))
    assert solve_live(read(path)).objective == 445
    change(data["problem"])
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError) as refusal:
        read(path)
    assert says in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\x1f\x8bno", b'{"problem": 3}'])
def test_what_is_no_cost_graph_is_refused(tmp_path, content):
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"is not a cost graph|it is damaged"):
        read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "nowhere.json")


def test_limits_may_differ_over_time():
    live = Live(
        (np.array([0.0, 1.0]), np.array([0.0, 1.0])),
        (),
        (Demand(0, 0, 2, np.array([4.0, 1.0])), Demand(1, 1, 3, np.array([4.0, 1.0]))),
        np.array([4.0, 8.0, 3.0]),
    )
    assert solve_live(live).choices == (0, 1)
    assert solve_live(replace(live, limits=np.array([3.0, 8.0, 4.0]))).choices == (1, 0)
