"""Which values are a cross-entropy's, found by structure in steps as their gradients are captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.attention import attentions
from meshwright.ir.analysis.cross_entropy import CrossEntropy, Unfused, looked_at
from meshwright.ir.graph import Graph

B, T, D, V = 8, 8, 16, 96  # batch, tokens, width, vocabulary
Array = jax.Array
Params = dict[str, Array]
Loss = Callable[..., Array]
X_BTD, Y_BT, M_BT = jnp.ones((B, T, D)), jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
checkpoint: Any = jax.checkpoint  # type: ignore[reportPrivateImportUsage]


def weights(**more: Array) -> Params:
    return {"h": jnp.ones((D, D)), "w": jnp.ones((D, V)), **more}


def logits_of(params: Params, x_BTD: Array) -> Array:
    return jnp.tanh(x_BTD @ params["h"]) @ params["w"]


def integers(logits_BTV: Array, y_BT: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, y_BT)


def taken(logits_BTV: Array, y_BT: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), y_BT[..., None], -1)[..., 0]


def one_hot(logits_BTV: Array, y_BT: Array) -> Array:
    return -(jax.nn.log_softmax(logits_BTV) * jax.nn.one_hot(y_BT, V)).sum(-1)


def indexed(logits_BTV: Array, y_BT: Array) -> Array:
    picked = logits_BTV[jnp.arange(B)[:, None], jnp.arange(T)[None, :], y_BT]
    return jax.nn.logsumexp(logits_BTV, -1) - picked


def compared(logits_BTV: Array, y_BT: Array) -> Array:
    """Picked by a mask over classes."""
    kept = jnp.arange(V) == y_BT[..., None]
    return jax.nn.logsumexp(logits_BTV, -1) - jnp.where(kept, logits_BTV, 0).sum(-1)


def smoothed(logits_BTV: Array, y_BT: Array) -> Array:
    labels_BTV = optax.smooth_labels(jax.nn.one_hot(y_BT, V), 0.1)
    return optax.softmax_cross_entropy(logits_BTV, labels_BTV)


def with_z(logits_BTV: Array, y_BT: Array) -> Array:
    """With the loss of PaLM that keeps normalizers near 1 (arXiv 2204.02311, section 5)."""
    return integers(logits_BTV, y_BT) + 1e-4 * jax.nn.logsumexp(logits_BTV, -1) ** 2


def by_hand(logits_BTV: Array, y_BT: Array) -> Array:
    highest = logits_BTV.max(-1, keepdims=True)
    total = jnp.log(jnp.exp(logits_BTV - highest).sum(-1)) + highest[..., 0]
    return total - jnp.take_along_axis(logits_BTV, y_BT[..., None], -1)[..., 0]


CORES: dict[str, Loss] = {
    "optax, integers": integers, "log_softmax, take_along_axis": taken, "one-hot": one_hot, "indexed": indexed,
    "compared": compared, "smoothed": smoothed, "z-loss": with_z, "by hand": by_hand,
}  # fmt: skip


def mean_of(core: Loss) -> Loss:
    return lambda params, x, y: core(logits_of(params, x), y).mean()


def tied_with_bias(params: Params, x: Array, y: Array) -> Array:
    logits = jnp.einsum("btd,vd->btv", x + params["e"][y], params["e"]) + params["b"]
    return integers(logits, y).mean()


def cast_and_capped(params: Params, x: Array, y: Array) -> Array:
    """As Gemma 2 caps its logits (arXiv 2408.00118, section 2)."""
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    logits = logits_of(narrow, x.astype(jnp.bfloat16)).astype(jnp.float32)
    return integers(30 * jnp.tanh(logits / 30), y).mean()


def masked(params: Params, x: Array, y: Array, mask: Array) -> Array:
    return (integers(logits_of(params, x), y) * mask).sum() / mask.sum()


def with_temperature(params: Params, x: Array, y: Array) -> Array:
    return integers(logits_of(params, x) / params["t"], y).mean()


def flattened(params: Params, x: Array, y: Array) -> Array:
    return taken_flat(logits_of(params, x.reshape(B * T, D)), y.reshape(-1)).mean()


def taken_flat(logits_NV: Array, y_N: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_NV), y_N[:, None], 1)


def summed_at_once(params: Params, x: Array, y: Array) -> Array:
    return -(jax.nn.log_softmax(logits_of(params, x)) * jax.nn.one_hot(y, V)).sum() / B


def weighted_by_loss(params: Params, x: Array, y: Array) -> Array:
    """Gradients depend on a number of the whole batch that is made of losses."""
    return (mean_of(integers)(params, x, y) - 2) ** 2


def focal(params: Params, x: Array, y: Array) -> Array:
    """Lin et al., arXiv 1708.02002, section 3.2."""
    loss = integers(logits_of(params, x), y)
    return ((1 - jnp.exp(-loss)) ** 2 * loss).mean()


LOSSES: dict[str, tuple[Loss, tuple[Any, ...]]] = {
    **{name: (mean_of(core), (weights(), X_BTD, Y_BT)) for name, core in CORES.items()},
    "tied, bias": (tied_with_bias, ({"e": jnp.ones((V, D)), "b": jnp.ones(V)}, X_BTD, Y_BT)),
    "cast, capped": (cast_and_capped, (weights(), X_BTD, Y_BT)),
    "masked": (masked, (weights(), X_BTD, Y_BT, M_BT)),
    "temperature": (with_temperature, (weights(t=jnp.ones(())), X_BTD, Y_BT)),
    "flattened": (flattened, (weights(), X_BTD, Y_BT)),
    "summed at once": (summed_at_once, (weights(), X_BTD, Y_BT)),
    "weighted by loss": (weighted_by_loss, (weights(), X_BTD, Y_BT)),
    "focal": (focal, (weights(), X_BTD, Y_BT)),
}


def trained(loss: Loss) -> Callable[..., Any]:
    def step(params: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value

    return step


def microbatched(loss: Loss) -> Callable[..., Any]:
    """Gradients of two halves of the batch, added up in a loop of the step's own."""

    def step(params: Any, *batch: Any) -> Any:
        def one(total: Any, part: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(params, *part)
            return jax.tree.map(jnp.add, total, gradients), value

        parts = jax.tree.map(lambda a: a.reshape(2, B // 2, *a.shape[1:]), batch)
        total, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(lambda w, g: w - 0.05 * g, params, total), values.mean()

    return step


def graph_of(loss: Loss, *args: Any) -> Graph:
    return capture(trained(loss), *args).graph


def sides(graph: Graph) -> list[tuple[int, int]]:
    """What leaves the forward pass and the backward pass of each cross-entropy found."""
    found = looked_at(graph)
    assert all(isinstance(one, CrossEntropy) for one in found), found
    return [(len(one.results), len(one.gradients)) for one in found if isinstance(one, CrossEntropy)]  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_one_cross_entropy_is_found_with_its_gradients(name: str):
    """One loss per token leaves, and the gradients of hidden states and weight; of a bias or a temperature too."""
    loss, args = LOSSES[name]
    more = name in ("tied, bias", "temperature")
    graph = graph_of(loss, *args)
    assert sides(graph) == [(1, 2 + more)]
    assert attentions(graph) == ()


@pytest.mark.parametrize("name", LOSSES)
def test_everything_as_large_as_the_logits_is_inside(name: str):
    loss, args = LOSSES[name]
    graph = graph_of(loss, *args)
    (one,) = looked_at(graph)
    assert isinstance(one, CrossEntropy)
    made = {v for visit in graph.visits for v in visit.op.outputs}
    large = {v for v in made if graph.types[v].size >= B * T * V}
    assert one.inside <= large <= one.inside | one.remade
    assert {graph.types[one.softmax].shape[d] for d in one.keys} == {V}


def test_labels_as_numbers_of_all_classes():
    def distilled(params: Params, x: Array, y_BTV: Array) -> Array:
        return optax.softmax_cross_entropy(logits_of(params, x), y_BTV).mean()

    assert sides(graph_of(distilled, weights(), X_BTD, jnp.ones((B, T, V)))) == [(1, 2)]


def test_a_loss_without_gradients():
    assert sides(capture(mean_of(integers), weights(), X_BTD, Y_BT).graph) == [(1, 0)]


@pytest.mark.parametrize("core", [integers, taken, one_hot])
def test_computed_again_and_in_loops(core: Loss):
    """Where the loss is computed again, its backward pass has logits of its own."""
    args = weights(), X_BTD, Y_BT
    assert sides(graph_of(checkpoint(mean_of(core)), *args)) == [(1, 0), (0, 2)]
    assert sides(capture(microbatched(mean_of(core)), *args).graph) == [(1, 2)]

    def in_chunks(params: Params, x: Array, y: Array) -> Array:
        """As steps do that hold few logits by themselves."""
        part = checkpoint(lambda x, y: core(logits_of(params, x[None]), y[None]).sum())
        return jax.lax.scan(lambda sum_, xy: (sum_ + part(*xy), None), 0.0, (x, y))[0] / (B * T)

    assert sides(graph_of(in_chunks, *args)) == [(1, 0), (0, 2)]


# ------------------------------------------------------------ what is none, and what stays plain


def contrastive(params: Params, x: Array, y: Array) -> Array:
    logits, n = (x @ params["a"]) @ (y @ params["b"]).T, jnp.arange(8)
    return -(jax.nn.log_softmax(logits)[n, n].mean() + jax.nn.log_softmax(logits.T)[n, n].mean())


def one_sided(params: Params, x: Array, y: Array) -> Array:
    return -jax.nn.log_softmax((x @ params["a"]) @ y.T)[jnp.arange(8), jnp.arange(8)].mean()


def attention(params: Params, x: Array, y: Array) -> Array:
    return (jax.nn.softmax((x @ params["a"]) @ y.T) @ (y @ params["b"])).sum()


def normalizer(params: Params, x: Array, y: Array) -> Array:
    return jax.nn.logsumexp((x + y) @ params["a"], -1).mean()


def gated(params: Params, x: Array, y: Array) -> Array:
    return (jax.nn.softmax(x @ params["a"]) * (y @ params["b"])).sum()


@pytest.mark.parametrize("loss", [contrastive, one_sided, attention, normalizer, gated])
def test_other_softmaxes_are_no_cross_entropy(loss: Loss):
    args = {name: jnp.ones((D, D)) for name in "ab"}, jnp.ones((8, D)), jnp.ones((8, D))
    assert looked_at(graph_of(loss, *args)) == ()


def test_attention_with_a_mask_of_data_is_no_cross_entropy():
    """A mask compares as labels do; of one head and one sequence, keys are as a weight is."""

    def loss(params: Params, x_TD: Array, kind_T: Array) -> Array:
        q, k, v = (x_TD @ params[name] for name in "qkv")
        same = kind_T[:, None] == kind_T[None, :]
        return (jax.nn.softmax(jnp.where(same, q @ k.T, -1e9)) @ v).sum()

    args = {name: jnp.ones((D, D)) for name in "qkv"}, jnp.ones((T, D)), jnp.zeros(T, jnp.int32)
    graph = graph_of(loss, *args)
    assert looked_at(graph) == () and len(attentions(graph)) == 1


def test_the_weights_of_a_router_are_no_cross_entropy():
    """Others read them too, but no log is taken of them: there is no loss that stays plain."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        chances = jax.nn.softmax(x @ params["a"])
        best, which = jax.lax.top_k(chances, 2)
        return (params["b"][which] * best[..., None] * y[:, None]).sum()

    args = {name: jnp.ones((D, D)) for name in "ab"}, jnp.ones((8, D)), jnp.ones((8, D))
    assert looked_at(graph_of(loss, *args)) == ()


def accuracy(logits: Array, y: Array) -> Array:
    return (logits.argmax(-1) == y).mean()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (accuracy, "`argmax` reads its logits [8, 8, 96]"),
        (lambda logits, y: logits, "its logits [8, 8, 96] are a result"),
        (lambda logits, y: jax.lax.top_k(logits, 2)[1], "`top_k` reads its logits [8, 8, 96]"),
    ],
)
def test_logits_that_others_read_stay_with_the_reason(other: Loss, reason: str):
    def loss(params: Params, x: Array, y: Array) -> tuple[Array, Array]:
        logits = logits_of(params, x)
        return integers(logits, y).mean(), other(logits, y)

    def step(params: Params, x: Array, y: Array) -> Any:
        value, gradients = jax.value_and_grad(loss, has_aux=True)(params, x, y)
        return jax.tree.map(lambda w, g: w - g, params, gradients), value

    (one,) = looked_at(capture(step, weights(), X_BTD, Y_BT).graph)
    assert isinstance(one, Unfused)
    assert one.reason == reason and one.where.startswith("test_cross_entropy.py")
