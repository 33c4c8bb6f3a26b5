"""Predicted against compiled communication and memory, for every model of the zoo on three meshes.

    python benchmarks/audit_zoo.py [--meshes 8 4x2 2x2x2] [-o FILE]

Tiny sizes on 8 emulated CPU devices; the plan is free, the program is compiled, not run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax

ZOO = (
    "gpt-tiny", "gpt-tiny-scan", "llama-tiny", "llama-tiny-scan", "mixtral-tiny", "vit-tiny", "wrn-tiny", "dlrm-tiny",
    "gpt-bytes",
)  # fmt: skip


def audited(name: str, mesh: tuple[int, ...]) -> dict[str, Any]:
    import meshwright as mw
    from meshwright.models import build

    example = build(name)
    arguments = (example.step, example.state, example.batch)
    request = mw.Request(mesh=mesh, time_limit=30, gap=0.02)
    plan = mw.plan(*arguments, cluster="8xcpu", donate_argnums=0, request=request)
    found = mw.lower(plan, *arguments, donate_argnums=0).audit()
    return {
        "model": name, "mesh": "x".join(map(str, mesh)), "recompute": plan.recompute, "microbatches": plan.microbatches,
        "predicted_bytes": found.predicted_bytes, "compiled_bytes": found.compiled_bytes,
        "difference": found.difference, "predicted_peak": found.predicted_peak, "compiled_peak": found.compiled_peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--meshes", nargs="*", default=["8", "4x2", "2x2x2"])
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    for name in ZOO:
        for mesh in options.meshes:
            row = audited(name, tuple(map(int, mesh.split("x"))))
            rows.append(row)
            memory = row["compiled_peak"] / row["predicted_peak"] - 1
            moved = f"{row['predicted_bytes']:.0f} -> {row['compiled_bytes']:.0f} bytes {row['difference']:+.1%}"
            peak = f"{row['predicted_peak']:.0f} -> {row['compiled_peak']:.0f} bytes {memory:+.1%}"
            print(f"{name:16} {row['mesh']:6} moved {moved}, memory {peak}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
