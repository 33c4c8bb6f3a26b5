"""The planner against brute force, and what a memory limit does to a plan."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from meshwright.api import plan, plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.analysis.roles import roles
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import InfeasibleError, PlanError
from meshwright.ir.mesh import Mesh
from meshwright.ir.passes.recompute import POLICIES
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.catalogue import Catalogue
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.solve import data_parallel, live_of, solve_space
from meshwright.planner.intra.space import Space
from meshwright.planner.intra.space import build as build_space
from meshwright.planner.memory.ledger import Ledger
from meshwright.planner.memory.lifetimes import lifetimes
from meshwright.planner.memory.storage import storage_of
from meshwright.planner.problem import Problem
from meshwright.planner.report.chosen import prices_of
from meshwright.planner.report.moves import find_collectives
from meshwright.planner.request import Request
from meshwright.planner.search.candidates import Candidate
from meshwright.planner.search.meshes import finest, mesh_of, meshes, other_groups
from meshwright.planner.search.search import Search
from meshwright.planner.trace import Trace
from meshwright.view.text import proof_line
from meshwright.view.words import words

CLUSTER = Cluster.parse("4xcpu")
MOST = 20_000  # assignments that brute force looks at


# ---------------------------------------------------------------- one solve against enumeration


@st.composite
def tiny_steps(draw):
    """A chain of products and elementwise ops with a gradient step; a few dims of 2, 4 or 6."""
    sizes = st.sampled_from([2, 3, 4])
    batch, widths = draw(sizes), draw(st.lists(sizes, min_size=2, max_size=3))
    activations = draw(st.lists(st.sampled_from(["tanh", "relu", "none"]), min_size=3, max_size=3))
    train = draw(st.booleans())
    apply = {"tanh": jnp.tanh, "relu": jax.nn.relu, "none": lambda x: x}

    def loss(params, x):
        for weight, kind in zip(params, activations, strict=False):
            x = apply[kind](x @ weight)
        return jnp.sum(x * x)

    def step(params, x):
        if not train:
            return params, loss(params, x)
        grads = jax.grad(loss)(params, x)
        return [p - 0.1 * g for p, g in zip(params, grads, strict=True)], 0.0

    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in itertools.pairwise(widths)]
    return step, params, jax.ShapeDtypeStruct((batch, widths[0]), jnp.float32)


def space_of(step, params, x, mesh: Mesh) -> tuple[Space, Ledger]:
    program = prepare(fold(capture(step, params, x).graph).small, "none")
    cost = Roofline(CLUSTER)
    space = build_space(program, 1, cost, Layouts(cost.collectives(mesh)))
    lives = lifetimes(program, 1, roles(program.graph), storage_of(program, cost.execution_model))
    return space, Ledger(space, lives)


def cheapest(space: Space, ledger: Ledger, limit: float) -> float:
    """Every assignment, its price summed from the tables, its peak from liveness: of those that fit the first."""
    sizes = [len(node.choices) for node in space.nodes]
    at = np.indices(sizes).reshape(len(sizes), -1)
    seconds = sum(node.seconds[x] for node, x in zip(space.nodes, at, strict=True))
    seconds = seconds + sum(table[at[a], at[b]] for (a, b), table in space.edges.items())
    for index in np.argsort(seconds, kind="stable"):
        choices = tuple(int(x) for x in at[:, index])
        if np.isfinite(seconds[index]) and ledger.peak(ledger.local_bytes(choices))[0] <= limit:
            return float(seconds[index])
    return np.inf


@given(tiny_steps(), st.sampled_from([(2,), (2,), (4,), (2, 2)]), st.floats(0.0, 1.2))
@settings(max_examples=20, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_solve_under_memory_matches_brute_force(case, shape, share):
    space, ledger = space_of(*case, mesh_of(shape))
    assume(1 < np.prod([float(len(node.choices)) for node in space.nodes]) <= MOST)
    most = ledger.peak(ledger.local_bytes((0,) * len(space.nodes)))[0]
    limit = share * most
    answer = solve_space(space, ledger.lives, limit, time_limit=20.0, gap=1e-9)
    best = cheapest(space, ledger, limit)
    if np.isinf(best):
        assert answer.solution.status == "infeasible"
    else:
        assert answer.solution.objective == pytest.approx(best, rel=1e-6)
        assert answer.peak <= limit
        assert answer.solution.lower_bound <= best * (1 + 1e-9)


# ---------------------------------------------------------------- the search against enumeration


def mlp(params, batch):
    def loss(params):
        hidden = jax.nn.gelu(batch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": value}


def mlp_arguments(batch=64, width=128, hidden=512):
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return (
        {"up": f32(width, hidden), "down": f32(hidden, width)},
        {"x": f32(batch, width), "y": f32(batch, width)},
    )


def test_a_shared_catalogue_changes_no_price():
    """Whatever meshes and microbatch counts came before, a space is the same."""
    cost, steps = Roofline(CLUSTER), capture(mlp, *mlp_arguments())
    program, names = prepare(fold(steps.graph).small, "none"), Catalogue(mesh_of((2, 2)))
    for shape, count in itertools.product([(4, 1), (2, 2), (1, 4)], (1, 2, 16, 64)):
        mesh = Mesh.of(x=shape[0], y=shape[1])
        shared, alone = (
            build_space(program, count, cost, Layouts(cost.collectives(mesh), known))
            for known in (names, None)
        )
        assert shared.edges.keys() == alone.edges.keys()
        assert all(np.array_equal(shared.edges[key], alone.edges[key]) for key in alone.edges)
        for ours, theirs in zip(shared.nodes, alone.nodes, strict=True):
            assert ours.choices == theirs.choices and np.array_equal(ours.seconds, theirs.seconds)


def test_cutting_microbatches_into_equal_parts_never_makes_a_step_faster():
    """What the search carries from one count to those that it divides."""
    captured, where = (
        capture(mlp, *mlp_arguments(batch=96, width=2048, hidden=6144)),
        "2xa100x2@hdr200",
    )
    pins = [
        Request(gap=1e-6, recompute="none", microbatches=count) for count in (1, 2, 3, 4, 6, 12)
    ]
    seconds = {
        p.microbatches: plan_captured(captured, where, p, "mlp").estimate.step_seconds for p in pins
    }
    for few, many in itertools.permutations(seconds, 2):
        if many % few == 0:
            assert seconds[few] <= seconds[many] * (1 + 1e-5)


@pytest.mark.parametrize("memory", [None, 900e3, 600e3, 450e3])
def test_the_search_matches_solving_every_combination(memory):
    """No bound, dominance or order of the search loses the best combination."""
    captured = capture(mlp, *mlp_arguments())
    found = plan_captured(captured, CLUSTER, Request(memory=memory, gap=1e-6), "mlp")
    best = np.inf
    for mesh, policy, count in itertools.product(meshes(CLUSTER), POLICIES, (1, 2, 4, 8, 16)):
        pins = Request(
            memory=memory, gap=1e-6, mesh=mesh.shape, recompute=policy, microbatches=count
        )
        try:
            best = min(best, plan_captured(captured, CLUSTER, pins, "mlp").estimate.step_seconds)
        except InfeasibleError:
            continue
    assert found.estimate.step_seconds == pytest.approx(best, rel=1e-5)
    assert found.proof.lower_bound <= best * (1 + 1e-9)
    assert found.proof.status == "optimal"


@pytest.mark.parametrize(
    ("gap", "status", "told"), [(0.0, "optimal", "optimal"), (0.5, "within_gap", "within 3")]
)
def test_only_a_plan_without_a_gap_is_called_optimal(gap, status, told):
    found = plan_captured(capture(mlp, *mlp_arguments()), CLUSTER, Request(gap=gap), "mlp")
    assert (found.proof.status, found.proof.stopped_by, found.proof.good_enough) == (
        status,
        "proof",
        gap,
    )
    assert (found.proof.gap > 0.3) == (status == "within_gap")
    assert proof_line(found).startswith(told) and f"({100 * gap:g}% is good enough)" in proof_line(
        found
    )


def test_flexflows_search_starts_at_data_parallelism_and_proves_nothing():
    captured = capture(mlp, *mlp_arguments())
    space, _ = space_of(mlp, *mlp_arguments(), mesh_of((4,)))
    start = data_parallel(space)
    layouts = {n.tag: str(n.choices[x]) for n, x in zip(space.nodes, start, strict=True)}
    state = {
        tag: layout for tag, layout in layouts.items() if tag in space.program.graph.input_tags
    }
    assert sorted(state.values()) == ["[-, -]", "[-, -]", "[x, -]", "[x, -]"]
    exact = plan_captured(captured, CLUSTER, Request(gap=1e-6), "mlp")
    walked, again = (
        plan_captured(captured, CLUSTER, Request(search="mcmc", time_limit=6), "mlp")
        for _ in range(2)
    )
    assert walked.strategies == again.strategies and walked.slots == again.slots
    assert (
        walked.proof.status == "feasible"
        and walked.proof.lower_bound <= exact.estimate.step_seconds
    )
    assert exact.estimate.step_seconds <= walked.estimate.step_seconds * (1 + 1e-6)
    assert walked.estimate.step_seconds <= live_of(space).cost(start) * (1 + 1e-9)
    assert walked.estimate.peak_bytes <= walked.estimate.limit_bytes
    with pytest.raises(InfeasibleError, match="no plan fits"):
        plan_captured(captured, CLUSTER, Request(search="mcmc", memory=1000.0), "mlp")


def test_the_estimate_is_the_sum_of_its_parts():
    """All that travels plus every op's own time is the objective."""
    space, _ = space_of(mlp, *mlp_arguments(), mesh_of((2, 2)))
    rng, problem, unlinked = np.random.default_rng(0), live_of(space), live_of(_without_links())
    for _ in range(200):
        choices = tuple(int(rng.integers(len(node.choices))) for node in space.nodes)
        total = problem.cost(choices)
        if np.isinf(total):
            continue
        sent = find_collectives(prices_of(space, choices, Roofline(CLUSTER)))
        moved = sum(each.seconds for each in sent)
        alone = unlinked.cost(choices)
        assert total - moved == pytest.approx(alone, rel=1e-6, abs=1e-12)


def _without_links() -> Space:
    """The same space with communication for nothing."""
    free = CLUSTER
    for tier in free.fabric:
        free = free.with_(f"fabric.{tier.tier}.bandwidth", 1e30).with_(
            f"fabric.{tier.tier}.latency", 0.0
        )
    cost = Roofline(free)
    program = prepare(fold(capture(mlp, *mlp_arguments()).graph).small, "none")
    return build_space(program, 1, cost, Layouts(cost.collectives(mesh_of((2, 2)))))


def test_finer_meshes_are_never_worse():
    captured = capture(mlp, *mlp_arguments())
    cluster = Cluster.parse("8xcpu")
    seconds = {
        mesh.shape: plan_captured(
            captured, cluster, Request(mesh=mesh.shape, gap=0.0), "mlp"
        ).estimate.step_seconds
        for mesh in meshes(cluster)
    }
    assert finest(meshes(cluster)) == [mesh_of((2, 2, 2))]
    assert seconds[2, 2, 2] <= min(seconds.values()) * (1 + 1e-9)


def test_groups_of_hosts_of_other_sizes_are_tried_next_to_the_best():
    """Of 32 hosts, groups of 2, 8 and 16 are searched, so 4 is next to 2 and to 8."""
    cluster, graph = Cluster.parse("32xh100x2@ib100"), fold(capture(mlp, *mlp_arguments()).graph)
    assert [each.shape for each in other_groups(cluster, mesh_of((4, 8, 2)))] == [(8, 4, 2)]
    assert [each.shape for each in other_groups(cluster, mesh_of((16, 2, 2)))] == [(8, 4, 2)]
    assert other_groups(cluster, mesh_of((32, 2))) == ()

    def searched(shape):
        problem = Problem(graph, cluster, Request(), Roofline(cluster), "mlp", "x")
        search = Search(problem, Trace(problem.request.time_limit))
        search.relaxed(Candidate(mesh_of(shape), "none", 1))
        return search

    search, other = searched((4, 8, 2)), searched((8, 4, 2))
    before = search.best.seconds
    search._regroup()
    assert search.best.seconds == min(before, other.best.seconds) < float("inf")


def test_an_axis_of_one_device_is_no_axis():
    assert Request(mesh=(8, 1)).mesh == (8,)
    assert Request(mesh=(1,)).mesh == (1,)
    assert Request(mesh="4x2", memory="1GiB") == Request(mesh=(4, 2), memory=float(2**30))


@pytest.mark.parametrize(
    "wrong",
    [{"mesh": (4.0, 2)}, {"mesh": "a"}, {"microbatches": "2"}, {"time_limit": "5"}, {"seed": 1.5}],
)
def test_what_is_no_request_is_refused_by_name(wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        Request(**wrong)


# ---------------------------------------------------------------- memory


@cache
def gpt2():
    example = build("gpt2", batch=16)
    return capture(example.step, example.state, example.batch, donate_argnums=0)


def squeezed(memory: float | None):
    request = Request(memory=memory, mesh=(8,), gap=0.005, time_limit=30)
    return plan_captured(gpt2(), "h100x8", request, "gpt2")


@cache
def refused() -> InfeasibleError:
    with pytest.raises(InfeasibleError) as refusal:
        squeezed(1.0)
    return refusal.value


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param((0.4, 0.05), id="few"),
        pytest.param((0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05), id="many", marks=pytest.mark.slow),
    ],
)
def test_squeezing_memory_shards_states_then_recomputes_and_gets_slower(shares):
    free, refusal = squeezed(None), refused()
    least = refusal.needed_bytes
    plans = [free]
    for share in shares:
        limit = least + share * (free.estimate.peak_bytes - least)
        plans.append(squeezed(limit))
        assert plans[-1].estimate.peak_bytes <= limit
    seconds = [p.estimate.step_seconds for p in plans]
    for earlier, later in itertools.pairwise(plans):
        assert later.proof.lower_bound >= earlier.proof.lower_bound * (1 - 1e-9)
        assert later.estimate.step_seconds >= earlier.proof.lower_bound
    assert seconds == sorted(seconds) or all(
        b >= a * (1 - 0.005) for a, b in itertools.pairwise(seconds)
    )
    halfway = plans[1 + shares.index(0.4)]
    assert any("sharded" in word or "ZeRO-3" in word for word in words(halfway))
    order = [POLICIES.index(p.recompute) for p in plans]
    assert order[-1] == POLICIES.index("full") and order[0] < order[-1]
    assert "the least is with" in str(refusal) and "more devices" in str(refusal)


def test_over_hosts_states_are_replicated_until_memory_says_otherwise():
    """One all-reduce, in the hops of a tree, is cheaper than a scatter and a gather, in those of a ring."""
    example = build("wrn-50-2")
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)

    def within(memory: float | None):
        request = Request(memory=memory, mesh=(8,), gap=0.01)
        return plan_captured(captured, "8xh100x1@ib400", request, "wrn-50-2")

    free = within(None)
    squeezed, least = within(1.6 * 2**30), within(1.2 * 2**30)
    assert "replicated states" in words(free)
    assert all(
        "sharded" in words(each)[1] or "ZeRO-3" in words(each)[1] for each in (squeezed, least)
    )
    assert "recompute full" in words(least)
    seconds = [p.estimate.step_seconds for p in (free, squeezed, least)]
    assert seconds == sorted(seconds)


def test_just_below_the_least_nothing_fits():
    with pytest.raises(PlanError):
        squeezed(refused().needed_bytes * 0.999)


# ---------------------------------------------------------------- what is found


def test_expert_parallelism_is_found_where_it_pays():
    """Mixtral's eight experts on eight devices, one each."""
    example = build("mixtral-8x7b", batch=8, layers=8)
    found = plan(
        example.step, example.state, example.batch, cluster="b200x8", donate_argnums=0,
        request=Request(mesh=(8,), time_limit=30, gap=0.05),
    )  # fmt: skip
    assert any("expert parallel 8" in word for word in words(found))
    experts = [t for t in found.tensors if "EDF" in t.name or "EFD" in t.name]
    assert experts and all(t.local_shape[0] == 1 and t.shape[0] == 8 for t in experts)


def test_tensor_parallelism_is_found_where_it_pays():
    """One sequence: there are no examples to share out."""
    example = build("llama3-8b", batch=1, seq=2048, layers=8)
    found = plan(
        example.step, example.state, example.batch, cluster="h100x8", donate_argnums=0,
        request=Request(mesh=(8,), time_limit=30, gap=0.05),
    )  # fmt: skip
    assert any("tensor parallel" in word for word in words(found))


def test_a_vocabulary_is_cut_when_logits_do_not_fit():
    example = build("gpt2", batch=1)
    found = plan(
        example.step, example.state, example.batch, cluster="h100x8", donate_argnums=0,
        request=Request(mesh=(8,), recompute="none", gap=0.05),
    )  # fmt: skip
    logits = [t for t in found.tensors if 50304 in t.shape and t.role == "activation"]
    assert logits and logits[0].local_shape[logits[0].shape.index(50304)] < 50304


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("pins", "complaint"),
    [
        ({"mesh": (3,)}, "mesh 3 has 3 devices, the cluster has 4"),
        ({"mesh": (2, 2, 2, 2)}, "one to three axes"),
        ({"microbatches": 3}, "64 cannot be cut into 3 microbatches"),
        ({"microbatches": 0}, "microbatches cannot be 0"),
        ({"recompute": "some"}, "`selective`|`none`|one of"),
        ({"memory": -1.0}, "memory cannot be -1.0"),
        ({"gap": 2.0}, "gap cannot be 2.0"),
        ({"time_limit": 0.0}, "time_limit cannot be 0.0"),
        ({"headroom": 1.0}, "headroom cannot be 1.0"),
        ({"search": "genetic"}, "search cannot be 'genetic'"),
        ({"seed": -1}, "seed cannot be -1"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(pins, complaint):
    with pytest.raises(PlanError, match=complaint):
        plan(mlp, *mlp_arguments(), cluster=CLUSTER, request=Request(**pins))


@pytest.mark.parametrize(
    "pins",
    [
        {"memory": -1.0},
        {"memory": "0 B"},
        {"gap": 2.0},
        {"time_limit": 0.0},
        {"microbatches": 0},
        {"mesh": 2.5},
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_traced(pins):
    with pytest.raises(PlanError, match="cannot be"):
        Request(**pins)


def test_all_mistakes_of_a_request_are_told_at_once():
    with pytest.raises(PlanError) as refusal:
        Request(microbatches=0, gap=-1.0, mesh=(0, 8), recompute="most")  # type: ignore[arg-type]
    told = str(refusal.value)
    for name in (
        "microbatches cannot be 0",
        "gap cannot be -1.0",
        "mesh cannot be 0×8",
        "recompute cannot be 'most'",
    ):
        assert name in told, told
    assert "request: gap: a share from 0" in told


@pytest.mark.parametrize("request_", [{"search": "mcmc"}, "mcmc", 5, Request])
def test_what_is_no_request_is_refused(request_):
    with pytest.raises(PlanError, match="request cannot be"):
        plan(mlp, *mlp_arguments(), cluster=CLUSTER, request=request_)


def test_a_batch_that_does_not_divide_is_planned_and_said():
    found = plan(mlp, *mlp_arguments(batch=6), cluster=CLUSTER)
    assert any("does not divide over 4 devices" in note for note in found.notes)


def test_equal_requests_give_equal_plans():
    plans = [plan(mlp, *mlp_arguments(), cluster=CLUSTER) for _ in range(2)]
    assert plans[0].model_dump(exclude={"proof"}) == plans[1].model_dump(exclude={"proof"})
