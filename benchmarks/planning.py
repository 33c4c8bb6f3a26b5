"""How long planning takes: by depth, for one solve, and for whole searches.

    python benchmarks/planning.py [-o FILE]

1. gpt3-175b with 12, 48 and 96 layers, after capture: fold and search on all meshes of
   128xa100x8@hdr200, without a memory limit, so that all three do the same work; and one
   solve under a memory limit in proportion to depth.
2. That solve in detail: a three-axis mesh, 96 layers, 70.2 GiB.
3. Whole searches of several models, with their gap.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

CLUSTER, BATCH, MESH = "128xa100x8@hdr200", 1536, (64, 2, 8)
GIB = 2.0**30
SEARCHES = (
    ("gpt3-1.3b", 512, "4xh100x8@ib400"), ("gpt3-175b", 1536, "128xa100x8@hdr200"),
    ("llama3-70b", 1024, "16xh100x8@ib400"), ("mixtral-8x7b", 256, "4xh100x8@ib400"),
)  # fmt: skip


def captured(name: str, batch: int, layers: int | None = None) -> tuple[Any, float]:
    from meshwright.backends.xla.capture import capture
    from meshwright.models import build

    start = time.perf_counter()
    example = build(name, batch=batch, layers=layers)
    found = capture(example.step, example.state, example.batch, donate_argnums=0)
    return found, time.perf_counter() - start


def by_depth(layers: int, repeats: int = 2) -> dict[str, Any]:
    from meshwright.api import plan_captured
    from meshwright.planner.request import Request

    step, capture_seconds = captured("gpt3-175b", BATCH, layers)
    free, bound = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        plan_captured(step, CLUSTER, Request(memory=1e6 * GIB, time_limit=600), "depth")
        free.append(time.perf_counter() - start)
        limit = Request(
            memory=70.2 * GIB * layers / 96, mesh=MESH, recompute="selective", microbatches=3, time_limit=600
        )
        start = time.perf_counter()
        plan_captured(step, CLUSTER, limit, "depth")
        bound.append(time.perf_counter() - start)
    return {
        "layers": layers, "capture_seconds": capture_seconds, "search_seconds": median(free),
        "one_solve_seconds": median(bound),
    }  # fmt: skip


def one_solve() -> dict[str, Any]:
    """The ILP alone: build the space, then solve under memory to a proven gap."""
    from meshwright.ir.blocks import fold
    from meshwright.ir.cluster import Cluster
    from meshwright.ir.program import prepare
    from meshwright.ir.roles import roles
    from meshwright.planner.cost import Roofline
    from meshwright.planner.intra import solve_space
    from meshwright.planner.layouts import Layouts
    from meshwright.planner.memory import lifetimes
    from meshwright.planner.meshes import mesh_of
    from meshwright.planner.space import build

    step, _ = captured("gpt3-175b", BATCH)
    program, cost = prepare(fold(step.graph).small, "selective"), Roofline(Cluster.parse(CLUSTER))
    start = time.perf_counter()
    space = build(program, 3, cost, Layouts(cost.collectives(mesh_of(MESH))))
    built = time.perf_counter() - start
    lives = lifetimes(program, 3, roles(program.graph))
    start = time.perf_counter()
    answer = solve_space(space, lives, 70.2 * GIB, deadline=time.monotonic() + 60, gap=0.01, seed=0)
    seconds, solution = time.perf_counter() - start, answer.solution
    assert solution.objective is not None
    return {
        "mesh": MESH, "nodes": len(space.nodes), "edges": len(space.edges),
        "choices": sum(len(node.choices) for node in space.nodes),
        "build_seconds": built, "solve_seconds": seconds,
        "gap": 1 - solution.lower_bound / solution.objective, "rounds": answer.rounds,
    }  # fmt: skip


def whole_search(name: str, batch: int, cluster: str) -> dict[str, Any]:
    from meshwright.api import plan_captured
    from meshwright.planner.request import Request
    from meshwright.view.words import words

    step, capture_seconds = captured(name, batch)
    plan = plan_captured(step, cluster, Request(time_limit=60), name)
    return {
        "model": name, "batch": batch, "cluster": cluster, "capture_seconds": capture_seconds,
        "search_seconds": plan.proof.seconds, "gap": plan.proof.gap, "status": plan.proof.status,
        "step_seconds": plan.estimate.step_seconds, "plan": "; ".join(words(plan)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"depth": [], "searches": []}
    for layers in (12, 48, 96):
        results["depth"].append(by_depth(layers))
        print(results["depth"][-1], flush=True)
    results["solve"] = one_solve()
    print(results["solve"], flush=True)
    for case in SEARCHES:
        results["searches"].append(whole_search(*case))
        print(results["searches"][-1], flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
