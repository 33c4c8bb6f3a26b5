"""Seconds and bytes of one step of a training job given as numbers.

    job      layers, microbatches, and the degrees of parallelism
    parts    what an embedding, one layer and a head cost under them (`parts`)
    price    stages of layers, a schedule, what overlaps with what, memory per stage

A stage is a run of layers; the first also has the embedding, the last the head. With one
stage there is no pipeline, and parameters and gradients travel while layers compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cluster import Cluster
from ..ir.errors import PlanError
from .parts import Parts, Place, Work
from .pinned import Parallelism

GRADIENT = 4  # bytes per accumulated gradient: fp32, as Megatron-LM and PyTorch FSDP keep them


@dataclass(frozen=True)
class Job:
    """One training job as numbers.

    `microbatch` counts sequences of one microbatch on one data rank; `microbatches` those of
    one step on one data rank. `overlap` says which collectives run beside computation:
    "gradients" (data parallelism), "parameters" (gathers of ZeRO), "tensor" (exchanges inside
    layers, hidden behind the products next to them as far as those last).
    """

    layers: int
    parallelism: Parallelism
    microbatch: int
    microbatches: int
    overlap: frozenset[str] = frozenset()
    reduce_in_fp32: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "microbatch", "microbatches"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} cannot be {getattr(self, name)}.", where=name, fix="1 or more")
        stages = self.parallelism.pp * self.parallelism.vpp
        if self.layers < stages:
            raise PlanError(
                f"{self.layers} layers are fewer than {stages} stages.", where="pp, vpp", fix=f"at most {self.layers} stages"
            )
        if self.parallelism.vpp > 1 and self.microbatches % self.parallelism.pp:
            raise PlanError(
                f"interleaving needs microbatches in groups of {self.parallelism.pp}, got {self.microbatches}.",
                where="vpp", fix="another microbatch size, or vpp=1",
            )  # fmt: skip


@dataclass(frozen=True)
class Price:
    """A priced step. `memory[stage]` and `seconds` tell causes; `step` is the whole."""

    step: float
    seconds: dict[str, float]
    memory: tuple[dict[str, float], ...]
    flop: float  # of products, on all devices, without recomputation

    @property
    def peak(self) -> float:
        return max(sum(stage.values()) for stage in self.memory)


def price(parts: Parts, job: Job, cluster: Cluster, boundary: float) -> Price:
    """Price one step; `boundary` are the bytes of a microbatch that one device hands to the next stage."""
    return _Pricing(parts, job, cluster, boundary).run()


@dataclass
class _Pricing:
    parts: Parts
    job: Job
    cluster: Cluster
    boundary: float

    def run(self) -> Price:
        pp, vpp = self.job.parallelism.pp, self.job.parallelism.vpp
        stages = [self._stage(i) for i in range(pp * vpp)]
        forward = [self._pass(stage, "forward") for stage in stages]
        backward = [self._pass(stage, "backward") for stage in stages]
        hop = self._hop()
        m = self.job.microbatches
        ranks = [
            (sum(forward[i::pp]), sum(backward[i::pp])) for i in range(pp)
        ]
        slowest = max(f + b for f, b in ranks)
        sends = 2 * hop * vpp if pp > 1 else 0.0
        pipeline = (m - 1) * (slowest + sends) + (sum(f + b for f, b in ranks) + (pp - 1) * sends) / vpp + slowest * (1 - 1 / vpp)
        tail = max(self._tail(stages[i::pp], slowest) for i in range(pp))
        seconds = {
            "compute": m * slowest, "bubble": pipeline - m * (slowest + sends), "sends": m * sends, "gradients and update": tail,
        }  # fmt: skip
        memory = tuple(self._memory(i, stages[i::pp]) for i in range(pp))
        return Price(pipeline + tail, seconds, memory, self._flop())

    def _stage(self, index: int) -> dict[Place, int]:
        """How many of each part one stage has; earlier stages take what does not divide."""
        count = self.job.parallelism.pp * self.job.parallelism.vpp
        each, left = divmod(self.job.layers, count)
        layers = each + (index < left)
        return {"embedding": int(index == 0), "layer": layers, "head": int(index == count - 1)}

    def _pass(self, stage: dict[Place, int], which: str) -> float:
        return sum(n * self._seconds(self.parts[place], which) for place, n in stage.items())

    def _seconds(self, part: Part, which: str) -> float:
        """One pass over one part. What overlaps costs only where it outlasts the computation."""
        work: Work = getattr(part, which)
        seconds = work.compute
        seconds = max(seconds, work.exchange) if "tensor" in self.job.overlap else seconds + work.exchange
        travel = work.gather
        if which == "backward" and self.job.parallelism.zero >= 2:
            travel += self._reduce(part)
        return max(seconds, travel) if "parameters" in self.job.overlap else seconds + travel

    def _reduce(self, part: Part) -> float:
        wide = 2.0 if self.job.reduce_in_fp32 and self.job.parallelism.dp > 1 else 1.0
        return part.update.reduce * wide

    def _hop(self) -> float:
        """Seconds of one send to the next stage."""
        par = self.job.parallelism
        if par.pp == 1:
            return 0.0
        tier = self.cluster.tier_for(par.devices // par.pp * 2)
        return tier.latency + self.boundary / tier.effective_bandwidth

    def _tail(self, stages: list[dict[Place, int]], slowest: float) -> float:
        """After the last backward pass: gradients reduced, optimizer, parameters gathered again."""
        reduce = gather = update = 0.0
        for stage in stages:
            for place, n in stage.items():
                part = self.parts[place]
                reduce += n * self._reduce(part)
                gather += n * part.prepare.gather
                update += n * (part.update.compute + part.prepare.compute)
        if self.job.parallelism.zero >= 2:
            reduce = 0.0
        if "gradients" in self.job.overlap:
            reduce = max(0.0, reduce - slowest)
        if "parameters" in self.job.overlap:
            gather = max(0.0, gather - slowest / 3)
        return reduce + update + gather

    def _memory(self, rank: int, stages: list[dict[Place, int]]) -> dict[str, float]:
        par, found = self.job.parallelism, dict.fromkeys(("state", "parameters", "gradients", "activations", "transient"), 0.0)
        for stage in stages:
            for place, n in stage.items():
                part = self.parts[place]
                found["state"] += n * part.state
                found["parameters"] += n * (part.casts if par.zero < 3 else 0.0)
                found["gradients"] += n * GRADIENT * (part.weights if par.zero < 2 else part.shard)
        found["activations"] = self._waiting(rank, stages)
        found["transient"] = self.parts.transient
        if par.zero == 3:
            found["parameters"] = 2 * self.parts["layer"].casts
        return found

    def _waiting(self, rank: int, stages: list[dict[Place, int]]) -> float:
        """Saved activations of all microbatches in flight."""
        par, m = self.job.parallelism, self.job.microbatches
        saved = [sum(n * self.parts[place].saved for place, n in stage.items()) for stage in stages]
        if par.vpp == 1:
            return saved[0] * min(m, par.pp - rank)
        most = min(m * par.vpp, 2 * (par.pp - rank - 1) + (par.vpp - 1) * par.pp + 1)
        return sum(saved) / par.vpp * most

    def _flop(self) -> float:
        par, job = self.job.parallelism, self.job
        once = sum(
            (job.layers if place == "layer" else 1) * (part.forward.flop * 3)
            for place, part in self.parts.parts.items()
        )
        return once * job.microbatches
