"""A pipeline: four equal layers on two stages of two devices, four microbatches.

The step needs no markers; the planner cuts it between layers.

python examples/pipeline.py
"""

import jax
import jax.numpy as jnp

LAYERS, WIDTH, BATCH = 4, 64, 32


def train_step(params, batch):
    def loss_of(params):
        hidden = batch["x"]
        for layer in params:
            hidden = hidden + jnp.tanh(hidden @ layer["up"]) @ layer["down"]
        return jnp.mean((hidden - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}


def layers():
    """The step, its state and its batch; the command line plans them too, see docs/pipelines.md."""
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS + 1)
    params = [
        {
            "up": jax.random.normal(up, (WIDTH, 4 * WIDTH)) / 8,
            "down": jax.random.normal(down, (4 * WIDTH, WIDTH)) / 16,
        }
        for up, down in zip(keys[:LAYERS], keys[LAYERS : 2 * LAYERS], strict=True)
    ]
    batch = {"x": jax.random.normal(keys[-1], (BATCH, WIDTH)), "y": jnp.zeros((BATCH, WIDTH))}
    return train_step, params, batch


def main(steps=3):
    """Losses."""
    import meshwright as mw

    mw.emulate(4)
    step, params, batch = layers()
    step = mw.parallelize(step, cluster="4xcpu", pp=2, microbatches=4, verify=True)
    print(step.explain(params, batch))
    losses = []
    for _ in range(steps):
        params, metrics = step(params, batch)
        losses.append(float(metrics["loss"]))
    return losses


if __name__ == "__main__":
    print(main())
