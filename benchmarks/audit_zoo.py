"""Predicted against compiled communication and memory, for every model of the zoo.

    python benchmarks/audit_zoo.py [--meshes 8 4x2 2x2x2] [--squeeze 0.7] [--models NAME ...] [-o FILE]
    python benchmarks/audit_zoo.py --tpu [--models NAME ...] [-o FILE]

Plans are free, programs are compiled, not run: tiny sizes for 8 emulated CPU devices, or real sizes
for TPU slices with the compiler of libtpu, which needs no TPU (extra `tpu`). `--squeeze` plans again
with that part of the memory that the free plan takes, so that microbatches and recomputation are met.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax

CPU = (
    "gpt-tiny", "gpt-tiny-scan", "llama-tiny", "llama-tiny-scan", "mixtral-tiny", "vit-tiny", "wrn-tiny", "dlrm-tiny",
    "gpt-bytes",
)  # fmt: skip
TPU = (
    ("gpt2", {"batch": 64}, "v5e-8"),
    ("gpt2-scan", {"batch": 64}, "v5e-8"),
    ("gpt3-1.3b", {"batch": 128}, "v5p-64"),
    ("gpt3-6.7b-scan", {"batch": 256}, "v5p-128"),
    ("llama3-8b-scan", {"batch": 64, "seq": 4096}, "v5p-128"),
    ("llama3-8b", {"batch": 32, "seq": 4096, "layers": 8}, "v6e-16"),
    ("mixtral-8x7b", {"batch": 64, "seq": 2048, "layers": 4}, "v5p-64"),
    ("vit-l16", {"batch": 512}, "v5e-16"),
    ("wrn-50-2", {"batch": 512}, "v5e-16"),
    ("dlrm", {"batch": 2048}, "v5p-64"),
)


def audited(
    name: str,
    options: dict[str, Any],
    cluster: str,
    mesh: tuple[int, ...] | None,
    squeeze: float | None = None,
) -> dict[str, Any]:
    import meshwright as mw
    from meshwright.backends.xla.capture import capture
    from meshwright.backends.xla.lower import lower
    from meshwright.backends.xla.topology import name_of, topology_devices
    from meshwright.models import build

    example = build(name, **options)
    arguments = (example.step, example.state, example.batch)
    request = mw.Request(mesh=mesh, time_limit=60, gap=0.02)
    plan = mw.plan(*arguments, cluster=cluster, donate_argnums=0, request=request)
    if squeeze:
        request = mw.Request(
            mesh=mesh, time_limit=60, gap=0.02, memory=squeeze * plan.estimate.peak_bytes
        )
        plan = mw.plan(*arguments, cluster=cluster, donate_argnums=0, request=request)
    topology = name_of(plan.cluster)
    devices = topology_devices(topology, plan.cluster) if topology else None
    begun = time.perf_counter()
    found = mw.RunningStep(lower(plan, capture(*arguments, donate_argnums=0), devices)).audit()
    return {
        "model": name, **options, "cluster": cluster, "mesh": "x".join(map(str, plan.mesh.shape)),
        "recompute": plan.recompute, "microbatches": plan.microbatches,
        "predicted_bytes": found.predicted_bytes, "compiled_bytes": found.compiled_bytes,
        "difference": found.difference, "predicted_peak": found.predicted_peak, "compiled_peak": found.compiled_peak,
        "memory_difference": found.memory_difference, "parts": found.parts, "compile_s": time.perf_counter() - begun,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--squeeze", type=float)
    parser.add_argument("--meshes", nargs="*", default=["8", "4x2", "2x2x2"])
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    meshes = [tuple(map(int, mesh.split("x"))) for mesh in options.meshes]
    cases: list[Any] = [(*case, None) for case in TPU] if options.tpu else [
        (name, {}, "8xcpu", mesh) for name in CPU for mesh in meshes
    ]  # fmt: skip
    rows = []
    for case in cases:
        if options.models and case[0] not in options.models:
            continue
        try:
            row = audited(*case, options.squeeze)
        except Exception as error:
            print(f"{case[0]:16} {case[2]:8} {type(error).__name__}: {error}", flush=True)
            rows.append({"model": case[0], **case[1], "cluster": case[2], "refused": str(error)})
            continue
        rows.append(row)
        moved = f"{row['predicted_bytes']:.3e} -> {row['compiled_bytes']:.3e} bytes {row['difference']:+.1%}"
        peak = f"{row['predicted_peak']:.3e} -> {row['compiled_peak']:.3e} bytes {row['memory_difference']:+.1%}"
        place = f"{row['cluster']:8} {row['mesh']:7} {row['recompute']:11} {row['microbatches']}"
        print(
            f"{row['model']:16} {place} moved {moved}, memory {peak}, {row['compile_s']:.0f} s",
            flush=True,
        )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
