"""How fast, how well proven and how large planning is: six tables.

    python benchmarks/planning.py [zoo autoparallel mcmc depth solve pipelines] [--models ...] [--clusters ...] [-o F]

zoo           the zoo at real size on three clusters; each row is one whole search pinned to one
              mesh (1, 2, 3 axes): all recompute policies and microbatch counts, under the
              devices' memory, to a gap of 1 %. `kinds`: different repeated blocks of the forward
              pass; `problems`: combinations looked at, the slowest and all of them in seconds, and in seconds of CPU.
              A job that does not fit says so, proven.
autoparallel  the job Meta's AutoParallel was measured on, in a process of its own, from import to
              proven plan: CPU seconds and memory.
mcmc          FlexFlow's search against ours: same inputs, prices, memory limit and machine.
depth         gpt3-175b with 12, 48 and 96 layers: search on all meshes; one solve in proportion.
solve         one problem of the last in detail.
pipelines     gpt3-175b on 1024 A100s (with a quarter of its layers and on four times as many devices too) and
              llama3-405b on 16384 H100s with `--pp auto`: seconds after capture, gap, step; and the first planned anew
              on other numbers of hosts, from what that search kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

GIB = 2.0**30
CLUSTERS = {
    "h100x8": ((8,), (4, 2), (2, 2, 2)),
    "32xh100x8@ib400": ((256,), (32, 8), (4, 8, 8)),
    "v5p-256": ((128,), (32, 4), (4, 8, 4)),
}
MODELS = (
    "gpt3-1.3b", "gpt3-13b", "gpt3-175b", "llama3-8b", "llama3-70b", "llama3-405b", "mixtral-8x7b",
    "vit-l16", "vit-h14", "wrn-50-2", "wrn-alpa-1b", "wrn-alpa-13b", "dlrm",
)  # fmt: skip
GAP, SECONDS_PER_KIND = 0.01, 5.0
DEEP, DEEP_BATCH, DEEP_MESH = "128xa100x8@hdr200", 1536, (64, 2, 8)
# What AutoParallel took, on 2 cores: tracing and building, then solving; gigabytes; binaries.
AUTOPARALLEL = {
    "trace_cpu_seconds": 174,
    "solve_cpu_seconds": 88,
    "gigabytes": 4.4,
    "binaries": 580_690,
}
COMPARED = (
    ("gpt3-1.3b", "h100x8", (4, 2)), ("gpt3-1.3b", "h100x8", (2, 2, 2)), ("llama3-8b", "32xh100x8@ib400", (32, 8)),
    ("mixtral-8x7b", "32xh100x8@ib400", (32, 8)), ("gpt3-175b", "32xh100x8@ib400", (32, 8)),
    ("vit-l16", "32xh100x8@ib400", (4, 8, 8)), ("wrn-50-2", "h100x8", (4, 2)), ("dlrm", "h100x8", (4, 2)),
)  # fmt: skip
CHAIN_SECONDS = 30.0
PIPELINES = (
    ("gpt3-175b", "128xa100x8@hdr200", {"batch": 1536}, (127, 64, 160)),
    ("gpt3-175b", "128xa100x8@hdr200", {"batch": 1536, "layers": 24}, ()),
    ("gpt3-175b", "512xa100x8@hdr200", {"batch": 1536}, ()),
    ("llama3-405b", "2048xh100x8@ib400", {"batch": 2048, "seq": 8192}, ()),
)


def captured(name: str, **options: Any) -> Any:
    from meshwright.backends.xla.capture import capture
    from meshwright.models import build

    example = build(name, **options)
    return capture(example.step, example.state, example.batch, donate_argnums=0)


def block_kinds(folded: Any) -> int:
    """Different repeated blocks of the forward pass; at least one."""
    from meshwright.ir.program import prepare
    from meshwright.ir.values import block_instances

    program = prepare(folded.small, "none")
    groups = block_instances(program.graph.ops)
    forward = {g[0] for g, p in zip(groups, program.phases, strict=True) if g and p == "forward"}
    return max(1, len(forward))


def searched(step: Any, cluster: str, name: str, **pins: Any) -> dict[str, Any]:
    """One search after capture; what it found, how sure it is, and the incumbent's size."""
    from meshwright.ir.analysis.blocks import fold
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.ir.errors import InfeasibleError, StoppedError
    from meshwright.planner.cost.model import Roofline
    from meshwright.planner.plans import without_stages
    from meshwright.planner.problem import Problem
    from meshwright.planner.report.of_plan import write_plan
    from meshwright.planner.request import Request
    from meshwright.planner.search.candidates import Candidate
    from meshwright.planner.search.search import Search
    from meshwright.planner.trace import Trace

    class Timed(Search):
        """Seconds spent on each combination: build, relax, solve."""

        def _advance(self, candidate: Candidate) -> None:
            start = time.perf_counter()
            super()._advance(candidate)
            spent[candidate] = spent.get(candidate, 0.0) + time.perf_counter() - start

    spent: dict[Candidate, float] = {}
    where, start, busy = Cluster.parse(cluster), time.perf_counter(), time.process_time()
    folded = fold(step.graph)
    request = Request(**{"time_limit": 60, "gap": GAP, **pins})
    problem = Problem(folded, where, request, Roofline(where), name, "")
    search = Timed(problem, Trace(request.time_limit))
    row: dict[str, Any] = {"model": name, "cluster": cluster, "mesh": list(pins.get("mesh", ()))}
    try:
        row |= _told(write_plan(without_stages(search)))
    except (InfeasibleError, StoppedError) as error:
        fate = "does not fit" if isinstance(error, InfeasibleError) else "nothing found"
        row |= {"status": fate, "gap": None, "step_seconds": None, "plan": error.what}
    space = search.best.space
    return row | {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "problems": len(spent),
        "slowest": max(spent.values(), default=0.0),
        "kinds": block_kinds(folded),
        "nodes": len(space.nodes) if space else None,
        "choices": sum(len(node.choices) for node in space.nodes) if space else None,
        "pairs": sum(table.size for table in space.edges.values()) if space else None,
    }


def _told(plan: Any) -> dict[str, Any]:
    from meshwright.view.words import words

    return {
        "status": plan.proof.status, "gap": plan.proof.gap, "step_seconds": plan.estimate.step_seconds,
        "plan": "; ".join(words(plan)), "search_seconds": plan.proof.seconds,
    }  # fmt: skip


# ---------------------------------------------------------------- tables


def zoo(options: argparse.Namespace) -> list[dict[str, Any]]:
    print(
        "| model | cluster | mesh | kinds | nodes | choices | pairs | problems | slowest | search | CPU | gap | step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in options.models:
        step = captured(name)
        for cluster in options.clusters:
            for mesh in CLUSTERS[cluster]:
                rows.append(searched(step, cluster, name, mesh=mesh))
                print(_zoo_line(rows[-1]), flush=True)
    fitting = [row for row in rows if row["gap"] is not None]
    wide = sum(row["gap"] > GAP for row in fitting)
    late = [
        sum(row[key] > SECONDS_PER_KIND * row["kinds"] for row in rows)
        for key in ("slowest", "seconds")
    ]
    print(f"\n{len(rows)} searches, {len(fitting)} with a plan; {wide} with a gap above {GAP:.0%}. More than "
          f"{SECONDS_PER_KIND:.0f} s per block kind: {late[0]} in their slowest problem, {late[1]} in all")  # fmt: skip
    return rows


def _zoo_line(row: dict[str, Any]) -> str:
    mesh = "x".join(map(str, row["mesh"]))
    gap = row["status"] if row["gap"] is None else f"{row['gap']:.2%}"
    step = "" if row["step_seconds"] is None else f"{row['step_seconds'] * 1e3:.1f} ms"
    sizes = " | ".join(
        str(row[key] or "") for key in ("kinds", "nodes", "choices", "pairs", "problems")
    )
    times = f"{row['slowest']:.1f} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f}"
    return f"| {row['model']} | {row['cluster']} | {mesh} | {sizes} | {times} | {gap} | {step} |"


def autoparallel(options: argparse.Namespace) -> dict[str, Any]:
    """Runs itself as a child, so that the figures are those of a whole process."""
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, __file__, "autoparallel-job"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    found |= {"wall_seconds": time.perf_counter() - begin, "autoparallel": AUTOPARALLEL}
    print(json.dumps(found, indent=1), flush=True)
    return found


def autoparallel_job() -> None:
    step = captured("llama3-8b", batch=16, seq=8192)
    traced = _cpu_seconds()
    row = searched(step, "8xh100x8@ib400", "llama3-8b", mesh=(8, 8))
    row |= {"capture_cpu_seconds": traced, "cpu_seconds": _cpu_seconds()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(row | {"gigabytes": peak / 1e9}))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def mcmc(options: argparse.Namespace) -> list[dict[str, Any]]:
    print("| model | cluster | mesh | ours | gap | seconds | FlexFlow's chains | seconds | ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name, cluster, mesh in COMPARED:
        step = captured(name)
        ours = searched(step, cluster, name, mesh=mesh)
        chains = searched(step, cluster, name, mesh=mesh, search="mcmc", time_limit=CHAIN_SECONDS)
        rows.append({"ours": ours, "mcmc": chains})
        print(_mcmc_line(ours, chains), flush=True)
    return rows


def _mcmc_line(ours: dict[str, Any], chains: dict[str, Any]) -> str:
    where = f"{ours['model']} | {ours['cluster']} | {'x'.join(map(str, ours['mesh']))}"
    proven = f"{ours['step_seconds'] * 1e3:.1f} ms | {ours['gap']:.2%} | {ours['seconds']:.1f}"
    if chains["step_seconds"] is None:
        return f"| {where} | {proven} | {chains['status']} | {chains['seconds']:.1f} | |"
    ratio = chains["step_seconds"] / ours["step_seconds"]
    return f"| {where} | {proven} | {chains['step_seconds'] * 1e3:.1f} ms | {chains['seconds']:.1f} | {ratio:.2f} |"


def depth(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for layers in (12, 48, 96):
        rows.append(_by_depth(layers))
        print(rows[-1], flush=True)
    return rows


def _by_depth(layers: int, repeats: int = 2) -> dict[str, Any]:
    """With memory for everything, so that all depths do the same work; and one solve under a limit."""
    from meshwright.api import plan_captured
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.planner.request import Request

    start = time.perf_counter()
    step = captured("gpt3-175b", batch=DEEP_BATCH, layers=layers)
    capture_seconds = time.perf_counter() - start
    limit = 70.2 * GIB * layers / 96
    pins = Request(
        memory=limit, mesh=DEEP_MESH, recompute="selective", microbatches=3, time_limit=600
    )
    roomy = Cluster.parse(DEEP).with_("device.memory", 1e6 * GIB)
    free, bound = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        plan_captured(step, roomy, Request(time_limit=600), "depth")
        free.append(time.perf_counter() - start)
        start = time.perf_counter()
        plan_captured(step, DEEP, pins, "depth")
        bound.append(time.perf_counter() - start)
    return {
        "layers": layers, "capture_seconds": capture_seconds, "search_seconds": median(free),
        "one_solve_seconds": median(bound),
    }  # fmt: skip


def solve(options: argparse.Namespace) -> dict[str, Any]:
    """The ILP alone: build the space, then solve under memory to a proven gap."""
    from meshwright.ir.analysis.blocks import fold
    from meshwright.ir.analysis.roles import roles
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.ir.program import prepare
    from meshwright.planner.cost.model import Roofline
    from meshwright.planner.intra.layouts import Layouts
    from meshwright.planner.intra.solve import solve_space
    from meshwright.planner.intra.space import build
    from meshwright.planner.memory.lifetimes import lifetimes
    from meshwright.planner.memory.storage import storage_of
    from meshwright.planner.search.meshes import mesh_of

    step = captured("gpt3-175b", batch=DEEP_BATCH)
    program, cost = prepare(fold(step.graph).small, "selective"), Roofline(Cluster.parse(DEEP))
    start = time.perf_counter()
    space = build(program, 3, cost, Layouts(cost.collectives(mesh_of(DEEP_MESH))))
    built = time.perf_counter() - start
    lives = lifetimes(program, 3, roles(program.graph), storage_of(program, cost.execution_model))
    start = time.perf_counter()
    answer = solve_space(space, lives, 70.2 * GIB, time_limit=16, gap=GAP)
    seconds, solution = time.perf_counter() - start, answer.solution
    assert solution.objective is not None
    found = {
        "mesh": DEEP_MESH, "nodes": len(space.nodes), "edges": len(space.edges),
        "choices": sum(len(node.choices) for node in space.nodes), "build_seconds": built,
        "solve_seconds": seconds, "gap": 1 - solution.lower_bound / solution.objective,
    }  # fmt: skip
    print(found, flush=True)
    return found


def pipelines(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Three searches of each with an open number of stages, then three plans anew of each other number of hosts."""
    rows = []
    for name, cluster, sizes, others in PIPELINES:
        rows += _pipelines_of(name, cluster, sizes, others)
    return rows


def _pipelines_of(
    name: str, cluster: str, sizes: dict[str, int], others: tuple[int, ...], repeats: int = 3
) -> Iterator[dict[str, Any]]:
    from meshwright.api import plan_captured
    from meshwright.collector import paused
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.planner.request import Request
    from meshwright.recipe import make

    step, request, kept = (
        make({"model": name, **sizes}).capture(True),
        Request(pp="auto", time_limit=600),
        [],
    )

    def plan_of(keep=None):
        return plan_captured(step, Cluster.parse(cluster), request, name, keep=keep)

    yield _timed({"model": name, "cluster": cluster, **sizes}, plan_of, repeats)
    if others:
        plan_of(kept.append)
    for hosts in others:
        other = f"{hosts}{cluster[cluster.index('x') :]}"
        with paused():
            anew = lambda other=other: kept[0].replanned(Cluster.parse(other))  # noqa: E731
            yield _timed({"model": name, "cluster": other, **sizes, "anew": True}, anew, repeats)


def _timed(row: dict[str, Any], plan_of: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Medians of wall and CPU seconds of this process."""
    seconds, busy, plan = [], [], None
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        plan = plan_of()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    assert plan is not None
    told = _told(plan)
    row |= {"seconds": median(seconds), "all_seconds": seconds, "cpu_seconds": median(busy)}
    row |= {key: told[key] for key in ("gap", "step_seconds", "plan")}
    print(row, flush=True)
    return row


TABLES = {
    "zoo": zoo, "autoparallel": autoparallel, "mcmc": mcmc, "depth": depth, "solve": solve, "pipelines": pipelines,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE")
    parser.add_argument("--clusters", nargs="+", default=list(CLUSTERS), choices=list(CLUSTERS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.tables == ["autoparallel-job"]:
        return autoparallel_job()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    results = dict(_run(options))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return None


def _run(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for name in options.tables:
        print(f"\n{name}", flush=True)
        yield name, TABLES[name](options)


if __name__ == "__main__":
    main()
