"""Seconds of one collective over some axes of a mesh.

A group is looked at tier by tier (`groups`). Each tier carries its share while the others
carry theirs, as the rings and trees of NCCL do, so the slowest sets the slope of the price; hops
of all tiers add up to its fixed part.

    all_gather, reduce_scatter   a ring over all ranks
    all_reduce                   a ring's bytes, a tree's hops; or reduced inside the switch (NVLS)
    all_to_all                   every rank sends to every other, each over its own link
    permute                      every rank sends to one other, over the farthest tier: its own link

Devices that are threads of one process meet once for a collective of any kind (`_in_one_process`); those that are
processes of one host, without wires of their own, hand on through its memory (`_between_processes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2

from ...ir.cluster.cluster import Cluster
from ...ir.errors import PlanError, did_you_mean
from ...ir.execution_model import Backend, ExecutionModel, ProcessMeeting, execution_model
from ...ir.graph import ITEM_BYTES, TensorType
from ...ir.mesh import Mesh
from ...ir.sharding import ReshardStep, Sharding
from .groups import Level, levels_of

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute")


@dataclass(frozen=True, slots=True)
class LinearTime:
    """Seconds as a straight line in bytes: `fixed + slope * nbytes`."""

    fixed: float = 0.0
    slope: float = 0.0

    def __call__(self, nbytes: float) -> float:
        return self.fixed + self.slope * nbytes

    def __add__(self, other: LinearTime) -> LinearTime:
        return LinearTime(self.fixed + other.fixed, self.slope + other.slope)


FREE = LinearTime()


@dataclass(frozen=True)
class Collectives:
    """Prices collectives on one mesh of one cluster.

    All groups of the same axes work at the same time, each rank on its own link. Leaves out
    congestion between groups that share a link, and overlap with compute.
    """

    mesh: Mesh
    cluster: Cluster
    backend: Backend = "xla"

    @property
    def execution_model(self) -> ExecutionModel:
        return execution_model(self.cluster.device.kind, self.backend)

    def wire_bytes(self, kind: TensorType) -> int:
        """Bytes of a whole tensor when it travels, be it as f32."""
        widened = kind.dtype in self.execution_model.widened
        return kind.nbytes * (4 // ITEM_BYTES[kind.dtype] if widened else 1)

    def joins(self, kind: str, phase: str, source: Sharding) -> bool:
        """Whether many collectives of this kind become one, and so have no latency of their own.

        A single number (a loss, a norm) comes after the gradients and pays its own.
        """
        return kind in self.execution_model.joined and phase == "update" and bool(source.dims)

    def line(self, kind: str, axes: tuple[str, ...]) -> LinearTime:
        """Seconds of one collective, as a line in the bytes of the larger local side."""
        if (kind, axes) not in self._lines:
            self._lines[kind, axes] = self._line(kind, axes)
        return self._lines[kind, axes]

    @cached_property
    def _lines(self) -> dict[tuple[str, tuple[str, ...]], LinearTime]:
        return {}

    def _line(self, kind: str, axes: tuple[str, ...]) -> LinearTime:
        if kind not in KINDS:
            raise PlanError(
                f"`{kind}` is no collective.", where="collective", fix=did_you_mean(kind, KINDS)
            )
        measured = self._measured(kind, axes)
        if measured is not None:
            return measured
        levels = levels_of(axes, self.mesh, self.cluster)
        if not levels:
            return FREE
        if self.execution_model.one_process and self.cluster.hosts == 1:
            return _in_one_process(kind, levels)
        meeting = self.execution_model.meeting
        if meeting is not None and self.cluster.hosts == 1:
            return _between_processes(kind, levels, meeting)
        prices = {
            "all_reduce": self._all_reduce, "all_to_all": _all_to_all, "permute": _permute
        }  # fmt: skip
        return prices.get(kind, self._ring)(levels)

    def _measured(self, kind: str, axes: tuple[str, ...]) -> LinearTime | None:
        """What a profile says of groups that lie like this; axes next to each other are one group. Profiles measure
        XLA's collectives, which are not those of processes that meet through memory."""
        if self.execution_model.meeting is not None:
            return None
        strides = sorted((self.mesh.stride(name), self.mesh.sizes[name]) for name in axes)
        size = stride = 1
        for step, n in strides:
            if size > 1 and step != stride * size:
                return None
            stride, size = (stride if size > 1 else step), size * n
        for line in self.cluster.measured:
            if (line.kind, line.size, line.stride) == (kind, size, stride):
                return LinearTime(line.fixed, line.slope)
        return None

    def _ring(self, levels: tuple[Level, ...]) -> LinearTime:
        """Every byte passes every link of a ring over all n ranks but one: (n - 1) / n of them.
        The ranks of one part pass on to the next with all their links at once.

        Source: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, sections 4.1 and 4.2.
        """
        n = levels[-1].inside
        slope = max((n - 1) / n / level.bandwidth for level in levels)
        hops = _ring_hops if self.execution_model.ring_latency else _tree_hops
        return LinearTime(hops(levels), slope)

    def _all_reduce(self, levels: tuple[Level, ...]) -> LinearTime:
        """Twice a ring's bytes; twice a tree's hops. A switch that reduces (`nvls`) is sent the
        bytes once and sends the sum back: n / (n - 1) of them at its efficiency.

        Source: NCCL @5067397c26, src/graph/tuning.cc (nvlsEfficiency); 8 H100 reach 480 GB/s
        of bus bandwidth that way [nccl-tests, recalled], this formula 477.
        """
        n = levels[-1].inside
        slopes: list[float] = []
        for level in levels:
            ring = 2 * (n - 1) / n / level.bandwidth
            if level.tier.nvls is not None and level.lanes == 1:
                share = level.parts / (level.parts - 1)
                ring = min(ring, share / (level.tier.achieved * level.tier.nvls))
            slopes.append(ring)
        return LinearTime(2 * _tree_hops(levels), max(slopes))

    def hop(self, stride: int, nbytes: float) -> float:
        """Seconds of sending from every rank to the one `stride` ranks on (pipeline neighbours)."""
        tier = self.cluster.tier_for(min(2 * stride, self.cluster.size))
        return tier.latency + nbytes / tier.achieved

    def moving(self, steps: Sequence[ReshardStep], source: Sharding, phase: str) -> LinearTime:
        """Seconds of the steps from a source layout to another, as a line in the tensor's *global* bytes."""
        total, share = FREE, 1.0 / source.ways(self.mesh)
        for step in steps:
            larger, share = self.shares(step, share)
            if step.kind != "slice":
                line = self.line(step.kind, step.axes)
                fixed = 0.0 if self.joins(step.kind, phase, source) else line.fixed
                total += LinearTime(fixed, line.slope * larger)
        return total

    def shares(self, step: ReshardStep, share: float) -> tuple[float, float]:
        """Local bytes per global byte: of the larger side of the step, and after it."""
        ways = self.mesh.ways(step.axes)
        match step.kind:
            case "all_gather":
                return share * ways, share * ways
            case "reduce_scatter" | "slice":
                return share, share / ways
            case _:
                return share, share


def _in_one_process(kind: str, levels: tuple[Level, ...]) -> LinearTime:
    """Threads meet once and read each other's memory: twice a ring's bytes, but for an all-gather and a permute, which
    only copy: 0.73 s for 1 GB on average, over how many devices it may be.

    Measured on 2, 4 and 8 devices of 2 cores: 26 to 62, 56 to 94 and 106 to 172 us of any kind; slopes in
    `benchmarks/results/cpu8.json` and `cpu8_epyc.json`.
    """
    n, bandwidth = levels[-1].inside, min(level.bandwidth for level in levels)
    copies = kind in ("all_gather", "permute")
    return LinearTime(_tree_hops(levels), (0.75 if copies else 2 * (n - 1) / n) / bandwidth)


def _between_processes(kind: str, levels: tuple[Level, ...], meeting: ProcessMeeting) -> LinearTime:
    """Processes of one host, by gloo's algorithms and the way our backend uses them:

        all_reduce       2 (n - 1) (hop + size / n / bandwidth)     a ring
        all_gather       (n - 1) (hop + size / n / bandwidth)       a ring
        all_to_all       log2(n) hop + (n - 1) / n * size / bandwidth
        reduce_scatter   an all_to_all; sums are added to it as bytes that are read
        permute          hop + size / bandwidth

    Source: gloo/allreduce.cc and allgather.cc; `benchmarks/torch_predictions.py`.
    """
    n = levels[-1].inside
    bandwidth = min(level.bandwidth for level in levels) * meeting.share
    hop, ring = meeting.hop_bytes / bandwidth, (n - 1) / n / bandwidth
    match kind:
        case "all_reduce":
            return LinearTime(2 * (n - 1) * hop, 2 * ring)
        case "all_gather":
            return LinearTime((n - 1) * hop, ring)
        case "permute":
            return LinearTime(hop, 1 / bandwidth)
        case _:
            added = meeting.share / bandwidth if kind == "reduce_scatter" else 0.0
            return LinearTime(ceil(log2(n)) * hop, ring + added)


def _all_to_all(levels: tuple[Level, ...]) -> LinearTime:
    """A rank sends as much to each of the others; those that a tier joins share its own link.

    Source: pairwise exchange, Thakur et al., section 4.4.
    """
    n, slope, before = levels[-1].inside, 0.0, 1
    for level in levels:
        slope = max(slope, (level.inside - before) / n / level.tier.achieved)
        before = level.inside
    return LinearTime(_tree_hops(levels), slope)


def _permute(levels: tuple[Level, ...]) -> LinearTime:
    """As the pair that is farthest apart: all others send at the same time."""
    far = levels[-1].tier
    return LinearTime(far.latency, 1 / far.achieved)


def _ring_hops(levels: tuple[Level, ...]) -> float:
    """A ring's n - 1 hops, each over the tier that joins its two ranks."""
    n, before, seconds = levels[-1].inside, 1, 0.0
    for level in levels:
        seconds += (n / before - n / level.inside) * level.tier.latency
        before = level.inside
    return seconds


def _tree_hops(levels: tuple[Level, ...]) -> float:
    return sum(ceil(log2(level.parts)) * level.tier.latency for level in levels)
