"""Plans whose checksum is right and whose content contradicts itself are refused by name."""

from __future__ import annotations

import json
from dataclasses import fields
from math import inf, nan
from typing import Any

import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.lower import lower
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import CHECKSUM, parse_plan, sealed
from meshwright.ir.errors import MeshwrightError, PlanError
from meshwright.planner.request import Request, check_early
from meshwright.planner.search.frontier import load_frontier
from meshwright.recipe import make
from meshwright.simulation import simulate


@pytest.fixture(scope="module")
def found():
    """A pipeline of two stages on four devices, and what its search kept."""
    made, kept = make({"model": "gpt-tiny", "layers": 2}), []
    request = Request(
        pp=2, microbatches=4, recompute="none", schedule="1f1b", program="stages", time_limit=20
    )
    return plan_captured(made.capture(True), "4xcpu", request, made.name, keep=kept.append), kept[
        -1
    ]


@pytest.fixture(scope="module")
def piped(found):
    return found[0]


def changed(plan, path: str, value) -> str:
    """The file of a plan with one field changed, sealed again; a value that is callable changes what is there."""
    data = json.loads(sealed(plan))
    data.pop(CHECKSUM)
    *names, last = path.split("/")
    place = data
    for name in names:
        place = place[int(name) if isinstance(place, list) else name]
    key = int(last) if isinstance(place, list) else last
    place[key] = value(place[key]) if callable(value) else value
    return sealed_again(data)


def sealed_again(data) -> str:
    from meshwright.ir.codec import _digest

    return json.dumps({**data, CHECKSUM: _digest(data)})


X = {"name": "x", "size": 8}
FLAT = [
    ("graph", "abc", "`abc` is no fingerprint of a graph"),
    ("microbatches", 0, "a step of 0 microbatches cannot be"),
    ("microbatches", -3, "a step of -3 microbatches cannot be"),
    ("recompute", "fused", "`fused` is no policy of plans"),
    ("mesh/axes", [], "with this number of axes cannot be: 0"),
    ("mesh/axes", [X, X], "two axes of mesh"),
    ("mesh/axes/0/size", 0, "axis `x` has 0 devices"),
    ("mesh/axes/0/size", 4, "are not the axes of mesh x=4"),
    ("mesh/axes/0/name", "y", "axis `x` is none of mesh y=8"),
    ("mesh/axes/0/name", "", "`` cannot name an axis"),
    ("mesh/axes/0/name", "stage", "`stage` cannot name an axis"),
    (
        "slots",
        lambda slots: {**slots, "z": {"dims": [["x"], ["x"]], "owed": []}},
        "axis `x` is used twice",
    ),
    (
        "slots",
        lambda slots: {**slots, "z": {"dims": [["x"]], "owed": ["x"]}},
        "axis `x` is used twice",
    ),
    (
        "slots",
        lambda slots: {**slots, "z": {"dims": [["w"]], "owed": []}},
        "axis `w` is none of mesh x=8",
    ),
    ("strategies", lambda all: {tag: [0, 0] for tag in all}, "2 codes for the axes of mesh x=8"),
    ("uses/0/batch", 1.5, "1.5 is no share"),
    ("uses/0/axis", "y", "are not the axes of mesh x=8"),
    ("estimate/step_seconds", -1.0, "-1.0 is no amount"),
    ("estimate/memory", {"parameters": -5.0}, "-5.0 is no amount"),
    ("proof/lower_bound", 1e9, "a bound of 1000000000.0 s is above the plan's own"),
    ("tensors/0/count", 0, "a count of 0 is none"),
    ("tensors/0/local_shape", [1, 1, 1, 1, 1, 1], "on a device cannot be"),
    ("collectives/0/axes", ["w"], "axis `w` is none of mesh x=8"),
    ("collectives/0/seconds", -2.0, "-2.0 is no amount"),
]


@pytest.mark.parametrize("path, value, complaint", FLAT)
def test_what_contradicts_itself_is_refused_by_name(small_plan, path, value, complaint):
    with pytest.raises(PlanError, match="the plan contradicts itself") as caught:
        parse_plan(changed(small_plan, path, value), "p.json")
    assert complaint in str(caught.value) and "from   p.json" in str(caught.value)


def test_a_policy_that_does_not_exist_is_refused_with_those_that_do(small_plan):
    with pytest.raises(PlanError, match="this is no plan") as caught:
        parse_plan(changed(small_plan, "recompute", "some"), "p.json")
    assert "'selective'" in str(caught.value) and "where  recompute" in str(caught.value)


PIPED = [
    ("pipeline/stages", [], "a pipeline of no stages cannot be"),
    ("pipeline/stages/1/cut", 0, "overlap"),
    ("pipeline/stages/0/cut", -1, "overlap"),
    ("pipeline/stages/1/forward_seconds", -1.0, "-1.0 is no amount"),
    ("pipeline/stages/1/mesh/axes/0/size", 8, "are not among the 4 of the cluster"),
    ("pipeline/stages/1/mesh/axes/0/name", "w", "axis `x` is none of mesh w=2"),
    ("pipeline/first", [0, 1], "ranks 0 and 1 lie on the same devices"),
    ("pipeline/first", [0, -2], "are not among the 4 of the cluster"),
    ("pipeline/first", [0, 3], "are not among the 4 of the cluster"),
    ("pipeline/first", [0], "1 first devices for 2 ranks"),
    ("pipeline/programs", {"stages": -1.0}, "-1.0 is no amount"),
    (
        "pipeline/orders",
        ["0F0 0B0", "1F0 1B0"],
        "4 passes are too few for 2 stages and 4 microbatches",
    ),
    ("microbatches", 1000, "16 passes are too few for 2 stages and 1000 microbatches"),
]


@pytest.mark.parametrize("path, value, complaint", PIPED)
def test_pipelines_that_contradict_themselves_are_refused_by_name(piped, path, value, complaint):
    with pytest.raises(PlanError, match="the plan contradicts itself") as caught:
        parse_plan(changed(piped, path, value), "p.json")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "order, complaint",
    [
        (lambda text: text.replace("0F3", "0F2"), "has 0F2 2 times"),
        (lambda text: text.replace("0F0 0F1", "0F1 0F9"), "has 0F0 0 times"),
        (lambda text: text.replace("0F0", "zero"), "`zero` is no step"),
        (lambda text: "0B0 " + text.replace(" 0B0", ""), "waits for itself"),
    ],
)
def test_orders_that_cannot_be_are_refused(piped, order, complaint):
    with pytest.raises(PlanError, match=complaint):
        parse_plan(changed(piped, "pipeline/orders/0", order), "p.json")


def test_numbers_that_are_none_are_refused(small_plan):
    for value in (nan, inf, 10**400):
        with pytest.raises(PlanError, match="this is no JSON"):
            parse_plan(changed(small_plan, "estimate/flop", value), "p.json")


def test_a_right_plan_is_read_as_it_was_written(small_plan, piped):
    for plan in (small_plan, piped):
        assert parse_plan(sealed(plan), "p.json").model_dump_json() == plan.model_dump_json()


DECISIONS = [
    ("strategies", lambda all: {}, "the plan has no strategy for dot_general"),
    ("strategies", lambda all: {tag: [99] for tag in all}, "has no strategy 99"),
    ("strategies", lambda all: {tag: [-99] for tag in all}, "has no strategy -99"),
    ("slots", lambda all: {tag: {"dims": [["x"]], "owed": []} for tag in all}, "dims"),
]


@pytest.mark.parametrize("path, value, complaint", DECISIONS)
def test_decisions_that_do_not_fit_the_step_are_refused(small_plan, piped, path, value, complaint):
    """Lowered and simulated alike; one stage's own decisions as those of all."""
    made = make({"model": "gpt-tiny"})
    plan = parse_plan(changed(small_plan, path, value), "p.json")
    with pytest.raises(PlanError, match=complaint):
        lower(plan, made.capture())
    with pytest.raises(PlanError, match=complaint):
        simulate(plan.model_copy(update={"recipe": {"model": "gpt-tiny"}}))
    staged = make({"model": "gpt-tiny", "layers": 2})
    with pytest.raises(PlanError, match=complaint):
        lower(parse_plan(changed(piped, path, value), "p.json"), staged.capture(True))


FRONTIER = [
    ("request", lambda request: {**request, "x": 1}, "unexpected keyword argument 'x'"),
    ("units", lambda units: {**units, "x": []}, "their fields are"),
    ("units/cuts", lambda cuts: cuts[1:], "do not go together"),
    ("units/cuts", lambda cuts: cuts[::-1], "overlap"),
    ("units/kinds", lambda kinds: [99, *kinds[1:]], "a unit of a kind that is none of"),
    ("units/work", lambda work: [-1.0, *work[1:]], "-1.0 is no amount"),
    ("points/0/microbatches", 0, "0 microbatches cannot be"),
    ("points/0/mesh", [0], "a mesh of 0 cannot be"),
    ("points/0/passes", 0.0, "0.0 s for the passes of a microbatch cannot be"),
    ("points/0/strategies", {"op": [0, 0, 0, 0]}, "4 codes for a mesh of"),
    ("work/none/0/1", 99, "of kind 99 is no work of these units"),
]


@pytest.mark.parametrize("path, value, complaint", FRONTIER)
def test_frontiers_that_contradict_themselves_are_refused_by_name(
    found, tmp_path, path, value, complaint
):
    place = tmp_path / "frontier.json"
    place.write_text(changed(found[1], path, value))
    with pytest.raises(PlanError, match="the frontier contradicts itself") as caught:
        load_frontier(place)
    assert complaint in str(caught.value)
    place.write_text(sealed(found[1]))
    assert load_frontier(place) == found[1]


@pytest.mark.parametrize("pp", [1, 2, "auto"])
@pytest.mark.parametrize("name", [field.name for field in fields(Request)])
def test_requests_of_any_types_are_taken_or_refused_by_name(name: str, pp: Any):
    """As they may stand in a file: nothing else than a refusal of ours."""
    cluster = Cluster.parse("8xh100x8@ib400")
    for value in (1.5, True, "x", "", [1], {}, float("nan"), -1, 10**400, (1.5,), ["a"], b"x"):
        try:
            check_early(Request(**{"pp": pp, name: value}), cluster)
        except MeshwrightError as error:
            assert error.what and error.fix
    with pytest.raises(MeshwrightError, match=r"schedule cannot be 1\.5"):
        Request(schedule=1.5)  # type: ignore[arg-type]
