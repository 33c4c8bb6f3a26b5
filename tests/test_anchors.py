"""Published pipeline partitions: their plans give their figures here, and ours are never worse by them."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from anchors import aceso, aceso_profile, dapple, max_load, nearby, neutral, pipedream, piper  # noqa: E402
from anchors.row import Row, choose  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
PUBLISHED = DATA / "pipeline"
needs_data = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published profiles are not here")


def load(name: str):
    return json.loads((PUBLISHED / name).read_text())


# ---------------------------------------------------------------- the neutral evaluator


def test_a_simulated_pipeline_of_even_stages_takes_its_closed_form():
    assert neutral.step_seconds([neutral.Stage(1, 2)] * 3, 10) == pytest.approx((10 + 3 - 1) * 3)


def test_replicas_share_microbatches_and_agree_at_the_end():
    alone, shared = neutral.Stage(4, 8, last=3), neutral.Stage(4, 8, replicas=4, last=3)
    assert neutral.step_seconds([alone], 8) == pytest.approx(8 * 12 + 3)
    assert neutral.step_seconds([shared], 8) == pytest.approx(2 * 12 + 3)


@given(
    st.lists(
        st.builds(
            neutral.Stage,
            *[st.sampled_from([0.0, 0.1, 0.7, 3.0])] * 3,
            st.integers(1, 5),
            st.sampled_from([0.0, 0.3]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 12),
)
def test_the_compiled_evaluator_gives_what_the_simulator_gives(stages, microbatches):
    assert neutral.quick_seconds(stages, microbatches) == neutral.step_seconds(stages, microbatches)


def test_sends_take_the_seconds_of_their_cut_each_way():
    stages = [neutral.Stage(1, 1, send=5), neutral.Stage(1, 1, send=7), neutral.Stage(1, 1)]
    assert neutral.step_seconds(stages, 1) == pytest.approx(6 + 2 * (5 + 7))


def test_among_plans_equal_by_the_objective_the_fastest_simulated_is_chosen():
    objective = {"a": 2, "b": 1, "c": 1, "d": 3}.__getitem__
    chosen = choose(
        "abcd", objective, {"a": 9, "b": 8, "c": 7, "d": 5}.__getitem__, lambda plan: ()
    )
    assert (chosen.plan, chosen.objective, chosen.fastest, chosen.front) == (
        "c",
        1,
        "d",
        ((1, 7), (3, 5)),
    )


def test_plans_near_known_ones_are_chosen_where_they_are_faster():
    chosen = choose(
        [5],
        lambda plan: 1.0 + (plan < 3),
        lambda plan: abs(plan - 2),
        lambda plan: (plan - 1, plan + 1),
    )
    assert (chosen.plan, chosen.fastest, chosen.front) == (3, 2, ((1.0, 1), (2.0, 0)))


def test_of_plans_no_worse_by_the_objective_the_fastest_simulated_counts_for_both():
    row = Row(
        "a",
        "b",
        published=2.0,
        reproduced=2.0,
        ours=1.0,
        front=((1.0, 9.0), (2.0, 7.0), (3.0, 5.0)),
    )
    assert row.simulated_both == 7.0


def test_a_row_knows_whether_ours_is_worse_and_whether_their_plan_gives_their_figure():
    assert Row("a", "b", published=2.0, reproduced=2.0, ours=2.0).never_worse
    assert not Row("a", "b", published=2.0, reproduced=None, ours=2.1).never_worse
    assert not Row("a", "b", published=2.0, reproduced=None, ours=None).never_worse
    assert Row("a", "b", published=2.0, reproduced=2.0, ours=2.0).faithful
    assert Row("a", "b", published=2.0, reproduced=2.1, ours=2.0).faithful is False
    assert Row("a", "b", published=2.0, reproduced=None, ours=2.0).faithful is None


# ---------------------------------------------------------------- published cases


@needs_data
@pytest.mark.parametrize("model", ["alexnet", "vgg16"])
def test_pipedream_plans_give_their_seconds_and_ours_the_same(model):
    file = load(f"pipedream_{model}.json")
    graph = pipedream.Graph(file)
    for result in file["results"]:
        objective = pipedream.Throughput(
            graph, result["machines"], result["bandwidths_Bps"], result["straight"]
        )
        theirs = pipedream.read_plan(result["stages"], len(result["machines"]))
        assert objective.of(theirs) == pytest.approx(result["pipeline_s"], rel=1e-12)
        assert objective.of(objective.best()) == pytest.approx(result["pipeline_s"], rel=1e-12)


@needs_data
def test_plans_for_the_simulator_keep_the_limits_they_are_given():
    file = load("pipedream_alexnet.json")
    objective = pipedream.Throughput(pipedream.Graph(file), [4], [1e9], False)
    best = objective.best()
    plan = objective.calm(objective.of(best) * (1 + 1e-12), np.inf)
    assert plan and objective.of(plan) == pytest.approx(objective.of(best))
    assert objective.calm(objective.of(best) * 0.99, np.inf) is None


@needs_data
def test_aceso_predicts_less_for_our_plan_of_gpt_and_it_fits():
    recorded = aceso_profile.read(DATA / "planners" / "aceso" / "profiled-time-miniset", "gpt_1_3B")
    problem = aceso.Problem(recorded, 4, 12000.0, 512)
    plan = problem.best()
    assert plan
    assert problem.seconds(plan) <= 58.76
    assert problem.fullest(plan) <= 12000.0
    assert [s.first for s in plan.stages[1:]] == [s.last for s in plan.stages[:-1]]
    assert sum(stage.devices for stage in plan.stages) == 4
    assert {
        name for s in plan.stages for name in (recorded.names[i] for i in s.recomputed)
    }.isdisjoint({"encoder-embedding", "gpt-post-process"})


@needs_data
@pytest.mark.parametrize(("memory", "devices"), [(8.0, 8), (80.0, 8), (1.0, 32)])
def test_piper_is_matched_and_what_fits_nowhere_is_found_to(memory, devices):
    file = load("piper.json")
    case = next(c for c in file["cases"] if (c["memGB"], c["k"]) == (memory, devices))
    objective = piper.Throughput(
        piper.Graph(file["input_bert32"]), devices, memory * piper.GIB, int(case["bs"])
    )
    ours = objective.best()
    if case["TPS"] is None:
        assert ours is None
    else:
        assert ours
        assert objective.of(objective.read(case["plan"])) == pytest.approx(case["TPS"], rel=1e-7)
        assert objective.of(ours) == pytest.approx(case["TPS"], rel=1e-7)


@needs_data
def test_dapple_plans_give_their_speedups():
    file = load("dapple_results.json")
    net = file["net"]
    network = dapple.Network(net["nvlink_p2p"], net["eth_p2p"], net["eth_nccl"])
    for result in file["results"]:
        machines = [int(end) for end in result["seps"].split(",")]
        profile = load(f"dapple_{result['model']}.json")
        objective = dapple.Latency(profile, result["gbs"], result["mbs"], machines, network)
        plan = dapple.read_plan(result, objective.units)
        assert objective.work[-1] / objective.of(plan) == pytest.approx(
            result["speedup"], rel=1e-12
        )


@needs_data
@pytest.mark.parametrize(("case", "alone", "lined"), [
    ("bert24_inference", 92.406, 17.7899), ("bert24_training", 217.813, 41.7458),
    ("resnet50_inference", 201.45, 33.7747), ("resnet50_training", 462.381, 78.6318),
])  # fmt: skip
def test_loads_on_one_accelerator_and_in_line_are_as_published(case, alone, lined):
    graph = max_load.Graph(load("dnn_partitioning.json")["inputs"][case])
    assert graph.loads(np.ones(len(graph.cpu), int)).max() == pytest.approx(alone, rel=5e-6)
    assert graph.of(graph.lined()) == pytest.approx(lined, rel=5e-6)


def test_operators_without_a_colour_are_tied_to_nothing():
    node = {
        "supportedOnFpga": True,
        "cpuLatency": 9.0,
        "fpgaLatency": 2.0,
        "isBackwardNode": False,
        "size": 1.0,
    }
    nodes = [
        {"id": i, **node, **colour}
        for i, colour in enumerate([{"colorClass": None}] * 2 + [{}] * 2)
    ]
    file = {
        "nodes": nodes,
        "edges": [(0, 1, 0.0)],
        "maxFPGAs": 4,
        "maxCPUs": 1,
        "maxSizePerFPGA": 9.0,
    }
    graph = max_load.Graph(file)
    assert graph.of(np.arange(1, 5)[graph.group]) == 2.0


# ---------------------------------------------------------------- against trying everything


@st.composite
def piper_files(draw):
    """A few units with edges forward, up to two tensor degrees, no choice of recomputation."""
    count = draw(st.integers(1, 4))
    pairs = [(a, b) for b in range(count) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    number = st.sampled_from([0.1, 0.2, 0.5, 1.0])

    def way(v: int) -> dict:
        return {
            "id": "vanilla", "timePerSample": draw(number), "parameterSize": 1e9 * draw(number),
            "memoryUsageA": draw(number), "memoryUsageB": draw(number),
            "syncTimeFw": {str(a): 0.0 for a, b in edges if b == v},
            "syncTimeBw": {str(b): 0.0 for a, b in edges if a == v},
        }  # fmt: skip

    nodes = [
        {"id": v, "name": "unit", "TMPCs": {str(t): [way(v)] for t in (1, 2)}} for v in range(count)
    ]
    costs = [
        {"sourceId": a, "destId": b, "communicationCost": 1e10 * draw(number)} for a, b in edges
    ]
    return {"nodes": nodes, "edges": costs}


WORK = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 7.0]), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(WORK, st.integers(2, 4), st.booleans(), st.data())
def test_the_fastest_near_one_cut_of_a_chain_is_the_fastest_of_all(work, devices, straight, data):
    """With patience for all of them."""
    devices = min(devices, len(work)) if straight else devices
    sends = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, 5.0]), min_size=len(work), max_size=len(work))
    )

    def seconds(stages):
        found = [
            neutral.Stage(sum(work[a:b]), 2 * sum(work[a:b]), sends[b - 1] * (b < len(work)), width)
            for a, b, width, _ in stages
        ]
        return neutral.step_seconds(found, 5)

    def around(stages):
        widths = nearby.SINGLE if straight else nearby.SHARED
        found = nearby.neighbours(stages, lambda a, b: range(a + 1, b), widths)
        return [tuple(stage._replace(like=0) for stage in each) for each in found]

    every = list(chains(len(work), devices, straight))
    found = nearby.fastest_near(every[:1], around, seconds, 10_000)
    assert found in every
    assert seconds(found) == min(map(seconds, every))


def chains(units: int, devices: int, straight: bool, first: int = 0):
    """All ways to cut a chain into stages on exactly so many devices; straight: one on each."""
    if first == units and not devices:
        yield ()
    for last in range(first + 1, units + 1):
        for width in range(1, 1 + min(devices, 1 if straight else devices)):
            stage = nearby.Stage(first, last, width)
            yield from ((stage, *rest) for rest in chains(units, devices - width, straight, last))


@settings(max_examples=20, deadline=None)
@given(piper_files(), st.integers(1, 4), st.sampled_from([1.0, 2.0, 100.0]))
def test_the_fastest_near_pipers_best_plan_is_the_fastest_of_those_that_fit(file, devices, memory):
    objective = piper.Throughput(piper.Graph(file), devices, memory, 4)
    every = [
        plan for plan in plans(objective.graph.left, devices, 4) if np.isfinite(objective.of(plan))
    ]
    if every:
        found = nearby.fastest_near(
            [objective.best()], objective.around, objective.simulated, 10_000
        )
        assert objective.of(found) < np.inf
        assert objective.simulated(found) == pytest.approx(min(map(objective.simulated, every)))


@settings(max_examples=40, deadline=None)
@given(piper_files(), st.integers(1, 4), st.sampled_from([1.0, 2.0, 4.0, 100.0]))
def test_piper_search_equals_trying_every_plan_of_a_graph(file, devices, memory):
    objective = piper.Throughput(piper.Graph(file), devices, memory, 4)
    every = [
        plan for plan in plans(objective.graph.left, devices, 4) if np.isfinite(objective.of(plan))
    ]
    found = objective.best()
    if not every:
        assert found is None
    else:
        assert found
        assert objective.of(found) == pytest.approx(min(map(objective.of, every)))


def plans(left: list[int], devices: int, batch: int):
    """All pipelines between closed sets, from all units left to none."""

    def rest(some: int, devices: int, batch: int):
        if not some:
            yield ()
        for after, tensor, data in product(left, (1, 2), (1, 2, 4)):
            if after & some == after != some and tensor * data <= devices and data <= batch:
                stage = piper.Stage(some ^ after, tensor, data, 0)
                yield from (
                    (stage, *others)
                    for others in rest(after, devices - tensor * data, batch - data)
                )

    return rest(left[-1], devices, batch)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.data())
def test_loads_in_line_equal_trying_every_cut_of_a_chain(count, data):
    number = st.sampled_from([0.1, 0.2, 0.5, 1.0, 2.0])
    nodes = [
        {"id": v, "supportedOnFpga": True, "cpuLatency": 10 * data.draw(number), "fpgaLatency": data.draw(number),
         "isBackwardNode": False, "size": 1.0, "colorClass": v}
        for v in range(count)
    ]  # fmt: skip
    edges = [(v, v + 1, data.draw(number)) for v in range(count - 1)]
    file = {"nodes": nodes, "edges": edges, "maxFPGAs": 2, "maxCPUs": 1, "maxSizePerFPGA": 3.0}
    graph = max_load.Graph(file)
    runs = [
        np.array(own)
        for own in product(range(3), repeat=count)
        if all(own[i] == own[i - 1] or own[i] not in own[:i] for i in range(1, count))
    ]
    assert graph.of(graph.lined()) == pytest.approx(min(map(graph.of, runs)))
