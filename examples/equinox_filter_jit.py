"""equinox: a module that holds functions, gradients and jit by its filters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

jit = eqx.filter_jit
OPTIMIZER = optax.sgd(0.3, momentum=0.9)


def train_step(model, state, x, y):
    @eqx.filter_value_and_grad
    def loss_of(model):
        logits = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = loss_of(model)
    updates, state = OPTIMIZER.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, loss


def train(step, steps=4):
    """Losses, and the state at the end."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    y = jnp.argmax(x[:, :4], axis=1)
    model = eqx.nn.MLP(16, 4, 32, 2, activation=jax.nn.gelu, key=jax.random.key(0))
    state = OPTIMIZER.init(eqx.filter(model, eqx.is_array))
    losses = []
    for _ in range(steps):
        model, state, loss = step(model, state, x, y)
        losses.append(float(loss))
    return losses, (eqx.filter(model, eqx.is_array), state)


if __name__ == "__main__":
    import meshwright as mw

    mw.emulate(8)
    print(train(mw.parallelize(eqx.filter_jit(train_step), cluster="8xcpu", verify=True))[0])
