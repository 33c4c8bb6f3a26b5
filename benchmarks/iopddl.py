"""Our solver on the contest's published cost graphs: cost against the best team's, bound, time, memory.

    python benchmarks/iopddl.py FOLDER [--time-limit 120] [--names A,B,...] [--seed 0] [-o FILE]

FOLDER holds `asplos-2025-iopddl-X.json.gz`. Each graph is solved in a process of its own, as
`meshwright solve` does it; cost and peak usage are computed anew from the file. The best team's
costs are those the contest published for the whole field (lowest of all teams, per graph).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEST_TEAM = {
    "A": 6548641531, "B": 532843, "G": 217039, "K": 2274276676,
    "L": 1970993742, "S": 1534613444, "U": 2569342178, "V": 1632051,
}  # fmt: skip


def judged(path: Path, choices: list[int]) -> tuple[int, bool]:
    """Cost of an assignment, and whether it stays under the limit, from the file alone."""
    problem = json.loads(gzip.decompress(path.read_bytes()))["problem"]
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
    return cost, peak <= problem["usage_limit"]


def solved(path: Path, time_limit: float, seed: int) -> dict[str, Any]:
    """One run of the command line, with its wall-clock and CPU seconds."""
    words = [
        "solve",
        str(path),
        "--time-limit",
        str(time_limit),
        "--seed",
        str(seed),
        "--format",
        "json",
    ]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "meshwright", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(run.stdout)
    cost, fits = judged(path, found["assignment"])
    assert fits and cost == found["cost"], (path, cost, found["cost"])
    return {
        "cost": cost,
        "lower_bound": found["lower_bound"],
        "gap": found["gap"],
        "status": found["status"],
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
        ),
        "largest_gib": round(after.ru_maxrss / 2**20, 2),  # of all runs so far
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time-limit", type=float, default=120.0)
    parser.add_argument("--names", default=",".join(BEST_TEAM))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    print(
        f"{'':2}{'cost':>13}{'of best team':>14}{'bound':>15}{'gap':>8}{'seconds':>9}{'CPU-s':>8}{'GiB':>6}  status"
    )
    for name in options.names.split(","):
        path = options.folder / f"asplos-2025-iopddl-{name}.json.gz"
        row = {"graph": name, **solved(path, options.time_limit, options.seed)}
        ratio = row["cost"] / BEST_TEAM[name] if name in BEST_TEAM else float("nan")
        rows.append({**row, "of_best_team": ratio})
        print(
            f"{name:2}{row['cost']:13d}{ratio:14.5f}{row['lower_bound']:15.0f}{row['gap']:8.2%}"
            f"{row['seconds']:9.1f}{row['cpu_seconds']:8.1f}{row['largest_gib']:6.2f}  {row['status']}",
            flush=True,
        )
    if options.output:
        options.output.write_text(
            json.dumps({"time_limit": options.time_limit, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
