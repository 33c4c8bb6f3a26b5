"""Verification tells a wrong program from another order of sums, also where Adam makes whole updates of rounding.

The sharded step is played by one in plain jax: the same model, its gradients added up over four microbatches in bf16,
with one mistake of those that sharding can make.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.rounding import measure
from meshwright.backends.xla.verify import reference, verify_outputs
from meshwright.ir.errors import VerificationError

MICROBATCHES, WIDTH, LAYERS, EXPERTS = 8, 32, 2, 4
ADAM = optax.adamw(1e-2, b1=0.9, b2=0.95)


def loss_of(params, tokens, targets):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    hidden = params["table"][tokens]
    for layer in params["layers"]:
        centred = hidden - hidden.mean(-1, keepdims=True)
        normed = (
            centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + layer["shift"]
        )
        scores = jnp.einsum("btd,bsd->bts", normed @ layer["key"] + layer["key_shift"], normed)
        hidden = hidden + jax.nn.softmax(scores / 7, axis=-1) @ jnp.tanh(normed @ layer["up"])
        if "router" in layer:
            hidden = hidden + by_experts(layer, hidden)
    logits = (hidden @ params["table"].T).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1))


def by_experts(layer, hidden):
    """Each position by the expert that it chooses."""
    best, chosen = jax.lax.top_k(hidden @ layer["router"], 1)
    all_of_them = jnp.tanh(jnp.einsum("btd,edf->btef", hidden, layer["experts"]))
    taken = jnp.einsum(
        "bte,btef->btf", jax.nn.one_hot(chosen[..., 0], EXPERTS, dtype=best.dtype), all_of_them
    )
    return taken * jax.nn.sigmoid(best)


def update(state, grads, loss):
    params, moments = state
    updates, moments = ADAM.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), {"loss": loss}


def step(state, batch):
    loss, grads = jax.value_and_grad(loss_of)(state[0], *batch)
    return update(state, grads, loss)


@jax.jit
def of_parts(params, batch):
    """Losses and gradients of the batch in parts."""
    parts = [tuple(each[k::MICROBATCHES] for each in batch) for k in range(MICROBATCHES)]
    return [jax.value_and_grad(loss_of)(params, *part) for part in parts]


@functools.partial(jax.jit, static_argnums=0)
def updated(mistake, state, found):
    """The rest of the step; `mistake` spoils the gradients of the parts, or what they add up to."""
    loss = sum(loss for loss, _ in found) / MICROBATCHES
    found = [
        jax.tree.map(lambda g: (g / MICROBATCHES).astype(jnp.bfloat16), grads) for _, grads in found
    ]
    if mistake == "a microbatch left out":
        found.pop()
    grads = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), found)
    layers = grads["layers"]
    if mistake == "a gradient averaged twice":
        layers[1]["up"] /= MICROBATCHES
    if mistake == "layers confused":
        layers[0], layers[1] = layers[1], layers[0]
    if (
        mistake == "a sum not taken"
    ):  # over an axis of two: each device has its own half of the examples
        layers[1]["up"] = found[0]["layers"][1]["up"] + found[1]["layers"][1]["up"]
    if mistake == "one row":
        grads["table"] = grads["table"].at[3].set(0)
    return update(state, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state[0]), loss)


@functools.cache
def truth(experts=False):
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32)

    layer = lambda: {  # noqa: E731
        "up": drawn(WIDTH, WIDTH), "key": drawn(WIDTH, WIDTH), "shift": jnp.zeros(WIDTH), "key_shift": jnp.zeros(WIDTH),
    }  # fmt: skip
    routed = lambda: {  # noqa: E731
        "router": drawn(WIDTH, EXPERTS), "experts": drawn(EXPERTS, WIDTH, WIDTH),
    }  # fmt: skip
    params = {"table": drawn(64, WIDTH), "layers": [layer() for _ in range(LAYERS)]}
    if experts:
        params["layers"] = [each | routed() for each in params["layers"]]
    args = (
        (params, ADAM.init(params)),
        tuple(jnp.asarray(rng.integers(0, 64, (16, 24))) for _ in range(2)),
    )
    captured, (leaves, tree) = capture(step, *args), jax.tree.flatten(args)
    flat = jax.jit(lambda *leaves: step(*jax.tree.unflatten(tree, leaves)))
    return reference(flat, captured, leaves), captured.graph.output_names, args


@functools.cache
def in_microbatches(mistake: str, experts: bool = False):
    """The same step, its batch in parts, with a mistake."""
    _, _, (state, batch) = truth(experts)
    return updated(mistake, state, of_parts(state[0], batch))


def check(mistake: str, experts: bool = False) -> None:
    expected, names, _ = truth(experts)
    verify_outputs(expected, in_microbatches(mistake, experts), names)


def test_rounding_that_adam_magnifies_is_no_alarm():
    check("none")
    expected, _, _ = truth()
    found = jax.tree.leaves(in_microbatches("none"))
    far = [
        np.max(np.abs(np.asarray(f) - w))
        for f, w in zip(found, jax.tree.leaves(expected.results), strict=True)
    ]
    assert max(far) > 1.5e-2, "no update has another sign: the case is too easy"


@pytest.mark.parametrize(
    "mistake",
    [
        "a microbatch left out",
        "a gradient averaged twice",
        "layers confused",
        "a sum not taken",
        "one row",
    ],
)
def test_a_mistake_is_found_behind_adam_in_bf16(mistake):
    with pytest.raises(VerificationError, match=r"`result\[0\]"):
        check(mistake)


def test_a_choice_that_rounding_turns_counts_as_far_as_it_moves_its_results():
    """Ties: in a mean over runs, each result would have moved by some of its way only."""

    def step(x, weights):
        scores = x @ weights
        return jnp.where(jnp.argmax(scores, axis=-1) == 0, 1.0, 2.0)

    args = jnp.ones((256, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)
    noise = measure(capture(step, *args), jax.tree.leaves(args))
    assert (noise[0].near == 1.0).all()


def test_choices_that_rounding_turns_are_no_alarm():
    check("none", experts=True)


@pytest.mark.parametrize(
    "mistake", ["a microbatch left out", "layers confused", "a sum not taken", "one row"]
)
def test_a_mistake_is_found_where_experts_are_chosen(mistake):
    with pytest.raises(VerificationError, match=r"`result\[0\]"):
        check(mistake, experts=True)
