"""Random numbers of a torch step: by seed, draw and place, so that every layout draws the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from meshwright.api import plan_captured  # noqa: E402
from meshwright.backends.torch import drawn  # noqa: E402
from meshwright.backends.torch.capture import Captured, capture  # noqa: E402
from meshwright.backends.torch.decompose import attention  # noqa: E402
from meshwright.backends.torch.lower import arrays_in, lower  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.analysis.attention import attentions  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402

from .torch_models import GPT, Perceptron, class_loss, feature_batch, token_batch  # noqa: E402
from .torch_pipelines import run_pipeline  # noqa: E402
from .torch_ranks import run_ranks  # noqa: E402

SEED = 5


class Chain:
    """What draws in eager mode as a captured step does, each with the next seed."""

    def __init__(self) -> None:
        self.seed = torch.tensor(SEED, dtype=torch.int32)

    def next(self) -> torch.Tensor:
        self.seed = drawn.next_seed(self.seed)
        return self.seed

    def dropout(self, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return drawn.dropout(self.next(), x, p) if training and p else x

    def attention(self, q: Any, k: Any, v: Any, dropout_p: float = 0.0, **words: Any) -> Any:
        seed = self.next() if dropout_p else None
        return attention(q, k, v, dropout_p=dropout_p, seed=seed, **words)


def dropped_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The GPT's, with dropout of attention and of what follows it."""
    usual = F.scaled_dot_product_attention

    def mixed(*args: Any, **words: Any) -> torch.Tensor:
        return F.dropout(usual(*args, dropout_p=0.2, **words), 0.1)

    with mock.patch.object(F, "scaled_dot_product_attention", mixed):
        logits_BTV = model(batch["tokens"])
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten())


def stepped(
    loss: Callable[..., Any], model: nn.Module, batch: Any
) -> tuple[Captured, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A captured step of SGD with momentum, what it is given, and what eager mode makes of it with the same draws."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    captured = capture(model, loss, optimizer, batch, seed=SEED)
    given = tuple(tensor.clone() for tensor in captured.inputs(model, optimizer, batch))
    chain = Chain()
    with (
        mock.patch.object(F, "dropout", chain.dropout),
        mock.patch.object(F, "scaled_dot_product_attention", chain.attention),
    ):
        eager = loss(model, batch)
        eager.backward()
    optimizer.step()
    after = captured.inputs(model, optimizer, batch)
    wanted = dict(zip(captured.graph.input_names, after, strict=True))
    return captured, given, {**wanted, "loss": eager.detach(), "random.seed": chain.seed}


def check(captured: Captured, found: Any, wanted: dict[str, torch.Tensor]) -> None:
    for name, value in zip(captured.graph.output_names, found, strict=True):
        want = wanted[name].double()
        off = (torch.as_tensor(value).double() - want).abs().max()
        assert off <= 1e-5 * want.abs().max().clamp_min(1e-4), (name, float(off))


def test_dropout_drops_what_it_does_with_the_same_draws_in_eager_mode():
    torch.manual_seed(0)
    captured, given, wanted = stepped(dropped_loss, GPT(), token_batch())
    check(captured, replay(captured.graph, captured.binding.arrays, given), wanted)
    assert len(attentions(captured.graph)) == 2


@pytest.mark.parametrize(
    "words",
    [{"mesh": (4,)}, {"mesh": (2, 2), "microbatches": 2}, {"mesh": (2, 2), "attention": "plain"}],
)
def test_every_layout_has_the_masks_of_one_process(words):
    torch.manual_seed(0)
    captured, given, wanted = stepped(dropped_loss, GPT(), token_batch(8))
    plan = plan_captured(captured, Cluster.parse("4xcpu"), Request(pp=1, **words), "gpt")
    program = lower(plan, captured.graph)
    arrays = arrays_in(program, captured.graph, captured.binding.arrays)
    check(captured, run_ranks(program, given, arrays), wanted)


def test_stages_have_the_masks_of_one_process_and_hand_the_seed_on():
    torch.manual_seed(0)
    captured, given, _ = stepped(dropped_loss, GPT(), token_batch(8))
    graph, arrays = captured.graph, captured.binding.arrays
    words = {"pp": 2, "microbatches": 2, "program": "stages"}
    plan = plan_captured(captured, Cluster.parse("2xcpu"), Request(**words), "gpt")
    found = run_pipeline(lower(plan, graph), given, arrays, graph.state, 2)
    wanted, inputs = (), list(given)
    for _ in range(2):
        wanted = replay(graph, arrays, tuple(inputs))
        for into, out in graph.state:
            inputs[into] = wanted[out]
    check(captured, found, dict(zip(graph.output_names, wanted, strict=True)))


def losses(loss: Callable[..., Any], seeds: tuple[int, ...] = (1, 1, 2)) -> list[float]:
    torch.manual_seed(0)
    model, batch = Perceptron(), feature_batch()
    optimizer = torch.optim.SGD(model.parameters())
    captured = capture(model, loss, optimizer, batch)
    place = captured.graph.input_names.index("random.seed")
    given = list(captured.inputs(model, optimizer, batch))
    found = list[float]()
    for seed in seeds:
        given[place] = torch.tensor(seed, dtype=torch.int32)
        results = replay(captured.graph, captured.binding.arrays, given)
        found.append(float(results[captured.graph.output_names.index("loss")]))
    return found


DRAWING: dict[str, Callable[[nn.Module, Any], torch.Tensor]] = {
    "rand": lambda m, b: class_loss(m, (b[0] + torch.rand(6, 8), b[1])),
    "randn_like": lambda m, b: class_loss(m, (b[0] + torch.randn_like(b[0]), b[1])),
    "bernoulli": lambda m, b: class_loss(m, (b[0] * torch.bernoulli(torch.full_like(b[0], 0.5)), b[1])),
    "in place": lambda m, b: class_loss(m, (F.dropout(b[0] * 2, 0.5, inplace=True), b[1])),
    "computed again": lambda m, b: class_loss(
        lambda x: checkpoint(lambda y: m(F.dropout(y, 0.5)), x, use_reentrant=False), b
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWING)
def test_equal_seeds_draw_equal_numbers(name):
    one, same, other = losses(DRAWING[name])
    assert one == same != other


def test_what_runs_under_autocast_draws_too():
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x = F.dropout(batch[0], 0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.dropout(model[0](x), 0.5)
        return F.cross_entropy(model[2](F.dropout(x.float(), 0.5)), batch[1])

    one, same, other = losses(loss)
    assert one == same != other


def test_draws_are_spread_evenly_and_apart():
    seed = torch.tensor(7, dtype=torch.int32)
    one, other = (drawn.bits(s, [400, 500]).double() / 2**31 for s in (seed, drawn.next_seed(seed)))
    assert one.min() >= 0 and one.max() < 1
    for found in (one, other):
        counts = torch.histc(found, 20, 0, 1)
        assert (counts - 10_000).abs().max() < 5 * 10_000**0.5
    both = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    beside = torch.corrcoef(torch.stack([one[:, 1:].flatten(), one[:, :-1].flatten()]))[0, 1]
    below = torch.corrcoef(torch.stack([one[1:].flatten(), one[:-1].flatten()]))[0, 1]
    assert max(abs(both), abs(beside), abs(below)) < 5 / 200_000**0.5
    numbers = drawn.normal(seed, [400, 500], torch.float32)
    assert abs(numbers.mean()) < 0.012 and abs(numbers.std() - 1) < 0.01


def test_evaluation_draws_nothing():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 10)).eval()
    captured = capture(model, class_loss, torch.optim.SGD(model.parameters()), feature_batch())
    assert "random.seed" not in captured.graph.input_names
