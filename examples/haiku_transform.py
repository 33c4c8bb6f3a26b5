"""haiku: a transformed function, its parameters and state, and optax."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

jit = jax.jit
OPTIMIZER = optax.sgd(0.3, momentum=0.9)


class Training(NamedTuple):
    params: hk.Params
    state: hk.State
    moments: optax.OptState
    key: jax.Array


@hk.transform_with_state
def net(x, is_training):
    x = hk.Linear(32)(x)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training))
    x = hk.dropout(hk.next_rng_key(), 0.1, x) if is_training else x
    return hk.Linear(4)(x)


def train_step(training, x, y):
    key, own = jax.random.split(training.key)

    def loss_of(params):
        logits, state = net.apply(params, training.state, own, x, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    (loss, state), grads = jax.value_and_grad(loss_of, has_aux=True)(training.params)
    updates, moments = OPTIMIZER.update(grads, training.moments)
    return Training(optax.apply_updates(training.params, updates), state, moments, key), loss


def train(step, steps=4):
    """Losses, and the state at the end."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    y = jnp.argmax(x[:, :4], axis=1)
    params, state = net.init(jax.random.PRNGKey(0), x, True)
    training = Training(params, state, OPTIMIZER.init(params), jax.random.PRNGKey(1))
    losses = []
    for _ in range(steps):
        training, loss = step(training, x, y)
        losses.append(float(loss))
    return losses, training


if __name__ == "__main__":
    import meshwright as mw

    mw.emulate(8)
    print(train(mw.parallelize(train_step, cluster="8xcpu", verify=True))[0])
