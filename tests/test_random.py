"""A cut step draws the random numbers that one device would."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

import meshwright as mw
from meshwright.backends.xla import emit_random
from meshwright.backends.xla.shard import Local, Moment, ShardPart
from meshwright.ir.rules.factors import Factors
from meshwright.ir.rules.rule import cuttable

from .op_samples import samples

ROWS, COLUMNS = 512, 64


def step(weights: Any, key: Any, x: Any) -> Any:
    """Dropout by a folded key, noise by a key for each row, an order, a choice, and keys for later."""

    def loss(weights: Any) -> Any:
        h = x
        for number, w in enumerate(weights):
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 0.9, h.shape)
            h = jnp.where(kept, jnp.tanh(h @ w) / 0.9, 0)
        return jnp.mean((h + noise(key, x)) ** 2)

    value, grads = jax.value_and_grad(loss)(weights)
    told = {
        "loss": value,
        "order": jax.random.permutation(key, 64),
        "choice": jax.random.categorical(key, x),
        "keys": jax.random.split(key, (4, 2)),
    }
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), told


def noise(key: Any, x: Any) -> Any:
    keys = jax.random.split(key, 16)
    return jax.vmap(lambda k: jax.random.normal(k, (ROWS // 16, x.shape[1])))(keys).reshape(x.shape)


def host(value: Any) -> np.ndarray:
    keys = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if keys else value)


def check(run: Any, *args: Any) -> None:
    got, wanted = run(*args), jax.jit(step)(*args)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(host(g), host(w), 1e-5, 1e-6, err_msg=jax.tree_util.keystr(path))


def arguments(key: Any) -> tuple[Any, ...]:
    draw = np.random.default_rng(0)
    weights = [draw.normal(size=(COLUMNS, COLUMNS)).astype(np.float32) / 8 for _ in range(2)]
    return weights, key, draw.normal(size=(ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("mesh", [(8,), (2, 4)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_typed_keys(mesh: Any, microbatches: int):
    run = mw.parallelize(step, cluster="8xcpu", mesh=mesh, microbatches=microbatches)
    check(run, *arguments(jax.random.key(3)))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_generator(impl: str):
    run = mw.parallelize(step, cluster="8xcpu", mesh=(8,), microbatches=1)
    check(
        run,
        *arguments(
            jax.random.PRNGKey(3, impl=impl)
            if impl == "threefry2x32"
            else jax.random.key(3, impl=impl)
        ),
    )


def test_numbers_that_no_place_tells_are_drawn_whole():
    with jax.threefry_partitionable(False):
        run = mw.parallelize(step, cluster="8xcpu", mesh=(8,), microbatches=1)
        check(run, *arguments(jax.random.key(3)))


def test_a_device_draws_its_part():
    args = arguments(jax.random.key(3))
    run = mw.parallelize(step, cluster="8xcpu", mesh=(8,), microbatches=1)
    words = [int(a) * int(b) for a, b in re.findall(r"u32\[(\d+),(\d+)\]", run.lower(*args).hlo())]
    assert max(words) == ROWS * COLUMNS // 8


@pytest.mark.parametrize("sizes", [(1 << 20, 3, 1 << 16), (5, 1 << 30, 2)])
def test_places_above_a_word(sizes: tuple[int, ...]):
    """A small part near the end of what one key makes, its places counted by Python."""
    ways = [max(1, size >> 2) if size > 1024 else 1 for size in sizes]
    factors = Factors()
    dims = factors.like(sizes)
    rule = factors.rule([()], [dims])
    cuts = {dim[0]: ShardPart(n - 1, n) for dim, n in zip(dims, ways, strict=True)}
    key = jax.random.key(7)
    [bits] = emit_random.random_bits(Local(rule, cuts), None, {"bit_width": 32}, [key])
    rows = [
        np.arange(size - size // n, size, dtype=object) for size, n in zip(sizes, ways, strict=True)
    ]
    strides = [int(np.prod(sizes[d + 1 :], dtype=object)) for d in range(len(sizes))]
    ends = [row * stride for row, stride in zip(rows, strides, strict=True)]
    places = [sum(parts) for parts in product(*ends)]
    words = np.array([[p >> 32 for p in places], [p & 0xFFFFFFFF for p in places]], np.uint32)
    wanted = threefry_2x32(jax.random.key_data(key), jnp.asarray(words))
    np.testing.assert_array_equal(bits.reshape(-1), wanted[0] ^ wanted[1])


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_a_shard_draws_its_rows_of_a_microbatch(groups: int, width: int):
    """The rows of a microbatch are runs of neighbours, one from each group of the batch."""
    key, count, ways = jax.random.key(1), 2, 4
    [one] = samples(lambda k: jax.random.bits(k, (32, 6), f"uint{width}"), key)
    [batch, _] = cuttable(one.rule)
    [whole] = one.run([key])
    dealt = np.asarray(whole).reshape(groups, count, -1, 6)
    for number in range(count):
        rows = dealt[:, number].reshape(ways, -1, 6)
        for index in range(ways):
            moment = Moment(index, number, count, groups)
            [part] = one.run(
                [key], {batch: ShardPart(index * count + number, ways * count, moment)}
            )
            np.testing.assert_array_equal(part, rows[index])


def test_bits_drawn_whole_leave_what_their_masks_meet_cut():
    """An rbg key's bits cannot be cut; a mask of them takes its part of them, and no activation is gathered."""

    def dropped(w: Any, key: Any, x: Any) -> Any:
        def loss(w: Any) -> Any:
            h = jnp.tanh(x @ w)
            return jnp.mean(jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h, 0) ** 2)

        return w - 0.1 * jax.grad(loss)(w)

    args = (
        jnp.ones((COLUMNS, COLUMNS)),
        jax.random.key(0, impl="rbg"),
        jnp.ones((64 * ROWS, COLUMNS)),
    )
    found = mw.plan(dropped, *args, cluster="8xcpu")
    assert {each.kind for each in found.collectives if each.nbytes > args[0].nbytes} == set()
    sides = [mw.parallelize(dropped, cluster="8xcpu", verify=True)(*args), jax.jit(dropped)(*args)]
    np.testing.assert_allclose(*map(np.asarray, sides), rtol=1e-5, atol=1e-7)
