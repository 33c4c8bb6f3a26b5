"""A real `torch.optim` optimizer as operations: captured once for each distinct leaf, written for each parameter.

    update = Update(optimizer, names)          names: id of a parameter -> its name
    update.leaves                              name -> the tensors of its state, as fakes
    update.write(b, ...)                       one parameter, its gradient, state and rate -> the new ones

What the optimizer does is traced, as `torch.compile` does: any one works that is made of operations with a
mapping and keeps tensors as its state. The count of steps is one for all parameters. The learning rate of each group
is an input of the step, as schedules change it: a number that differs with the rate is a multiple of it and a number,
found by tracing with several rates (`rates.py`). Other options are fixed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...ir.errors import CaptureError
from . import compat
from .decompose import table
from .map import Builder, Value, write
from .rates import PROBES, with_rate

STEP = "step"  # of torch's optimizers that count
RATE = "lr"
_SWITCHES = {"foreach": False, "fused": False, "capturable": True, "differentiable": False}
_FIX = "take one step before the capture, so that its state is known, or another optimizer"


@dataclass(frozen=True)
class Leaf:
    """A parameter as its optimizer sees it: what to trace depends on nothing else.

    `state` are the tensors kept for it, by name, as (shape, dtype); `options` are those of its group.
    """

    group: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.state)


class Update:
    """The optimizer's part of a step.

    Raises:
        CaptureError: it holds parameters that are none of the model's, or cannot be traced.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]):
        self.optimizer, self.name = optimizer, type(optimizer).__name__
        self._check_hooks()
        self.mode = compat.fakes()
        self._states: dict[Any, dict[str, Any]] = {}
        self._traced: dict[Leaf, Any] = {}
        self.leaves: dict[str, Leaf] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.rates = rate_names(optimizer)
        self.fixed = options_of(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            self._check_options(number, group)
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise CaptureError(
                        f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the model has not.",
                        where=f"{self.name}, group {number}",
                        fix="an optimizer of model.parameters(), made after the model got its last parameters",
                    )
                if parameter.requires_grad:
                    self.parameters[name] = parameter
                    self.leaves[name] = self._leaf(number, parameter)

    @cached_property
    def counts(self) -> bool:
        """Whether it keeps a count of steps."""
        return any(STEP in leaf.kept for leaf in self.leaves.values())

    def write(
        self, b: Builder, leaf: Leaf, parameter: Value, gradient: Value, state: Mapping[str, Value], rate: Value | None
    ) -> tuple[Value, dict[str, Value]]:  # fmt: skip
        """The new parameter and its new state. `rate` is None where the group has none."""
        if leaf not in self._traced:
            self._traced[leaf] = self._trace(leaf)
        graph = self._traced[leaf]
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        given = [parameter, gradient, *(state[name] for name in leaf.kept)]
        given += [] if rate is None else [rate]
        b.where, b.module = f"{self.name}.step", self.name
        values = write(b, graph, dict(zip(inputs, given, strict=True)))
        [output] = [node for node in graph.graph.nodes if node.op == "output"]
        new, *kept = (values[node] for node in output.args[0])
        return new, dict(zip(leaf.kept, kept, strict=True))

    # ------------------------------------------------------------ what it keeps

    def _leaf(self, group: int, parameter: torch.Tensor) -> Leaf:
        shape, dtype = tuple(parameter.shape), parameter.dtype
        state = self.optimizer.state.get(parameter) or self._first_state(group, shape, dtype)
        kept = [
            (name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        ]
        others = [
            name for name, value in state.items() if not isinstance(value, torch.Tensor | None)
        ]
        if others:
            raise CaptureError(
                f"{self.name} keeps `{others[0]}`, which is no tensor, for each parameter.",
                where="the optimizer",
                fix="an optimizer that keeps tensors alone, as AdamW",
            )
        return Leaf(group, shape, dtype, tuple(kept))

    def _first_state(
        self, group: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Any]:
        """What it keeps after one step, which began with zeros: proved on a small tensor."""
        key = (group, shape, dtype)
        if key not in self._states:
            with self._explained(group):
                self._check_zeros(group, dtype)
                with self.mode:
                    self._states[key] = self._stepped(group, _example(shape, dtype), {})[1]
        return self._states[key]

    def _check_zeros(self, group: int, dtype: torch.dtype) -> None:
        """Refuse an optimizer whose first step is not one from a state of zeros."""
        start = torch.linspace(-1, 2, 6, dtype=torch.float32).reshape(2, 3).to(dtype)
        first, state = self._stepped(group, start, {})
        zeros = {
            name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        again, _ = self._stepped(group, start, zeros)
        if not torch.equal(first, again):
            raise CaptureError(
                f"the first step of {self.name} is unlike the later ones: its state does not begin with zeros.",
                where=f"{self.name}, group {group}",
                fix=_FIX,
            )

    # ------------------------------------------------------------ tracing

    def _stepped(
        self,
        group: int,
        parameter: torch.Tensor,
        state: dict[str, Any],
        gradient: torch.Tensor | None = None,
        rate: float = PROBES[0],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """One step of one parameter at some rate; it is its own gradient if there is no other."""
        parameter = parameter.clone()
        parameter.grad = parameter.clone() if gradient is None else gradient
        kind = type(self.optimizer)
        twin = object.__new__(kind)
        twin.__dict__.update(
            {name: held for name, held in vars(self.optimizer).items() if name != "step"}
        )
        options = self.optimizer.param_groups[group]
        set_here = {**_SWITCHES, RATE: rate}
        switches = {name: value for name, value in set_here.items() if name in options}
        twin.param_groups = [{**options, **switches, "params": [parameter]}]
        twin.state = defaultdict(dict)
        if state:
            twin.state[parameter] = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
            }
        with compat.compiling(), torch.no_grad():
            kind.step(twin)
        return parameter.detach(), dict(twin.state[parameter])

    def _trace(self, leaf: Leaf) -> Any:
        """(parameter, gradient, *state, rate) -> (parameter, *state); without a rate where the group has none."""
        has_rate = RATE in self.optimizer.param_groups[leaf.group]
        with self._explained(leaf.group):
            traced = [self._traced_at(leaf, rate) for rate in (PROBES if has_rate else PROBES[:1])]
        return with_rate(traced, f"{self.name}, group {leaf.group}") if has_rate else traced[0]

    def _traced_at(self, leaf: Leaf, rate: float) -> Any:
        def step(parameter: torch.Tensor, gradient: torch.Tensor, *state: torch.Tensor) -> Any:
            given = dict(zip(leaf.kept, state, strict=True))
            new, kept = self._stepped(leaf.group, parameter, given, gradient, rate)
            return new, *(kept[name] for name in leaf.kept)

        with self.mode:
            examples = [_example(leaf.shape, leaf.dtype) for _ in range(2)]
            examples += [_example(shape, dtype) for _, shape, dtype in leaf.state]
            return compat.traced(step, examples, table())

    # ------------------------------------------------------------ what is refused

    @contextmanager
    def _explained(self, group: int) -> Iterator[None]:
        """torch's errors as ours."""
        try:
            yield
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{self.name} cannot be traced: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                where=f"{self.name}, group {group}",
                fix="numbers, no tensors, for its options; or AdamW, Adam or SGD",
            ) from error

    def _check_hooks(self) -> None:
        hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        if any(getattr(self.optimizer, name, None) for name in hooks):
            raise CaptureError(
                f"{self.name} has hooks around its step, which a sharded step would leave out.",
                where="the optimizer",
                fix="what they do in the loss or after the step",
            )

    def _check_options(self, number: int, group: Mapping[str, Any]) -> None:
        tensors = [
            name
            for name, value in group.items()
            if isinstance(value, torch.Tensor) and name != RATE
        ]
        if tensors:
            raise CaptureError(
                f"option `{tensors[0]}` of {self.name} is a tensor, whose changes a captured step would not see.",
                where=f"{self.name}, group {number}",
                fix=f"a number: {tensors[0]}=float(...)",
            )


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def rate_names(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Inputs that are the learning rates of groups: `optimizer.lr`, or `optimizer.1.lr` where there are several."""
    groups = [n for n, group in enumerate(optimizer.param_groups) if RATE in group]
    alone = len(optimizer.param_groups) == 1
    return {f"optimizer.{RATE}" if alone else f"optimizer.{n}.{RATE}": n for n in groups}


def options_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """Options of groups that are fixed at capture: numbers, switches, pairs of them."""
    return {
        (n, name): value
        for n, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in (RATE, "initial_lr", "params")
        and isinstance(value, bool | int | float | tuple)
    }
