"""flax.nnx: the step updates model, optimizer and metrics in place and returns nothing."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

jit = nnx.jit


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def train_step(model, optimizer, metrics, batch):
    def loss_of(model):
        logits = model(batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, logits

    (loss, logits), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)


def train(step, steps=4):
    """Losses, and the state at the end."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    batch = {"image": images, "label": jnp.argmax(images[:, :4], axis=1)}
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.3, momentum=0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    losses = []
    for _ in range(steps):
        step(model, optimizer, metrics, batch)
        losses.append(float(metrics.compute()["loss"]))
        metrics.reset()
    return losses, nnx.to_pure_dict(nnx.state((model, optimizer)))


if __name__ == "__main__":
    import meshwright as mw

    mw.emulate(8)
    print(train(mw.parallelize(nnx.jit(train_step), cluster="8xcpu", verify=True))[0])
