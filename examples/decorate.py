"""Decorate a step: it is planned and compiled when it is first called.

python examples/decorate.py
"""

import jax
import jax.numpy as jnp

import meshwright as mw

mw.emulate(8)  # 8 CPU devices; leave it out where there are real ones


@mw.parallelize(cluster="8xcpu", verify=True)
def train_step(params, batch):
    def loss_of(params):
        hidden = jnp.tanh(batch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def main(steps=3):
    """Losses."""
    params = {"up": jnp.ones((64, 256)) / 64, "down": jnp.ones((256, 64)) / 256}
    batch = {"x": jnp.ones((32, 64)), "y": jnp.zeros((32, 64))}
    print(train_step.explain(params, batch))
    losses = []
    for _ in range(steps):
        params, loss = train_step(params, batch)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    print(main())
