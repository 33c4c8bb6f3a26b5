"""Our step on torch ranks beside PyTorch's own: FSDP2, DDP, and one process alone.

    python benchmarks/torch_side_by_side.py --ranks 2,4 --models gpt,llama -o benchmarks/results/torch_side_by_side.json

Every way trains the same model from the same weights on the same batch with AdamW, in the same processes (gloo, one
thread each), a step of each in turn; the one process alone has the whole batch and as many threads as there are ranks,
at most one per processor. `plan` is what the planner chooses freely, `squeezed` what it chooses in half of that
memory, so that parameters or state are cut, as FSDP's are. Medians are compared: seconds by the clock of the slowest
rank, and of the processors of all ranks. Collectives are those that the profiler saw on the first rank.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import meshwright as mw

VOCABULARY, KEY_HEADS = 2048, 2
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch: B rows, T positions, D width, H heads."""

    layers: int
    width: int
    heads: int
    rows: int
    positions: int


class GptBlock(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        h = self.ln1(x_BTD)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.ln2(x_BTD)), approximate="tanh"))


class Gpt(nn.Module):
    """Learnt positions, tied embeddings."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, sizes.width)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.layers = nn.ModuleList(GptBlock(sizes) for _ in range(sizes.layers))
        self.ln, self.head = (
            nn.LayerNorm(sizes.width),
            nn.Linear(sizes.width, VOCABULARY, bias=False),
        )
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(self.ln(x_BTD))


class LlamaBlock(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, self.size = sizes.width, sizes.width // sizes.heads
        hidden, keys = 8 * width // 3 // 32 * 32, KEY_HEADS * self.size
        self.ln1, self.ln2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.ln1(x_BTD)
        q, k, v = (
            f(h).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.ln2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


class Llama(nn.Module):
    """RMS norm, rotary positions, grouped queries, gated units."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, sizes.width)
        self.layers = nn.ModuleList(LlamaBlock(sizes) for _ in range(sizes.layers))
        self.ln, self.head = nn.RMSNorm(sizes.width), nn.Linear(sizes.width, VOCABULARY, bias=False)
        size = sizes.width // sizes.heads
        frequencies = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(tokens_BT.shape[1]).float(), self.frequencies).repeat(
            1, 2
        )
        x_BTD = self.tokens(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, angles.cos(), angles.sin())
        return self.head(self.ln(x_BTD))


MODELS: dict[str, Callable[[Sizes], nn.Module]] = {"gpt": Gpt, "llama": Llama}


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


# ---------------------------------------------------------------- the ways to train


def eager(model: nn.Module, batch: Batch) -> Callable[[], float]:
    """A step of PyTorch's own."""
    optimizer = adamw(model)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def planned(model: nn.Module, batch: Batch, request: mw.Request) -> Any:
    return mw.torch.parallelize(model, loss_of, adamw(model), batch, request=request)


def ways(model: nn.Module, batch: Batch, rank: int, count: int) -> dict[str, Callable[[], float]]:
    """By name, a step of each on this rank; what only the first runs does nothing on others."""
    rows = {name: x.chunk(count)[rank] for name, x in batch.items()}
    free = planned(copy.deepcopy(model), batch, mw.Request())
    tight = mw.Request(memory=free.plan.estimate.peak_bytes / 2)
    squeezed = planned(copy.deepcopy(model), batch, tight)
    threads = min(count, len(os.sched_getaffinity(0)))
    whole = eager(copy.deepcopy(model), batch)

    def alone() -> float:
        if rank:
            return 0.0
        torch.set_num_threads(threads)
        found = whole()
        torch.set_num_threads(1)
        return found

    if rank == 0:
        print(free.plan, squeezed.plan, sep="\n", flush=True)
    return {
        "plan": lambda: free(batch),
        "ddp": eager(DistributedDataParallel(copy.deepcopy(model)), rows),
        "squeezed": lambda: squeezed(batch),
        "fsdp2": eager(sharded(copy.deepcopy(model)), rows),
        "alone": alone,
    }


# ---------------------------------------------------------------- measuring


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one step that all ranks begin together: by the clock of the slowest, of all ranks' processors."""
    dist.barrier()
    clock, busy = time.perf_counter(), time.process_time()
    step()
    mine = torch.tensor(
        [time.perf_counter() - clock, time.process_time() - busy], dtype=torch.float64
    )
    slowest, total = mine[:1], mine[1:]
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return slowest.item(), total.item()


def collectives(step: Callable[[], float]) -> dict[str, dict[str, int]]:
    """Of one step on this rank, by kind: how many, and the bytes of their operands."""
    count, nbytes = Counter[str](), Counter[str]()
    with torch.profiler.profile(record_shapes=True) as seen:
        step()
    for event in seen.events():
        if event.name.startswith("gloo:"):
            kind = event.name.removeprefix("gloo:")
            count[kind] += 1
            nbytes[kind] += sum(4 * torch.Size(shape).numel() for shape in event.input_shapes)
    return {kind: {"count": count[kind], "bytes": nbytes[kind]} for kind in count}


def serve(rank: int, count: int, name: str, sizes: Sizes, rounds: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}/meet", rank=rank, world_size=count)
    torch.manual_seed(0)
    model = MODELS[name](sizes)
    batch = {
        key: torch.randint(VOCABULARY, (sizes.rows, sizes.positions))
        for key in ("tokens", "targets")
    }
    every = ways(model, batch, rank, count)
    losses = {way: [step() for _ in range(2)] for way, step in every.items()}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in every}
    for _ in range(rounds):
        for way, step in every.items():
            found[way].append(timed(step))
    met = {way: collectives(step) for way, step in every.items()}
    if rank == 0:
        assert (
            max(abs(losses[way][1] / losses["alone"][1] - 1) for way in ("plan", "squeezed")) < 1e-4
        ), losses
        told = {
            way: {
                "seconds": median(clock for clock, _ in runs),
                "busy_seconds": median(busy for _, busy in runs),
                "collectives": met[way],
            }
            for way, runs in found.items()
        }
        Path(store, "result.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def measured(name: str, count: int, sizes: Sizes, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as store:
        multiprocessing.spawn(serve, (count, name, sizes, rounds, store), count)
        told = json.loads(Path(store, "result.json").read_text())
    for unit in ("seconds", "busy_seconds"):
        for ours, theirs in (("plan", "ddp"), ("squeezed", "fsdp2"), ("plan", "alone")):
            told[ours][f"{unit} over {theirs}"] = told[ours][unit] / told[theirs][unit]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--models", default="gpt,llama")
    for field, value in {
        "layers": 4,
        "width": 256,
        "heads": 4,
        "rows": 16,
        "positions": 128,
    }.items():
        parser.add_argument(f"--{field}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    sizes = Sizes(options.layers, options.width, options.heads, options.rows, options.positions)
    results = {}
    for name in options.models.split(","):
        for count in map(int, options.ranks.split(",")):
            found = results[f"{name} on {count} ranks"] = measured(
                name, count, sizes, options.rounds
            )
            for way, told in found.items():
                ratios = ", ".join(f"{told[key]:.2f} {key}" for key in told if " over " in key)
                print(
                    f"{name} on {count}: {way} {told['seconds']:.3f} s, busy {told['busy_seconds']:.3f} s; "
                    f"{ratios} {told['collectives']}",
                    flush=True,
                )
    if options.output:
        options.output.write_text(json.dumps({"sizes": vars(sizes), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
