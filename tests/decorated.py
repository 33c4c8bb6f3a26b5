"""A decorated step on eight devices, verified, and what it gives compared."""

import jax
import jax.numpy as jnp
import numpy as np

import meshwright as mw

QUICK = {"cluster": "8xcpu", "mesh": (8,), "microbatches": 1, "recompute": "none"}
BATCH = {
    "x": np.linspace(-1, 1, 32 * 16, dtype=np.float32).reshape(32, 16),
    "y": np.ones((32, 8), np.float32),
}


def parallel(step, **options):
    return mw.parallelize(step, **{**QUICK, "verify": True, **options})


def same(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)
