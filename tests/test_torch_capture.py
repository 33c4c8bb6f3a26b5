"""Steps of PyTorch as graphs: what they compute, what they are called, how they plan, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from meshwright.api import plan_captured  # noqa: E402
from meshwright.backends.torch.capture import Captured, capture  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.analysis.attention import attentions  # noqa: E402
from meshwright.ir.analysis.blocks import fold  # noqa: E402
from meshwright.ir.analysis.cross_entropy import cross_entropies  # noqa: E402
from meshwright.ir.errors import CaptureError, MismatchError  # noqa: E402
from meshwright.ir.ops import CONTRACTIONS  # noqa: E402
from meshwright.ir.rules import rule_of  # noqa: E402
from meshwright.ir.verify import verify  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402

from .torch_models import (  # noqa: E402
    GPT,
    OPTIMIZERS,
    SUBJECTS,
    Llama,
    Perceptron,
    class_loss,
    feature_batch,
    token_batch,
    token_loss,
)

CLOSE = 1e-5  # of the largest element of a tensor, in f32


def made(subject: str, optimizer: str = "adamw") -> tuple[Captured, nn.Module, Any]:
    """A subject with its optimizer, captured."""
    torch.manual_seed(0)
    one = SUBJECTS[subject]
    model = one.make()
    chosen = OPTIMIZERS[optimizer](model.parameters())
    return capture(model, one.loss, chosen, one.batch()), model, chosen


def differences(
    captured: Captured, model: nn.Module, loss: Any, optimizer: Any, batch: Any,
    before_update: Callable[[nn.Module], Any] = lambda model: None,
) -> dict[str, float]:  # fmt: skip
    """Of each result of one step, how far the graph is from torch, which takes the step."""
    found = replay(
        captured.graph, captured.binding.arrays, captured.inputs(model, optimizer, batch)
    )
    optimizer.zero_grad()
    eager = loss(model, batch)
    eager.backward()
    before_update(model)
    optimizer.step()
    after = captured.inputs(model, optimizer, batch)
    wanted = {**dict(zip(captured.graph.input_names, after, strict=True)), "loss": eager.detach()}
    return {
        name: _difference(value, wanted[name])
        for name, value in zip(captured.graph.output_names, found, strict=True)
    }


def _difference(found: Any, wanted: Any) -> float:
    off = (found.double() - wanted.double()).abs().max()
    return float(off / wanted.double().abs().max().clamp_min(1e-12))


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_graph_takes_the_step_that_torch_takes(subject, optimizer):
    """Loss, gradients (as momenta), new parameters, buffers and state, of the first step and a later one."""
    captured, model, chosen = made(subject, optimizer)
    for _ in range(2):
        off = differences(
            captured, model, SUBJECTS[subject].loss, chosen, SUBJECTS[subject].batch()
        )
        worst = max(off, key=lambda name: off[name])
        assert off[worst] <= CLOSE, (worst, off[worst])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_graph_keeps_the_laws_and_knows_every_op(subject):
    captured, _, _ = made(subject)
    verify(captured.graph)
    types = captured.graph.types
    assert not [op.kind for op in captured.graph.ops if rule_of(op, types).opaque]


def test_a_model_on_meta_has_the_graph_of_one_on_the_cpu():
    def graph(device: str) -> Any:
        with torch.device(device):
            model = Llama()
        return capture(
            model, token_loss, torch.optim.AdamW(model.parameters()), token_batch()
        ).graph

    assert graph("meta") == graph("cpu")


def test_capture_leaves_the_model_and_its_optimizer_as_they_were():
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    capture(model, class_loss, optimizer, feature_batch())
    after = {name: (id(p), p) for name, p in model.named_parameters()}
    assert all(
        after[name][0] == key and torch.equal(after[name][1], p)
        for name, (key, p) in before.items()
    )
    assert not optimizer.state


def test_groups_of_an_optimizer_have_options_of_their_own():
    model = Perceptron()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 1e-2}], eps=1e-5
    )
    captured = capture(model, class_loss, optimizer, feature_batch())
    off = differences(captured, model, class_loss, optimizer, feature_batch())
    assert max(off.values()) <= CLOSE


def test_activations_may_be_written_in_place():
    def loss(model: nn.Module, batch: Any) -> Any:
        hidden = model[0](batch[0]).clone()
        hidden[:, 2:4] = 1.0
        hidden[0] *= 2
        hidden.relu_()
        return F.cross_entropy(model[2](hidden), batch[1])

    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    captured = capture(model, loss, optimizer, feature_batch())
    assert max(differences(captured, model, loss, optimizer, feature_batch()).values()) <= CLOSE


RATED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **OPTIMIZERS,
    "adamax": lambda p: torch.optim.Adamax(p, eps=1e-5, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, eps=1e-5),
    "radam": lambda p: torch.optim.RAdam(p, eps=1e-5, decoupled_weight_decay=True),
    "tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), eps=1e-5),
}


@pytest.mark.parametrize("optimizer", RATED)
def test_rates_change_from_step_to_step(optimizer):
    """As under a scheduler whose warm-up begins with 0."""
    model = Perceptron()
    chosen = RATED[optimizer](model.parameters())
    group = chosen.param_groups[0]
    usual, group["lr"] = group["lr"], 0.0
    captured = capture(model, class_loss, chosen, feature_batch())
    assert captured.binding.rates == {"optimizer.lr": 0}
    for share in (0, 0.5, 1, 0.3):
        group["lr"] = usual * share
        off = differences(captured, model, class_loss, chosen, feature_batch())
        assert max(off.values()) <= CLOSE, off


def test_groups_have_rates_of_their_own():
    model = Perceptron()
    groups = [{"params": [p], "lr": 0.1 * (k + 1)} for k, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    captured = capture(model, class_loss, optimizer, feature_batch())
    assert list(captured.binding.rates) == [f"optimizer.{k}.lr" for k in range(4)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step, k=k: 0.5 ** (k * step) for k in range(4)]
    )
    for _ in range(2):
        off = differences(captured, model, class_loss, optimizer, feature_batch())
        assert max(off.values()) <= CLOSE
        scheduler.step()


def test_other_options_stay_as_they_were():
    captured, model, optimizer = made("perceptron", "sgd")
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(MismatchError, match=r"`momentum` of the optimizer is 0.5, it was 0.9"):
        captured.inputs(model, optimizer, feature_batch())


def test_an_update_that_is_not_linear_in_the_rate_is_refused():
    class Squared(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(parameter.grad, alpha=-(group["lr"] ** 2))

    model = Perceptron()
    optimizer = Squared(model.parameters(), lr=0.1)
    assert "-0.0625, -0.25 and -1.0 at rates" in refused(class_loss, model, optimizer=optimizer)


def of_model(change: Any) -> Any:
    return change and (lambda model, _: change(model))


CLIPS: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "norm of some": lambda model: nn.utils.clip_grad_norm_(model.h.parameters(), 0.1, foreach=True),
    "norm that is small": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e3),
    "largest": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=inf),
    "values": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "none": lambda model: [p.grad.mul_(0.5) for p in model.parameters()],
}


@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_are_changed_before_the_update(clip):
    torch.manual_seed(0)
    model, change = GPT(), CLIPS[clip]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    captured = capture(model, token_loss, optimizer, token_batch(), of_model(change))
    for _ in range(2):
        off = differences(captured, model, token_loss, optimizer, token_batch(), change)
        assert max(off.values()) <= CLOSE, off
    assert all(p.grad is None or p.grad.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0, error_if_nonfinite=True), "error_if_nonfinite=False"),
        (lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0, norm_type=3), "norm of order 3"),
        (lambda m: setattr(m[0].weight, "grad", None), "`0.weight` is taken away"),
        (lambda m: m[0].weight.grad.mul_(2) if m[0].weight.grad.sum() > 0 else None, "decides in Python by a value"),
    ],
)  # fmt: skip
def test_changes_of_gradients_that_are_refused(change, words):
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(CaptureError, match=words):
        capture(model, class_loss, optimizer, feature_batch(), of_model(change))
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- what they are called


def test_inputs_and_outputs_are_named_by_path():
    captured, _, _ = made("convnet", "adamw")
    names = set(captured.graph.input_names)
    assert {
        "parameters.blocks.0.conv1.weight", "buffers.bn.running_mean", "optimizer.head.bias.exp_avg", "optimizer.step",
        "batch.0", "batch.1",
    } <= names  # fmt: skip
    assert captured.graph.output_names[-1] == "loss"
    assert set(captured.graph.output_names) - {"loss"} <= names


def test_what_is_carried_is_every_tensor_that_a_step_changes():
    captured, _, _ = made("convnet", "adamw")
    graph = captured.graph
    pairs = {graph.input_name(i): graph.output_name(o) for i, o in graph.state}
    assert all(before == after for before, after in pairs.items())
    carried = {name for name in graph.input_names if not name.startswith("batch")}
    assert carried - captured.binding.rates.keys() == pairs.keys()
    assert graph.donated == {i for i, _ in graph.state}


def test_tied_weights_are_one_input_that_gathers_both_gradients():
    captured, _, _ = made("gpt")
    assert captured.binding.tied == {"head.weight": "tokens.weight"}
    assert "parameters.head.weight" not in captured.graph.input_names


def test_the_batch_is_told():
    captured, _, _ = made("llama")
    graph = captured.graph
    assert graph.batch is not None
    assert {graph.input_name(p): d for p, d in graph.batch.dims} == {
        "batch.targets": 0,
        "batch.tokens": 0,
    }


def test_ops_know_the_line_of_the_user():
    captured, _, _ = made("gpt")
    lines = {op.where.partition(":")[0] for op in captured.graph.ops}
    assert lines == {"torch_models.py", "AdamW.step"}


def test_a_frozen_parameter_is_an_input_that_nothing_updates():
    model = Perceptron()
    model[0].weight.requires_grad_(False)
    captured = capture(model, class_loss, torch.optim.SGD(model.parameters()), feature_batch())
    assert "parameters.0.weight" in captured.graph.input_names
    assert "parameters.0.weight" not in captured.graph.output_names


def test_another_batch_than_the_example_is_told_apart():
    captured, model, optimizer = made("perceptron")
    with pytest.raises(MismatchError, match="the batch is"):
        captured.inputs(model, optimizer, {"x": torch.zeros(6, 8)})


# ---------------------------------------------------------------- what planning sees


@pytest.mark.parametrize("subject", ["gpt", "llama", "mixture"])
def test_products_keep_batch_sequence_and_heads_apart(subject):
    """No dim of an activation is a batch of tokens, or of heads."""
    captured, _, _ = made(subject)
    graph = captured.graph
    for op in graph.ops:
        if op.kind in CONTRACTIONS:
            sizes = {n for v in (*op.inputs, *op.outputs) for n in graph.types[v].shape}
            assert sizes.isdisjoint({4 * 16}), (op.kind, op.where)


@pytest.mark.parametrize("subject", ["gpt", "llama", "mixture"])
def test_attention_and_losses_are_found(subject):
    captured, _, _ = made(subject)
    assert [one.share for one in attentions(captured.graph)] == [17 / 32] * 2
    assert len(cross_entropies(captured.graph)) == 1


@pytest.mark.parametrize(
    ("model", "clip"), [pytest.param(GPT, "norm", id="GPT"), pytest.param(Llama, None, id="Llama")]
)
def test_repeated_layers_fold(model, clip):
    def small(layers: int) -> int:
        torch.manual_seed(0)
        deep, change = model(layers), CLIPS[clip] if clip else None
        optimizer = torch.optim.AdamW(deep.parameters())
        captured = capture(deep, token_loss, optimizer, token_batch(), of_model(change))
        return len(fold(captured.graph).small.ops)

    assert small(9) == small(7)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_captured_step_is_planned(subject):
    one = SUBJECTS[subject]
    model = one.make()
    captured = capture(model, one.loss, torch.optim.AdamW(model.parameters()), one.batch(8))
    plan = plan_captured(captured, "1xh100x4", Request(pp=1), subject)
    assert plan.proof.status in ("optimal", "within_gap") and plan.estimate.step_seconds > 0


def test_a_captured_step_is_planned_as_a_pipeline():
    model = GPT(4)
    captured = capture(model, token_loss, torch.optim.AdamW(model.parameters()), token_batch(16))
    plan = plan_captured(captured, "1xh100x4", Request(pp=2), "gpt")
    assert plan.pipeline is not None and len(plan.pipeline.stages) == 2


# ---------------------------------------------------------------- what is refused


def refused(
    loss: Any, model: nn.Module | None = None, batch: Any = None, optimizer: Any = None
) -> str:
    model = model or Perceptron()
    optimizer = optimizer or torch.optim.SGD(model.parameters())
    with pytest.raises(CaptureError) as error:
        capture(model, loss, optimizer, feature_batch() if batch is None else batch)
    assert error.value.where and error.value.fix
    return str(error.value)


def test_a_parameter_without_a_gradient_is_refused():
    said = refused(lambda model, batch: model[0](batch[0]).sum())
    assert (
        "`2.weight` gets no gradient, nor do 1 others" in said and "requires_grad_(False)" in said
    )


def test_control_flow_by_values_is_refused():
    def loss(model: nn.Module, batch: Any) -> Any:
        found = class_loss(model, batch)
        return found * 2 if found > 1 else found

    assert "decides in Python by a value" in refused(loss)


def test_indexing_by_truth_values_is_refused():
    def loss(model: nn.Module, batch: Any) -> Any:
        logits = model(batch[0])
        return logits[logits > 0].sum()

    said = refused(loss)
    assert (
        "indexes by truth values" in said
        and "torch.where" in said
        and "test_torch_capture.py" in said
    )


def test_writing_over_a_parameter_is_refused():
    def loss(model: nn.Module, batch: Any) -> Any:
        model[0].weight.mul_(2)
        return class_loss(model, batch)

    assert "in place" in refused(loss)


def test_complex_values_are_refused():
    def loss(model: nn.Module, batch: Any) -> Any:
        return torch.fft.fft(model(batch[0])).abs().sum()

    assert "complex64" in refused(loss)


def test_an_operation_without_a_mapping_is_refused_by_name():
    def loss(model: nn.Module, batch: Any) -> Any:
        return torch.linalg.qr(model(batch[0]))[1].sum()

    said = refused(loss)
    assert "`aten.linalg_qr.default`" in said and "test_torch_capture.py" in said


def test_mixed_devices_are_refused():
    said = refused(
        class_loss, batch=(torch.zeros(6, 8), torch.zeros(6, dtype=torch.long)), model=_elsewhere()
    )
    assert "mixes devices" in said


def _elsewhere() -> nn.Module:
    """A model that says that it is on a device which is not here."""
    model = Perceptron()

    class Placed(nn.Parameter):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda:0")

    model[0].weight = Placed(model[0].weight.detach())
    return model


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, b: m(b[0]), "of shape (6, 10)"),
        (lambda m, b: 1.0, "1.0"),
        (lambda m, b: {"a": 1}, "'a'"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, words):
    assert words in refused(loss)


def test_an_optimizer_of_another_model_is_refused():
    said = refused(class_loss, optimizer=torch.optim.SGD(Perceptron().parameters()))
    assert "that the model has not" in said


def test_an_optimizer_whose_first_step_differs_is_refused_until_it_was_taken():
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, dampening=0.5)
    assert "first step of SGD is unlike" in refused(class_loss, model, optimizer=optimizer)
    class_loss(model, feature_batch()).backward()
    optimizer.step()
    captured = capture(model, class_loss, optimizer, feature_batch())
    assert (
        max(differences(captured, model, class_loss, optimizer, feature_batch()).values()) <= CLOSE
    )


def test_an_option_in_a_tensor_is_refused():
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    optimizer.param_groups[0]["momentum"] = torch.tensor(0.1)
    assert "option `momentum` of SGD is a tensor" in refused(class_loss, model, optimizer=optimizer)


def test_numbers_in_a_batch_are_refused():
    said = refused(lambda m, b: F.mse_loss(m(b[0]), b[0]), batch=(torch.zeros(6, 8), 3))
    assert "not a tensor" in said and "batch.1" in said
