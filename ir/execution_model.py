"""What a backend makes of a program: everything that prices and memory assume of its compiler and its runtime.

    execution_model("cpu")                  XLA's CPU backend
    execution_model("cuda", "framework")    a framework that runs kernels of its own, as published jobs do

What a plan may choose is an `Execution`; what devices and their fabric can do is in the cluster. A backend states every
field, for each kind of device that it runs on: none has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

PlanBackend = Literal["xla", "torch"]  # ours, which run plans
Backend = Literal[PlanBackend, "framework"]
BACKENDS: tuple[PlanBackend, ...] = get_args(PlanBackend)
AttentionKernel = Literal["cuDNN", "splash attention"]


@dataclass(frozen=True, slots=True)
class ProcessMeeting:
    """How processes of one host hand values on through its memory, as against what threads of one process reach.

    Attributes:
        share: of the fabric's bandwidth.
        hop_bytes: a hop takes as long as so many bytes: it is work of processors, and slower where ranks share them.
    """

    share: float
    hop_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionModel:
    """What a backend does with a program on one kind of device.

    Attributes:
        fuses_into_readers: a cheap op is made a part of every op that reads it, so that its result is never stored and
            is made again for the backward pass; else what a kernel leaves is stored (`planner/memory/storage.py`).
        fused_dear: kinds of ops that are dear, and made part of their readers nevertheless.
        redone_inside: what a plan recomputes is made within the kernels that read it, and moves nothing in memory.
        lone_reductions: a reduction is a kernel of its own, which reads its operand, or both factors of it.
        widened: element types that products read, and collectives carry, as f32; what is made in them is rounded and
            stored, not made again.
        eager_schedule: what needs inputs and constants alone is made at the start of a program.
        runs_ops_alone: the host runs op by op: each op stores its result, a value is let go after its last reader, and
            no memory is written over; else a program is compiled, and its buffers are laid out beforehand.
        adds_in_products: a product adds to the sum of a weight's gradient; else what it adds is stored beside the sum.
        gradient_buffers: gradients lie in buffers that a step begins with, as wide as a job says, which are set to zero
            and scaled; else they lie where the backward pass makes them, and microbatches are added up in fp32.
        f32_as_tf32: products of f32 are multiplied in tf32, on devices that have it, unless more is asked for.
        fuses_attention: attention is run as one op that keeps no scores, unless a request says otherwise.
        attention_kernel: what runs such an op where it can (`ir/composites/attention_kernels.py`); elsewhere it runs
            block by block. None: every attention is priced as by a kernel that takes it.
        overlaps: communication that does not wait for a layer runs beside computation.
        exchanges_parts: an all-to-all sends and takes an array per device, beside the whole that is made of them.
        joined: kinds of collectives of which those of gradients, new parameters and metrics become few.
        one_process: devices of one host are threads of one process, which meet once for a collective of any kind.
        meeting: of processes that meet through the memory of their host; None where they have a fabric of their own.
        ring_latency: gathers and reduce-scatters take the latency of every hop of a ring; else that of a tree.
        dispatch_seconds: of the host, to run an op, where it runs op by op.
        instruction_seconds: of the host, to dispatch an instruction of a pipeline (a pass, or a send with its receive).
        shard_seconds: of the host, for each shard of what a forward pass leaves for later, which passes give and take.
        dispatches_beside: the host dispatches while devices work; else before.
    """

    fuses_into_readers: bool
    fused_dear: frozenset[str]
    redone_inside: bool
    lone_reductions: bool
    widened: frozenset[str]
    eager_schedule: bool
    runs_ops_alone: bool
    adds_in_products: bool
    gradient_buffers: bool
    f32_as_tf32: bool
    fuses_attention: bool
    attention_kernel: AttentionKernel | None
    overlaps: bool
    exchanges_parts: bool
    joined: frozenset[str]
    one_process: bool
    meeting: ProcessMeeting | None
    ring_latency: bool
    dispatch_seconds: float
    instruction_seconds: float
    shard_seconds: float
    dispatches_beside: bool


def execution_model(kind: str, backend: Backend = "xla") -> ExecutionModel:
    """Of a backend on a kind of device, as clusters call it, which is one of `runs_on`."""
    return _MODELS[backend][kind]


def runs_on(backend: Backend) -> frozenset[str]:
    """The kinds of devices that a backend runs on."""
    return frozenset(_MODELS[backend])


# XLA on TPUs, jax 0.10.2.
#   fuses_into_readers   a producer goes into all of its readers or into none (instruction_fusion.h); seen in compiled
#                        programs on CPUs and TPUs
#   redone_inside        measured on an H100 (`planner/cost/kernels.py`)
#   overlaps             the latency-hiding scheduler, always on for TPUs
#   instruction_seconds  processor time of the dispatching thread, what 16 microbatches take it more than 4, over their
#   and shard_seconds    instructions. gpt-tiny, 2 stages: 332 us with 52 such values on 1 device, 640 us on 4 devices;
#                        4 stages, 26 values on 2 devices: 277 us, 334 by this. A later run of the benchmark, on the
#                        same shared machine, had 332 in place of 640 and 113 of 277 (benchmarks/pipeline_programs.py,
#                        2 cores of a cloud host, 2026-11-26)
_TPU = ExecutionModel(
    fuses_into_readers=True,
    fused_dear=frozenset(),
    redone_inside=False,
    lone_reductions=False,
    widened=frozenset(),
    eager_schedule=False,
    runs_ops_alone=False,
    adds_in_products=True,
    gradient_buffers=False,
    f32_as_tf32=False,
    fuses_attention=True,
    attention_kernel="splash attention",
    overlaps=True,
    exchanges_parts=False,
    joined=frozenset(),
    one_process=False,
    meeting=None,
    ring_latency=False,
    dispatch_seconds=0.0,
    instruction_seconds=230e-6,
    shard_seconds=2e-6,
    dispatches_beside=True,
)

# XLA and NCCL (RCCL) on GPUs.
#   fused_dear           an op is weighed against a pass through memory (priority_fusion.cc); seen in the buffers of
#                        GPT-2 and Llama steps compiled for an H100: scores are stored, exponentials of them are not
#   overlaps             the latency-hiding scheduler, which our programs turn on
#   ring_latency         Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, section 4.1
_ROCM = replace(
    _TPU, fused_dear=frozenset({"exp", "logistic"}), attention_kernel=None, ring_latency=True
)

#   f32_as_tf32          XLA's default, as jax documents it (`jax.default_matmul_precision`), and measured: 400 TFLOP/s
#                        in f32 on an H100, whose units reach 67 without tf32
_CUDA = replace(_ROCM, attention_kernel="cuDNN", f32_as_tf32=True)

# XLA on CPUs, whose devices are emulated, jax 0.10.2.
#   widened              every collective of bf16 in the compiled programs of the zoo is f32 (`meshwright audit`), and
#                        products read copies in f32
#   lone_reductions      seen in buffers of compiled programs
#   eager_schedule       the scheduler goes breadth first: the zeros that a scatter adds to, and transposed inputs for
#                        gradients of convolutions, are made at once
#   overlaps             thunks run in order
#   exchanges_parts      seen in buffers of compiled programs
#   joined               29 to 97 of gradients and metrics are 1 in each compiled program (`meshwright audit`)
#   dispatches_beside    the host's work takes the cores that its devices are
_CPU = replace(
    _TPU,
    lone_reductions=True,
    widened=frozenset({"bf16", "f16"}),
    eager_schedule=True,
    adds_in_products=False,
    fuses_attention=False,
    attention_kernel=None,
    overlaps=False,
    exchanges_parts=True,
    joined=frozenset({"all_reduce"}),
    one_process=True,
    dispatches_beside=False,
)


def _as_framework(xla: ExecutionModel) -> ExecutionModel:
    """The same devices run by a framework, such as Megatron-LM: kernels leave what they make in memory, make again
    inside what they need, and take any attention; gradients are added up in buffers (param_and_grad_buffer.py)."""
    return replace(
        xla,
        fuses_into_readers=False,
        redone_inside=True,
        adds_in_products=True,
        gradient_buffers=True,
        attention_kernel=None,
    )


# Our torch backend on CPUs, torch 2.13: each op of a local program is a call of torch (`backends/torch/local_step.py`).
# What is said of it follows from that file, and `benchmarks/torch_predictions.py` measures it: peaks of memory that
# are counted storage by storage, processor time of steps, and gloo's collectives.
#   widened              torch's products and gloo's sums take bf16 as it is
#   redone_inside        recomputed ops are ops like all others
#   adds_in_products     microbatches are added up after they have run
#   fuses_attention      a composite runs the ops of its body, block by block: no time is saved
#   overlaps             collectives begin early and are waited for late, but gloo's threads take the processors that
#                        ranks compute on
#   joined               buckets (`ir/passes/bucket.py`)
#   exchanges_parts      all_to_all stacks what it sends, and takes as much (`backends/torch/collectives.py`)
#   meeting              all kinds on 2 and 4 ranks of 2 cores: 0.22 to 0.41 of the fabric's bandwidth, 108 to 198 KB
#                        for a hop (benchmarks/results/torch_predictions.json)
#   dispatch_seconds     processor time of steps on one rank, over their ops, less the work predicted: 7.9 us of
#                        gpt-tiny with one example (2819 ops, 23.7 ms), 8.1 of vit-tiny (2058 ops, 18.8 ms), on 2 cores
#                        of an EPYC; an op without work takes 3 to 5, but emitters call torch several times for some
#   instruction_seconds  taken from XLA's, whose driver of pipelines is the same (`backends/runtime/driver.py`);
#   and shard_seconds    not measured on torch
_TORCH_CPU = replace(
    _TPU,
    fuses_into_readers=False,
    runs_ops_alone=True,
    adds_in_products=False,
    fuses_attention=False,
    attention_kernel=None,
    overlaps=False,
    exchanges_parts=True,
    joined=frozenset({"all_reduce", "reduce_scatter", "all_gather"}),
    meeting=ProcessMeeting(share=0.3, hop_bytes=150e3),
    dispatch_seconds=8e-6,
    dispatches_beside=False,
)

# The same on GPUs of NVIDIA, with NCCL. Our ranks do not run there yet; nothing is measured.
#   dispatch_seconds     as on CPUs: the host does the same
#   dispatches_beside    kernels are queued: a step takes as long as its device or its host, whichever is slower
_TORCH_CUDA = replace(_TORCH_CPU, meeting=None, ring_latency=True, dispatches_beside=True)
_TORCH = {"cpu": _TORCH_CPU, "cuda": _TORCH_CUDA}

_XLA = {"cpu": _CPU, "cuda": _CUDA, "rocm": _ROCM, "tpu": _TPU}
_MODELS: Mapping[Backend, Mapping[str, ExecutionModel]] = MappingProxyType(
    {
        "xla": _XLA,
        "torch": _TORCH,
        "framework": {kind: _as_framework(model) for kind, model in _XLA.items()},
    }
)
