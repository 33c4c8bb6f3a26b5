"""PyTorch's front door: a model, its loss and its optimizer become a planned step over the ranks of a run.

    import meshwright as mw

    step = mw.torch.parallelize(model, loss, optimizer, batch)   # in every process of torchrun
    for batch in loader:
        print(step(batch))                                       # the loss of the whole batch
    step.write_back()                                            # into the model and the optimizer, on every rank

The step is captured without values, planned by the first process, and run by all of them: each holds its part of
parameters and state. A run of one process plans for one device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from . import view  # noqa: F401  gives plans their looks
from .backends.runtime.rendezvous import deadline_seconds
from .backends.torch.allocator import keep_freed_memory
from .backends.torch.capture import Captured, capture
from .backends.torch.compat import mark_stepped
from .backends.torch.dtypes import array_of, tensor_of, torch_dtype
from .backends.torch.leaves import leaves_of
from .backends.torch.lower import arrays_in, lower
from .backends.torch.plain import PlainStep
from .backends.torch.ranks import outputs_of, steps_of, together
from .collector import paused
from .ir.cluster.cluster import Cluster
from .ir.codec import parse_plan, sealed
from .ir.errors import (
    LoweringError,
    MeshwrightError,
    MismatchError,
    MissingDependencyError,
    UsageError,
)
from .ir.graph import TensorType
from .ir.plan import Plan
from .planner.request import Request, check_early
from .planning import plan_graph


def parallelize(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    example_batch: Any,
    *,
    cluster: Cluster | str | Path | None = None,
    plan: Plan | None = None,
    request: Request | None = None,
    before_update: Callable[[nn.Module], Any] | None = None,
    seed: int | None = None,
    backend: Literal["torch", "xla"] = "torch",
) -> TorchStep:
    """Plan a training step and make this process one of its ranks, or with XLA run it on the devices of this process.

    Args:
        model: on CPUs; all ranks begin with the same parameters.
        loss: of (model, batch), a tensor of rank 0 over the whole batch.
        optimizer: over the model's parameters; its learning rates are read at each step, so that a scheduler may
            change them, its other options are fixed at capture.
        example_batch: the whole batch, as every step is given it; dim 0 is cut where the plan does.
        cluster: what to plan for, with a device for each process; by default as many CPUs. For XLA by default the
            devices that jax sees.
        plan: use this plan instead of searching for one.
        request: pins and limits of the search, which is for `backend`.
        before_update: of the model, whose parameters have their gradients as `.grad`; it may change them:
            `lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)`. It is called once, at capture.
        seed: of random numbers, as dropout's: the same on every layout. By default torch's of the first process.
        backend: "xla" compiles the step for all devices of this one process, by jax.

    Raises:
        CaptureError, PlanError, LoweringError: the step cannot be captured, planned or run.
    """
    change = None if before_update is None else lambda model, _: before_update(model)
    given = cluster, plan, request, seed
    return _parallelized(model, loss, optimizer, example_batch, change, *given, backend)


def step(
    function: Callable[[nn.Module, torch.optim.Optimizer, Any], Any] | None = None,
    *,
    cluster: Cluster | str | Path | None = None,
    plan: Plan | None = None,
    request: Request | None = None,
    seed: int | None = None,
) -> Any:
    """A decorator: a step function of (model, optimizer, batch) is planned at its first call and run by all ranks.

    It calls `backward` and `optimizer.step()` once each, may change gradients between, and returns its loss. It is run
    without values, at the first call: nothing else that it does in Python happens at later ones.

    Args: as for `parallelize`.

    Raises:
        CaptureError, PlanError, LoweringError: at the first call: it cannot be captured, planned or run.
    """

    def decorated(function: Callable[..., Any]) -> StepFunction:
        return StepFunction(function, (cluster, plan, request, seed))

    return decorated if function is None else decorated(function)


class StepFunction:
    """A decorated step function; after its first call `planned` is the `TorchStep` that it became."""

    def __init__(self, function: Callable[..., Any], options: tuple[Any, ...]):
        functools.update_wrapper(self, function)
        self.function, self.options = function, options
        self.planned: TorchStep | None = None

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
        """One step; the loss before its update.

        Raises:
            MismatchError: the model or the optimizer are not those of the first call.
        """
        if self.planned is None:
            parts = PlainStep(self.function, optimizer)
            self.planned = _parallelized(
                model, parts.loss, optimizer, batch, parts.change, *self.options
            )
        if model is not self.planned.model or optimizer is not self.planned.optimizer:
            raise MismatchError(
                "the model or the optimizer are not those of the first call.",
                where=f"`{self.function.__name__}`",
                fix="the same objects at each call, or another decorated function for others",
            )
        return self.planned(batch)


def _parallelized(
    model: nn.Module, loss: Callable[..., Any], optimizer: torch.optim.Optimizer, example_batch: Any, change: Any,
    cluster: Cluster | str | Path | None, plan: Plan | None, request: Request | None, seed: int | None,
    backend: Literal["torch", "xla"] = "torch",
) -> TorchStep:  # fmt: skip
    rank, world = _joined()
    if backend == "xla":
        _check_xla(world)
    local = Cluster.local() if backend == "xla" and cluster is None else f"{world}xcpu"
    where = Cluster.parse(local if cluster is None else cluster)
    wanted = replace(request or Request(), backend=backend)
    if wanted.pp != 1 and wanted.program is None:
        wanted = replace(wanted, program="stages")  # what steps of torch run as
    check_early(wanted, where)
    first = _told_by_first(torch.initial_seed() if seed is None else seed, world)
    with paused():
        captured = capture(model, loss, optimizer, example_batch, change, first)
    name = type(model).__name__
    if plan is None:
        plan = _planned_once(captured, where, wanted, name, rank, world)
    elif rank == 0 and (elsewhere := plan.read_elsewhere(backend)):
        warnings.warn(elsewhere, stacklevel=2)
    if backend == "torch" and plan.device_count != world:
        raise LoweringError(
            f"the plan is for {plan.device_count} devices, this run has {world} process{'es' * (world > 1)}.",
            where=f"plan `{plan.name}`",
            fix=f"torchrun --nproc-per-node {plan.device_count}, or a cluster of {world} devices",
        )
    return TorchStep(model, optimizer, captured, plan, rank, example_batch, backend)


class TorchStep:
    """A planned step, of which this process is a rank. Call it with whole batches; it gives the loss.

    Attributes:
        plan: what was found; `print(step.plan)`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, captured: Captured, plan: Plan, rank: int, batch: Any,
        backend: Literal["torch", "xla"] = "torch",
    ):  # fmt: skip
        self.model, self.optimizer, self.captured, self.plan, self.rank = (
            model,
            optimizer,
            captured,
            plan,
            rank,
        )
        graph = captured.graph
        if backend == "xla":
            from .torch_on_xla import XlaSteps

            self._steps = XlaSteps(plan, captured)
            self._places = self._steps.places
        else:
            keep_freed_memory()
            program = lower(plan, graph)
            arrays = arrays_in(program, graph, captured.binding.arrays)
            self._steps, _ = steps_of(program, arrays, graph.state, rank)
            self._places = outputs_of(program)
        self._given = [  # at each step
            k
            for k, name in enumerate(graph.input_names)
            if name.partition(".")[0] == "batch" or name in captured.binding.rates
        ]
        self._loss = graph.output_names.index("loss")
        self._leaves = leaves_of(captured, model)
        for position, tensor in enumerate(captured.inputs(model, optimizer, batch)):
            self._steps.give(position, tensor)

    def __call__(self, batch: Any) -> float:
        """One step on a whole batch, at the learning rates that the optimizer has now; the loss before its update.

        Raises:
            MismatchError: the batch has another tree, shapes or types than the example; or the optimizer other options.
        """
        given = self.captured.inputs(self.model, self.optimizer, batch)
        for position in self._given:
            self._steps.give(position, given[position])
        self._steps.run()
        mark_stepped(self.optimizer)
        return float(self._whole(self._loss))

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers and optimizer state as whole tensors, by their unsharded names. All ranks call it."""
        graph = self.captured.graph
        return {graph.output_names[out]: self._gathered(into) for into, out in graph.state}

    def save(self, folder: str | Path) -> None:
        """Write parameters, buffers and optimizer state to a new folder, whole or not at all. All ranks call it, and
        each writes what it holds, by `torch.distributed.checkpoint`.

        Names and shapes are those of one device, as torch's own state dicts have them: `load` takes it under another
        plan, by another number of ranks; plain torch takes "model" and "optimizer" of it.

        Raises:
            UsageError: there is something already.
            LoweringError: it cannot be written.
        """
        from .backends.torch.state import save  # which imports much that a step needs not

        found = {name: self._steps.held(position) for name, position in self._leaves.items()}
        save(Path(folder), {name: x for name, x in found.items() if x is not None})

    def load(self, folder: str | Path) -> None:
        """Go on from what was saved, by this step or by another one of the same model and optimizer. All ranks call it.

        Raises:
            UsageError: no checkpoint is there.
            MismatchError: a tensor is missing, has another shape or type, or has no place here; nothing is changed.
            LoweringError: it cannot be read; nothing is changed.
        """
        from .backends.torch.state import load

        graph = self.captured.graph
        rooms = {position: self._steps.room(position) for position in self._leaves.values()}
        named = {position: name for name, position in self._leaves.items()}
        types = {name: graph.types[graph.inputs[k]] for name, k in self._leaves.items()}
        wanted = {named[k]: shard for k, shard in rooms.items() if shard is not None}
        load(Path(folder), types, wanted)
        for position, shard in rooms.items():
            self._steps.put(position, shard)

    def write_back(self) -> None:
        """Put what was trained into the model and the optimizer. All ranks call it."""
        named = dict(self.model.named_parameters())
        state = self.state()
        with torch.no_grad():
            for kind, tensors in (
                ("parameters", named),
                ("buffers", dict(self.model.named_buffers())),
            ):
                for name, tensor in tensors.items():
                    if (found := state.get(f"{kind}.{name}")) is not None:
                        tensor.copy_(found)
        for name, tensor in state.items():
            path, _, key = name.removeprefix("optimizer.").rpartition(".")
            if not name.startswith("optimizer."):
                continue
            for parameter in [named[path]] if path else self._trained(named):
                self.optimizer.state[parameter][key] = tensor.clone()

    def _trained(self, named: dict[str, nn.Parameter]) -> list[nn.Parameter]:
        """Those whose optimizer counts steps."""
        held = {name.removeprefix("parameters.") for name in self.captured.graph.output_names}
        return [parameter for name, parameter in named.items() if name in held]

    def _whole(self, position: int) -> torch.Tensor:
        """A result as one tensor on every rank."""
        held = self._steps.result(position)
        mine = None if held is None else array_of(held)
        place, layout = self._places[position]
        parts = _from_all(mine)
        here = [part for rank in place.ranks if (part := parts[rank]) is not None]
        graph = self.captured.graph
        return _typed(together(here, layout, place.mesh), graph.types[graph.outputs[position]])

    def _gathered(self, position: int) -> torch.Tensor:
        """An input of the next step as one tensor on every rank."""
        held = self._steps.held(position)
        mine = None if held is None else (held.offsets, array_of(held.tensor))
        graph = self.captured.graph
        kind, whole = graph.types[graph.inputs[position]], None
        for offsets, array in filter(None, _from_all(mine)):
            whole = np.empty(kind.shape, array.dtype) if whole is None else whole
            ends = zip(offsets, array.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in ends)] = array
        assert whole is not None
        return _typed(whole, kind)


def _from_all(mine: Any) -> list[Any]:
    """What each rank gives."""
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def _typed(array: np.ndarray[Any, Any], kind: TensorType) -> torch.Tensor:
    """An array as a tensor of its own, which it has the bits of."""
    tensor, dtype = tensor_of(array), torch_dtype(kind.dtype)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _check_xla(world: int) -> None:
    if world > 1:
        raise UsageError(
            f"XLA runs a torch step in one process, this run has {world}.",
            where='backend="xla"',
            fix="python, without torchrun; or backend='torch'",
        )
    if importlib.util.find_spec("jax") is None:
        raise MissingDependencyError(
            "jax is not installed, by which XLA is reached.",
            where='backend="xla"',
            fix="pip install 'meshwright[jax,torch]'",
        )


def _joined() -> tuple[int, int]:
    """This process's rank and how many there are, in torch's default group, which torchrun's variables describe."""
    if not dist.is_initialized():
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return 0, 1
        dist.init_process_group("gloo", timeout=timedelta(seconds=deadline_seconds()))
    return dist.get_rank(), dist.get_world_size()


def _planned_once(
    captured: Captured, where: Cluster, request: Request, name: str, rank: int, world: int
) -> Plan:
    """The first process's plan, or its refusal, in all of them."""
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [sealed(plan_graph(captured.graph, where, request, name))]
        except MeshwrightError as error:
            told = [error]
    found = _told_by_first(told[0], world)
    if isinstance(found, MeshwrightError):
        raise found
    return parse_plan(found, "the first process")


def _told_by_first(mine: Any, world: int) -> Any:
    """What the first process has, in all of them."""
    told = [mine]
    if world > 1:
        dist.broadcast_object_list(told)
    return told[0]
