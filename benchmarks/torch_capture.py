"""What capturing a model of transformers and planning it costs: seconds of CPU and memory.

    python benchmarks/torch_capture.py [--model llama-70b] [--cluster 32xh100x8@ib400] [--pp auto] [--profile] [-o FILE]

The model is made from its config on the meta device, in bf16; its loss is its own (`model(**batch).loss`), its
optimizer AdamW. Each row is one process, from its first line on: seconds count imports.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import time
from pathlib import Path
from typing import Any

GIB = 2.0**20  # of `ru_maxrss`, in KiB
LLAMA = {
    "vocab_size": 128_256, "max_position_embeddings": 8192, "num_key_value_heads": 8, "use_cache": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # class, sizes, sequences, tokens of each
    "llama-8b": ("Llama", {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    }, 512, 8192),
    "llama-70b": ("Llama", {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
    }, 512, 8192),
}  # fmt: skip


def spent() -> float:
    """Seconds of CPU of this process and of those that it waited for."""
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


def captured(name: str) -> Any:
    import torch
    import transformers

    from meshwright.backends.torch.capture import capture

    family, sizes, rows, length = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(config)
        ids = torch.empty(rows, length, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    return capture(
        model,
        lambda model, batch: model(**batch).loss,
        optimizer,
        {"input_ids": ids, "labels": ids},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-70b")
    parser.add_argument("--cluster", default="32xh100x8@ib400")
    parser.add_argument("--pp", default="auto", help="auto, or a number of stages")
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--profile", action="store_true", help="of the capture alone")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    started = time.perf_counter()
    if options.profile:
        watched = cProfile.Profile()
        watched.runcall(captured, options.model)
        pstats.Stats(watched).sort_stats("cumulative").print_stats(60)
        return
    step = captured(options.model)
    row: dict[str, Any] = {
        "model": options.model, "cluster": options.cluster, "ops": len(step.graph.ops), "capture_cpu_seconds": spent(),
        "capture_gib": peak_gib(),
    }  # fmt: skip
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.planner.request import Request
    from meshwright.planning import plan_graph

    pp = "auto" if options.pp == "auto" else int(options.pp)
    plan = plan_graph(
        step.graph,
        Cluster.parse(options.cluster),
        Request(pp=pp, time_limit=options.time_limit),
        options.model,
    )
    row |= {
        "cpu_seconds": spent(), "seconds": time.perf_counter() - started, "gib": peak_gib(),
        "status": plan.proof.status, "step_seconds": plan.estimate.step_seconds,
        "bound_seconds": plan.proof.lower_bound, "stages": len(plan.pipeline.stages) if plan.pipeline else 1,
        "microbatches": plan.microbatches, "peak_bytes": plan.estimate.peak_bytes,
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
