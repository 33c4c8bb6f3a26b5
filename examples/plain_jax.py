"""A plain jax step: parameters in dictionaries, gradient descent with momentum."""

import jax
import jax.numpy as jnp
import numpy as np

jit = jax.jit


def train_step(state, batch):
    def loss_of(params):
        hidden = jnp.tanh(batch["x"] @ params["up"] + params["shift"])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    speed = jax.tree.map(lambda v, g: 0.9 * v + g, state["speed"], grads)
    params = jax.tree.map(lambda p, v: p - 0.1 * v, state["params"], speed)
    return {"params": params, "speed": speed, "step": state["step"] + 1}, loss


def train(step, steps=4):
    """Losses, and the state at the end."""
    rng = np.random.default_rng(0)
    params = {
        "up": jnp.asarray(rng.normal(0, 0.1, (32, 64)), jnp.float32),
        "shift": jnp.zeros(64),
        "down": jnp.asarray(rng.normal(0, 0.1, (64, 8)), jnp.float32),
    }
    state = {"params": params, "speed": jax.tree.map(jnp.zeros_like, params), "step": 0}
    x = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    batch = {"x": x, "y": jnp.sin(x[:, :8])}
    losses = []
    for _ in range(steps):
        state, loss = step(state, batch)
        losses.append(float(loss))
    return losses, state


if __name__ == "__main__":
    import meshwright as mw

    mw.emulate(8)
    print(train(mw.parallelize(train_step, cluster="8xcpu", verify=True))[0])
