"""A plain step function, as users write it, as a loss and what it does with gradients before the update.

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch["tokens"]), batch["targets"])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

It is run twice without values: up to `backward`, which gives the loss, and once more, where `backward` has gradients
ready, up to its end. What tracing cannot see is refused: a second `backward`, a scheduler's step, another result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from ...ir.errors import CaptureError
from . import compat

Step = Callable[[nn.Module, torch.optim.Optimizer, Any], Any]


class _Reached(BaseException):
    """`backward` was called on a loss; no `except Exception` of the step's stops it."""

    def __init__(self, loss: torch.Tensor):
        self.loss = loss


class PlainStep:
    """A step function in two parts: `loss(model, batch)` and `change(model, batch)`."""

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer):
        self.step, self.optimizer = step, optimizer
        self.name = getattr(step, "__name__", "the step")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """What `backward` is called on."""

        def backward(loss: torch.Tensor, *_: Any, **__: Any) -> None:
            raise _Reached(loss)

        with self._watched(backward, lambda: self._refuse("updates before it calls `backward`")):
            try:
                self.step(model, self.optimizer, batch)
            except _Reached as reached:
                return reached.loss
        raise self._refused("never calls `backward`", "loss.backward() before optimizer.step()")

    def change(self, model: nn.Module, batch: Any) -> None:
        """What follows `backward`; gradients are there. Nothing before it is traced."""
        met: list[torch.Tensor] = []
        updates: list[None] = []
        with ExitStack() as untraced:
            untraced.enter_context(compat.untraced())
            untraced.enter_context(torch.no_grad())

            def backward(loss: torch.Tensor, *given: Any, **options: Any) -> None:
                if met or any(x is not None for x in given) or any(options.values()):
                    self._refuse("calls `backward` twice, or with arguments")
                met.append(loss)
                untraced.close()

            with self._watched(backward, lambda: updates.append(None)):
                found = self.step(model, self.optimizer, batch)
        if len(updates) != 1:
            raise self._refused(f"calls `optimizer.step` {len(updates)} times", "one update")
        if found is not None and not compat.is_alias(found, met[0]):
            raise self._refused("returns something else than its loss", "return the loss alone")

    @contextmanager
    def _watched(self, backward: Callable[..., None], update: Callable[[], Any]) -> Iterator[None]:
        def nothing(*_: Any, **__: Any) -> None:
            pass

        def schedule(*_: Any, **__: Any) -> None:
            self._refuse("steps a scheduler, which would happen once, at capture")

        with (
            mock.patch.object(torch.Tensor, "backward", backward),
            mock.patch.object(self.optimizer, "step", lambda *_, **__: update()),
            mock.patch.object(self.optimizer, "zero_grad", nothing),
            mock.patch.object(nn.Module, "zero_grad", nothing),
            mock.patch.object(torch.optim.lr_scheduler.LRScheduler, "step", schedule),
        ):
            yield

    def _refuse(self, what: str) -> None:
        raise self._refused(
            what, "one backward, one optimizer.step(); scheduler.step() after the step"
        )

    def _refused(self, what: str, fix: str) -> CaptureError:
        return CaptureError(f"`{self.name}` {what}.", where=f"`{self.name}`", fix=fix)
