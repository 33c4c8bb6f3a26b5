"""From a model, a loss, an optimizer and an example batch to a `Graph`.

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    captured = capture(model, loss, torch.optim.AdamW(model.parameters()), batch)
    captured.graph       what happens: plain data, no framework
    captured.binding     what of it is torch's: constants, names of tensors, the tree of the batch

One step is the loss, its gradients, the optimizer's update, and what the model writes to its buffers. torch traces
it with tensors without values, so that a model on the meta device will do. Inputs and outputs are named by path:

    parameters.h.0.attn.weight    optimizer.h.0.attn.weight.exp_avg    optimizer.step
    buffers.bn.running_mean       batch.tokens                         loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...ir.errors import CaptureError, MismatchError
from ...ir.graph import Batch, Graph, TensorType
from ...ir.passes.dead import drop_dead_ops
from . import compat
from .decompose import rewrite, table
from .drawn import SEED, signed
from .dtypes import torch_dtype
from .gradients import Change, changed
from .map import Builder, Value, type_of, write
from .optimizer import RATE, STEP, Update, options_of
from .unflatten import unflatten

RANDOM = "random.seed"  # the input, and carried
NO_RATE = 1e-30  # for a rate of 0: Adam, as it is traced, divides by the rate, and no parameter moves by so little
Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Binding:
    """What a backend needs to run the graph, kept out of it.

    Attributes:
        arrays: constants that are not plain numbers, by value id.
        tied: other paths of a parameter or buffer -> the path that it is named by.
        batch_tree: the tree of the batch; its leaves are inputs in order.
        rates: inputs that are learning rates -> of which group of the optimizer.
        options: of its groups, all others: as they were, and are to stay.
        seed: of random numbers in the first step, if it draws any.
    """

    arrays: Mapping[int, torch.Tensor]
    tied: Mapping[str, str]
    batch_tree: Any
    rates: Mapping[str, int]
    options: Mapping[tuple[int, str], Any]
    seed: int = 0


@dataclass(frozen=True)
class Captured:
    """A step as data, and its way back to torch."""

    graph: Graph
    binding: Binding

    def inputs(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any
    ) -> tuple[torch.Tensor, ...]:
        """The graph's inputs as they are now; state that the optimizer has not begun is zeros.

        Raises:
            MismatchError: the batch has another tree than the example, a tensor another shape or type than in the
                capture, or the optimizer other options.
        """
        self._check_options(optimizer)
        tensors = _Tensors(model)
        state = {tensors.names[id(parameter)]: held for parameter, held in optimizer.state.items()}
        leaves, tree = compat.leaves_with_names(batch, "batch")
        if tree != self.binding.batch_tree:
            raise MismatchError(
                f"the batch is {tree}, it was {self.binding.batch_tree} in the capture.",
                where="the batch",
                fix="batches like the example, or capture again",
            )
        given = {
            **{f"parameters.{name}": t for name, t in tensors.parameters.items()},
            **{f"buffers.{name}": t for name, t in tensors.buffers.items()},
            **dict(leaves),
            RANDOM: torch.tensor(signed(self.binding.seed), dtype=torch.int32),
            **{
                name: torch.tensor(float(optimizer.param_groups[group][RATE]) or NO_RATE)
                for name, group in self.binding.rates.items()
            },
        }
        found = tuple(
            given[name].detach() if name in given else self._kept(position, name, state)
            for position, name in enumerate(self.graph.input_names)
        )
        for name, value, tensor in zip(
            self.graph.input_names, self.graph.inputs, found, strict=True
        ):
            if (kind := type_of(tensor, f"`{name}`")) != self.graph.types[value]:
                raise MismatchError(
                    f"`{name}` is {kind}, it was {self.graph.types[value]} in the capture.",
                    where="the arguments of the step",
                    fix="batches like the example (the last one may be smaller: drop or pad it), or capture again",
                )
        return found

    def _check_options(self, optimizer: torch.optim.Optimizer) -> None:
        now = options_of(optimizer)
        for (group, name), value in self.binding.options.items():
            if now.get((group, name)) != value:
                raise MismatchError(
                    f"`{name}` of the optimizer is {now.get((group, name))}, it was {value} in the capture.",
                    where=f"{type(optimizer).__name__}, group {group}",
                    fix=f"only `{RATE}` may change between steps (schedules: cycle_momentum=False), or capture again",
                )

    def _kept(
        self, position: int, name: str, state: Mapping[str, Mapping[str, Any]]
    ) -> torch.Tensor:
        """A tensor of the optimizer's state."""
        path, _, key = name.removeprefix("optimizer.").rpartition(".")
        held = (
            [one for one in state.values() if key in one] if key == STEP else [state.get(path, {})]
        )
        if held and key in held[0]:
            return held[0][key]
        kind = self.graph.types[self.graph.inputs[position]]
        return torch.zeros(kind.shape, dtype=torch_dtype(kind.dtype))


def capture(
    model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, example_batch: Any,
    before_update: Change | None = None, seed: int = 0,
) -> Captured:  # fmt: skip
    """Trace a training step and convert it.

    Args:
        model: its parameters and buffers may be on the meta device; it is left as it was.
        loss: of (model, batch), a tensor of rank 0.
        optimizer: its learning rates are inputs, its other options numbers fixed in the graph.
        example_batch: a tensor, or tensors in a dict, list, tuple or dataclass that torch knows as a tree. Dim 0 of
            the first that has dims is the batch, and of all others in which it has the same size.
        before_update: of (model, batch), where parameters have their gradients; it may change these, as clipping does.
        seed: of random numbers; the graph does not depend on it.

    Raises:
        CaptureError: the step cannot be traced, leaves a trainable parameter without a gradient, or does something
            that a graph cannot hold.
    """
    tensors = _Tensors(model)
    leaves, tree = compat.leaves_with_names(example_batch, "batch")
    _check_batch(leaves)
    _check_devices(tensors, leaves)
    names = {id(t): name for name, t in tensors.parameters.items()}
    update = Update(optimizer, names)
    joint, change = _joint(model, loss, tensors, example_batch, before_update)
    return _Step(tensors, update, dict(leaves), joint, change).captured(tree, seed)


class _Tensors:
    """A model's parameters and buffers, each once, by the first path that leads to it."""

    def __init__(self, model: nn.Module):
        self.names: dict[int, str] = {}
        self.paths: dict[str, str] = {}  # every path -> the first of the same tensor
        self.parameters = self._once(model.named_parameters(remove_duplicate=False))
        self.buffers = self._once(model.named_buffers(remove_duplicate=False))

    def _once(self, found: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        for path, tensor in found:
            first = self.names.setdefault(id(tensor), path)
            self.paths[path] = first
            kept.setdefault(first, tensor)
        return kept

    @property
    def tied(self) -> dict[str, str]:
        return {path: first for path, first in self.paths.items() if path != first}


# ---------------------------------------------------------------- tracing


class _Stepping(nn.Module):
    """A model and its loss as one module, as tracing wants them."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = [loss]  # a module that is a loss is not one of the model's

    def forward(self, batch: Any) -> torch.Tensor:
        found = self.loss[0](self.model, batch)
        _check_loss(found)
        return found


def _joint(
    model: nn.Module, loss: Loss, tensors: _Tensors, batch: Any, before_update: Change | None
) -> tuple[compat.Joint, Any]:
    """Forward and backward, and what is done with gradients."""
    mode = compat.fakes()
    with _faked(model, mode), mode:
        given = compat.mapped(lambda leaf: compat.fake_like(mode, leaf), batch)
        whole = _Stepping(model, loss)
        try:
            opened = compat.exported(whole, (given,), rewrite)
            joint = compat.joint(opened, (given,), table())
            if before_update is None:
                return joint, None
            named = {
                tensors.paths[name]: p for name, p in model.named_parameters() if p.requires_grad
            }
            return joint, changed(named, model, given, before_update)
        except CaptureError:
            raise
        except Exception as error:
            raise _explained(error) from error


@contextmanager
def _faked(model: nn.Module, mode: Any) -> Iterator[None]:
    """Within, the model's tensors have no values; tied ones stay tied."""
    fakes: dict[int, torch.Tensor] = {}
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    for _, _, tensor in before:
        if id(tensor) not in fakes:
            fake = compat.fake_like(mode, tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    try:
        for held, name, tensor in before:
            held[name] = fakes[id(tensor)]
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


# ---------------------------------------------------------------- the graph


class _Step:
    """The joint graph with the update behind it, as one graph."""

    def __init__(
        self,
        tensors: _Tensors,
        update: Update,
        batch: Mapping[str, torch.Tensor],
        joint: compat.Joint,
        change: Any,
    ):
        self.tensors, self.update, self.batch, self.joint = tensors, update, batch, joint
        self.change = change
        self.b = Builder()
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[str, Value] = {}

    def captured(self, tree: Any, seed: int) -> Captured:
        self._define_inputs()
        gradients = self._write_joint()
        self._write_update(gradients)
        names, results = tuple(self.inputs), tuple(self.outputs)
        state = tuple(
            (names.index(name), k) for k, name in enumerate(results) if name in self.inputs
        )
        graph = Graph(
            types=self.b.types,
            inputs=tuple(value.number for value in self.inputs.values()),
            ops=tuple(self.b.ops),
            outputs=tuple(value.number for value in self.outputs.values()),
            constants=tuple(self.b.constants),
            input_names=names,
            output_names=results,
            state=tuple(sorted(state)),
            donated=frozenset(position for position, _ in state),
            batch=self._batch(names),
        )
        graph = unflatten(
            drop_dead_ops(graph), [value.number for value in gradients.values()], self.b.modules
        )
        arrays = {v: array for v, array in self.b.arrays.items() if v in graph.constant_ids}
        return Captured(
            graph,
            Binding(arrays, self.tensors.tied, tree, self.update.rates, self.update.fixed, seed),
        )

    def _define_inputs(self) -> None:
        b = self.b
        for name, tensor in self.tensors.parameters.items():
            self.inputs[f"parameters.{name}"] = b.value(type_of(tensor, f"parameter `{name}`"))
        for name, tensor in self.tensors.buffers.items():
            self.inputs[f"buffers.{name}"] = b.value(type_of(tensor, f"buffer `{name}`"))
        for name, leaf in self.update.leaves.items():
            for key, shape, dtype in leaf.state:
                kind = type_of(torch.empty(shape, dtype=dtype, device="meta"))
                kept = _state_name(name, key)
                if kept not in self.inputs:
                    self.inputs[kept] = b.value(kind)
        if any(end.role == "buffer" and end.name == SEED for end, _ in self.joint.inputs):
            self.inputs[RANDOM] = b.value(TensorType("s32", ()))
        for name in self.update.rates:
            self.inputs[name] = b.value(TensorType("f32", ()))
        for name, tensor in self.batch.items():
            self.inputs[name] = b.value(type_of(tensor, f"`{name}`"))

    def _write_joint(self) -> dict[str, Value]:
        """Forward and backward; the gradients by parameter."""
        leaves = list(self.batch)
        known: dict[Any, Value] = {}
        for end, node in self.joint.inputs:
            match end.role:
                case "parameter":
                    known[node] = self.inputs[f"parameters.{self._path(end)}"]
                case "buffer":
                    known[node] = self.inputs[self._buffer(end)]
                case "tangent":
                    known[node] = self.b.number(1, type_of(node.meta["val"]).dtype)
                case _:
                    known[node] = self.inputs[leaves[int(end.name)]]
        values = write(self.b, self.joint.graph, known)
        gradients: dict[str, Value] = {}
        for end, node in self.joint.outputs:
            match end.role:
                case "gradient":
                    name = self._path(end)
                    found = values[node]
                    gradients[name] = (
                        self.b.elementwise("add", gradients[name], found)
                        if name in gradients
                        else found
                    )
                case "mutated":
                    self.outputs[self._buffer(end)] = values[node]
                case _:
                    self.outputs["loss"] = values[node]
        return gradients

    def _buffer(self, end: compat.End) -> str:
        return RANDOM if end.name == SEED else f"buffers.{self._path(end)}"

    def _path(self, end: compat.End) -> str:
        return self.tensors.paths[str(end.name).removeprefix("model.")]

    def _write_update(self, gradients: Mapping[str, Value]) -> None:
        trainable = [name for name, t in self.tensors.parameters.items() if t.requires_grad]
        if missing := [name for name in trainable if name not in gradients]:
            raise CaptureError(
                f"`{missing[0]}` gets no gradient{_and_others(missing)}.",
                where="the model's trainable parameters",
                fix="requires_grad_(False) for what is not trained, or a loss that depends on it",
            )
        if self.change is not None:
            gradients = self._changed({name: gradients[name] for name in trainable})
        new: dict[str, Value] = {}
        rates = {group: self.inputs[name] for name, group in self.update.rates.items()}
        for name, leaf in self.update.leaves.items():
            state = {key: self.inputs[_state_name(name, key)] for key in leaf.kept}
            found = self.update.write(
                self.b, leaf, self.inputs[f"parameters.{name}"], gradients[name], state, rates.get(leaf.group)
            )  # fmt: skip
            new[f"parameters.{name}"] = found[0]
            new |= {_state_name(name, key): value for key, value in found[1].items()}
        made = {**self.outputs, **new}
        self.outputs = {name: made[name] for name in (*self.inputs, "loss") if name in made}

    def _changed(self, gradients: Mapping[str, Value]) -> dict[str, Value]:
        """Gradients after what is done with them before the update."""
        graph = self.change.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        [output] = [node for node in graph.nodes if node.op == "output"]
        self.b.where = self.b.module = "before_update"
        values = write(self.b, self.change, dict(zip(inputs, gradients.values(), strict=True)))
        return dict(zip(gradients, (values[node] for node in output.args[0]), strict=True))

    def _batch(self, names: tuple[str, ...]) -> Batch | None:
        """Dim 0 of the first array, and of all with as many rows."""
        rows = next((t.shape[0] for t in self.batch.values() if t.dim()), None)
        dims = [
            (names.index(name), 0)
            for name, t in self.batch.items()
            if t.dim() and t.shape[0] == rows
        ]
        return Batch(tuple(dims)) if dims else None


def _state_name(parameter: str, key: str) -> str:
    return f"optimizer.{STEP}" if key == STEP else f"optimizer.{parameter}.{key}"


# ---------------------------------------------------------------- what is refused


def _check_batch(leaves: list[tuple[str, Any]]) -> None:
    for name, leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise CaptureError(
                f"{leaf!r} is a {type(leaf).__name__}, not a tensor.",
                where=f"`{name}`",
                fix="a tensor, or leave it out of the batch: the loss may know it",
            )


def _check_devices(tensors: _Tensors, leaves: list[tuple[str, torch.Tensor]]) -> None:
    named = [*tensors.parameters.items(), *tensors.buffers.items(), *leaves]
    first: dict[str, str] = {}
    for name, tensor in named:
        if tensor.device.type != "meta":
            first.setdefault(str(tensor.device), name)
    if len(first) > 1:
        (one, here), (other, there) = [*first.items()][:2]
        raise CaptureError(
            f"the step mixes devices: `{here}` is on {one}, `{there}` on {other}.",
            where="the model and the batch",
            fix="all on one device, or all on meta; placing them is what the plan does",
        )


def _check_loss(found: Any) -> None:
    if not isinstance(found, torch.Tensor) or found.dim() or not found.is_floating_point():
        said = (
            f"{found.dtype} of shape {tuple(found.shape)}"
            if isinstance(found, torch.Tensor)
            else repr(found)
        )
        raise CaptureError(
            f"the loss is {said}, no real number in a tensor of rank 0.",
            where="the loss",
            fix="its mean or sum, and nothing beside it",
        )


def _and_others(names: list[str]) -> str:
    return f", nor do {len(names) - 1} others" if len(names) > 1 else ""


_ADVICE = (
    (
        ("GuardOnDataDependentSymNode", "data-dependent", "DataDependentOutputException"),
        "the step decides in Python by a value that is known only when it runs, or makes a shape of one.",
        "torch.where(condition, a, b), or masks instead of fewer elements",
    ),
    (
        ("DynamicOutputShapeException", "nonzero"),
        "the step makes something whose shape depends on values, as indexing by truth values does.",
        "torch.where(mask, a, b), or masked_fill",
    ),
    (
        ("view of a leaf", "in-place operation", "is being used in an in-place", "leaf Variable"),
        "the step writes in place over what it shares with a parameter or with something it still needs.",
        "the same operation out of place, as x = x + y",
    ),
    (
        ("different devices", "Expected all tensors to be on the same device"),
        "the step mixes devices.",
        "tensors made on the device of what they meet, as torch.arange(n, device=x.device)",
    ),
)  # fmt: skip


def _explained(error: Exception) -> CaptureError:
    """torch's error in three lines; the whole of it stays attached as the cause."""
    text = f"{type(error).__name__}: {error}"
    where = compat.user_place(error) or "the loss"
    for words, what, fix in _ADVICE:
        if any(word in text for word in words):
            return CaptureError(what, where=where, origin=_first_line(text), fix=fix)
    return CaptureError(
        f"the step cannot be traced: {_first_line(text)}",
        where=where,
        fix="run loss(model, batch).backward() once and mend what it reports",
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
