"""Whether a change leaves plans as they were: plans of the zoo recorded before it, compared after it.

    python benchmarks/same_plans.py [JOB ...] -o before.json      on the commit before
    python benchmarks/same_plans.py [JOB ...] --compare before.json

Of each plan: objective, bound, mesh, microbatches, recomputation, schedule, peak memory, and a hash of all decisions
(layouts of ops and slots, cuts and orders of stages) and of what they imply. The graph's own name is left out: how
attributes are written is no decision. A search that ends by the clock depends on the machine's speed; its plan is
marked and not compared. How far the bound of a search over pipelines comes depends on it too: it is shown, not
compared. Differences are printed, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

jax.config.update("jax_platforms", "cpu")

from meshwright.api import plan_captured  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import MeshwrightError  # noqa: E402
from meshwright.ir.plan import Plan  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402
from meshwright.recipe import make  # noqa: E402

CLUSTERS = {"h8": "h100x8", "h32": "4xh100x8@ib400", "a128": "16xa100x8@hdr200"}
LIMIT = 600.0  # seconds of a search, enough for its proof
NO_MATTER = {"cpu_seconds", "bound_reached"}
NO_DECISIONS = {"meshwright", "graph", "name", "cluster", "recipe", "proof", "notes"}


class Job(NamedTuple):
    """A model with its options on a cluster, as one stage or with as many as are best."""

    model: str
    cluster: str
    pp: int | Literal["auto"]
    options: dict[str, Any]


MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt2": ("gpt2", {"dropout": 0.1}, ("h8", "h32", "a128")),
    "llama": ("llama3-8b", {"batch": 256, "seq": 8192}, ("h8", "h32", "a128")),
    "llama-scan": ("llama3-8b-scan", {"batch": 256}, ("h32",)),
    "mixtral": ("mixtral-8x7b", {}, ("h32", "a128")),
    "vit": ("vit-l16", {}, ("h8", "a128")),
    "resnet": ("wrn-101-2", {}, ("h8",)),
    "dlrm": ("dlrm", {}, ("h8", "a128")),
}
JOBS = {
    f"{name}/{cluster}/{pp}": Job(model, CLUSTERS[cluster], pp, options)
    for name, (model, options, clusters) in MODELS.items()
    for cluster in clusters
    for pp in (1, "auto")
} | {
    "llama-70b/a128/4": Job("llama3-70b", CLUSTERS["a128"], 4, {"batch": 256}),
    "deepseek/h32/1": Job("deepseek-v2", CLUSTERS["h32"], 1, {"batch": 256, "layers": 8}),
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("jobs", nargs="*", choices=[[], *JOBS], metavar="JOB", help=" ".join(JOBS))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--compare", type=Path, metavar="FILE")
    options = parser.parse_args()
    # One core: what spare ones find in time differs from run to run.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = json.loads(options.compare.read_text()) if options.compare else {}
    rows, changed = dict[str, Any](), False
    for name in options.jobs or JOBS:
        rows[name] = planned(JOBS[name])
        said = differences(before[name], rows[name]) if name in before else []
        changed |= bool(said)
        print(f"{name}: {_line(rows[name])}", *said, sep="\n    ", flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(changed)


def planned(job: Job) -> dict[str, Any]:
    """What is compared of a job's plan; a refusal is a result too."""
    captured = make({"model": job.model, **job.options}).capture(job.pp != 1)
    request, begun = Request(time_limit=LIMIT, pp=job.pp), time.process_time()
    try:
        plan = plan_captured(captured, Cluster.parse(job.cluster), request, job.model)
    except MeshwrightError as error:
        return {"refused": str(error)}
    by_clock = plan.proof.stopped_by in ("time", "interrupt")
    return {
        "objective": plan.proof.objective,
        "lower_bound" if job.pp == 1 else "bound_reached": plan.proof.lower_bound,
        "mesh": str(plan.mesh),
        "microbatches": plan.microbatches,
        "recompute": plan.recompute,
        "schedule": plan.pipeline and f"{plan.pipeline.schedule}, {len(plan.pipeline.stages)}",
        "peak_bytes": plan.estimate.peak_bytes,
        "flop": plan.estimate.flop,
        "decisions": decisions(plan),
        "stopped_by": plan.proof.stopped_by,
        "comparable": not by_clock,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def decisions(plan: Plan) -> str:
    """A hash of everything that was decided, and of what that implies."""
    said = plan.model_dump(mode="json", exclude=NO_DECISIONS)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two rows of one job, in words."""
    if not (old.get("comparable", True) and new.get("comparable", True)):
        return []
    keys = [k for k in {**old, **new} if k not in NO_MATTER and old.get(k) != new.get(k)]
    return [f"{k}: {old.get(k)} before, {new.get(k)} now" for k in keys]


def _line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return row["refused"].splitlines()[0]
    bound = row.get("lower_bound", row.get("bound_reached"))
    mark = "" if row["comparable"] else ", ended by the clock: not compared"
    return (
        f"{row['objective']:.6g} s (bound {bound:.6g}), {row['mesh']}, {row['schedule'] or 'one stage'}, "
        f"{row['microbatches']} microbatches, {row['recompute']}, {row['decisions']}; {row['cpu_seconds']} s{mark}"
    )


if __name__ == "__main__":
    main()
