"""How well and how fast whole searches do at real size: the zoo on three clusters.

    python benchmarks/zoo_planning.py [--clusters h100x8 v5p-256] [--models llama3-8b] [-o FILE]

Each row is one search pinned to one mesh (of 1, 2 and 3 axes), after capture: all recompute
policies and microbatch counts, under the devices' memory, to a gap of 1 %. `kinds` is the
number of different repeated blocks of the forward pass. The largest single problem of the
search is given in nodes, choices and pairs. A job that does not fit says so, proven.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

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


def block_kinds(folded: Any) -> int:
    """Different repeated blocks of the forward pass; at least one."""
    from meshwright.ir.program import prepare
    from meshwright.ir.values import block_instances

    program = prepare(folded.small, "none")
    groups = block_instances(program.graph.ops)
    forward = {g[0] for g, p in zip(groups, program.phases, strict=True) if g and p == "forward"}
    return max(1, len(forward))


def searched(captured: Any, cluster: str, mesh: tuple[int, ...], name: str) -> dict[str, Any]:
    from meshwright.ir.blocks import fold
    from meshwright.ir.cluster import Cluster
    from meshwright.ir.errors import InfeasibleError
    from meshwright.planner.cost import Roofline
    from meshwright.planner.request import Request
    from meshwright.planner.search import Search
    from meshwright.view.words import words

    where, start = Cluster.parse(cluster), time.perf_counter()
    request = Request(mesh=mesh, time_limit=60, gap=GAP)
    folded = fold(captured.graph)
    search = Search(folded, where, request, Roofline(where), name, "", lambda line: None)
    row: dict[str, Any] = {"model": name, "cluster": cluster, "mesh": list(mesh)}
    try:
        plan = search.run()
        row |= {
            "status": plan.proof.status, "gap": plan.proof.gap,
            "step_seconds": plan.estimate.step_seconds, "plan": "; ".join(words(plan)),
        }  # fmt: skip
    except InfeasibleError as error:
        row |= {"status": "does not fit", "gap": None, "step_seconds": None, "plan": str(error)}
    row["seconds"] = time.perf_counter() - start
    space = search.best.space
    return row | {
        "kinds": block_kinds(folded),
        "nodes": len(space.nodes) if space else None,
        "choices": sum(len(node.choices) for node in space.nodes) if space else None,
        "pairs": sum(table.size for table in space.edges.values()) if space else None,
    }


def main() -> None:
    from meshwright.backends.xla.capture import capture
    from meshwright.models import build

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", nargs="+", default=list(CLUSTERS), choices=list(CLUSTERS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    print("| model | cluster | mesh | kinds | nodes | choices | pairs | seconds | gap | step |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.models:
        example = build(name)
        captured = capture(example.step, example.state, example.batch, donate_argnums=0)
        for cluster in options.clusters:
            for mesh in CLUSTERS[cluster]:
                row = searched(captured, cluster, mesh, name)
                rows.append(row)
                print(_line(row), flush=True)
    fitting = [row for row in rows if row["gap"] is not None]
    late = [r for r in rows if r["seconds"] > SECONDS_PER_KIND * r["kinds"]]
    open_ = [r for r in fitting if r["gap"] > GAP]
    print(f"\n{len(rows)} searches, {len(fitting)} with a plan; {len(open_)} with a gap above {GAP:.0%},"
          f" {len(late)} slower than {SECONDS_PER_KIND:.0f} s per block kind")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    mesh = "x".join(map(str, row["mesh"]))
    gap = "does not fit" if row["gap"] is None else f"{row['gap']:.2%}"
    step = "" if row["step_seconds"] is None else f"{row['step_seconds'] * 1e3:.1f} ms"
    sizes = " | ".join(str(row[key] or "") for key in ("kinds", "nodes", "choices", "pairs"))
    return f"| {row['model']} | {row['cluster']} | {mesh} | {sizes} | {row['seconds']:.1f} | {gap} | {step} |"


if __name__ == "__main__":
    main()
