"""Which values are attention's, found by structure in steps as their gradients are captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.attention import Attention, attentions
from meshwright.ir.graph import Graph

B, T, S, D, N, H = 2, 16, 24, 32, 4, 8  # batch, queries, keys, width, heads, width of a head
Array = jax.Array
Params = dict[str, Array]
Core = Callable[[Array, Array, Array], Array]
X_BTD, Y_BSD = jnp.ones((B, T, D)), jnp.ones((B, S, D))


def weights(**more: Array) -> Params:
    return {**{name: jnp.ones((D, N, H)) for name in "qkv"}, "o": jnp.ones((N, H, D)), **more}


def scores(q_BTNH: Array, k_BSNH: Array) -> Array:
    return jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) / H**0.5


def mixed(weights_BNTS: Array, v_BSNH: Array) -> Array:
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH)


def plain(q: Array, k: Array, v: Array) -> Array:
    return mixed(jax.nn.softmax(scores(q, k)), v)


def layer(
    params: Params, x_BTD: Array, core: Core = plain, other_BSD: Array | None = None
) -> Array:
    y_BSD = x_BTD if other_BSD is None else other_BSD
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", a, params[n])
        for n, a in zip("qkv", (x_BTD, y_BSD, y_BSD), strict=True)
    )
    return x_BTD + jnp.einsum("btnh,nhd->btd", core(q, k, v), params["o"])


def trained(loss: Callable[..., Array]) -> Callable[..., Any]:
    def step(params: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value

    return step


def graph_of(loss: Callable[..., Array], *args: Any) -> Graph:
    return capture(trained(loss), *args).graph


def of(core: Core, **more: Array) -> Graph:
    """One layer with this attention."""
    return graph_of(lambda params, x: layer(params, x, core).sum(), weights(**more), X_BTD)


def sides(graph: Graph) -> list[tuple[int, int]]:
    """Products that open and that close each attention found."""
    return [(len(one.openings), len(one.closings)) for one in attentions(graph)]


def only(graph: Graph) -> Attention:
    (found,) = attentions(graph)
    return found


BOTH = [
    (2, 4)
]  # scores and the weights' gradient; the result, and gradients of values, keys and queries


def masked(mask_TS: Callable[[], Array]) -> Core:
    return lambda q, k, v: mixed(jax.nn.softmax(jnp.where(mask_TS(), scores(q, k), -1e9)), v)


def causal_by_iota() -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (T, T), 0) >= jax.lax.broadcasted_iota(
        jnp.int32, (T, T), 1
    )


def by_hand(q: Array, k: Array, v: Array) -> Array:
    s = scores(q, k)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return mixed(e / e.sum(-1, keepdims=True), v)


def divided_after(q: Array, k: Array, v: Array) -> Array:
    e_BNTS = jnp.exp(scores(q, k))
    return mixed(e_BNTS, v) / e_BNTS.sum(-1).transpose(0, 2, 1)[..., None]


def by_logarithm(q: Array, k: Array, v: Array) -> Array:
    return mixed(jnp.exp(jax.nn.log_softmax(scores(q, k))), v)


def capped(q: Array, k: Array, v: Array) -> Array:
    return mixed(jax.nn.softmax(30 * jnp.tanh(scores(q, k) / 30)), v)


def grouped(q: Array, k: Array, v: Array) -> Array:
    q_BTKGH = q.reshape(B, T, 2, 2, H)
    s_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k[:, :, :2])
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(s_BKGTS), v[:, :, :2]).reshape(B, T, N, H)


def one_head_of_keys(q: Array, k: Array, v: Array) -> Array:
    s_BNTS = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0])
    return jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(s_BNTS), v[:, :, 0])


def library(**options: Any) -> Core:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def library_grouped(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], bias=jnp.ones((1, N, T, T)))


@pytest.mark.parametrize(
    "core",
    [
        plain, by_hand, divided_after, by_logarithm, capped, grouped, one_head_of_keys, masked(causal_by_iota),
        library(), library(is_causal=True), library_grouped,
    ],
)  # fmt: skip
def test_one_attention_is_found_with_its_gradients(core: Core):
    assert sides(of(core)) == BOTH


def test_everything_as_large_as_the_scores_is_inside():
    """Heads, queries and keys are of different sizes here, so that sizes tell what must be inside."""
    graph = graph_of(lambda params, x, y: layer(params, x, plain, y).sum(), weights(), X_BTD, Y_BSD)
    found = only(graph)
    made = {v for visit in graph.visits for v in visit.op.outputs}
    assert found.inside == {v for v in made if sorted(graph.types[v].shape) == sorted((B, N, T, S))}
    assert found.many_keys == S
    assert {graph.types[found.softmax].shape[d] for d in found.keys} == {S}


def test_a_learned_bias_and_dropout_belong_to_it():
    bias_NTT = jnp.ones((N, T, T))

    def biased(params: Params, x: Array) -> Array:
        return layer(
            params, x, lambda q, k, v: mixed(jax.nn.softmax(scores(q, k) + params["b"]), v)
        ).sum()

    assert sides(graph_of(biased, weights(b=bias_NTT), X_BTD)) == BOTH

    def dropped(params: Params, x: Array, key: Array) -> Array:
        def core(q: Array, k: Array, v: Array) -> Array:
            p = jax.nn.softmax(scores(q, k))
            return mixed(jnp.where(jax.random.bernoulli(key, 0.9, p.shape), p / 0.9, 0), v)

        return layer(params, x, core).sum()

    graph = graph_of(dropped, weights(), X_BTD, jax.random.key(0))
    assert sides(graph) == BOTH
    bits = next(visit.op.outputs[0] for visit in graph.visits if visit.op.kind == "random_bits")
    assert bits in only(graph).inside


def test_scores_of_two_products_are_one_attention():
    """As in multi-head latent attention: a part with positions, a part without."""

    def core(q: Array, k: Array, v: Array) -> Array:
        return mixed(jax.nn.softmax(scores(q, k) + jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0])), v)

    assert sides(of(core)) == [(3, 6)]


def looped(one: Callable[[Params, Array], Array]) -> Graph:
    def loss(params: Params, x: Array) -> Array:
        return jax.lax.scan(lambda x, p: (one(p, x), None), x, params)[0].sum()

    return graph_of(loss, jax.tree.map(lambda w: jnp.stack([w] * 3), weights()), X_BTD)


def test_layers_in_a_row_in_a_loop_and_computed_again():
    unrolled = graph_of(lambda p, x: layer(p, layer(p, layer(p, x))).sum(), weights(), X_BTD)
    assert sides(unrolled) == BOTH * 3
    assert sides(looped(layer)) == BOTH  # what the forward loop stacks is the backward loop's
    again = [(1, 1), (2, 4)]  # forward; the forward pass once more with the backward one
    assert sides(looped(jax.checkpoint(layer))) == again
    assert (
        sides(graph_of(lambda p, x: jax.checkpoint(layer)(p, x).sum(), weights(), X_BTD)) == again
    )


def test_attention_of_flax_is_found():
    module = linen.MultiHeadDotProductAttention(num_heads=N, dropout_rate=0.1, deterministic=False)
    params = module.init(jax.random.key(0), X_BTD)

    def loss(params: Any, x: Array, key: Array) -> Array:
        return module.apply(
            params, x, mask=linen.make_causal_mask(jnp.ones((B, T))), rngs={"dropout": key}
        ).sum()  # type: ignore[union-attr]

    assert sides(graph_of(loss, params, X_BTD, jax.random.key(1))) == BOTH
    split = nnx.split(
        nnx.MultiHeadAttention(num_heads=N, in_features=D, rngs=nnx.Rngs(0), decode=False)
    )
    assert (
        sides(graph_of(lambda state, x: nnx.merge(split[0], state)(x).sum(), split[1], X_BTD))
        == BOTH
    )


def window(left: int) -> Core:
    return library(local_window_size=(left, 0))


@pytest.mark.parametrize(
    ("core", "share", "longest"),
    [
        (plain, 1.0, 1.0),
        (masked(causal_by_iota), (T + 1) / (2 * T), 1.0),
        (masked(lambda: jnp.tril(jnp.ones((T, T), bool))), (T + 1) / (2 * T), 1.0),
        (library(is_causal=True), (T + 1) / (2 * T), 1.0),
        (window(3), (4 * T - 6) / T**2, 4 / T),
        (lambda q, k, v: mixed(jax.nn.softmax(scores(q, k) + jnp.where(causal_by_iota(), 0, -1e9)), v),
         (T + 1) / (2 * T), 1.0),
    ],
)  # fmt: skip
def test_masks_that_the_program_counts_out_tell_what_is_kept(
    core: Core, share: float, longest: float
):
    found = only(of(core))
    assert (found.share, found.longest) == pytest.approx((share, longest))


def test_a_mask_of_the_batch_keeps_all():
    def loss(params: Params, x: Array, mask_BT: Array) -> Array:
        return layer(params, x, masked(lambda: mask_BT[:, None, None, :])).sum()

    found = only(graph_of(loss, weights(), X_BTD, jnp.ones((B, T), bool)))
    assert (found.share, found.longest) == (1.0, 1.0)


def test_long_sequences_are_counted_at_some_places():
    q = jax.ShapeDtypeStruct((1, 1 << 17, 1, 8), jnp.bfloat16)
    graph = capture(
        lambda q: jax.nn.dot_product_attention(q, q, q, local_window_size=(4095, 0)), q
    ).graph
    found = only(graph)
    assert found.share == pytest.approx(4096 / (1 << 17), rel=0.05)
    assert found.longest == pytest.approx(4096 / (1 << 17), rel=0.05)


def contrastive(params: Params, x: Array, y: Array) -> Array:
    logits, n = (x @ params["a"]) @ (y @ params["b"]).T, jnp.arange(8)
    return -(jax.nn.log_softmax(logits)[n, n].mean() + jax.nn.log_softmax(logits.T)[n, n].mean())


def one_sided(params: Params, x: Array, y: Array) -> Array:
    return -jax.nn.log_softmax((x @ params["a"]) @ y.T)[jnp.arange(8), jnp.arange(8)].mean()


def cross_entropy(params: Params, x: Array, y: Array) -> Array:
    return -(jax.nn.log_softmax(jnp.tanh(x @ params["b"]) @ params["a"]) * y).mean()


def exponential(params: Params, x: Array, y: Array) -> Array:
    return ((jnp.exp(x @ params["a"]) @ params["b"] - y) ** 2).sum()


def normed(params: Params, x: Array, y: Array) -> Array:
    h = jax.nn.elu(x @ params["a"])
    return ((h - h.mean(-1, keepdims=True)) @ params["b"] - y).sum()


@pytest.mark.parametrize("loss", [contrastive, one_sided, cross_entropy, exponential, normed])
def test_losses_and_layers_with_exponentials_are_no_attention(loss: Callable[..., Array]):
    args = {name: jnp.ones((D, D)) for name in "ab"}, jnp.ones((8, D)), jnp.ones((8, D))
    assert sides(graph_of(loss, *args)) == []


def rectified(q: Array, k: Array, v: Array) -> Array:
    return mixed(jax.nn.relu(scores(q, k)), v)


def of_slots(q: Array, k: Array, v: Array) -> Array:
    """Normalised over queries, then over keys (Locatello et al., arXiv 2006.15055)."""
    p = jax.nn.softmax(scores(q, k), axis=2)
    return mixed(p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("core", [rectified, of_slots])
def test_other_weights_than_a_softmax_over_keys_are_no_attention(core: Core):
    assert sides(of(core)) == []


def test_weights_that_someone_reads_are_no_attention_to_fuse():
    def step(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(scores(q, k))
        return mixed(p, v), p

    q = jnp.ones((B, T, N, H))
    assert sides(capture(step, q, q, q).graph) == []


def test_a_router_is_no_attention():
    def loss(params: Params, x: Array) -> Array:
        gates_BTE = jax.nn.softmax(x @ params["r"])
        top, which = jax.lax.top_k(gates_BTE, 2)
        places = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None], which
        return jnp.einsum(
            "btd,edf,bte->btf", x, params["e"], jnp.zeros_like(gates_BTE).at[places].set(top)
        ).sum()

    assert sides(graph_of(loss, {"r": jnp.ones((D, 6)), "e": jnp.ones((6, D, D))}, X_BTD)) == []
