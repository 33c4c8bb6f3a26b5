"""Communication beside computation in plans: which may hide, what a step then takes, and bounds that hold."""

import itertools
import json
from collections import Counter
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import meshwright as mw
from meshwright.api import plan
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.devices import options_for
from meshwright.cli import app
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.analysis.roles import roles
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import load_plan, save_plan
from meshwright.ir.errors import MeshwrightError, PlanError
from meshwright.ir.execution import Execution, parse_overlap
from meshwright.ir.execution_model import execution_model
from meshwright.ir.fingerprint import fingerprint
from meshwright.ir.plan import Plan
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.hideable import flow_of
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.overlapped import solve_overlapped
from meshwright.planner.intra.solve import live_of
from meshwright.planner.intra.space import Space
from meshwright.planner.intra.space import build as build_space
from meshwright.planner.intra.windows import MANY, SHARE
from meshwright.planner.jobs.fixed import fixed_plan
from meshwright.planner.jobs.pinned import Parallelism
from meshwright.planner.memory.lifetimes import lifetimes
from meshwright.planner.memory.storage import storage_of
from meshwright.planner.request import Request
from meshwright.planner.search.meshes import mesh_of
from meshwright.planner.solver.anytime import solve_live
from meshwright.view.html import plan_html
from meshwright.view.text import plan_text

ALL = ("parameters", "gradients", "tensor")
CLUSTER = Cluster.parse("h100x4")
SLOWER = CLUSTER.with_("fabric.nvlink4.bandwidth", "100GB/s")


# ---------------------------------------------------------------- one space against enumeration


@st.composite
def tiny_steps(draw, most=2):
    """A chain of `most` products at most with a gradient step, of sizes at which work and travel take about as long."""
    sizes = st.sampled_from([512, 2048, 4096])
    batch, widths = (
        draw(st.sampled_from([256, 1024, 8192])),
        draw(st.lists(sizes, min_size=2, max_size=most + 1)),
    )
    clip = draw(st.booleans())

    def loss(params, x):
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x * x)

    def step(params, x):
        grads = jax.grad(loss)(params, x)
        scale = 1 / (1 + jnp.sqrt(sum(jnp.sum(g * g) for g in grads))) if clip else 1.0
        return [p - 0.1 * scale * g for p, g in zip(params, grads, strict=True)], 0.0

    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in itertools.pairwise(widths)]
    return step, params, jax.ShapeDtypeStruct((batch, widths[0]), jnp.float32)


def space_of(step, params, x, shape, microbatches=1, overlap=ALL, cluster=CLUSTER) -> Space:
    program = prepare(fold(capture(step, params, x).graph).small, "none")
    cost = Roofline(cluster)
    layouts = Layouts(cost.collectives(mesh_of(shape)))
    return build_space(program, microbatches, cost, layouts, overlap=overlap)


def every(space: Space, multipliers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of all assignments with overlap, if nothing overlapped, and by a bound: summed anew, place by place."""
    shape = tuple(len(node.choices) for node in space.nodes)
    compute, beside = (np.zeros((MANY + 1, *shape)) for _ in range(2))
    alone = np.zeros(shape)

    def spread(table, *nodes):
        """A table over nodes, as one over all of them."""
        order = np.argsort(nodes)
        return np.transpose(table, order).reshape(
            [n if k in nodes else 1 for k, n in enumerate(shape)]
        )

    windows, readings = space.windows, space.frame.outline.readings
    assert windows is not None
    for tag, often in zip(space.frame.outline.runs, windows.ops, strict=True):
        for window in np.flatnonzero(often):
            compute[window] += often[window] * spread(space.own[tag], space.op_node[tag])
    rows = zip(space.transfers, windows.beside, windows.alone, strict=True)
    for item, hides, waits in rows:
        priced = space.layouts.seconds(item.have, item.wanted, item.nbytes, item.phase)
        a, b = item.producer, item.consumer
        places = (
            []
            if a is b is None
            else [a, b]
            if None not in (a, b) and a != b
            else [a if b is None else b]
        )
        table = (
            np.diagonal(priced)
            if a == b and a is not None
            else priced
            if len(places) == 2
            else priced.ravel()
        )
        if places:
            for window in np.flatnonzero(hides):
                beside[window] += hides[window] * spread(table, *places)
            if waits.sum():
                alone += waits.sum() * spread(table, *places)
    assert len(readings) == len(windows.beside)
    c, h = compute[:MANY], beside[:MANY]
    exposed = alone + compute[MANY] + beside[MANY]
    first, second = c + SHARE * h, h + SHARE * c
    m = multipliers.reshape(MANY, *[1] * len(shape))
    with np.errstate(invalid="ignore"):  # what cannot be takes for ever
        bound = exposed + (m * second + (1 - m) * first).sum(axis=0)
    return exposed + np.maximum(first, second).sum(axis=0), exposed + (c + h).sum(axis=0), bound


def solved(space: Space, gap: float = 1e-9):
    return solve_overlapped(space, lambda priced: solve_live(live_of(priced), gap=gap), gap)[0]


kinds = st.sets(st.sampled_from(ALL), min_size=1).map(lambda names: parse_overlap(sorted(names)))
shares = st.lists(st.floats(0, 1), min_size=MANY, max_size=MANY).map(np.array)


@given(
    tiny_steps(1),
    st.sampled_from([(2,), (4,)]),
    st.sampled_from([1, 2]),
    kinds,
    shares,
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_no_plan_is_faster_than_a_bound_and_the_found_one_is_within_its_gap(
    case, shape, microbatches, overlap, multipliers, slow
):
    space = space_of(*case, shape, microbatches, overlap, SLOWER if slow else CLUSTER)
    seconds, serial, bound = every(space, multipliers)
    can = np.isfinite(serial)
    assert (bound[can] <= seconds[can] * (1 + 1e-9)).all()
    assert (seconds[can] <= serial[can] * (1 + 1e-9)).all()
    best, priced = seconds[can].min(), space.bounding(multipliers)
    for flat in np.random.default_rng(0).choice(np.flatnonzero(can), 5):
        choices = np.unravel_index(flat, seconds.shape)
        assert space.seconds(choices) == pytest.approx(seconds[choices])
        assert space.serial(choices) == pytest.approx(serial[choices])
        assert priced.serial(choices) == pytest.approx(bound[choices])
    found = solved(space)
    assert found.choices is not None and found.objective is not None
    assert found.objective == pytest.approx(seconds[found.choices])
    assert found.lower_bound <= best * (1 + 1e-9) <= found.objective * (1 + 2e-9)
    assert found.objective <= best * 1.08, "as near as a few solves come"


def one_product(params, x):
    loss = lambda params: jnp.mean(jnp.tanh(x @ params) ** 2)  # noqa: E731
    return params - 0.1 * jax.grad(loss)(params), 0.0


@pytest.mark.parametrize(("width", "batch"), [(2048, 256), (4096, 1024), (2048, 8192)])
def test_where_communication_lasts_as_long_other_multipliers_raise_the_bound(width, batch):
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    space = space_of(one_product, f32(width, width), f32(batch, width), (4,), 2, cluster=SLOWER)
    seconds, _, _ = every(space, np.zeros(MANY))
    best = seconds[np.isfinite(seconds)].min()
    bounds = []

    def solve(priced: Space):
        found = solve_live(live_of(priced), gap=1e-9)
        bounds.append(found.lower_bound)
        return found

    found, multipliers = solve_overlapped(space, solve, 1e-9)
    assert len(bounds) > 1 and multipliers.any() and found.objective is not None
    assert bounds[0] < found.lower_bound == pytest.approx(max(bounds))
    assert found.lower_bound <= best * (1 + 1e-9)
    assert found.objective == pytest.approx(best)


@given(tiny_steps(), st.sampled_from([(2,), (4,)]))
@settings(max_examples=8, deadline=None)
def test_a_bound_is_tight_at_a_plan_under_its_own_multipliers(case, shape):
    space = space_of(*case, shape, 2)
    choices = solve_live(live_of(space)).choices
    assert choices is not None
    timed = space.timed(choices)
    assert timed is not None
    assert space.bounding(timed.multipliers).serial(choices) == pytest.approx(timed.seconds)
    sides = np.maximum(timed.compute + SHARE * timed.beside, timed.beside + SHARE * timed.compute)
    assert timed.seconds == pytest.approx(timed.exposed + sides.sum())
    assert timed.exposed + timed.compute.sum() + timed.beside.sum() == pytest.approx(
        space.serial(choices)
    )


@given(tiny_steps())
@settings(max_examples=8, deadline=None)
def test_cutting_microbatches_into_parts_never_makes_a_step_faster(case):
    bounds = [solved(space_of(*case, (4,), many)).lower_bound for many in (1, 2)]
    seconds = [solved(space_of(*case, (4,), many)).objective for many in (2, 4)]
    assert bounds[0] <= seconds[0] * (1 + 1e-9) and bounds[1] <= seconds[1] * (1 + 1e-9)


# ---------------------------------------------------------------- what may hide


def mlp(params, batch):
    def loss(params):
        return jnp.mean((jax.nn.gelu(batch @ params["up"]) @ params["down"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda p, g: p - 0.1 / (1 + norm) * g, params, grads), value


def scanned(params, batch):
    def loss(params):
        def layer(x, one):
            return x + jax.nn.gelu(x @ one["up"]) @ one["down"], None

        return jnp.mean(jax.lax.scan(layer, batch, params)[0] ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def kinds_of(step, lead=()):
    """By phase, the kinds of the readings of weights, of gradients, of activations."""
    f32 = lambda *shape: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)  # noqa: E731
    params = {"up": f32(512, 2048), "down": f32(2048, 512)}
    batch = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    program = prepare(fold(capture(step, params, batch).graph).small, "none")
    cost = Roofline(CLUSTER)
    space = build_space(program, 1, cost, Layouts(cost.collectives(mesh_of((4,)))))
    flow = flow_of(program)
    return {
        (item.source, item.reader): flow.kind(item.source, item.reader, item.phase)
        for item in space.transfers
    }, program


@pytest.mark.parametrize(("step", "lead"), [(mlp, ()), (scanned, (3,))])
def test_weights_come_early_gradients_leave_late_and_the_rest_is_of_its_pass(step, lead):
    found, program = kinds_of(step, lead)
    tags = program.value_tags
    inputs = {
        tags[v]
        for v in program.graph.inputs
        if "params" in tags[v] or "up" in tags[v] or "down" in tags[v]
    }
    reads = {
        kind
        for (source, reader), kind in found.items()
        if source in inputs and "update" not in reader
    }
    assert "parameters" in reads and "tensor" not in reads and "gradients" not in reads
    products = [v.op for v in program.graph.visits if v.op.kind == "dot_general"]
    weights = [
        op
        for op in products
        if program.graph.types[op.outputs[0]].shape in {(512, 2048), (2048, 512)}
    ]
    assert weights
    for op in weights:
        leaves = {kind for (source, _), kind in found.items() if source == tags[op.outputs[0]]}
        assert leaves == {"gradients"}
    between = [op for op in products if op not in weights]
    assert any(
        found.get((tags[op.outputs[0]], reader)) == "tensor"
        for op in between
        for _, reader in found
    )


def test_what_the_update_makes_of_gradients_waits():
    found, program = kinds_of(mlp)
    loss, *_, last = (
        op for op, phase in zip(program.graph.ops, program.phases, strict=True) if phase == "update"
    )
    assert loss.kind == "div" and last.kind == "sub"  # the mean of the loss; new weights
    kinds = {
        op: {kind for (source, _), kind in found.items() if source in tags}
        for op, tags in ((op, {program.value_tags[v] for v in op.outputs}) for op in (loss, last))
    }
    assert kinds[last] == {None}
    assert kinds[loss] == {"gradients"}  # which is there before the backward pass


# ---------------------------------------------------------------- whole plans


@cache
def planned(overlap="all", cluster="h100x8", **pins):
    example = build("gpt2", layers=4, batch=32)
    request = Request(attention="plain", overlap=overlap, time_limit=30, **pins)
    return plan(
        example.step,
        example.state,
        example.batch,
        cluster=cluster,
        request=request,
        donate_argnums=0,
    )


def test_a_plan_with_overlap_is_faster_says_so_and_is_kept(tmp_path):
    alone, beside = planned("none"), planned("all")
    assert beside.estimate.step_seconds < alone.estimate.step_seconds
    assert beside.proof.lower_bound <= beside.estimate.step_seconds
    assert beside.proof.gap <= 0.01 + 1e-9
    parts = beside.estimate
    assert parts.step_seconds == pytest.approx(
        parts.compute_seconds + parts.communication_seconds - parts.hidden_seconds
    )
    assert alone.estimate.hidden_seconds == 0 and alone.overlap == ()
    assert "no overlap" in alone.proof.band and "run beside computation" in beside.proof.band
    assert not any("overlap" in each for each in beside.proof.left_out)
    assert any("overlap" in each for each in alone.proof.left_out)
    assert "  assumes attention plain; gathers of weights, reductions of gradients" in plan_text(
        beside
    )
    assert "assumes" in plan_html(beside) and "assumes" not in plan_text(alone)
    save_plan(beside, tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json").overlap == ALL
    older = json.loads((tmp_path / "p.json").read_text())
    del older["checksum"], older["overlap"], older["estimate"]["hidden_seconds"]
    assert Plan.model_validate(older).overlap == (), "as plans of before are read"


def test_no_plan_of_a_mesh_is_faster_than_its_bound():
    bound = planned("all", mesh=(2, 4)).proof.lower_bound
    for microbatches, recompute in ((1, "none"), (2, "none"), (4, "elementwise"), (1, "full")):
        pins = {"microbatches": microbatches, "recompute": recompute}
        assert bound <= planned("all", mesh=(2, 4), **pins).estimate.step_seconds * (1 + 1e-9)


@pytest.mark.parametrize("overlap", ["none", "all"])
def test_a_mesh_of_fewer_axes_is_not_faster_than_the_bound_of_all(overlap: str):
    """What four devices of one axis exchange at once, two axes of two do too."""
    bound = planned(overlap).proof.lower_bound
    assert bound <= planned(overlap, mesh=(4, 2)).estimate.step_seconds * (1 + 1e-9)


@cache
def fsdp(microbatches: int):
    """Half of GPT-2's layers with everything sharded over eight devices, as somebody else decided."""
    example = build("gpt2", batch=32, layers=6)
    graph = capture(example.step, example.state, example.batch, donate_argnums=0).graph
    made = fixed_plan(
        fold(graph), Cluster.parse("h100x8"), Parallelism(dp=8, zero=3), microbatches=microbatches, name="fsdp",
        fingerprint=fingerprint(graph),
    )  # fmt: skip
    return example, made


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize(
    ("speed", "within"), [("450GB/s", 0.01), ("60GB/s", 0.03), ("20GB/s", 0.02)]
)
def test_the_simulator_and_the_windows_agree_on_fsdp(microbatches, speed, within):
    """Near balance (60 GB/s) the ends show: the first gather and the last reduction have nothing to hide behind."""
    example, made = fsdp(microbatches)
    found = mw.simulate(
        made, example.step, example.state, example.batch, donate_argnums=0, overlap="all",
        changes={"fabric.nvlink4.bandwidth": speed},
    )  # fmt: skip
    result = found.result
    assert result.run.makespan == pytest.approx(found.seconds, rel=within)
    longer, shorter = (
        max(result.compute, result.communication),
        min(result.compute, result.communication),
    )
    assert longer <= found.seconds * (1 + 1e-9) and found.seconds < longer + shorter


def test_without_overlap_everything_waits():
    example, made = fsdp(4)
    found = mw.simulate(made, example.step, example.state, example.batch, donate_argnums=0)
    assert found.seconds == pytest.approx(made.estimate.step_seconds)
    assert (
        found.result.run.makespan
        == pytest.approx(found.result.serial)
        == pytest.approx(found.seconds)
    )


@pytest.mark.parametrize("overlap", ["none", "all"])
def test_the_simulator_runs_every_collective_of_the_plan(overlap):
    """Of the loss too, which only the user reads: the same kinds, axes and seconds as the plan's table."""
    example, made = build("gpt2", layers=4, batch=32), planned("all")
    found = mw.simulate(
        made, example.step, example.state, example.batch, donate_argnums=0, overlap=overlap
    )
    ran, told = Counter(), Counter()
    for task in found.result.run.tasks:
        if task.kind == "communication":
            ran[task.name] += task.seconds
    for each in made.collectives:
        told[f"{each.kind} {each.what}"] += each.seconds
    assert len(told) > 5 and dict(ran) == pytest.approx(dict(told), rel=1e-6)


def simulated(step, *arguments, overlap=None):
    request = Request(overlap=overlap, time_limit=30, pp=1)
    made = plan(step, *arguments, cluster="h100x8", request=request)
    return made, mw.simulate(made, step, *arguments)


def test_a_step_without_an_update_is_simulated_whole():
    """Its last all-reduce hides in a window in which nothing is computed."""
    batch = jax.ShapeDtypeStruct((2048, 4096), jnp.float32)
    made, found = simulated(lambda x: jnp.mean(jnp.tanh(x @ x.T)), batch)
    sent = sum(each.seconds for each in made.collectives)
    assert sent > 0 and found.result.communication == pytest.approx(sent)


@pytest.mark.parametrize("overlap", [None, "all"])
def test_nothing_hides_what_tells_whether_a_loop_goes_on(overlap):
    """The next turn waits for the condition's sum, of weights that are cut."""
    weights, batch = (jax.ShapeDtypeStruct((n, 4096), jnp.float32) for n in (4096, 2048))

    def step(w, x):
        gradient = jax.grad(lambda w: jnp.mean((x @ w) ** 2))
        return jax.lax.while_loop(lambda w: jnp.sum(w) > 1e9, lambda w: w - gradient(w), w)

    made, found = simulated(step, weights, batch, overlap=overlap)
    deciding = [each for each in made.collectives if each.nbytes == 4]
    assert deciding and found.result.exposed >= sum(each.seconds for each in deciding) * (1 - 1e-9)
    assert made.estimate.step_seconds >= made.estimate.compute_seconds + found.result.exposed * (
        1 - 1e-9
    )


def test_what_may_hide_alone_hides():
    example, made = fsdp(1)
    seconds = [
        mw.simulate(
            made, example.step, example.state, example.batch, donate_argnums=0, overlap=kinds
        ).seconds
        for kinds in ("none", "parameters", "parameters,gradients")
    ]
    assert seconds[0] > seconds[1] > seconds[2]


def test_plan_and_simulation_tell_one_step():
    example, made = build("gpt2", layers=4, batch=32), planned("all")
    found = mw.simulate(made, example.step, example.state, example.batch, donate_argnums=0)
    assert found.seconds == pytest.approx(made.estimate.step_seconds, rel=1e-6)
    assert sum(found.result.memory.values()) == pytest.approx(made.estimate.peak_bytes, rel=1e-6)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("given", "found"),
    [("none", ()), ("", ()), ("all", ALL), ("gradients+parameters", ALL[:2]), ("tensor", ALL[2:]),
     (("gradients",), ALL[1:2])],
)  # fmt: skip
def test_kinds_by_name(given, found):
    assert Request(overlap=given).overlap == found
    assert Request(overlap=given).execution == Execution("plain", found)


@pytest.mark.parametrize(
    "given", ["parameter", "stages", 7, ("tensor", 3), "all,none,x", "all,none", "none+parameters"]
)
def test_other_words_are_refused(given):
    with pytest.raises(PlanError, match="overlap"):
        Request(overlap=given)


@pytest.mark.parametrize(
    ("cluster", "request_", "told"),
    [
        ("8xcpu", {"overlap": "all"}, "XLA's CPU backend"),
        ("8xcpu", {"overlap": "gradients", "pp": 2}, "XLA's CPU backend"),
        ("h100x8", {"overlap": "all", "search": "mcmc"}, "mcmc with overlap"),
    ],
)
def test_what_cannot_be_held_is_refused(cluster, request_, told):
    example = build("gpt-tiny")
    with pytest.raises(MeshwrightError, match=told):
        plan(
            example.step, example.state, example.batch, cluster=cluster, request=Request(**request_)
        )


@pytest.mark.parametrize(
    ("cluster", "given", "assumed"),
    [
        ("h100x8", {}, Execution("fused", ALL[:2])),
        ("v5e-8", {"pp": 2}, Execution("fused", (*ALL[:2], "stages"))),
        ("h100x8", {"overlap": "none"}, Execution("fused")),
        ("h100x8", {"attention": "plain", "overlap": "tensor"}, Execution("plain", ALL[2:])),
        ("h100x8", {"search": "mcmc"}, Execution("fused")),
        ("8xcpu", {"pp": 2}, Execution()),
        ("8xcpu", {"attention": "fused"}, Execution("fused")),
    ],
)
def test_by_default_devices_do_what_their_runtime_does(cluster, given, assumed):
    assert Request(**given).on(Cluster.parse(cluster)).execution == assumed


def test_a_plan_a_price_and_a_simulation_assume_the_same_by_default(tmp_path):
    cli = lambda *words: CliRunner().invoke(app, words)  # noqa: E731
    words = ["--model", "gpt2", "--layers", "2", "--cluster", "h100x8", "--batch", "32"]
    path = tmp_path / "p.json"
    made = cli("plan", *words, "--microbatches", "1", "-o", str(path))
    priced, ran = cli("price", *words), cli("simulate", str(path))
    assert made.exit_code == priced.exit_code == ran.exit_code == 0, priced.output
    told = "attention fused; gathers of weights, reductions of gradients run beside computation"
    assert f"assumes {told}" in made.output and f"assumes {told}" in priced.output
    assert "gathers of weights, reductions of gradients run beside" in ran.output
    ring = cli("price", *words, "--attention", "ring")
    assert isinstance(ring.exception, PlanError), "a ring is a kind of context parallelism there"
    refused = cli("price", *words[:-4], "--cluster", "8xcpu", "--batch", "32", "--overlap", "all")
    assert isinstance(refused.exception, PlanError) and "XLA's CPU" in str(refused.exception)


@pytest.mark.parametrize(
    ("platform", "overlap", "on"),
    [("gpu", ALL[:1], True), ("gpu", (), False), ("tpu", ALL, False), ("cpu", (), False)],
)
def test_programs_on_gpus_turn_on_the_scheduler_that_plans_count_on(platform, overlap, on):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    options = options_for(mesh, SimpleNamespace(overlap=overlap)) or {}
    assert options.get("xla_gpu_enable_latency_hiding_scheduler", False) == on


def test_what_comes_early_and_what_leaves_late_takes_memory():
    example = build("gpt2", batch=32)
    program = prepare(
        fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph).small,
        "none",
    )
    known, storage = roles(program.graph), storage_of(program, execution_model("cuda"))

    def held(overlap):
        lives = lifetimes(program, 1, known, storage, overlap)
        return lives.profile({v: program.graph.types[v].nbytes for v in lives.causes})

    none, early, both = held(()), held(("parameters",)), held(("parameters", "gradients"))
    assert (none <= early).all() and (early <= both).all()
    assert none.sum() < early.sum() < both.sum()
    assert (held(("tensor",)) == none).all()
