"""Steps that torch captured run on XLA, and give what torch gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import numpy as np  # noqa: E402

import meshwright as mw  # noqa: E402
from meshwright.backends.torch.dtypes import array_of  # noqa: E402
from meshwright.backends.xla.dtypes import jax_dtype  # noqa: E402
from meshwright.backends.xla.foreign import adopted  # noqa: E402
from meshwright.backends.xla.replay import Walk  # noqa: E402
from meshwright.ir.errors import LoweringError  # noqa: E402
from meshwright.ir.graph import Graph, Op  # noqa: E402

from .test_torch_map import SAMPLES, graph_of, with_gradients  # noqa: E402
from .torch_models import OPTIMIZERS, SUBJECTS  # noqa: E402


def typed(tensor: Any, graph: Graph, value: int) -> np.ndarray:
    return array_of(tensor).view(jax_dtype(graph.types[value].dtype))


@pytest.mark.parametrize(
    ("function", "args"), [pytest.param(f, a, id=name) for name, f, a in SAMPLES]
)
def test_an_operation_of_torch_does_the_same_on_xla(function: Any, args: Any):
    both = with_gradients(function, args)
    wanted = both(*args)
    graph, tensors = graph_of(both, args)
    given = [typed(x, graph, v) for x, v in zip(args, graph.inputs, strict=True)]
    arrays = {v: typed(x, graph, v) for v, x in tensors.items()}
    with jax.enable_x64(True):
        binding = adopted(graph, arrays).binding
        found = jax.jit(Walk(graph, binding.ops, arrays))(*given)
    half = any(want.dtype in (torch.bfloat16, torch.float16) for want in wanted)
    close = 2e-2 if half else 2e-5
    for x, want, value in zip(found, wanted, graph.outputs, strict=True):
        assert x.dtype == jax_dtype(graph.types[value].dtype)
        np.testing.assert_allclose(
            np.asarray(x).astype(np.float64), want.double().numpy(), rtol=close, atol=close
        )


PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt, eight devices": ("gpt", {"mesh": (2, 2, 2), "attention": "fused", "loss": "fused"}),
    "gpt, two stages": ("gpt", {"pp": 2, "microbatches": 4}),
    "llama": ("llama", {"mesh": (4,), "microbatches": 2, "recompute": "full"}),
    "mixture": ("mixture", {"mesh": (2, 2), "attention": "plain"}),
    "convnet": ("convnet", {"mesh": (4,)}),
}


@pytest.mark.parametrize(("name", "words"), PLANS.values(), ids=PLANS)
def test_a_model_of_torch_trains_on_xla_as_in_torch(name: str, words: dict[str, Any]):
    assert len(jax.devices()) == 8
    subject, make = SUBJECTS[name], OPTIMIZERS["adamw"]
    torch.manual_seed(0)
    model = subject.make()
    batches = [subject.batch(8) for _ in range(3)]
    alone = copy.deepcopy(model)
    optimizer, twin = make(model.parameters()), make(alone.parameters())
    step = mw.torch.parallelize(
        model, subject.loss, optimizer, batches[0], request=mw.Request(**words), backend="xla",
        cluster=f"{int(np.prod(words.get('mesh', 4)))}xcpu",
    )  # fmt: skip
    for batch in batches:
        twin.zero_grad()
        loss = subject.loss(alone, batch)
        loss.backward()
        twin.step()
        assert step(batch) == pytest.approx(loss.item(), rel=2e-4)
    step.write_back()
    kept = [*zip(model.named_parameters(), alone.parameters(), strict=True)]
    for (path, a), b in kept:
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=path)
        for key, held in twin.state[b].items():  # moments: of gradients, and of their squares
            torch.testing.assert_close(optimizer.state[a][key], held, rtol=2e-3, atol=2e-4)
    for (path, a), b in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=path)


def test_what_xla_trained_goes_on_on_torch(tmp_path: Path):
    subject, make = SUBJECTS["perceptron"], OPTIMIZERS["adamw"]

    def stepped(backend: Any) -> Any:
        torch.manual_seed(0)
        model = subject.make()
        return mw.torch.parallelize(
            model, subject.loss, make(model.parameters()), subject.batch(), cluster="1xcpu", backend=backend
        )  # fmt: skip

    one, other, batch = stepped("xla"), stepped("torch"), subject.batch()
    one(batch)
    one.save(tmp_path / "1")
    other.load(tmp_path / "1")
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in one.state().items())
    assert one(batch) == pytest.approx(other(batch), rel=1e-5)


def test_what_xla_has_not_is_refused_by_name():
    graph, _ = graph_of(lambda x: [x.lgamma()], [torch.ones(2)])
    odd = Graph(graph.types, graph.inputs, (Op("own", (0,), (1,)),), (1,), graph.constants)
    with pytest.raises(LoweringError, match="`own` of another front end cannot run on XLA yet"):
        adopted(odd, {})
