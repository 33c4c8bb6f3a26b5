"""Attention composites by torch's flash attention: what the body gives, and only where it is that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from meshwright.backends.torch import emit_composite  # noqa: E402
from meshwright.backends.torch.attention_kernels import Flash  # noqa: E402
from meshwright.backends.torch.capture import capture  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.composites.attention_op import with_attention  # noqa: E402
from meshwright.ir.composites.bodies import BACKWARD, FORWARD  # noqa: E402

BIAS = torch.linspace(-1, 1, 36).reshape(6, 6)
WAYS: dict[str, tuple[Callable[..., Any], int]] = {
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 2),
    "full": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 2),
    "biased": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=BIAS), 0),
}


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Any]):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.attend = attend

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x_BTD).view(2, 6, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.attend(q, k, v)


@pytest.mark.parametrize("handed_on", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_attention_and_its_gradients_are_those_of_the_plain_step(
    name: str, handed_on: bool, monkeypatch: pytest.MonkeyPatch
):
    attend, by_kernel = WAYS[name]
    torch.manual_seed(0)
    model, batch = Attention(attend), torch.randn(2, 6, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = capture(model, lambda model, batch: model(batch).square().sum(), optimizer, batch)
    given, arrays = found.inputs(model, optimizer, batch), found.binding.arrays
    plain = replay(found.graph, arrays, given)
    graph, ran = with_attention(found.graph, for_kernels=handed_on), list[int]()
    kinds = [op.kind for op in graph.ops]
    assert kinds.count(FORWARD) == kinds.count(BACKWARD) == 1
    call = Flash.__call__
    monkeypatch.setattr(Flash, "__call__", lambda *given: ran.append(1) or call(*given))
    by_it = replay(graph, arrays, given)
    assert len(ran) == by_kernel
    monkeypatch.setattr(emit_composite, "attention_kernel", lambda op, cuts: None)
    by_blocks = replay(graph, arrays, given)
    for one, other, wanted in zip(by_it, by_blocks, plain, strict=True):
        torch.testing.assert_close(one, wanted, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(other, wanted, rtol=2e-5, atol=2e-5)
