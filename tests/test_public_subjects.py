"""Training steps of the subjects that people publish code for: each gives what plain jax gives."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .styles import KEY, mlp, normal, trains_alike, weights


def test_batches_drawn_in_the_step_from_a_closed_over_text():
    """Small language models: windows of a text by a vmapped dynamic_slice, only a key goes in."""
    text = jax.random.randint(KEY, (5_000,), 0, 50)
    window = jax.vmap(jax.lax.dynamic_slice, in_axes=(None, 0, None))

    @jax.jit
    def step(key, table, head):
        key, now = jax.random.split(key)
        at = jax.random.randint(now, (32, 1), 0, text.size - 9)
        x, y = window(text, at, (8,)), window(text, at + 1, (8,))

        def loss(table, head):
            logits = jnp.cumsum(table[x], axis=1) @ head
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, (a, b) = jax.value_and_grad(loss, argnums=(0, 1))(table, head)
        return key, table - 0.1 * a, head - 0.1 * b, value

    def call(step, state, i):
        *state, value = step(*state)
        return tuple(state), (state[1:], value)

    trains_alike(step, lambda: (KEY, normal(1, 50, 16), normal(2, 16, 50)), call)


class Rollout(NamedTuple):
    seen: jax.Array
    action: jax.Array
    gain: jax.Array


def test_epochs_and_minibatches_of_a_shuffled_rollout():
    """PPO: a permutation, a scan over minibatches in a scan over epochs, every gradient returned."""
    opt = optax.chain(
        optax.clip_by_global_norm(0.5), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    )

    def loss(params, part):
        chosen = jax.nn.log_softmax(mlp(params, part.seen))[
            jnp.arange(part.action.shape[0]), part.action
        ]
        gain = (part.gain - part.gain.mean()) / (part.gain.std() + 1e-8)
        return -jnp.mean(chosen * gain)

    @jax.jit
    def step(state, rollout, key):
        def epoch(carry, _):
            state, key = carry
            key, now = jax.random.split(key)
            flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), rollout)
            mixed = jax.tree.map(
                lambda x: jax.random.permutation(now, x).reshape((4, -1, *x.shape[1:])), flat
            )

            def minibatch(state, part):
                value, grads = jax.value_and_grad(loss)(state[0], part)
                changes, opt_state = opt.update(grads, state[1], state[0])
                return (optax.apply_updates(state[0], changes), opt_state), (value, grads)

            state, told = jax.lax.scan(minibatch, state, mixed)
            return (state, key), told

        (state, key), told = jax.lax.scan(epoch, (state, key), (), length=2)
        return state, told, key

    rollout = Rollout(normal(1, 8, 16, 12), jnp.arange(128).reshape(8, 16) % 3, normal(2, 8, 16))

    def start():
        return (weights(12, 32, 3), opt.init(weights(12, 32, 3))), jax.random.PRNGKey(1)

    def call(step, held, i):
        state, told, key = step(held[0], rollout, held[1])
        return (state, key), (state, told, key)

    trains_alike(step, start, call)


def test_a_graph_network_with_padding():
    """Messages are gathered at senders, summed at receivers, and pooled per graph; unlabelled graphs are masked."""

    @jax.jit
    def step(params, graph):
        def loss(params):
            encode, message, head = params
            nodes = jax.nn.relu(graph["nodes"] @ encode)
            sent = jax.nn.relu(
                jnp.concatenate([nodes[graph["from"]], nodes[graph["to"]]], 1) @ message
            )
            nodes = nodes + jax.ops.segment_sum(sent, graph["to"], num_segments=nodes.shape[0])
            pooled = jax.ops.segment_sum(nodes, graph["of"], num_segments=graph["label"].shape[0])
            known = ~jnp.isnan(graph["label"])
            target = jnp.where(known, graph["label"], 0)
            each = optax.sigmoid_binary_cross_entropy((pooled @ head)[:, 0], target)
            return jnp.sum(jnp.where(known, each, 0)) / jnp.sum(known)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    random = np.random.default_rng(0)
    graph = {
        "nodes": normal(1, 64, 6), "from": random.integers(0, 64, 128), "to": random.integers(0, 64, 128),
        "of": np.sort(random.integers(0, 16, 64)), "label": np.where(np.arange(16) % 5, np.arange(16.0) % 2, np.nan),
    }  # fmt: skip
    graph = jax.tree.map(jnp.asarray, graph)

    def call(step, params, i):
        params, value = step(params, graph)
        return params, (params, value)

    trains_alike(step, lambda: [*weights(6, 16), normal(8, 32, 16) / 6, normal(9, 16, 1) / 4], call)


def test_an_epoch_in_a_loop_over_a_whole_data_set():
    """stax examples: batches by dynamic_slice in fori_loop, binarized by noise, the count as a Python number."""

    @jax.jit
    def epoch(key, count, params, images):
        def body(i, params):
            now = jax.random.fold_in(key, i + count)
            batch = jax.lax.dynamic_slice_in_dim(images, i % 3 * 16, 16)
            batch = jax.random.bernoulli(now, batch).astype(jnp.float32)
            grads = jax.grad(lambda p: jnp.mean(jnp.square(mlp(p, batch) - batch)))(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        return jax.lax.fori_loop(0, 3, body, params)

    images = jax.nn.sigmoid(normal(3, 48, 24))

    def call(step, params, i):
        params = step(KEY, i, params, images)
        return params, params

    trains_alike(epoch, lambda: weights(24, 16, 24), call)


def test_a_long_convolution_of_complex_states():
    """State spaces: complex parameters, a kernel by powers, a convolution by fft; one rate for some leaves."""
    rates = optax.multi_transform(
        {"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)},
        {"pole": "slow", "mix": "slow", "out": "fast"},
    )

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            pole = -jnp.exp(params["pole"].real) + 1j * params["pole"].imag
            kernel = (
                jnp.exp(pole[:, None] * jnp.arange(32) / 8) * params["mix"][:, None]
            ).real.sum(0)
            spectrum = jnp.fft.rfft(x, n=64, axis=1) * jnp.fft.rfft(kernel, n=64)[None, :, None]
            mixed = jnp.fft.irfft(spectrum, n=64, axis=1)[:, :32]
            return jnp.mean(jnp.square(jax.nn.gelu(mixed).mean(1) @ params["out"] - y))

        value, grads = jax.value_and_grad(loss)(params)
        changes, opt_state = rates.update(jax.tree.map(jnp.conj, grads), opt_state, params)
        return optax.apply_updates(params, changes), opt_state, value

    x, y = normal(1, 16, 32, 8), normal(2, 16, 2)

    def start():
        params = {
            "pole": jax.lax.complex(normal(3, 4) / 4, normal(4, 4)),
            "mix": jax.lax.complex(normal(5, 4), normal(6, 4)),
            "out": normal(7, 8, 2),
        }
        return params, rates.init(params)

    def call(step, state, i):
        *state, value = step(*state, x, y)
        return tuple(state), (state, value)

    trains_alike(step, start, call)


def test_learning_a_learning_rate_where_nothing_is_a_batch():
    """Meta learning over scalars: hyper-parameters in the optimizer's state are set in the step."""
    inner, outer = optax.inject_hyperparams(optax.rmsprop)(learning_rate=0.1), optax.sgd(0.1)

    def loss(theta, x, y):
        return optax.l2_loss(y, theta * x)

    @jax.jit
    def step(eta, theta, outer_state, state, samples):
        def later(eta, theta, state):
            state.hyperparams["learning_rate"] = jax.nn.sigmoid(eta)
            for x, y in samples[:-1]:
                changes, state = inner.update(jax.grad(loss)(theta, x, y), state)
                theta = optax.apply_updates(theta, changes)
            return loss(theta, *samples[-1]), (theta, state)

        grad, (theta, state) = jax.grad(later, has_aux=True)(eta, theta, state)
        changes, outer_state = outer.update(grad, outer_state)
        return optax.apply_updates(eta, changes), theta, outer_state, state

    samples = [(jnp.float32(x), jnp.float32(10 * x)) for x in (0.3, 0.6, 0.9)]

    def start():
        eta, theta = jnp.array(-1.0), jnp.array(0.5)
        return eta, theta, outer.init(eta), inner.init(theta)

    def call(step, state, i):
        state = step(*state, samples)
        return state, state

    trains_alike(step, start, call)


def test_gradients_per_example_clipped_and_noised():
    """Private SGD: vmap of grad, a norm per example, noise from a key folded with the step's number."""

    @jax.jit
    def step(key, i, params, batch):
        key = jax.random.fold_in(key, i)

        def clipped(x, y):
            grads = jax.grad(lambda p: jnp.mean(jnp.square(mlp(p, x) - y)))(params)
            norm = optax.global_norm(grads)
            return jax.tree.map(lambda g: g / jnp.maximum(1.0, norm / 0.5), grads)

        each = jax.vmap(clipped)(*batch)
        keys = iter(jax.random.split(key, len(params)))
        total = [g.sum(0) + jax.random.normal(next(keys), g.shape[1:]) for g in each]
        return [p - 0.1 / 32 * g for p, g in zip(params, total, strict=True)]

    batch = (normal(3, 32, 12), normal(4, 32, 3))

    def call(step, params, i):
        params = step(KEY, i, params, batch)
        return params, params

    trains_alike(step, lambda: weights(12, 16, 3), call)


def test_a_line_search_in_the_optimizer():
    """Full-batch fits: the optimizer calls the loss again in a while loop."""
    opt = optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    )

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            return jnp.mean(jnp.square(mlp(params, x) - y))

        value, grads = jax.value_and_grad(loss)(params)
        changes, opt_state = opt.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, changes), opt_state, value

    x, y = normal(1, 64, 8), normal(2, 64, 2)

    def call(step, state, i):
        *state, value = step(*state, x, y)
        return tuple(state), (state, value)

    trains_alike(step, lambda: (weights(8, 16, 2), opt.init(weights(8, 16, 2))), call)
