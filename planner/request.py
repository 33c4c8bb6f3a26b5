"""What a user may fix or limit, and the checks that it makes sense."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from numbers import Integral
from sys import float_info
from typing import Any, Literal, NoReturn, get_args

from ..ir.cluster.cluster import Cluster
from ..ir.composites.attention_op import AttentionKind
from ..ir.composites.losses import LossKind
from ..ir.errors import PlanError, UsageError, did_you_mean
from ..ir.execution import OVERLAPS, WITHIN, Execution, OverlapKind, parse_overlap, usual_execution
from ..ir.execution_model import BACKENDS, PlanBackend, execution_model, runs_on
from ..ir.mistakes import Mistakes
from ..ir.passes.microbatch import Refusal, TimeAxis
from ..ir.passes.recompute import POLICIES, Policy
from ..ir.units import counted, format_bytes, parse_bytes, parse_count
from .pipeline.schedules import entry, schedule_named

Searcher = Literal["exact", "mcmc"]
ProgramKind = Literal["stages", "single"]
BatchStats = Literal["microbatch"]
GAP, PIPELINE_GAP = 0.01, 0.02  # what ends a search; where stages are cut may leave more open
OPEN = ("memory", "gap", "microbatches")  # numbers that need not be given
HEADROOM = 0.10  # of device memory kept free; runs above ~90 % lose speed to the allocator


@dataclass(frozen=True)
class Request:
    """What the user fixed or limited. None means: planned.

    memory        bytes per device that the plan may use; else the device's, less `headroom`
    mesh          sizes of the mesh's axes, outermost first: (128, 8)
    microbatches  how many parts of the batch run one after another
    recompute     "none", "elementwise", "selective" or "full"
    pp            stages of a pipeline; "auto": planned, 1 included; then `mesh` is that of one stage
    schedule      of the pipeline: "1f1b", "interleaved", "zb-h1", ...
    chunks        stages per rank, where the schedule takes any number; planned if not given
    program       of the pipeline: "stages", programs of each stage, or a "single" one for all, which runs gpipe
    time_limit    seconds of search
    gap           the search ends when no plan can be faster by more than this share; by default 0.01, and
                  0.02 where pipelines are searched
    batch_stats   "microbatch": what a step takes over the batch and computes each example with (batch norm) is taken
                  over each microbatch, which changes numbers; None: such a step has one microbatch
    attention     "fused": each attention is one op that keeps no scores; "ring": so too, and where devices share the
                  queries of a sequence, keys go round them, once in the backward pass, for which sums are kept;
                  "plain": products and softmax as written
    loss          "fused": each cross-entropy is one op with its gradients, or one per pass, that makes few logits at a
                  time; "plain": as written
    overlap       which communication runs beside computation: "parameters" (gathers of weights), "gradients" (their
                  reductions), "tensor" (exchanges within layers), with a pipeline "stages" (sends between these);
                  several joined by a comma, "all" or "none"; attention and overlap, if not given, are what the
                  cluster's devices do (`ir.execution.usual_execution`)
    backend       what runs the plan: "xla", or "torch", a process for each device; prices and memory are of it, on
                  another backend a plan runs too, but takes other seconds and bytes
    search        "exact" proves its plans; "mcmc" is FlexFlow's, for comparison, and proves nothing
    """

    memory: float | None = None
    headroom: float = HEADROOM
    mesh: tuple[int, ...] | None = None
    microbatches: int | None = None
    recompute: Policy | None = None
    pp: int | Literal["auto"] = 1
    schedule: str | None = None
    chunks: int | None = None
    program: ProgramKind | None = None
    batch_stats: BatchStats | None = None
    attention: AttentionKind | None = None
    loss: LossKind = "plain"
    overlap: str | tuple[OverlapKind, ...] | None = None
    time_limit: float = 60.0
    gap: float | None = None
    seed: int = 0
    search: Searcher = "exact"
    backend: PlanBackend = "xla"

    @property
    def good_enough(self) -> float:
        """The gap at which the search ends."""
        if self.gap is not None:
            return self.gap
        return GAP if self.pp == 1 else PIPELINE_GAP

    @property
    def execution(self) -> Execution:
        """What is assumed of the runtime; where nothing is said nor known of devices, a step as written, in turn."""
        beside = parse_overlap(self.overlap or (), self._known)
        return Execution(self.attention or "plain", beside, self.loss)

    def on(self, cluster: Cluster) -> Request:
        """The same, with what the devices of a cluster usually do where nothing is said."""
        kinds = [device.kind for device in cluster.devices.values()]
        usual = usual_execution(kinds, self.backend)
        beside = tuple(kind for kind in usual.overlap if kind in self._known)
        if self.search != "exact":
            beside = ()  # chains of moves know no windows
        overlap = beside if self.overlap is None else self.overlap
        program = "stages" if self.backend == "torch" and self.pp != 1 else self.program
        attention = self.attention or usual.attention
        return replace(self, attention=attention, overlap=overlap, program=program)

    @property
    def _known(self) -> tuple[OverlapKind, ...]:
        """What may overlap: without stages nothing is sent between them."""
        return WITHIN if self.pp == 1 else OVERLAPS

    @property
    def flat(self) -> Request:
        """The same without a pipeline."""
        return replace(self, pp=1, program=None, overlap=self.execution.within)

    def __post_init__(self) -> None:
        """Accept sizes as they are written on the command line; refuse what is neither."""
        if isinstance(self.memory, str):
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        if isinstance(self.mesh, str | int):
            object.__setattr__(self, "mesh", parse_mesh(str(self.mesh)))
        wrong = Mistakes()
        for name in ("memory", "headroom", "time_limit", "gap"):
            wrong.of(partial(_check_number, name, getattr(self, name)))
        for name, least in (("microbatches", 1), ("seed", 0)):
            wrong.of(partial(_check_count, name, getattr(self, name), least))
        for name, known, fix in (
            (
                "batch_stats",
                (None, *get_args(BatchStats)),
                '"microbatch", or left out: over the whole batch',
            ),
            (
                "attention",
                (None, *get_args(AttentionKind)),
                did_you_mean(str(self.attention), get_args(AttentionKind)),
            ),
            ("loss", get_args(LossKind), did_you_mean(str(self.loss), get_args(LossKind))),
            ("backend", BACKENDS, did_you_mean(str(self.backend), BACKENDS)),
            ("search", get_args(Searcher), did_you_mean(str(self.search), get_args(Searcher))),
            ("recompute", (None, *POLICIES), did_you_mean(str(self.recompute), POLICIES)),
        ):
            if getattr(self, name) not in known:
                wrong.of(partial(_refuse, name, repr(getattr(self, name)), fix))
        wrong.of(partial(_check_schedule_name, self.schedule))
        wrong.of(lambda: _check_axes(self.mesh))
        if self.overlap is not None:
            wrong.of(partial(_check_overlap, self.overlap, self._known))
        wrong.tell()
        if self.overlap is not None:
            object.__setattr__(self, "overlap", parse_overlap(self.overlap, self._known))
        if self.mesh is not None:  # an axis of one device cuts nothing
            cutting = tuple(int(size) for size in self.mesh if size != 1)
            object.__setattr__(self, "mesh", cutting or tuple(self.mesh[:1]))


def parse_mesh(text: str) -> tuple[int, ...]:
    """Sizes of a mesh's axes: `128x8` is (128, 8)."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        return tuple(parse_count(part.strip()) for part in parts)
    except UsageError:
        _refuse("mesh", f"`{text:.60}`", "sizes of axes, as in 128x8")


def parse_pp(text: str) -> int | Literal["auto"]:
    """Stages of a pipeline: a number, or `auto`."""
    if text == "auto":
        return "auto"
    try:
        return parse_count(text.strip())
    except UsageError:
        _refuse("pp", f"`{text:.60}`", "a number of stages, or auto")


def check_early(request: Request, cluster: Cluster) -> None:
    """Refuse what contradicts itself or the cluster, which needs no step.

    Raises:
        PlanError: the field, its value, and values that would do.
    """
    _check_pipeline(request)
    _check_backend(request.backend, cluster)
    check_overlap(request.execution.overlap, cluster, request.backend)
    if (
        len(cluster.groups) > 1
    ):  # of unlike devices each group is planned for, and stages are not equal
        return
    if request.memory is not None and request.memory > cluster.device.memory:
        _refuse(
            "memory",
            format_bytes(request.memory),
            f"at most the {format_bytes(cluster.device.memory)} that a {cluster.device.name} has",
        )
    _check_stages(request, cluster)
    if request.mesh is not None and request.pp != "auto":
        _check_mesh(request.mesh, cluster, int(request.pp))


def _check_backend(backend: PlanBackend, cluster: Cluster) -> None:
    """Refuse a backend that runs on none of the kind of a cluster's devices."""
    for device in cluster.devices.values():
        if device.kind not in runs_on(backend):
            known = " or ".join(sorted(runs_on(backend)))
            what = f"{backend} on {cluster.name}: it does not run on {device.name}, which is {device.kind}"
            _refuse("backend", what, f"backend=xla, or a cluster of {known} devices")


def check_overlap(
    overlap: Sequence[OverlapKind], cluster: Cluster, backend: PlanBackend = "xla"
) -> None:
    """Refuse communication beside computation where one is done after the other."""
    kinds = [device.kind for device in cluster.devices.values()]
    if overlap and not all(execution_model(kind, backend).overlaps for kind in kinds):
        torch = backend == "torch"
        which = "our torch backend" if torch else "XLA's CPU backend"
        what = (
            f"{'+'.join(overlap)} on {cluster.name}, as {which} computes and communicates in turn"
        )
        fix = "backend=xla on GPUs or TPUs" if torch else "a cluster of GPUs or TPUs"
        _refuse("overlap", what, f"overlap=none, or {fix}")


def check(request: Request, cluster: Cluster, time: TimeAxis | Refusal) -> None:
    """Refuse what cannot be honoured of a step.

    Raises:
        PlanError: the field, its value, and values that would do.
    """
    check_early(request, cluster)
    if request.program == "single" and isinstance(time, Refusal):
        raise PlanError(
            f"one program for all stages needs two microbatches or more, which are not possible: {time.reason}.",
            where=time.where,
            fix="program=stages, which takes one",
        )
    if request.microbatches is not None:
        _check_microbatches(request.microbatches, time)


def _check_number(name: str, value: Any) -> None:
    if value is None and name in OPEN:
        return
    if isinstance(value, bool) or not isinstance(value, float | int):
        _refuse(name, repr(value), "a number")
    if name in ("headroom", "gap"):
        if not 0 <= value < 1:
            _refuse(name, value, "a share from 0 up to, not including, 1")
    elif not 0 < value <= float_info.max:
        _refuse(name, value, "a positive number")


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None and name in OPEN:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(name, repr(value), "a whole number")
    if value < least:
        _refuse(name, value, f"{least} or more")


def _check_schedule_name(schedule: object) -> None:
    if schedule is not None and not isinstance(schedule, str):
        _refuse("schedule", repr(schedule), "a name, such as 1f1b")


def _check_overlap(overlap: Iterable[object], known: tuple[OverlapKind, ...]) -> None:
    if not isinstance(overlap, str | tuple | list | set | frozenset):
        _refuse("overlap", repr(overlap), '"all", "none", or kinds joined by a comma')
    parse_overlap(overlap, known)


def _check_axes(mesh: Iterable[Any] | None) -> None:
    """Whether these are sizes of axes at all."""
    if mesh is None:
        return
    if not isinstance(mesh, Sequence) or not all(
        not isinstance(size, bool) and isinstance(size, Integral) for size in mesh
    ):
        _refuse("mesh", repr(mesh), "sizes of axes, as in (4, 2)")
    if (
        any(size < 1 for size in mesh)
        or not 1 <= len([size for size in mesh if size > 1] or mesh) <= 3
    ):
        _refuse(
            "mesh", "×".join(map(str, mesh)), "one to three axes of at least 1 device, as in 4x2"
        )


def _check_stages(request: Request, cluster: Cluster) -> None:
    """Whether devices can be cut into so many stages."""
    pp = request.pp
    if pp != "auto" and (pp > cluster.size or (cluster.size % pp and request.mesh is not None)):
        stages, rest = divmod(cluster.size, prod(request.mesh or (1,)))
        pinned = "no pinned mesh" if rest else f"pp={stages}, or no pinned mesh"
        fix = f"at most {cluster.size}" if request.mesh is None else pinned
        raise PlanError(
            f"{counted(cluster.size, 'device')} cannot be cut into {pp} {'equal ' * (pp <= cluster.size)}stages.",
            where="request: pp", origin=f"cluster {cluster.name}", fix=fix,
        )  # fmt: skip


def _check_pipeline(request: Request) -> None:
    pp = request.pp
    if pp != 1 and request.batch_stats is not None:
        _refuse(
            "batch_stats",
            f"{request.batch_stats} with a pipeline",
            "pp=1, or statistics over each example",
        )
    if request.search != "exact" and request.execution.overlap:
        _refuse("search", f"{request.search} with overlap", "exact, or overlap=none")
    if pp == "auto":
        if request.mesh is not None:
            _refuse(
                "mesh",
                "pinned while the number of stages is open",
                "pp as a number too, or no mesh",
            )
    elif isinstance(pp, bool) or not isinstance(pp, Integral) or pp < 1:
        _refuse("pp", repr(pp), 'a number of stages, or "auto"')
    if request.program not in (None, *get_args(ProgramKind)):
        _refuse(
            "program",
            repr(request.program),
            did_you_mean(str(request.program), get_args(ProgramKind)),
        )
    if pp == 1 and (request.schedule or request.chunks or request.program):
        name = next(name for name in ("schedule", "chunks", "program") if getattr(request, name))
        _refuse(name, f"{getattr(request, name)} without a pipeline", "pp of 2 or more, or auto")
    if request.chunks is not None:
        _check_chunks(request.chunks, request.schedule)
    if request.program == "single" and request.backend == "torch":
        _refuse("program", "single with backend=torch", "program=stages, or backend=xla")
    if request.program == "single" and request.microbatches == 1:
        _refuse("microbatches", "1 with program=single", "2 or more")
    if request.program == "single" and request.schedule not in (None, "gpipe"):
        _refuse(
            "program",
            f"single with schedule {request.schedule}",
            "schedule=gpipe, which it runs, or no schedule",
        )
    if pp != 1 and request.search != "exact":
        _refuse("search", f"{request.search} with pp", "exact")
    if request.schedule is not None:
        _check_schedule(request, request.schedule)


def _check_chunks(chunks: int, schedule: str | None) -> None:
    if isinstance(chunks, bool) or not isinstance(chunks, Integral) or chunks < 1:
        _refuse("chunks", repr(chunks), "1 or more stages per rank")
    if schedule is None:
        _refuse(
            "chunks",
            f"{chunks} without a schedule that has several stages per rank",
            "schedule=interleaved too",
        )


def _check_schedule(request: Request, name: str) -> None:
    found = entry(name)
    if found.copies > 1:
        raise PlanError(
            f"{found.name} holds each stage on {found.copies} ranks, which plans cannot.",
            where="request: schedule", fix="1f1b, interleaved, zb-h1, zbv and others with one copy",
        )  # fmt: skip
    if request.chunks == 1 and found.chunks is None:
        raise PlanError(
            f"{found.name} has two stages per rank or more, not 1.",
            where="request: chunks", fix="chunks=2 or more, or schedule=1f1b",
        )  # fmt: skip
    if request.chunks is not None and request.chunks != (found.chunks or request.chunks):
        raise PlanError(
            f"{found.name} has {counted(found.chunks or 0, 'stage')} per rank, not {request.chunks}.",
            where="request: chunks", fix="no chunks with this schedule, or interleaved, which takes them",
        )  # fmt: skip
    if found.needs and isinstance(request.pp, int) and request.microbatches is not None:
        schedule_named(
            name, request.pp, request.microbatches, None if found.chunks else request.chunks
        )


def _check_mesh(shape: Sequence[int], cluster: Cluster, stages: int = 1) -> None:
    text = "×".join(map(str, shape))
    if prod(shape) * stages != cluster.size:
        whole = "the cluster" if stages == 1 else f"each of {stages} stages"
        raise PlanError(
            f"mesh {text} has {counted(prod(shape), 'device')}, {whole} has {cluster.size // stages}.",
            where="request: mesh",
            origin=f"cluster {cluster.name}",
            fix=f"a mesh whose axes multiply to {cluster.size // stages}",
        )


def _check_microbatches(count: int, time: TimeAxis | Refusal) -> None:
    if count == 1:
        return
    if isinstance(time, Refusal):
        raise PlanError(
            f"{count} microbatches are not possible: {time.reason}.",
            where=time.where,
            fix=time.fix,
        )
    if time.parts % count:
        near = [m for m in range(1, time.parts + 1) if time.parts % m == 0]
        raise PlanError(
            f"a batch of {time.batch}{time.grouped} cannot be cut into {count} microbatches.",
            where="request: microbatches",
            fix=f"a count dividing {time.parts}: {', '.join(map(str, near[:12]))}; "
            "or, if that is not the batch, say what is by batch_argnums",
        )


def _refuse(field: str, value: object, fix: str) -> NoReturn:
    raise PlanError(f"{field} cannot be {value}.", where=f"request: {field}", fix=fix)
