"""A step for the command line, which calls `mlp` for the step and its arguments.

meshwright plan --model examples/command_line.py:mlp --cluster 8xcpu -o plan.json
meshwright run plan.json --steps 3 --verify

docs/commands.md shows the other commands on the same plan.
"""

import jax
import jax.numpy as jnp


def train_step(params, batch):
    def loss_of(params):
        hidden = jnp.tanh(batch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}


def mlp():
    """The step, its state and its batch: arrays, or shapes alone where nothing is to run."""
    up, down, x = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(up, (64, 256)) / 8,
        "down": jax.random.normal(down, (256, 64)) / 16,
    }
    batch = {"x": jax.random.normal(x, (32, 64)), "y": jnp.zeros((32, 64))}
    return train_step, params, batch


if __name__ == "__main__":
    print(__doc__)
