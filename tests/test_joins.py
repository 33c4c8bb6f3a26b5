"""Partial results joined over devices, microbatches and stages are what one device finds, NaN included."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

import meshwright as mw
from meshwright.backends.xla.hlo import collectives
from meshwright.backends.xla.joins import JOIN, settle, start
from meshwright.ir.mesh import Mesh

ODD = [1.5, -2.5, np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3e4, -3e4]
WHOLE = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min, "and": jnp.all, "or": jnp.any}


def columns(dtype: Any) -> jax.Array:
    """[8, n]: in each column one device holds an odd number and the others another, or a plain one."""
    found = [np.where(np.arange(8) == k % 8, a, b) for k, a in enumerate(ODD) for b in (*ODD, 0.5)]
    return jnp.asarray(np.stack(found, axis=1), dtype)


def over_devices(reduction: str, x: jax.Array) -> tuple[jax.Array, str]:
    mesh = DeviceMesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))

    def body(part: jax.Array) -> jax.Array:
        return settle(part[0], reduction, ("x", "y"))

    joined = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P(("x", "y")), out_specs=P(), check_vma=False)
    )
    return joined(x), joined.lower(x).compile().as_text() or ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2", "int8"])
@pytest.mark.parametrize("reduction", ["max", "min"])
def test_extremes_over_devices_are_those_of_one_device(reduction: str, dtype: str):
    x = columns(dtype) if dtype != "int8" else jnp.arange(-64, 64, dtype=dtype).reshape(8, 16)
    np.testing.assert_array_equal(
        np.asarray(over_devices(reduction, x)[0], np.float32),
        np.asarray(WHOLE[reduction](x, axis=0), np.float32),
    )


@pytest.mark.parametrize("reduction", ["and", "or"])
def test_all_and_any_over_devices(reduction: str):
    x = jnp.asarray([[i == j for j in range(8)] + [True, False] for i in range(8)])
    np.testing.assert_array_equal(over_devices(reduction, x)[0], WHOLE[reduction](x, axis=0))


@pytest.mark.parametrize(("reduction", "dtype"), [("max", "float32"), ("or", "bool")])
def test_a_join_moves_no_more_than_its_operand(reduction: str, dtype: str):
    x = jnp.zeros((8, 64), dtype)
    found = collectives(over_devices(reduction, x)[1], Mesh.of(x=2, y=4))
    assert [(f.kind, f.nbytes) for f in found] == [("all_reduce", 64 * x.dtype.itemsize)]


@pytest.mark.parametrize("reduction", WHOLE)
def test_parts_joined_one_after_another_are_the_whole(reduction: str):
    x = columns("float32") if reduction in ("sum", "max", "min") else columns("float32") > 0
    total = start(reduction, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    for part in x:
        total = JOIN[reduction](total, part)
    np.testing.assert_allclose(total, WHOLE[reduction](x, axis=0), rtol=1e-6)


def step(w: Any, x: Any) -> tuple[Any, Any]:
    """Extremes over the batch, over features and along both; all and any of the batch.

    XLA's CPU backend drops NaN in reductions of 64 rows or more, on one device too (jax 0.10).
    """

    def loss(w: Any) -> Any:
        h = x @ w
        return jnp.sum((h - lax.stop_gradient(h.max(1, keepdims=True))) ** 2)

    told = {
        "max": x.max(), "min": x.min(), "rows": x.max(1), "columns": x.min(0), "all": jnp.all(x < 9, 0),
        "any": jnp.any(x > 9), "lowest": jnp.minimum(x, -jnp.inf).max(),
    }  # fmt: skip
    return w - 0.1 * jax.grad(loss)(w), told


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize(("mesh", "microbatches"), [((8,), 1), ((2, 4), 2)])
def test_a_cut_step_tells_of_what_is_not_a_number(odd: float, mesh: Any, microbatches: int):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2048, 64)).astype(np.float32)
    x[11, 3], x[1500, 5] = odd, odd
    w = draw.normal(size=(64, 64)).astype(np.float32)
    run = mw.parallelize(step, cluster="8xcpu", mesh=mesh, microbatches=microbatches)
    assert any(c.nbytes == 256 for c in run.plan(w, x).collectives)  # the batch is cut
    got, wanted = run(w, x), jax.jit(step)(w, x)
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, v, rtol=1e-4, atol=1e-3)
