"""Models of `transformers` by their configs: captured whole, planned, and on ranks as in one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from meshwright.api import plan_captured  # noqa: E402
from meshwright.backends.torch.capture import Captured, capture  # noqa: E402
from meshwright.backends.torch.lower import arrays_in, lower  # noqa: E402
from meshwright.backends.torch.lower_pipeline import StagedProgram  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.analysis.attention import attentions  # noqa: E402
from meshwright.ir.analysis.cross_entropy import cross_entropies  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import PlanError  # noqa: E402
from meshwright.ir.rules import rule_of  # noqa: E402
from meshwright.ir.verify import verify  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402

from .torch_pipelines import run_pipeline  # noqa: E402
from .torch_ranks import run_ranks  # noqa: E402
from .transformers_models import ARCHITECTURES  # noqa: E402

CLOSE = 1e-5  # of the largest element of a tensor
LEAST = 1e-2  # of the largest gradient: a smaller one is rounding alone, as those of biases of keys
ROWS = 8

# What share of pairs of positions their masks keep, of 16 positions: a half, and where windows leave 8 keys.
CAUSAL, WINDOW = 17 / 32, 25 / 64
SHARES: dict[str, set[float]] = {
    **{name: {CAUSAL} for name in ARCHITECTURES},
    "mistral": {WINDOW},
    "gemma2": {WINDOW, CAUSAL},
    "gpt-oss": set(),  # a column of sinks beside the scores is no attention as a kernel has it
    **{name: {1.0} for name in ("bert", "roberta", "vit", "deit")},
    "t5": {1.0},  # its masks are added to a learnt bias, not to scores
    "clip": {1.0, CAUSAL},
    "whisper": {1.0, 9 / 16},  # of 8 positions
}
WHOLE_BATCH = {  # what compares examples with each other, and what says so
    **dict.fromkeys(("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v3"), "sort needs"),
    "clip": "compares examples",
}


def some(*usual: str) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in usual else pytest.mark.slow)
        for name in ARCHITECTURES
    ]


@dataclass(frozen=True)
class Stepped:
    """An architecture captured, and what one step of SGD with momentum makes of it: momenta are gradients."""

    captured: Captured
    inputs: tuple[torch.Tensor, ...]
    wanted: tuple[torch.Tensor, ...]

    def check(self, found: Any) -> None:
        names = self.captured.graph.output_names
        most = max(
            float(want.abs().max())
            for name, want in zip(names, self.wanted, strict=True)
            if name.startswith("optimizer")
        )
        for name, value, want in zip(names, found, self.wanted, strict=True):
            size = want.double().abs().max().clamp_min(LEAST * most)
            off = float((torch.as_tensor(value).double() - want.double()).abs().max() / size)
            assert off <= CLOSE, (name, off)


@functools.cache
def stepped(name: str) -> Stepped:
    torch.manual_seed(0)
    one = ARCHITECTURES[name]
    model, batch = one.make(), one.batch(ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    captured = capture(model, one.loss, optimizer, batch)
    inputs = tuple(tensor.clone() for tensor in captured.inputs(model, optimizer, batch))
    loss = one.loss(model, batch)
    loss.backward()
    optimizer.step()
    after = dict(
        zip(captured.graph.input_names, captured.inputs(model, optimizer, batch), strict=True)
    )
    after["loss"] = loss.detach()
    return Stepped(captured, inputs, tuple(after[n] for n in captured.graph.output_names))


@pytest.mark.parametrize("name", some("llama", "mixtral"))
def test_a_model_is_captured_whole(name: str):
    """Every op is known, masks are seen through, and a step of the graph is torch's."""
    step = stepped(name)
    graph = step.captured.graph
    verify(graph)
    assert not [op.kind for op in graph.ops if rule_of(op, graph.types).opaque]
    assert {one.share for one in attentions(graph)} == SHARES[name]
    assert len(cross_entropies(graph)) == (name != "clip")
    step.check(replay(graph, step.captured.binding.arrays, step.inputs))


def planned(name: str, ranks: int, **words: Any) -> Any:
    graph = stepped(name).captured.graph
    return lower(
        plan_captured(
            stepped(name).captured, Cluster.parse(f"{ranks}xcpu"), Request(**words), name
        ),
        graph,
    )


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some("llama"))
def test_ranks_take_the_step_of_one_process(name: str, ranks: int):
    step, program = stepped(name), planned(name, ranks, pp=1)
    arrays = arrays_in(program, step.captured.graph, step.captured.binding.arrays)
    step.check(run_ranks(program, step.inputs, arrays))


@pytest.mark.slow
@pytest.mark.parametrize("name", some("llama"))
def test_stages_of_two_ranks_take_the_step_of_one_process(name: str):
    step = stepped(name)
    words = {"pp": 2, "microbatches": 4, "mesh": (2,), "program": "stages"}
    if name in WHOLE_BATCH:
        with pytest.raises(PlanError, match=WHOLE_BATCH[name]):
            planned(name, 4, **words)
        return
    program = planned(name, 4, **words)
    assert isinstance(program, StagedProgram)
    arrays, state = step.captured.binding.arrays, step.captured.graph.state
    step.check(run_pipeline(program, step.inputs, arrays, state, 1))
