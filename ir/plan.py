"""A plan: what the planner decided for one graph on one cluster, and what it can claim.

`planner` writes it, `backends` lower it, `view` and `cli` print it; none of
them needs another. A plan is a versioned JSON file that can be read, compared
and reviewed without the graph it was made for.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from .analysis.batch import known_batch
from .cluster.cluster import Cluster
from .composites.attention_op import AttentionKind
from .composites.losses import LossKind
from .execution import Execution, OverlapKind
from .execution_model import PlanBackend
from .graph import Batch, Graph
from .mesh import Mesh
from .passes.recompute import Policy
from .pipeline.schedule import Schedule, read_schedule
from .sharding import Sharding
from .units import counted, format_bytes, format_seconds

PLAN_VERSION = (
    3  # 3: graphs, to whose fingerprints plans belong, have attributes in words of no framework
)
EXACT = (
    1e-6  # a gap up to which a plan is optimal: rounding of sums of seconds, and where solvers stop
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Proof(_Part):
    """What the search can claim, in predicted seconds per step."""

    status: Literal[
        "optimal", "within_gap", "feasible"
    ]  # "within_gap": proven to be within what is good enough
    # "end": all was looked at, the bound is not tight; "estimate": only what an estimate ranks first was solved
    stopped_by: Literal["proof", "time", "interrupt", "end", "estimate"]
    objective: float
    lower_bound: float  # no plan in the modelled space is faster
    seed: int
    cost_model: str
    band: str  # what is known about the error of the cost model
    left_out: tuple[str, ...]  # what the search did not look at
    searched: tuple[str, ...]  # one line per (mesh, microbatches, recompute) candidate
    seconds: float | None = Field(
        None, exclude=True
    )  # the search took; left out of files: equal plans, equal files
    good_enough: float | None = (
        None  # the gap at which the search was to end; older files do not say it
    )

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_is(cls, data: Any, read: ModelWrapValidatorHandler[Proof]) -> Proof:
        """Older files call optimal whatever is within the gap that was good enough."""
        found = read(data)
        if found.good_enough is None and found.status == "optimal" and found.gap > EXACT:
            return found.model_copy(update={"status": "within_gap"})
        return found

    @property
    def gap(self) -> float:
        """Relative distance between the plan and the bound: 0.01 is 1 %."""
        return 0.0 if self.objective == 0 else max(0.0, 1 - self.lower_bound / self.objective)


class Estimate(_Part):
    """Predicted time and memory of one step on one device."""

    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    hidden_seconds: float = (
        0.0  # of these together, what running beside each other saves: the step takes the rest
    )
    peak_bytes: float
    limit_bytes: float
    memory: dict[str, float]  # cause -> bytes at the peak
    flop: float  # of the whole step over all devices


class Tensor(_Part):
    """One row of the sharding table. `count` equal tensors (one per layer) share it.

    Activations are the results of forward products, for one microbatch; recompute
    may let fewer than `count` live at a time.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    sharding: str
    count: int
    local_bytes: float  # of all `count` together on one device
    where: str = ""


class Collective(_Part):
    """One predicted communication. It runs `count` times per step and each time
    moves `nbytes` (size of the larger of the local operand and result).

    A single program for all stages of a pipeline has some over the axis `mesh.STAGE` too, which `Plan.mesh` lacks.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute"]
    axes: tuple[str, ...]
    nbytes: float
    count: int
    seconds: float  # of all `count` together
    what: str
    phase: str


class AxisUse(_Part):
    """What one mesh axis cuts in the step's products, as shares of their FLOP.

    `batch` examples, `sequence` positions of a text, `experts` a dim that weights
    share with activations, `columns` other dims of the result, `sums` contracted
    dims (the result owes a sum); the rest is done by every device alike.
    """

    axis: str
    size: int
    batch: float
    sequence: float
    experts: float
    columns: float
    sums: float

    @property
    def idle(self) -> float:
        return max(0.0, 1 - self.batch - self.sequence - self.experts - self.columns - self.sums)


class Layout(_Part):
    """A sharding as plain data: mesh axes per dim, and axes whose sum is owed."""

    dims: tuple[tuple[str, ...], ...]
    owed: tuple[str, ...] = ()

    @classmethod
    def of(cls, sharding: Sharding) -> Layout:
        return cls(dims=sharding.dims, owed=tuple(sorted(sharding.partial)))

    @property
    def sharding(self) -> Sharding:
        return Sharding(self.dims, frozenset(self.owed))


class BatchInput(_Part):
    """One input of the step that has a batch dim; `position` counts the leaves of its arguments."""

    name: str
    position: int
    dim: int


class PlannedBatch(_Part):
    """What the plan takes for the batch, and why; `doubt` names dims for which as much speaks."""

    inputs: tuple[BatchInput, ...]
    examples: int
    evidence: str
    doubt: str = ""
    statistics: Literal["batch", "microbatch"] = (
        "batch"  # over what batch norm and the like take theirs
    )

    @classmethod
    def of(cls, graph: Graph) -> PlannedBatch:
        batch = known_batch(graph)
        inputs = tuple(
            BatchInput(name=graph.input_name(p), position=p, dim=d) for p, d in batch.dims
        )
        sizes = [graph.types[graph.inputs[p]].shape[d] for p, d in batch.dims]
        return cls(
            inputs=inputs, examples=(sizes or [0])[0], evidence=batch.evidence, doubt=batch.doubt,
            statistics=batch.statistics,
        )  # fmt: skip

    @property
    def known(self) -> Batch:
        """As a graph holds it."""
        return Batch(
            tuple((each.position, each.dim) for each in self.inputs),
            self.evidence,
            self.doubt,
            self.statistics,
        )

    def __str__(self) -> str:
        """`x dim 0, y dim 0 (256 examples): the update sums over it, no state has it`."""
        if not self.inputs:
            return f"none: {self.evidence}"
        names = ", ".join(f"{each.name} dim {each.dim}" for each in self.inputs)
        own = "; statistics of each microbatch" if self.statistics == "microbatch" else ""
        doubt = f"; as likely: {self.doubt}, which batch_argnums can tell" if self.doubt else ""
        return f"{names} ({counted(self.examples, 'example')}): {self.evidence}{own}{doubt}"


class Stage(_Part):
    """One stage of a pipeline: a stretch of the forward pass on devices of its own.

    `cut` is the position, among the ops of the captured graph, of the first op of the forward pass
    that belongs to this stage; it ends where the next one begins. `strategies`, `slots` and `uses`
    are as in `Plan`; where they are empty, the plan's own hold. The last fields speak of the rank
    that holds the stage.
    """

    cut: int
    blocks: str  # what it holds, in words: "embedding, layers 1-6"
    mesh: Mesh
    strategies: dict[str, tuple[int, ...]]
    slots: dict[str, Layout]
    uses: tuple[AxisUse, ...] = ()
    forward_seconds: float  # of one microbatch, as backward
    backward_seconds: float
    weight_seconds: float  # of the backward seconds, what goes into gradients of weights
    send_seconds: float  # of one microbatch's result to the next stage
    once_seconds: float  # per step: reduction of gradients, optimizer
    peak_bytes: float
    held: float  # microbatches' worth of forward results at most
    memory: dict[str, float]


class Pipeline(_Part):
    """Stages in order, the ranks that hold them, and the order in which each rank works.

    `first[rank]` is the first of a rank's devices, which are numbered one after another;
    `orders[rank]` are its passes, as `ir.schedule` reads and writes them. `program` says whether each
    stage has programs of its own, dispatched pass by pass, or all run a single one in step.
    """

    schedule: str  # name: "1f1b", ...
    stages: tuple[Stage, ...]
    first: tuple[int, ...]
    orders: tuple[str, ...]
    program: Literal["stages", "single"] = "stages"
    programs: dict[
        str, float
    ] = {}  # predicted seconds of a step either way; a way that cannot be is left out
    unstacked: bool = False  # stacked parameters of a loop over layers are held layer by layer

    def read(self, microbatches: int) -> Schedule:
        """The orders as a schedule, which is not checked."""
        return read_schedule(self.schedule, len(self.stages), microbatches, self.orders)


class Plan(_Part):
    """The decision and its evidence.

    `strategies[tag]` has one code per mesh axis (see `rule.Strategy`) for the ops
    of that tag (see `fold`); `slots[tag]` is the layout of an input of the step or
    of a loop. Both speak of the graph after `program.prepare(graph, recompute, in_stages)`.
    """

    version: int = PLAN_VERSION
    meshwright: str
    name: str
    graph: str  # fingerprint of the captured graph
    cluster: Cluster
    mesh: Mesh
    backend: PlanBackend = "xla"  # whose seconds and bytes these are; older files do not say it
    microbatches: int
    recompute: Policy
    attention: AttentionKind = "plain"
    loss: LossKind = "plain"
    overlap: tuple[OverlapKind, ...] = ()
    strategies: dict[str, tuple[int, ...]]
    slots: dict[str, Layout]
    uses: tuple[AxisUse, ...]  # one per mesh axis
    estimate: Estimate
    proof: Proof
    tensors: tuple[Tensor, ...]
    collectives: tuple[Collective, ...]
    opaque: tuple[str, ...]  # ops kept whole because no dim rule describes them
    notes: tuple[str, ...] = ()
    pipeline: Pipeline | None = (
        None  # then `mesh`, `strategies` and `slots` are those of the first stage
    )
    batch: PlannedBatch | None = (
        None  # of the graph whose layers came apart, where they did; older files lack it
    )
    recipe: dict[str, str | int | bool] = {}  # how the command line built the model, if it did

    @property
    def execution(self) -> Execution:
        """What its seconds assume of the runtime."""
        return Execution(self.attention, self.overlap, self.loss)

    def read_elsewhere(self, backend: PlanBackend) -> str:
        """What is to be said where another backend runs it; nothing where its own does. It runs all the same, as a plan
        names shardings and operations, and both backends run these."""
        if backend == self.backend:
            return ""
        seconds, memory = self.estimate.step_seconds, self.estimate.peak_bytes
        return (
            f"planned for {self.backend}, run by {backend}: the {format_seconds(seconds)} and {format_bytes(memory)} "
            f"predicted are those of {self.backend}"
        )

    @property
    def device_count(self) -> int:
        """How many devices run the step."""
        if self.pipeline is None:
            return self.mesh.size
        held = self.pipeline.read(self.microbatches).held
        meshes = [[self.pipeline.stages[s].mesh.size for s in stages] for stages in held]
        return max(
            first + max(sizes) for first, sizes in zip(self.pipeline.first, meshes, strict=True)
        )
