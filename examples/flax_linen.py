"""flax.linen: a TrainState, batch norm whose statistics it keeps, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

jit = jax.jit


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(32)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(4)(x)


class TrainState(train_state.TrainState):
    batch_stats: dict


def train_step(state, batch, key):
    def loss_of(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, updates

    (loss, updates), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), loss


def train(step, steps=4):
    """Losses, and the state at the end."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    batch = {"image": images, "label": jnp.argmax(images[:, :4], axis=1)}
    model = Net()
    variables = model.init(jax.random.key(0), images, train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(0.3, momentum=0.9),
    )
    losses = []
    for _ in range(steps):
        state, loss = step(state, batch, jax.random.key(1))
        losses.append(float(loss))
    return losses, state


if __name__ == "__main__":
    import meshwright as mw

    mw.emulate(8)
    print(train(mw.parallelize(train_step, cluster="8xcpu", verify=True))[0])
