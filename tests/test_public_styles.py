"""Training steps by the conventions that libraries have for them: each gives what its own library's jit gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.training import train_state

from .styles import KEY, mlp, normal, trains_alike, weights


def test_a_learner_s_method_jitted_with_itself_static():
    """haiku's actors and learners: `self` is static, and arrays are time-major."""

    class Learner:
        def __init__(self, update: Callable[..., Any]):
            self._update = update

        def loss(self, params, steps):
            values = mlp(params, steps["seen"])[..., 0]
            back = lambda later, now: (now + 0.9 * later,) * 2  # noqa: E731
            _, returns = jax.lax.scan(back, values[-1], steps["reward"], reverse=True)
            return jnp.mean(jnp.square(jax.lax.stop_gradient(returns) - values[:-1]))

        @functools.partial(jax.jit, static_argnums=0)
        def update(self, params, opt_state, steps):
            grads = jax.grad(self.loss)(params, steps)
            changes, opt_state = self._update(grads, opt_state)
            return optax.apply_updates(params, changes), opt_state

    opt = optax.sgd(0.1, momentum=0.9)
    learner = Learner(opt.update)
    steps = {"seen": normal(3, 9, 64, 16), "reward": normal(4, 8, 64)}

    def start():
        return weights(16, 32, 1), opt.init(weights(16, 32, 1))

    def call(step, state, i):
        state = step(*state, steps)
        return state, state

    trains_alike(learner.update, start, call)


class Tagger(nn.Module):
    width: int
    training: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(self.width))(x)
        x = nn.Dropout(0.1, deterministic=not self.training)(x)
        return nn.Dense(5)(nn.LayerNorm()(x).mean(axis=1))


def test_a_module_and_a_flag_as_static_arguments():
    """State-space models and diffusion code pass their linen module to the step."""

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def step(state, rng, x, y, model, decay):
        def loss(params):
            logits = model.apply({"params": params}, x, rngs={"dropout": rng})
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        if decay:
            grads = jax.tree.map(lambda g, p: g + 1e-3 * p, grads, state.params)
        return state.apply_gradients(grads=grads), value

    model = Tagger(16)
    x, y = normal(1, 32, 6, 4), jnp.arange(32) % 5

    def start():
        params = model.init({"params": KEY, "dropout": KEY}, x)["params"]
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))

    def call(step, state, i):
        state, value = step(state, jax.random.fold_in(KEY, i), x, y, model, True)
        return state, (state, value)

    trains_alike(step, start, call)


def test_functions_by_keyword_and_a_loss_that_is_an_object():
    """Libraries of flows: one step for every loss and optimizer."""

    class Likelihood:
        @eqx.filter_jit
        def __call__(self, params, static, x):
            flow = eqx.combine(params, static)
            shift, scale = jax.vmap(flow)(x).T
            return jnp.mean(jnp.square(shift) + jnp.square(scale - 1))

    @eqx.filter_jit
    def step(params, *args, optimizer, opt_state, loss_fn, **kwargs):
        value, grads = eqx.filter_value_and_grad(loss_fn)(params, *args, **kwargs)
        changes, opt_state = optimizer.update(grads, opt_state, params=params)
        return eqx.apply_updates(params, changes), opt_state, value

    opt, loss, x = optax.sgd(0.1), Likelihood(), normal(5, 64, 8)
    whole, static = eqx.partition(
        eqx.nn.MLP(8, 2, 32, 2, key=jax.random.key(1)), eqx.is_inexact_array
    )

    def call(step, state, i):
        params, opt_state, value = step(
            state[0], static, x, optimizer=opt, opt_state=state[1], loss_fn=loss
        )
        return (params, opt_state), (params, opt_state, value)

    trains_alike(step, lambda: (whole, opt.init(whole)), call)


class Judge(eqx.Module):
    layer: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, size: int):
        a, b = jax.random.split(jax.random.key(2))
        self.layer = eqx.nn.Linear(size, 16, key=a)
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch")
        self.last = eqx.nn.Linear(16, 1, key=b)

    def __call__(self, x, state):
        x, state = self.norm(self.layer(x), state)
        return self.last(jax.nn.relu(x)), state


def test_adversaries_with_batch_norm_over_a_named_axis_of_vmap():
    """A discriminator's step: noise is drawn in it, the optimizer is an argument, state is threaded."""

    @eqx.filter_value_and_grad(has_aux=True)
    def grads_of(judge, state, real, maker, key):
        fake = jax.random.normal(key, (real.shape[0], 4)) @ maker
        many = jax.vmap(judge, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        no, state = many(fake, state)
        yes, state = many(real, state)
        return (jax.nn.softplus(no) + jax.nn.softplus(-yes)).mean(), state

    @eqx.filter_jit
    def step(judge, state, optimizer, opt_state, real, maker, key):
        key, now = jax.random.split(key)
        (value, state), grads = grads_of(judge, state, real, maker, now)
        changes, opt_state = optimizer.update(grads, opt_state)
        return value, eqx.apply_updates(judge, changes), state, opt_state, key

    opt, real, maker = optax.sgd(0.1), normal(6, 64, 8), normal(7, 4, 8)

    def start():
        judge, state = eqx.nn.make_with_state(Judge)(8)
        return (
            judge,
            state,
            opt.init(eqx.filter(judge, eqx.is_inexact_array)),
            jax.random.PRNGKey(3),
        )

    def call(step, held, i):
        judge, state, opt_state, key = held
        value, *held = step(judge, state, opt, opt_state, real, maker, key)
        return tuple(held), (value, held[0], jax.tree.leaves(held[1]), held[3])

    trains_alike(step, start, call)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(12, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def test_an_nnx_module_that_holds_a_list_of_its_sizes():
    """What stands beside its arrays cannot be hashed; jax only compares it."""

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    batch = (normal(1, 64, 12), jnp.arange(64) % 3)

    def start():
        model = Net(nnx.Rngs(0))
        model.sizes = nnx.static([12, 32, 3])
        return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def call(step, state, i):
        value = step(*state, batch)
        return state, (value, nnx.state(state[0]))

    trains_alike(step, start, call)


def test_an_nnx_module_handed_to_jax_jit_beside_its_parameters():
    """Lookahead: fast and slow parameters, the module only lends its shape and is updated inside."""
    opt = optax.lookahead(optax.sgd(0.1), 2, 0.5)

    @jax.jit
    def predict(params, model, x):
        nnx.update(model, params)
        return model(x)

    @jax.jit
    def step(params, model, opt_state, batch):
        def loss(fast):
            logits = predict(fast, model, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        value, grads = jax.value_and_grad(loss)(params.fast)
        changes, opt_state = opt.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, value

    model, batch = Net(nnx.Rngs(0)), (normal(1, 64, 12), jnp.arange(64) % 3)

    def start():
        params = optax.LookaheadParams.init_synced(nnx.state(model, nnx.Param))
        return params, opt.init(params)

    def call(step, state, i):
        params, opt_state, value = step(state[0], model, state[1], batch)
        return (params, opt_state), (params, opt_state, value)

    trains_alike(step, start, call)


def test_two_towers_and_all_their_pairs():
    """Contrastive training: a loss over the batch's own square, the state a donated dict, norms of everything told."""

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state, key, batch):
        keep = jax.random.bernoulli(
            jax.random.fold_in(key, state["count"]), 0.9, batch["image"].shape
        )

        def loss(params):
            image, text = (
                mlp(params["image"], batch["image"] * keep),
                params["text"][batch["words"]].mean(1),
            )
            image, text = (
                x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-8) for x in (image, text)
            )
            logits = image @ text.T * jnp.exp(params["scale"])
            signs = 2 * jnp.eye(logits.shape[0]) - jnp.ones_like(logits)
            return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=-1))

        value, grads = jax.value_and_grad(loss)(state["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
        return {"params": params, "count": state["count"] + 1}, {
            "loss": value,
            "norm": optax.global_norm(grads),
        }

    batch = {"image": normal(1, 32, 20), "words": jnp.arange(32 * 5).reshape(32, 5) % 40}

    def start():
        params = {"image": weights(20, 24, 16), "text": normal(5, 40, 16), "scale": jnp.array(1.0)}
        return {"params": params, "count": jnp.array(0)}

    def call(step, state, i):
        state, told = step(state, KEY, batch)
        return state, (jax.tree.map(jnp.copy, state), told)

    trains_alike(step, start, call)


class Critic(train_state.TrainState):
    target_params: Any


def test_twin_critics_with_targets_and_noise():
    """Off-policy learners: states with targets, `apply` jitted inside, several states in and out, two loss values."""
    net = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
    value_of = jax.jit(net.apply)

    @jax.jit
    def step(one, two, seen, action, later, reward, key):
        key, now = jax.random.split(key)
        noise = jnp.clip(0.2 * jax.random.normal(now, action.shape), -0.5, 0.5)
        ahead = jnp.concatenate([later, jnp.clip(action + noise, -1, 1)], 1)
        worst = jnp.minimum(*(value_of(c.target_params, ahead)[:, 0] for c in (one, two)))
        goal = reward + 0.9 * worst

        def loss(params):
            found = value_of(params, jnp.concatenate([seen, action], 1))[:, 0]
            return jnp.mean(jnp.square(found - goal)), found.mean()

        told = []
        for critic in (one, two):
            (value, mean), grads = jax.value_and_grad(loss, has_aux=True)(critic.params)
            critic = critic.apply_gradients(grads=grads)
            targets = optax.incremental_update(critic.params, critic.target_params, 0.1)
            told += [critic.replace(target_params=targets), value, mean]
        return told, key

    batch = normal(1, 64, 6), jnp.tanh(normal(2, 64, 2)), normal(3, 64, 6), normal(4, 64)

    def start():
        params = [net.init(jax.random.key(i), jnp.ones((1, 8))) for i in (1, 2)]
        made = [
            Critic.create(apply_fn=net.apply, params=p, target_params=p, tx=optax.sgd(0.1))
            for p in params
        ]
        return *made, jax.random.PRNGKey(5)

    def call(step, state, i):
        one, two, key = state
        (one, *a, two, c, d), key = step(one, two, *batch, key)
        return (one, two, key), (one, two, a, c, d, key)

    trains_alike(step, start, call)
