"""Plain step functions: what they compute, and what of them is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import meshwright as mw  # noqa: E402
from meshwright.ir.errors import CaptureError, MismatchError  # noqa: E402

from .torch_models import Perceptron, class_loss, feature_batch  # noqa: E402


def train(model: nn.Module, optimizer: Any, batch: Any) -> torch.Tensor:
    optimizer.zero_grad()
    loss = class_loss(model, batch) / 2
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss.detach()


def made() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Perceptron()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_a_step_function_takes_the_steps_that_it_takes_in_eager_mode():
    model, optimizer = made()
    alone = copy.deepcopy(model)
    twin = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    step = mw.torch.step(train)
    for _ in range(3):
        batch = feature_batch()
        for each in (optimizer, twin):
            each.param_groups[0]["lr"] *= 0.5
        assert step(model, optimizer, batch) == pytest.approx(float(train(alone, twin, batch)))
    assert step.planned is not None and step.__name__ == "train"
    step.planned.write_back()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(MismatchError, match="not those of the first call"):
        step(alone, twin, feature_batch())


def no_backward(model: Any, optimizer: Any, batch: Any) -> None:
    class_loss(model, batch)


def twice(model: Any, optimizer: Any, batch: Any) -> None:
    for _ in range(2):
        class_loss(model, batch).backward()
    optimizer.step()


def no_update(model: Any, optimizer: Any, batch: Any) -> None:
    class_loss(model, batch).backward()


def beside(model: Any, optimizer: Any, batch: Any) -> Any:
    loss = class_loss(model, batch)
    loss.backward()
    optimizer.step()
    return loss, model(batch[0]).argmax(1)


def scheduled(model: Any, optimizer: Any, batch: Any) -> None:
    class_loss(model, batch).backward()
    optimizer.step()
    optimizer.scheduler.step()


def by_values(model: Any, optimizer: Any, batch: Any) -> None:
    loss = class_loss(model, batch)
    loss.backward()
    model[0].weight.grad.mul_(loss)
    optimizer.step()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_backward, "never calls `backward`"),
        (twice, "calls `backward` twice"),
        (no_update, "calls `optimizer.step` 0 times"),
        (beside, "returns something else than its loss"),
        (scheduled, "steps a scheduler"),
        (by_values, "made of parameters or the batch"),
    ],
)
def test_what_a_captured_step_would_leave_out_is_refused(function, words):
    model, optimizer = made()
    optimizer.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = copy.deepcopy(optimizer.param_groups[0]["lr"])
    with pytest.raises(CaptureError, match=words) as error:
        mw.torch.step(function)(model, optimizer, feature_batch())
    assert error.value.where and error.value.fix
    assert optimizer.param_groups[0]["lr"] == before and not optimizer.state
    assert all(p.grad is None for p in model.parameters())
