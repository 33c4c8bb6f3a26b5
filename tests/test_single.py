"""A pipeline of equal stages as a single program equals the single-device step, and the planner chooses it by time.

As in the matrix of pipelines: SGD in float32, so that what a parameter moved by is its gradient; under Adam with
clipping the norms of all stages' gradients meet. Four or eight devices.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from meshwright.api import RunningStep, plan_captured
from meshwright.backends.xla.audit import audit_single
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.lower_single import LoweredSingle
from meshwright.backends.xla.verify import verify_outputs
from meshwright.cli import app
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import save_plan
from meshwright.ir.errors import LoweringError, PlanError
from meshwright.ir.execution_model import execution_model
from meshwright.ir.plan import Plan
from meshwright.ir.units import parse_seconds
from meshwright.planner.pipeline import found as found_pipeline
from meshwright.planner.pipeline.schedules import gpipe, one_f_one_b
from meshwright.planner.pipeline.single import dispatch_seconds
from meshwright.planner.request import Request
from meshwright.recipe import make
from meshwright.view import plan_html, plan_text

from .pipelines import case, pipelined, stage_plan
from .test_pipeline_matrix import assert_moved, scanned
from .test_pipeline_matrix import stage_plan as laid_out


def single(
    plan: Plan, captured, stages: int, microbatches: int, cuts: list[int] | None = None
) -> Plan:
    found = pipelined(plan, captured, gpipe(stages, microbatches), cuts)
    return found.model_copy(
        update={"pipeline": found.pipeline.model_copy(update={"program": "single"})}
    )


def check(
    name: str, stages: int, microbatches: int, layout: str, devices: int, optimizer: str = "sgd"
) -> None:
    captured, leaves, _, truth = scanned(name) if name.endswith("-scan") else case(name, optimizer)
    assert_moved(captured.graph, truth)
    plan = single(
        laid_out(name, captured, devices, microbatches, layout), captured, stages, microbatches
    )
    verify_outputs(truth, lower(plan, captured).jitted(*leaves), captured.graph.output_names)


CASES = [
    (name, stages, 4, layout, devices)
    for name in ("gpt-tiny", "gpt-tiny-scan", "llama-tied-tiny")
    for stages, layout, devices in ((4, "dp", 2), (4, "tp", 2), (2, "fsdp", 4), (2, "tp", 4))
]
FEW = [CASES[10]]


@pytest.mark.parametrize("name, stages, microbatches, layout, devices", FEW)
def test_losses_and_gradients_equal_one_device(name, stages, microbatches, layout, devices):
    check(name, stages, microbatches, layout, devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stages, microbatches, layout, devices", [each for each in CASES if each not in FEW]
)
def test_all_equal_one_device(name, stages, microbatches, layout, devices):
    check(name, stages, microbatches, layout, devices)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 8])
def test_shares_need_not_be_equal(microbatches):
    """Four stages: two of them have no microbatch's front and back to run, or all have two."""
    check("gpt-tiny", 4, microbatches, "dp", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tied-tiny"])
def test_norms_of_all_stages_meet_where_gradients_are_clipped(name):
    captured, leaves, _, truth = case(name, "adamw")
    plan = single(stage_plan(name, 2, 4, "adamw"), captured, 2, 4)
    verify_outputs(truth, lower(plan, captured).jitted(*leaves), captured.graph.output_names)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("gpt-tiny", "full"),
        pytest.param("gpt-tiny", "selective", marks=pytest.mark.slow),
        pytest.param("llama-tiny", "full", marks=pytest.mark.slow),
    ],
)
def test_recomputing_changes_no_gradient(name, policy):
    captured, leaves, _, truth = case(name)
    plan = single(stage_plan(name, 2, 4, recompute=policy), captured, 2, 4)
    verify_outputs(truth, lower(plan, captured).jitted(*leaves), captured.graph.output_names)


def test_a_plan_whose_layers_do_not_lie_alike_is_refused_when_planned(monkeypatch):
    """What is computed again may tell the last layer apart from the others, so that it is laid out in its own way:
    here every value that is compared is."""
    compare, compared = found_pipeline._check_alike, []

    def each_in_its_own_way(self, tag, choices):
        compared.append(tag)
        return len(compared)

    def check_alike(found, single, search):
        with monkeypatch.context() as patch:
            patch.setattr(type(found.space), "layout", each_in_its_own_way)
            compare(found, single, search)

    monkeypatch.setattr(found_pipeline, "_check_alike", check_alike)
    made = make({"model": "llama-tied-tiny"})
    request = Request(pp=2, microbatches=2, program="single", mesh=(4,), recompute="none")
    with pytest.raises(
        PlanError,
        match=r"blocks'?\]?\[0\].* and .*blocks'?\]?\[\d\].* are laid out in different ways",
    ):
        plan_captured(
            made.capture(True), Cluster.parse("8xcpu"), request, made.name, lambda line: None
        )
    assert len(compared) == 2


def test_state_lies_as_with_programs_of_stages_and_either_takes_the_other_on():
    """Layers lie on the devices of their stage, in arrays of their own; a step of each kind equals two steps."""
    captured, leaves, flat, _ = case("gpt-tiny")
    plan = single(stage_plan("gpt-tiny", 2, 4), captured, 2, 4)
    stages = plan.pipeline.model_copy(update={"program": "stages"})
    one, many = lower(plan, captured), lower(plan.model_copy(update={"pipeline": stages}), captured)
    assert isinstance(one, LoweredSingle) and one.hlo().count("ENTRY") == 1
    after, names = dict(captured.graph.state), captured.graph.input_names
    homes = [
        (a.device_set, b.device_set)
        for a, b in zip(one.input_shardings, many.input_shardings, strict=True)
    ]
    layers = [k for k in after if "layers" in names[k]]
    assert len(layers) > 40 and all(homes[k][0] == homes[k][1] for k in layers)
    found, wanted = one.jitted(*leaves), jax.tree.leaves(flat(*leaves))
    found = many.jitted(*(found[after[k]] if k in after else leaf for k, leaf in enumerate(leaves)))
    wanted = jax.tree.leaves(
        flat(*(wanted[after[k]] if k in after else leaf for k, leaf in enumerate(leaves)))
    )
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(have), np.asarray(want), rtol=1e-3, atol=2e-5)


def test_donated_leaves_are_given_up():
    captured, leaves, _, _ = case("gpt-tiny")
    one = lower(single(stage_plan("gpt-tiny", 2, 4), captured, 2, 4), captured)
    placed = one.placed(leaves)
    jax.block_until_ready(one.jitted(*placed))
    gone = [k for k, leaf in enumerate(placed) if leaf.is_deleted()]
    assert set(gone) == set(captured.graph.donated)


# ---------------------------------------------------------------- refusals


def refusal(captured, plan: Plan) -> str:
    with pytest.raises(LoweringError) as refused:
        lower(plan, captured)
    return str(refused.value)


def test_what_is_not_equal_stages_is_refused():
    captured, plan = case("gpt-tiny")[0], stage_plan("gpt-tiny", 2, 4)
    whole = single(plan, captured, 2, 4)
    first, second = (stage.cut for stage in whole.pipeline.stages)
    uneven = single(plan, captured, 2, 4, [first, second + 87])  # a layer later
    assert "stages hold 3, 1 layers" in refusal(captured, uneven)
    within = single(plan, captured, 2, 4, [first, len(captured.graph.ops) - 1])
    assert "layers of several kinds" in refusal(captured, within)
    other = one_f_one_b(2, 4)
    orders = {"schedule": other.name, "orders": other.text()}
    plan = whole.model_copy(update={"pipeline": whole.pipeline.model_copy(update=orders)})
    assert "runs gpipe, not 1f1b" in refusal(captured, plan)
    assert "two microbatches or more" in refusal(
        captured, single(stage_plan("gpt-tiny", 2, 1), captured, 2, 1)
    )


def test_layers_that_pipelines_may_halve_stay_whole():
    captured = make({"model": "gpt-tiny", "layers": 4, "batch": 16}).capture(True)
    plan = plan_captured(
        captured, "4xcpu", Request(pp=4, program="single", microbatches=4), "gpt-tiny"
    )
    assert plan.pipeline is not None and plan.pipeline.program == "single"
    assert lower(plan, captured).plan == plan
    assert [stage.blocks for stage in plan.pipeline.stages] == [
        "start, layer 1",
        "layer 2",
        "layer 3",
        "layer 4, end",
    ]


@dataclass(frozen=True)
class Layered:
    """Four layers that look alike; with `tied` the third has the first one's weights."""

    tied: bool

    def __call__(self, weights, x):
        def loss(weights):
            h = x @ weights["in"]
            for number, (up, down) in enumerate(weights["layers"]):
                h = (
                    h
                    + jnp.tanh(h @ (weights["layers"][0][0] if self.tied and number == 2 else up))
                    @ down
                )
            return jnp.mean(jnp.square(h @ weights["out"]))

        value, grads = jax.value_and_grad(loss)(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), value


def layers_alike(tied: bool):
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32) / 4  # noqa: E731
    weights = {
        "in": make(8, 16),
        "layers": [(make(16, 16), make(16, 16)) for _ in range(4)],
        "out": make(16, 4),
    }
    return Layered(tied), weights, make(8, 8)


def test_of_one_microbatch_a_single_program_is_not_chosen_and_refused_where_no_more_are_possible():
    step, weights, x = layers_alike(False)
    plan = plan_captured(
        capture(step, weights, x), "2xcpu", Request(pp=2, microbatches=1, time_limit=10), "one"
    )
    assert plan.pipeline is not None and plan.pipeline.program == "stages"

    def of_all(weights, x):
        def loss(weights):
            y = x @ weights["in"]
            for up, down in weights["layers"]:
                y += jnp.tanh(y @ up) @ down
            return jnp.sum(y.mean(0) ** 2)

        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

    captured = capture(of_all, weights, x)
    with pytest.raises(PlanError, match="two microbatches or more, which are not possible"):
        plan_captured(captured, "2xcpu", Request(pp=2, program="single", time_limit=10), "all")


def test_layers_that_share_weights_are_refused_at_their_line():
    for tied in (False, True):
        step, weights, x = layers_alike(tied)
        captured = capture(step, weights, x, donate_argnums=0)
        request = Request(pp=2, microbatches=4, schedule="gpipe", recompute="none", time_limit=10)
        plan = plan_captured(captured, "2xcpu", replace(request, program="stages"), "alike")
        plan = plan.model_copy(
            update={"pipeline": plan.pipeline.model_copy(update={"program": "single"})}
        )
        if not tied:
            results = jax.tree.leaves(RunningStep(lower(plan, captured))(weights, x))
            for have, want in zip(results, jax.tree.leaves(step(weights, x)), strict=True):
                np.testing.assert_allclose(np.asarray(have), np.asarray(want), rtol=1e-5, atol=1e-6)
        else:
            assert re.search(r"not alike.*\n.*test_single\.py:\d+", refusal(captured, plan))
            with pytest.raises(PlanError, match="not alike") as refused:
                plan_captured(captured, "2xcpu", replace(request, program="single"), "alike")
            assert refused.value.exit_code == 2, "a request that cannot be honoured"


def test_layers_that_differ_in_a_constant_are_refused():
    """Each has its key, folded in with a number of its own: as one program all would drop what the first does."""
    weights = {"in": jnp.eye(8), "layers": [jnp.eye(8) / 2] * 4}

    def step(weights, key, x):
        def loss(weights):
            y = x @ weights["in"]
            for number, w in enumerate(weights["layers"]):
                kept = jax.random.bernoulli(jax.random.fold_in(key, 7 * number), 0.9, y.shape)
                y += jnp.where(kept, jnp.tanh(y @ w), 0.0)
            return jnp.mean((y @ weights["in"].T) ** 2)

        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

    captured = capture(step, weights, jax.random.key(0), jnp.ones((8, 8)), donate_argnums=0)
    request = Request(pp=2, microbatches=4, program="single", time_limit=10)
    with pytest.raises(
        PlanError, match=r"`random_fold_in` has another constant.*\n.*test_single\.py:\d+"
    ):
        plan_captured(captured, "2xcpu", request, "dropout")


# ---------------------------------------------------------------- the planner's choice


@cache
def chosen(**request) -> Plan:
    options = {"pp": 2, "microbatches": 8, "recompute": "none", "mesh": (1,), **request}
    return plan_captured(case("gpt-tiny", "adamw")[0], "2xcpu", Request(**options), "gpt-tiny")


def test_the_faster_kind_of_program_is_chosen_and_both_are_told():
    plan = chosen()
    pipeline = plan.pipeline
    assert pipeline.program == min(pipeline.programs, key=pipeline.programs.get) == "single"
    assert set(pipeline.programs) == {"stages", "single"}
    assert plan.estimate.step_seconds == pipeline.programs["single"]
    assert pipeline.schedule == "gpipe" and [s.held for s in pipeline.stages] == [9, 9]
    stages = chosen(program="stages").pipeline
    assert stages.program == "stages" and stages.programs["stages"] == pytest.approx(
        pipeline.programs["stages"]
    )


def told_of_dispatch(plan: Plan) -> list[tuple[float, float]]:
    """Of pipelines that were not taken, seconds by the devices alone, and with the host's dispatch."""
    told = [
        re.search(r"not taken: .*: (\S+ ms) by the devices alone, (\S+ ms) with the host", n)
        for n in plan.notes
    ]
    return [(parse_seconds(each[1]), parse_seconds(each[2])) for each in told if each]


def test_a_pipeline_that_is_faster_but_for_the_host_is_told():
    """Where a single program is taken in its place."""
    plan = chosen()
    [(alone, together)] = told_of_dispatch(plan)
    assert alone < plan.estimate.step_seconds < together
    assert "by the devices alone" in plan_text(plan) and "by the devices alone" in plan_html(plan)
    assert together == pytest.approx(plan.pipeline.programs["stages"], rel=1e-3)
    assert not told_of_dispatch(chosen(program="stages")), "what is taken itself"


def test_a_single_program_holds_every_tick_and_both_ends():
    one, many = chosen(program="single"), chosen(program="stages", schedule="gpipe")
    assert one.pipeline.program == "single" and "stages" not in one.pipeline.programs
    assert one.estimate.peak_bytes > many.estimate.peak_bytes
    tight = chosen(memory=one.estimate.peak_bytes * 0.9)
    assert tight.pipeline.program == "stages"
    assert any("no single program" in note and "may be used" in note for note in tight.notes)


@pytest.mark.slow
def test_the_compiled_program_takes_the_memory_predicted():
    plan = chosen(program="single")
    stats = lower(plan, case("gpt-tiny", "adamw")[0]).compiled.memory_analysis()
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    assert peak - stats.alias_size_in_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("cluster", "request_"),
    [
        ("4xcpu", {}),
        ("4xcpu", {"pp": 2, "mesh": (2,), "program": "stages"}),
        ("4xcpu", {"pp": 2, "mesh": (2,), "program": "stages", "schedule": "zbv"}),
        ("4xcpu", {"pp": 2, "mesh": (2,), "program": "single"}),
        ("4xcpu", {"pp": 4, "mesh": (1,), "program": "single"}),
        ("8xcpu", {"pp": 3, "program": "stages"}),
    ],
    ids=["flat", "stages", "two stages each", "single", "four, single", "unequal"],
)
def test_causes_of_memory_add_up_to_the_peak(cluster, request_):
    request = Request(**{"microbatches": 8, "recompute": "none", **request_})
    plan = plan_captured(case("gpt-tiny", "adamw")[0], cluster, request, "gpt-tiny")
    for part in (plan.estimate, *(plan.pipeline.stages if plan.pipeline else ())):
        assert sum(part.memory.values()) == pytest.approx(part.peak_bytes, rel=1e-9)


def test_ticks_shares_and_exchanges_add_up():
    plan = chosen(program="single", schedule="gpipe")
    stages = plan.pipeline.stages
    ticks = 9 * max(s.forward_seconds + s.backward_seconds + 2 * s.send_seconds for s in stages)
    updates = max(s.once_seconds for s in stages)
    assert ticks + updates < plan.estimate.step_seconds < 1.5 * (ticks + updates)


@pytest.mark.parametrize("program", ["single", "stages"])
def test_a_simulation_says_that_it_is_of_programs_of_stages(tmp_path, program):
    save_plan(chosen(program=program), tmp_path / "plan.json")
    command = ["simulate", str(tmp_path / "plan.json")]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and ("the plan runs a single program" in shown.output) == (
        program == "single"
    )
    data = json.loads(CliRunner().invoke(app, [*command, "--format", "json"]).output)
    assert (data["program"], data["simulated"]) == (program, "stages")


def test_each_host_dispatches_the_passes_of_its_ranks():
    """Four stages of eight microbatches: 16 passes each, and 16 hand-overs between neighbours."""
    schedule, model = gpipe(4, 8), execution_model("cpu")
    each = model.instruction_seconds + 100 * model.shard_seconds
    hosts = {
        1: [range(4)],
        2: [{0, 1}, {2, 3}],
        4: [{0}, {1}, {2}, {3}],
        "wide": [{0, 1, 2, 3}] * 2,
    }
    found = {
        key: dispatch_seconds(schedule, [100] * 4, [frozenset(ranks) for ranks in sets], model)
        for key, sets in hosts.items()
    }
    assert found[1] == found["wide"] == pytest.approx((4 * 16 + 3 * 16) * each)
    assert found[2] == pytest.approx((2 * 16 + 2 * 16) * each)
    assert found[4] == pytest.approx((16 + 2 * 16) * each)


def test_the_busiest_host_has_the_stages_that_leave_most():
    schedule = one_f_one_b(2, 8)
    hosts = [frozenset({0}), frozenset({1})]
    model = execution_model("cpu")
    found = dispatch_seconds(schedule, [1000, 10], hosts, model)
    each = model.instruction_seconds + 1000 * model.shard_seconds
    assert found == pytest.approx((16 + 16) * each)


def test_hosts_dispatch_side_by_side_beside_accelerators_and_before_cpus():
    """A tiny model, so that the host decides: 112 instructions of one host, 48 of the busiest of four."""
    captured = make({"model": "gpt-tiny", "batch": 16}).capture(True)
    plans = {}
    for cluster in ("h100x4", "4xh100x1@ib400", "4xcpu"):
        request = Request(
            pp=4, mesh=(1,), microbatches=8, schedule="gpipe", program="stages", recompute="none"
        )
        plans[cluster] = plan_captured(captured, Cluster.parse(cluster), request, "gpt-tiny")
    host = {cluster: plan.pipeline.programs["stages"] for cluster, plan in plans.items()}
    assert host["h100x4"] / host["4xh100x1@ib400"] == pytest.approx(112 / 48, rel=0.05)
    assert host["h100x4"] > plans["h100x4"].estimate.step_seconds
    cpus = plans["4xcpu"].estimate.step_seconds
    assert host["4xcpu"] == pytest.approx(cpus + host["h100x4"], rel=0.05)


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"schedule": "1f1b"}, "program cannot be single with schedule 1f1b"),
        ({"microbatches": 1}, "microbatches cannot be 1 with program=single"),
        ({"pp": 1}, "program cannot be single without a pipeline"),
    ],
)
def test_pins_that_contradict_a_single_program_are_refused(request_, message):
    with pytest.raises(PlanError, match=message):
        chosen(program="single", **request_)


def test_a_kind_of_program_that_does_not_exist_is_refused():
    with pytest.raises(PlanError, match="program cannot be 'singel'"):
        chosen(program="singel")


def test_layers_that_cannot_be_shared_equally_are_refused_when_asked_for():
    captured = case("gpt-tiny", "adamw")[0]
    request = Request(pp=3, microbatches=4, program="single", recompute="none")
    with pytest.raises(
        PlanError, match="4 layers alike in both passes, which 3 stages cannot share equally"
    ):
        plan_captured(captured, "3xcpu", request, "gpt-tiny")


def test_layers_that_may_be_halved_are_shared_whole():
    """Four layers are cut in halves for four stages; a single program takes them whole."""
    pipeline = plan_captured(
        case("gpt-tiny", "adamw")[0],
        "4xcpu",
        Request(pp=4, microbatches=8, recompute="none"),
        "gpt-tiny",
    ).pipeline
    assert pipeline is not None and pipeline.program == "single"
    assert [s.blocks for s in pipeline.stages] == [
        "start, layer 1",
        "layer 2",
        "layer 3",
        "layer 4, end",
    ]


def test_a_model_without_layers_is_refused_when_a_single_program_is_asked_for():
    captured = case("dlrm-tiny")[0]
    with pytest.raises(PlanError, match="the step has no layers"):
        plan_captured(
            captured, "4xcpu", Request(pp=2, microbatches=2, program="single"), "dlrm-tiny"
        )


# ---------------------------------------------------------------- the audit


@pytest.mark.parametrize(("stages", "mesh"), [(2, (2, 2)), (4, (2,))])
def test_an_audit_finds_what_was_planned_between_stages_and_sees_one_permute_too_few(stages, mesh):
    """Hand-overs happen in every tick, the layers' own communication in as many as there are microbatches."""
    captured = case("gpt-tiny", "adamw")[0]
    request = Request(
        pp=stages, mesh=mesh, microbatches=4, recompute="none", program="single", time_limit=20
    )
    running = RunningStep(lower(plan_captured(captured, "8xcpu", request, "gpt-tiny"), captured))
    report = running.audit()
    lines = {(line.kind, line.axes): line for line in report.lines}
    hops = lines["permute", ("stage",)]
    assert hops.compiled_count == hops.predicted_count == 2 * (4 + stages - 1) * stages
    assert hops.difference == lines["all_to_all", ("stage",)].difference == 0
    assert abs(lines["all_gather", ("stage",)].difference) < 0.02 and abs(report.difference) < 0.1
    assert 0.85 < report.compiled_peak / report.predicted_peak < 1.1
    planned = [
        c.model_copy(update={"count": c.count - (c.kind == "permute")})
        for c in running.plan.collectives
    ]
    damaged = running.plan.model_copy(update={"collectives": tuple(planned)})
    report = audit_single(replace(running.lowered, plan=damaged))
    hops = next(line for line in report.lines if line.kind == "permute")
    assert hops.compiled_count == hops.predicted_count + 2 and hops.difference > 0
