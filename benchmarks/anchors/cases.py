"""The published cases of each anchor, as rows: what its files hold is read, planned and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.ir.errors import PlanError

from . import aceso, aceso_profile, dapple, max_load, pipedream, piper
from .neutral import quick_seconds
from .row import Chosen, Row, Stopwatch, choose

# Paces tried for a plan that the simulator finds fast: as parts of the slowest stage of PipeDream's best plan,
# of the simulated pace of Piper's.
PACES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.35, 1.5, 2.0, 3.0)
LARGE = 150  # units of a graph for which, on machines within machines, every fifth pace is enough
NEAR_PACES = (0.9, 0.97, 0.99, 1.0)
# Aceso's predictions after a search of 200 s, as published with its artifact: model, GPUs, MB each, batch, seconds.
ACESO = [("gpt_1_3B", 4, 12000.0, 512, 58.76), ("t5_770M", 4, 12000.0, 512, 33.66)]
ACESO_SECONDS = 200.0


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def pipedream_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("pipedream_*.json")):
        file = load(path)
        graph = pipedream.Graph(file)
        for result in file["results"]:
            machines, straight = result["machines"], result["straight"]
            name = f"{result['model']} {result['cluster']}{' straight' * straight}"
            if not result.get("stages"):
                yield Row(
                    "PipeDream",
                    name,
                    None,
                    None,
                    None,
                    note=f"no plan is published: {result.get('error')}",
                )
                continue
            objective = pipedream.Throughput(graph, machines, result["bandwidths_Bps"], straight)
            theirs = pipedream.read_plan(result["stages"], len(machines))
            with Stopwatch() as watch:
                early, late = objective.best(), objective.best(latest=True)
            with Stopwatch() as further:
                slowest, large = objective.of(early), len(machines) > 1 and graph.end > LARGE
                paces = PACES[::5] if large else PACES
                limits = [
                    (limit, slowest * part)
                    for limit in (slowest * (1 + 1e-12), np.inf)
                    for part in paces
                ]
                calm = {plan for limit in limits if (plan := objective.calm(*limit))}
                plans = [early, late, *sorted(calm, key=str)]
                chosen = _choose(objective, plans)
            yield Row(
                "PipeDream", name, result["pipeline_s"], objective.of(theirs), chosen.objective,
                *map(objective.simulated, (theirs, chosen.plan, chosen.fastest)),
                chosen.front, watch.seconds, further.seconds, result["solver_s"],
            )  # fmt: skip


def aceso_rows(folder: Path) -> Iterator[Row]:
    for model, devices, memory, batch, published in ACESO:
        with Stopwatch() as watch:
            recorded = aceso_profile.read(folder, model)
            problem = aceso.Problem(recorded, devices, memory, batch) if recorded.profiles else None
            plan = problem.best() if problem else None
        if not problem or not plan:
            note = "no plan fits" if problem else f"{folder} holds no profiles {model}_mbs*"
            yield Row("Aceso", model, published, None, None, note=note)
            continue
        yield Row(
            "Aceso", f"{model} {devices} x {memory / 1000:g} GB", published, None, problem.seconds(plan),
            None, problem.simulated(plan), None, watch.seconds, ACESO_SECONDS,
            note=f"its plan is not published; ours needs {problem.fullest(plan):.0f} MB",
        )  # fmt: skip


def piper_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("piper*.json")):
        file = load(path)
        graphs: dict[str, piper.Graph] = {}
        for case in file["cases"]:
            model = f"bert{case['bert']:g}"
            name = f"{model} {case['memGB']:g} GiB k={case['k']:g}"
            if f"input_{model}" not in file:
                yield Row(
                    "Piper", name, case["TPS"], None, None, note=f"input_{model} is not in the file"
                )
                continue
            try:
                graph = graphs.setdefault(
                    model, graphs.get(model) or piper.Graph(file[f"input_{model}"])
                )
            except PlanError as error:
                yield Row("Piper", name, case["TPS"], None, None, note=error.what)
                continue
            yield _piper_row(name, case, graph)


def _piper_row(name: str, case: dict[str, Any], graph: piper.Graph) -> Row:
    objective = piper.Throughput(graph, int(case["k"]), case["memGB"] * piper.GIB, int(case["bs"]))
    with Stopwatch() as watch:
        ours = objective.best()
    if ours is None:
        note = "nothing fits, as published" if case["TPS"] is None else "we find nothing that fits"
        return Row(
            "Piper",
            name,
            case["TPS"],
            None,
            None,
            seconds=watch.seconds,
            theirs=case.get("cpu_s"),
            note=note,
        )
    with Stopwatch() as further:
        slowest, pace = objective.of(ours), objective.simulated(ours, quick_seconds)
        limits = [(slowest * (1 + 1e-12), pace * part) for part in NEAR_PACES]
        paced = {plan for limit in limits if (plan := objective.within(*limit))} - {ours}
        chosen = _choose(objective, [ours, *sorted(paced)])
    theirs = objective.read(case["plan"]) if case.get("plan") else None
    return Row(
        "Piper", name, case["TPS"], objective.of(theirs) if theirs else None, chosen.objective,
        objective.simulated(theirs) if theirs else None, *map(objective.simulated, (chosen.plan, chosen.fastest)),
        chosen.front, watch.seconds, further.seconds, case.get("cpu_s"), precision=1e-7,
    )  # fmt: skip


def _choose(objective: Any, plans: Sequence[Any]) -> Chosen[Any]:
    return choose(
        plans, objective.of, lambda plan: objective.simulated(plan, quick_seconds), objective.around
    )


def dapple_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("dapple_results*.json")):
        file = load(path)
        net = file["net"]
        network = dapple.Network(net["nvlink_p2p"], net["eth_p2p"], net["eth_nccl"])
        for result in file["results"]:
            machines = [int(end) for end in result["seps"].split(",")]
            name = f"{result['model']} {len(machines)} machines {result['mode']}"
            profile = folder / f"dapple_{result['model']}.json"
            if not profile.exists():
                yield Row(
                    "DAPPLE", name, None, None, None, note=f"{profile.name} is not in the folder"
                )
                continue
            objective = dapple.Latency(
                load(profile), result["gbs"], result["mbs"], machines, network
            )
            theirs = dapple.read_plan(result, objective.units)
            with Stopwatch() as watch:
                plans = objective.plans()
            with Stopwatch() as further:
                # the best of so many stages in so many pipelines
                alike = {(plan.pipelines, len(plan.stages)): plan for plan in reversed(plans)}
                chosen = _choose(objective, list(alike.values()))
            yield Row(
                "DAPPLE", name, float(objective.work[-1]) / result["speedup"], objective.of(theirs), chosen.objective,
                *map(objective.simulated, (theirs, chosen.plan, chosen.fastest)),
                chosen.front, watch.seconds, further.seconds, result["cpu_s"],
            )  # fmt: skip


def max_load_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("dnn_partitioning*.json")):
        file = load(path)
        published: dict[str, list[dict[str, Any]]] = {}
        for result in file["anchor_results"]:
            if result["method"] != "latgreedy":  # the latency of one sample, another objective
                published.setdefault(
                    result["case"].removeprefix("op ").replace(" ", "_"), []
                ).append(result)
        for name, results in published.items():
            best = min(results, key=lambda result: result["value"])
            if name not in file["inputs"]:
                yield Row(
                    "dnn-partitioning",
                    name,
                    best["value"],
                    None,
                    None,
                    note="its input is not in the file",
                )
                continue
            if (cpus := file["inputs"][name]["maxCPUs"]) != 1:
                yield Row(
                    "dnn-partitioning",
                    name,
                    best["value"],
                    None,
                    None,
                    note=f"it has {cpus} CPUs, not one",
                )
                continue
            graph = max_load.Graph(file["inputs"][name])
            alone = [result["value"] for result in results if result["method"] == "oneFpga"]
            with Stopwatch() as watch:
                ours = graph.best()
            note = f"best published: {best['method']}; no placement is"
            if alone:
                one = float(graph.loads(np.ones(len(graph.cpu), int)).max())
                note += f"; all on one: {one:.6g}, published {alone[0]:.6g}"
            yield Row(
                "dnn-partitioning", name, best["value"], None, graph.of(ours),
                seconds=watch.seconds, theirs=best["cpu_s"], precision=5e-6, note=note,
            )  # fmt: skip
