"""The zoo: sizes as published, training, and shapes that cost no memory."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright import models
from meshwright.models import ModelError, build, describe, mixtral, names
from meshwright.models.experts import assign
from meshwright.models.layers import dropout

FOLDER = Path(models.__file__).parent
UNROLLED = (
    *("gpt-tiny", "llama-tiny", "llama-tied-tiny", "mixtral-tiny"),
    *("deepseek-tiny", "vit-tiny", "wrn-tiny", "dlrm-tiny"),
)
SCANNED = ("gpt-tiny-scan", "llama-tiny-scan", "mixtral-tiny-scan")
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast

PUBLISHED = {
    # github.com/openai/gpt-2, model card: 124M, 355M, 774M, 1558M.
    "gpt2": 124e6,
    "gpt2-medium": 355e6,
    "gpt2-large": 774e6,
    "gpt2-xl": 1558e6,
    # Brown et al. 2020, table 2.1.
    "gpt3-125m": 125e6,
    "gpt3-350m": 350e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13.0e9,
    "gpt3-175b": 175e9,
    # Safetensors totals on huggingface.co/meta-llama: 8.03B, 70.6B, 406B.
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.6e9,
    "llama3-405b": 406e9,
    # mistral.ai/news/mixtral-of-experts: 46.7B.
    "mixtral-8x7b": 46.7e9,
    # arXiv 2405.04434 and 2412.19437: 236B and 671B.
    "deepseek-v2": 236e9,
    "deepseek-v3": 671e9,
    # torchvision's weight tables, the head of 1000 classes included.
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "vit-h14": 632_045_800,
    "wrn-50-2": 68_883_240,
    "wrn-101-2": 126_886_696,
    # Alpa's names for them; suite_wresnet.py.
    "wrn-alpa-250m": 250e6,
    "wrn-alpa-1b": 1e9,
    # NVIDIA DeepLearningExamples, DLRM.md: Criteo with frequency threshold 3, 22.8B.
    "dlrm": 22.8e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert build(name).params == pytest.approx(PUBLISHED[name], rel=0.02)


def test_tied_embeddings_are_one_parameter():
    tied, untied = build("llama-tied-tiny"), build("llama-tiny", layers=4)
    assert untied.params - tied.params == 128 * 64


def test_scanning_changes_no_parameter_count():
    assert build("llama3-70b-scan").params == build("llama3-70b").params


def train(example, steps, seed=0):
    step, rng = jax.jit(example.step, compiler_options=QUICK), np.random.default_rng(seed)
    init = jax.jit(example.init, compiler_options=QUICK)
    state, losses = init(jax.random.key(seed)), []
    for _ in range(steps):
        state, metrics = step(state, example.make_batch(rng))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(metrics["grad_norm"])
    return losses


@pytest.mark.parametrize("name", UNROLLED)
def test_tiny_models_learn(name):
    batch = 256 if name == "dlrm-tiny" else None  # clicks are noisy
    losses = train(build(name, batch=batch), 10)
    assert np.mean(losses[-3:]) < 0.95 * losses[0]


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


@pytest.mark.parametrize("name", UNROLLED + SCANNED)
def test_real_arrays_have_the_promised_shapes(name):
    example = build(name)
    assert shapes(jax.eval_shape(example.init, jax.random.key(0))) == shapes(example.state)
    assert shapes(example.make_batch(np.random.default_rng(0))) == shapes(example.batch)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", UNROLLED + SCANNED)
def test_a_step_returns_a_state_of_the_same_shapes(name, optimizer):
    example = build(name, optimizer=optimizer)
    state, metrics = jax.eval_shape(example.step, example.state, example.batch)
    assert shapes(state) == shapes(example.state)
    assert {"loss", "grad_norm"} <= set(metrics)


@pytest.mark.parametrize("name", ["gpt3-175b-scan", "llama3-405b-scan", "dlrm"])
def test_tracing_a_large_model_makes_no_large_array(name):
    before = sum(array.nbytes for array in jax.live_arrays())
    example = build(name)
    jax.make_jaxpr(example.step)(example.state, example.batch)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1e6


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny"])
def test_scanned_and_unrolled_layers_train_alike(name):
    options = {"dtype": "f32", "layers": 2, "optimizer": "sgd"}
    unrolled = train(build(name, **options), 2)
    assert train(build(name, **options, scan=True), 2) == pytest.approx(unrolled, rel=1e-5)


@pytest.mark.parametrize("name", [*UNROLLED[:4], *SCANNED])
def test_remat_is_in_the_program(name):
    example = build(name, remat=True)
    assert "remat" in str(jax.make_jaxpr(example.step)(example.state, example.batch))


def test_remat_does_not_change_training():
    options = {"dtype": "f32", "layers": 2, "optimizer": "sgd"}
    kept = train(build("gpt-tiny-scan", **options), 2)
    assert train(build("gpt-tiny-scan", **options, remat=True), 2) == pytest.approx(kept, rel=1e-5)


def test_options_replace_the_published_sizes():
    example = build("gpt3-13b", batch=8, seq=64, layers=2, optimizer="sgd", scan=True)
    assert example.name == "gpt3-13b-scan"
    assert example.batch["tokens"].shape == (8, 64)
    assert example.state.params["layers"]["up_DF"].shape == (2, 5120, 20_480)


def test_the_bytes_model_reads_this_source():
    tokens = build("gpt-bytes").make_batch(np.random.default_rng(0))["tokens"]
    source = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py")))
    assert bytes(tokens[0].astype(np.uint8)) in source


@pytest.mark.parametrize("module", models._MODULES)
def test_names_are_those_that_the_modules_configure(module):
    configs = importlib.import_module(f"meshwright.models.{module}").CONFIGS
    assert tuple(configs) == models._MODULES[module]


def test_describe_says_what_will_be_trained():
    assert describe("gpt-tiny") == (
        "gpt-tiny: GPT, 4 layers of width 64, 8 heads; 210,304 parameters; "
        "batch tokens (16, 32), targets (16, 32)"
    )


def test_a_misspelt_name_is_met_with_close_ones():
    with pytest.raises(ModelError) as caught:
        build("gpt3-175")
    assert str(caught.value) == (
        "No model is named 'gpt3-175'.\n"
        "  where  build('gpt3-175')\n"
        "  try    gpt3-175b, gpt3-125m, gpt3-13b"
    )


def test_an_option_that_the_model_lacks_is_refused():
    with pytest.raises(ModelError) as caught:
        build("vit-tiny", seq=128)
    assert str(caught.value) == (
        "'vit-tiny' has no option 'seq'.\n"
        "  where  build('vit-tiny', seq=128)\n"
        "  try    layers, batch, optimizer, dtype, remat"
    )


def test_an_unknown_choice_is_refused():
    with pytest.raises(ModelError) as caught:
        build("gpt-tiny", optimizer="adam")
    assert str(caught.value) == (
        "'optimizer' cannot be 'adam'.\n"
        "  where  build('gpt-tiny', optimizer='adam')\n"
        "  try    'adamw' or 'sgd'"
    )


def test_a_size_below_one_is_refused():
    with pytest.raises(ModelError, match="'layers' cannot be 0"):
        build("gpt-tiny", layers=0)


def test_dropout_zeroes_its_part_and_scales_up_the_rest():
    """Masks of other seeds are others; the mean stays."""
    ones = jnp.ones((64, 32, 64))
    first, second = (np.asarray(dropout(ones, 0.2, jnp.uint32(seed))) for seed in (3, 4))
    assert np.mean(first == 0) == pytest.approx(0.2, abs=0.005)
    assert first.mean() == pytest.approx(1, abs=0.01) and set(np.unique(first)) == {
        0,
        np.float32(1.25),
    }
    both = np.mean((first == 0) & (second == 0))
    shifted = np.mean((first == 0)[..., 1:] & (second == 0)[..., :-1])
    assert both == pytest.approx(0.04, abs=0.005) and shifted == pytest.approx(0.04, abs=0.005)


def test_a_dropout_of_one_is_refused():
    with pytest.raises(ModelError, match="'dropout' cannot be 1"):
        build("gpt-tiny", dropout=1.0)


def test_a_scanned_name_cannot_be_unrolled():
    with pytest.raises(ModelError, match="scan=False contradicts it"):
        build("gpt-tiny-scan", scan=False)


def test_every_name_is_listed_once():
    assert len(set(names())) == len(names())


@pytest.mark.parametrize("capacity_factor", [8.0, 0.5], ids=["room for all", "some dropped"])
def test_experts_looked_up_agree_with_one_hot_products(capacity_factor):
    """The two dispatches are one function: the same losses, gradients and tokens that find no room."""
    config = replace(
        mixtral.CONFIGS["mixtral-tiny"], dtype="f32", capacity_factor=capacity_factor, seq=64
    )
    params = jax.jit(partial(mixtral.init_params, config))(jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: 5 * leaf, params
    )  # far from the even choices of small weights
    batch = mixtral.make("mixtral", config).make_batch(np.random.default_rng(0))
    sides = []
    for dispatch in ("sorted", "einsum"):
        loss = partial(mixtral.loss_fn, config=replace(config, dispatch=dispatch))
        sides.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *sides)


def test_experts_take_no_more_than_their_capacity():
    """Three of four choices want expert 1, which has two slots: the last one is dropped."""
    choice, place = assign(jnp.array([[1, 1, 0, 1]]), experts=2, capacity=2)
    assert choice.tolist() == [
        [2, 4, 0, 1]
    ]  # expert 0: choice 2 and an empty slot; expert 1: choices 0, 1
    assert place.tolist() == [[2, 3, 0, 4]]
