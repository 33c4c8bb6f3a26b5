"""Whether a change of the planner changes plans: record them before, compare after.

    python benchmarks/same_plans.py record FILE [--models a,b] [--clusters x,y]
    python benchmarks/same_plans.py compare FILE [--models a,b] [--clusters x,y]

Models of the zoo at real size on three clusters, with and without pipelines. Equal are objective, bound and every
decision (layouts, strategies, stages, orders of passes); what differs is named. CPU seconds of each search stand
beside those recorded. Searches end by proof, not by the clock, unless a machine is very slow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")

from meshwright.api import plan_captured  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402
from meshwright.recipe import make  # noqa: E402

MODELS = ("gpt2", "gpt3-1.3b", "llama3-8b", "mixtral-8x7b", "vit-l16", "dlrm-small")
CLUSTERS = ("h100x8", "2xa100x8@hdr200", "8xh100x8@ib400")
PIPELINES = (1, "auto")
DECISIONS = ("mesh", "microbatches", "recompute", "strategies", "slots", "collectives")


def planned(captured: Any, model: str, cluster: str, pp: Any) -> dict[str, Any]:
    """What is decided, what is claimed, and how long it took."""
    busy = time.process_time()
    try:
        request = Request(pp=pp, time_limit=600)
        plan = plan_captured(captured, Cluster.parse(cluster), request, model)
    except MeshwrightError as error:
        return {"refused": error.what, "cpu_seconds": time.process_time() - busy}
    data = json.loads(plan.model_dump_json())
    stages = data["pipeline"] and {k: v for k, v in data["pipeline"].items() if k != "programs"}
    return {
        "objective": plan.proof.objective,
        "bound": plan.proof.lower_bound,
        "decisions": {key: data[key] for key in DECISIONS} | {"pipeline": stages},
        "cpu_seconds": time.process_time() - busy,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    given = parser.parse_args()
    known = json.loads(given.file.read_text()) if given.what == "compare" else {}
    found, changed = {}, 0
    for model in given.models.split(","):
        captured = make({"model": model}).capture(True)
        for cluster in given.clusters.split(","):
            for pp in PIPELINES:
                key = f"{model} on {cluster}, pp {pp}"
                row = found[key] = planned(captured, model, cluster, pp)
                before = known.get(key)
                words = f"{row.get('objective', 'refused')}, {row['cpu_seconds']:.1f} CPU s"
                if given.what == "compare":
                    unlike = differences(before, row)
                    changed += bool(unlike)
                    was = f" ({before['cpu_seconds']:.1f} before)" if before else ""
                    words += was + f": {'CHANGED: ' + ', '.join(unlike) if unlike else 'equal'}"
                print(f"{key}: {words}", flush=True)
    if given.what == "record":
        given.file.write_text(json.dumps(found))
    return int(changed > 0)


def differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What of a plan is not what it was."""
    if before is None:
        return ["not recorded"]
    keys = [key for key in ("refused", "objective", "bound") if before.get(key) != now.get(key)]
    old, new = before.get("decisions", {}), now.get("decisions", {})
    return keys + [key for key in new if old.get(key) != new[key]]


if __name__ == "__main__":
    sys.exit(main())
