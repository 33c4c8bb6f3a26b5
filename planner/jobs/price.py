"""Seconds and bytes of one step of a training job given as numbers.

    job      layers, microbatches, and the degrees of parallelism
    parts    what an embedding, one layer and a head cost under them (`parts`)
    price    stages of layers, a schedule, what overlaps with what, memory per stage

A stage is a run of layers; the first also has the embedding, the last the head. With one
stage there is no pipeline, and parameters and gradients travel while layers compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.cluster.cluster import Cluster
from ...ir.errors import PlanError
from ...ir.execution_model import Backend, execution_model
from ...ir.pipeline.schedule import Schedule, in_flight
from ..cost.collectives import Collectives
from ..pipeline.schedules import schedule_of
from ..pipeline.simulate import COMPUTE, SLOWDOWN, Run, StageSeconds, pipeline_tasks, simulate
from .parts import Part, Parts, Place, Work
from .pinned import Parallelism


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
    reduce_in_fp32: bool = True  # gradients are added up and reduced in fp32, as Megatron-LM and FSDP do; or in 16 bits
    fused_accumulation: bool = True  # weight gradients are added up by the products that make them
    narrow_gathers: bool = False  # gathers in layers carry one byte in place of two
    lead: int = 0  # layers of another kind, priced with the embedding: the first ones
    backend: Backend = "framework"

    def __post_init__(self) -> None:
        for name in ("layers", "microbatch", "microbatches"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"{name} cannot be {getattr(self, name)}.", where=name, fix="1 or more"
                )
        stages = self.parallelism.pp * self.parallelism.vpp
        units = self.layers + 2 * self.parallelism.lean_ends
        if units < stages:
            raise PlanError(
                f"{self.layers} layers are fewer than {stages} stages.",
                where="pp, vpp", fix=f"at most {units} stages",
            )  # fmt: skip
        if self.layers < stages * self.lead:
            raise PlanError(
                f"{self.lead} leading layers do not fit the first of {stages} stages of {self.layers} layers.",
                where="pp, vpp", fix=f"at most {self.layers // self.lead} stages",
            )  # fmt: skip
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
    flop: float  # of products, on all devices of one data rank, without recomputation
    run: Run

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

    @property
    def buffers(self) -> bool:
        """Whether gradients lie in buffers that the step begins with."""
        return execution_model(self.cluster.device.kind, self.job.backend).gradient_buffers

    @property
    def gradient_bytes(self) -> int:
        """Of one element of the sum of gradients. Without buffers several microbatches are added up in fp32."""
        added_up = not self.buffers and self.job.microbatches > 1
        return 4 if self.job.reduce_in_fp32 or added_up else 2

    @property
    def drains(self) -> bool:
        """Whether activations and casts of weights go, layer by layer, as gradients come: the more counts."""
        return not self.buffers and self.job.microbatches == 1

    def run(self) -> Price:
        pp, vpp = self.job.parallelism.pp, self.job.parallelism.vpp
        stages = [self._stage(i) for i in range(pp * vpp)]
        forward = [self._pass(stage, "forward") for stage in stages]
        backward = [self._pass(stage, "backward") for stage in stages]
        hop = self._hop()
        schedule = schedule_of(pp, self.job.microbatches, vpp)
        seconds = [StageSeconds(f, b, send=hop) for f, b in zip(forward, backward, strict=True)]
        tails = {
            i: self._tail(stages[i::pp], sum(forward[i::pp]), sum(backward[i::pp]))
            for i in range(pp)
        }
        run = simulate(
            pipeline_tasks(schedule, seconds, tails, blocking="stages" not in self.job.overlap)
        )
        worst = max(range(pp), key=lambda i: sum(forward[i::pp]) + sum(backward[i::pp]))
        memory = tuple(self._memory(schedule, i, stages[i::pp]) for i in range(pp))
        return Price(
            run.makespan, self._causes(run, worst, stages[worst::pp]), memory, self._flop(), run
        )

    def _causes(self, run: Run, rank: int, stages: list[dict[Place, int]]) -> dict[str, float]:
        """Seconds of the slowest rank by what it does; what is hidden counts for nothing."""
        found: dict[str, float] = {"compute": 0.0, "exchange": 0.0, "travel": 0.0}
        for stage in stages:
            for place, n in stage.items():
                for which in ("forward", "backward"):
                    for cause, seconds in self._split(self.parts[place], which).items():
                        found[cause] += n * seconds * self.job.microbatches
        for task in run.tasks:
            if task.device == rank and task.kind in ("send", "update"):
                found[task.kind] = found.get(task.kind, 0.0) + task.seconds * (
                    task.stream == COMPUTE
                )
        rest = run.makespan - sum(found.values())
        found["bubble"] = rest if rest > 1e-9 * run.makespan else 0.0  # less is rounding
        return found

    def _stage(self, index: int) -> dict[Place, int]:
        """How many of each part one stage has; earlier stages take what does not divide, the first has the
        leading layers.

        Where ends are lean, embedding and head count as a layer (Megatron-Core's
        account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split).
        """
        count, lean = (
            self.job.parallelism.pp * self.job.parallelism.vpp,
            self.job.parallelism.lean_ends,
        )
        embedding, head = int(index == 0), int(index == count - 1)
        each, left = divmod(self.job.layers + 2 * lean, count)
        layers = each + (index < left) - lean * (embedding + head) - self.job.lead * embedding
        return {"embedding": embedding, "layer": layers, "head": head}

    def _pass(self, stage: dict[Place, int], which: str) -> float:
        return sum(n * self._seconds(self.parts[place], which) for place, n in stage.items())

    def _seconds(self, part: Part, which: str) -> float:
        return sum(self._split(part, which).values())

    def _split(self, part: Part, which: str) -> dict[str, float]:
        """One pass over one part, by cause. What overlaps counts only where it outlasts the rest."""
        work: Work = getattr(part, which)
        compute, exchange, gather = work.compute, work.exchange, work.gather
        if which == "backward" and not self.job.fused_accumulation:
            compute += self._add_up(part)
        if self.job.narrow_gathers and part is self.parts["layer"]:
            gather /= 2
            exchange -= work.gathered / 2
        if self.job.parallelism.cp_kind == "p2p":
            exchange += _beside(work.ring, work.attention) - work.ring
        sharded = which == "backward" and self.job.parallelism.zero >= 2
        travels = {"parameters": gather, "gradients": self._reduce(part) if sharded else 0.0}
        if "tensor" in self.job.overlap:
            exchange = _beside(exchange, compute)
        beside = sum(seconds for name, seconds in travels.items() if name in self.job.overlap)
        alone = sum(seconds for name, seconds in travels.items() if name not in self.job.overlap)
        travel = _beside(beside, compute + exchange) + alone
        return {"compute": compute, "exchange": exchange, "travel": travel}

    def _add_up(self, part: Part) -> float:
        """Seconds of adding one microbatch's gradients to the sum in a pass of its own: the gradient in 16
        bits is read, the sum read and written. A product that adds does that while it multiplies."""
        return self.cluster.device.stream_seconds((2 + 2 * self.gradient_bytes) * part.weights)

    def _reduce(self, part: Part) -> float:
        wide = (
            2.0
            if self.job.reduce_in_fp32 and self.job.parallelism.dp * self.job.parallelism.cp > 1
            else 1.0
        )
        return part.update.reduce * wide

    def _hop(self) -> float:
        """Seconds of one send to the next stage. Ranks that hold equal copies each send a part,
        which is gathered on the other side (Narayanan et al., SC'21, section 4.1)."""
        par = self.job.parallelism
        if par.pp == 1:
            return 0.0
        tier = self.cluster.tier_for(par.devices // par.pp * 2)
        seconds = tier.latency + self.boundary / tier.achieved
        if par.tp > 1 and not par.sequence_parallel:
            whole = Collectives(par.mesh, self.cluster, self.job.backend).line(
                "all_gather", ("tp",)
            )
            seconds += whole(self.boundary * par.tp)
        return seconds

    def _tail(self, stages: list[dict[Place, int]], forward: float, backward: float) -> float:
        """After the last backward pass: gradients reduced, optimizer, parameters gathered again.
        Reductions may hide behind the last backward pass, gathers behind the first forward pass; both slow down."""
        reduce = gather = update = 0.0
        for stage in stages:
            for place, n in stage.items():
                part = self.parts[place]
                reduce += n * self._reduce(part)
                gather += n * part.prepare.gather
                work = part.update.compute + part.update.exchange + part.prepare.compute
                update += n * (work + self._buffers(part))
        if self.job.parallelism.zero >= 2:
            reduce = 0.0
        if "gradients" in self.job.overlap:
            reduce = _beside(reduce, backward)
        if "parameters" in self.job.overlap:
            gather = _beside(gather, forward)
        return reduce + update + gather

    def _buffers(self, part: Part) -> float:
        """Seconds of setting the step's gradients to zero, and of scaling them before they are reduced:
        a write, a read and a write (Megatron-LM, param_and_grad_buffer.py). ZeRO-2 and 3 keep shards alone."""
        par = self.job.parallelism
        if par.zero >= 2 or not self.buffers:
            return 0.0
        passes = 3 if par.dp * par.cp > 1 else 1
        return self.cluster.device.stream_seconds(passes * self.gradient_bytes * part.weights)

    def _memory(
        self, schedule: Schedule, rank: int, stages: list[dict[Place, int]]
    ) -> dict[str, float]:
        par = self.job.parallelism
        found: dict[str, float] = {"state": 0.0, "parameters": 0.0, "gradients": 0.0}
        held = [(n, self.parts[place]) for stage in stages for place, n in stage.items()]
        if par.pp > 1 and any(stage["head"] for stage in stages):
            held.append((1, self.parts.shared))
        for n, part in held:
            found["state"] += n * part.state
            found["parameters"] += n * (part.casts if par.zero < 3 else 0.0)
            found["gradients"] += (
                n * self.gradient_bytes * (part.weights if par.zero < 2 else part.shard)
            )
        saved = [sum(n * self.parts[place].saved for place, n in stage.items()) for stage in stages]
        found["activations"] = in_flight(schedule, rank) * sum(saved) / len(saved)
        found["transient"] = self.parts.transient
        if par.zero == 3:
            found["parameters"] = self._gathered()
        return self._drained(found) if self.drains else found

    def _drained(self, found: dict[str, float]) -> dict[str, float]:
        """Where the backward pass begins, or where it ends."""
        begins = found["gradients"] <= found["activations"] + found["parameters"]
        gone = {"gradients"} if begins else {"activations", "parameters"}
        return {cause: 0.0 if cause in gone else nbytes for cause, nbytes in found.items()}

    def _gathered(self) -> float:
        """Bytes of what FSDP has gathered at once: a layer and the next one, and the root unit with
        embedding and head, which is kept from the forward pass to the backward pass
        (PyTorch, torch.distributed.fsdp.fully_shard, `reshard_after_forward`)."""
        whole = {place: part.casts_whole for place, part in self.parts.parts.items()}
        return whole["embedding"] + 2 * whole["layer"] + whole["head"]

    def _flop(self) -> float:
        job = self.job
        once = sum(
            (job.layers if place == "layer" else 1) * (part.forward.flop * 3)
            for place, part in self.parts.parts.items()
        )
        return once * job.microbatches


def _beside(moving: float, computing: float) -> float:
    """Seconds that communication adds to a computation it runs beside, both slowed down."""
    together = min(moving * SLOWDOWN, computing * SLOWDOWN)
    hidden = together / SLOWDOWN  # of each
    return together + (moving - hidden) + (computing - hidden) - computing
