"""Ops whose places are chosen by ids, under every strategy, in one compiled program with the moves in front.

Op by op the emitted shards are right (`test_rules`); compiled, XLA joins a shard's slice of a replicated
value with the op that reads it. So here each operand starts replicated on 8 devices and is brought to its
layout inside the program, and ids lie on both sides of every border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import meshwright as mw
from meshwright.backends.xla.collectives import move, shard_index
from meshwright.backends.xla.emit import ShardPart
from meshwright.backends.xla.joins import settle
from meshwright.ir.mesh import Mesh
from meshwright.ir.rules.rule import (
    NONE,
    Strategy,
    cuttable,
    operand_sharding,
    result_sharding,
    settled_axes,
)
from meshwright.ir.sharding import Sharding, replicated, reshard

from .op_samples import Sample, bind, samples

MESH = Mesh.of(x=2, y=4)
MODES = ("clip", "fill", "promise_in_bounds")


def strategies(sample: Sample) -> list[Strategy]:
    rule = sample.rule
    codes = (NONE, *cuttable(rule))
    found = []
    for axes in product(codes, repeat=len(MESH.axes)):
        ways = dict.fromkeys(axes, 1)
        for code, size in zip(axes, MESH.shape, strict=True):
            ways[code] *= size
        if all(f == NONE or rule.factors[f].size % n == 0 for f, n in ways.items()):
            found.append(Strategy(axes))
    return found


def run_cut(sample: Sample, strategy: Strategy, operands: Sequence[Any]) -> list[Any]:
    """One device's part: bring replicated operands to their layout, run, put the results together."""
    rule = sample.rule
    local = []
    for k, operand in enumerate(operands):
        target = operand_sharding(rule, strategy, MESH, k)
        local.append(move(operand, reshard(replicated(operand.ndim), target) or (), MESH))
    axes: dict[int, list[str]] = {}
    for name, code in zip(MESH.names, strategy.axes, strict=True):
        if code >= 0:
            axes.setdefault(code, []).append(name)
    cuts = {f: ShardPart(shard_index(n, MESH), MESH.ways(tuple(n))) for f, n in axes.items()}
    results = sample.run(local, cuts)
    for reduction, over in settled_axes(rule, strategy, MESH).items():
        results = [settle(result, reduction, over) for result in results]
    layouts = [result_sharding(rule, strategy, MESH, k) for k in range(len(results))]
    return [together(result, layout) for result, layout in zip(results, layouts, strict=True)]


def together(array: Any, layout: Sharding) -> Any:
    return move(array, reshard(layout, replicated(array.ndim)) or (), MESH)


def compiled(every: list[tuple[Sample, Strategy]]) -> Callable[..., list[list[Any]]]:
    """All samples under all strategies as one program, called with operands by sample."""
    devices = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(MESH.shape), MESH.names)

    def program(operands: list[list[Any]]) -> list[list[Any]]:
        return [
            run_cut(sample, strategy, given)
            for (sample, strategy), given in zip(every, operands, strict=True)
        ]

    whole = jax.sharding.PartitionSpec()
    return jax.jit(
        jax.shard_map(program, mesh=devices, in_specs=whole, out_specs=whole, check_vma=False)
    )


Turns = list[tuple[Any, ...]]  # operands of one call after another
Case = tuple[Callable[..., Any], Turns]


def check(cases: list[Case]) -> None:
    """Every strategy of each function's only op, for all its operands, against the whole op."""
    taken = [only_op(function, turns[0]) for function, turns in cases]
    jobs = [(case, strategy) for case, one in enumerate(taken) for strategy in strategies(one)]
    run = compiled([(taken[case], strategy) for case, strategy in jobs])
    for turn in range(max(len(turns) for _, turns in cases)):
        given = [turns[turn % len(turns)] for _, turns in cases]
        wanted = [one.run(args) for one, args in zip(taken, given, strict=True)]
        found = run([list(given[case]) for case, _ in jobs])
        for (case, strategy), got in zip(jobs, jax.device_get(found), strict=True):
            for g, w in zip(got, wanted[case], strict=True):
                one = taken[case]
                assert same(g, w), (
                    f"{one.op} {one.types}\n{one.rule}\n{strategy}\non {given[case]}\ngave {g}\nnot {w}"
                )


def same(got: Any, wanted: Any) -> bool:
    """Equal, NaN where NaN, up to the rounding of sums."""
    return np.allclose(np.asarray(got), np.asarray(wanted), 1e-6, 1e-6, equal_nan=True)


def only_op(function: Callable[..., Any], args: tuple[Any, ...]) -> Sample:
    [found] = samples(function, *args)
    assert len(found.operands) == len(args) and not found.rule.opaque
    return found


# What is indexed: an [8, 8] table or more of them, by one id, by several, by pairs


def edges(size: int, take: int = 1) -> list[int]:
    """Both sides of every border between parts, of the whole, and of int32."""
    inside = [0, 1, size // 4 - 1, size // 4, size // 2, size - take]
    return [*inside, size - take + 1, size + 3, -1, -size, -size - 5, 2**31 - 1, -(2**31)]


def ids(shape: tuple[int, ...], columns: int = 1, take: int = 1) -> list[jax.Array]:
    """For each edge an array that begins with it, the others following (no two places alike)."""
    found, many = edges(8, take), int(np.prod(shape)) * columns
    rolled = [np.resize(np.roll(found, -turn), many) for turn in range(len(found))]
    return [jnp.asarray(some.reshape(*shape, columns), jnp.int32) for some in rolled]


def table(*shape: int, seed: int = 0) -> jax.Array:
    """Small numbers, and some that are none."""
    draw = np.random.default_rng(seed)
    values = draw.integers(1, 9, shape).astype(np.float32)
    odd = draw.choice([np.nan, np.inf, -np.inf, -0.0], shape)
    return jnp.asarray(np.where(draw.random(shape) < 0.1, odd, values))


def looked_up(mode: str) -> Iterator[Case]:
    take = partial(lax.gather, mode=mode, fill_value=7.0 if mode == "fill" else None)
    numbers = lax.GatherDimensionNumbers
    for shape in ((1,), (4,)):
        rank = len(shape)
        rows = numbers((rank,), (0,), (0,))
        yield (
            partial(take, dimension_numbers=rows, slice_sizes=(1, 8)),
            [(table(8, 8), i) for i in ids(shape)],
        )
        columns = numbers((rank,), (1,), (1,))
        yield (
            partial(take, dimension_numbers=columns, slice_sizes=(8, 1)),
            [(table(8, 8), i) for i in ids(shape)],
        )
        pairs = numbers((), (0, 1), (0, 1))
        yield (
            partial(take, dimension_numbers=pairs, slice_sizes=(1, 1)),
            [(table(8, 8), i) for i in ids(shape, 2)],
        )
        kept = numbers((rank, rank + 1), (), (0, 1))
        for sizes in ((8, 3), (1, 8)):
            some = [(table(8, 8), i) for i in ids(shape, 2, 3)]
            yield partial(take, dimension_numbers=kept, slice_sizes=sizes), some
    batched = numbers((1,), (1,), (1,), (0,), (0,))
    yield (
        partial(take, dimension_numbers=batched, slice_sizes=(1, 1, 2)),
        [(table(8, 8, 2), i) for i in ids((8,))],
    )


def changed(kind: str, mode: str) -> Iterator[Case]:
    put = partial(CHANGES[kind], mode=mode)
    numbers = lax.ScatterDimensionNumbers

    def some(
        given: tuple[int, ...],
        shape: tuple[int, ...],
        columns: int = 1,
        to: tuple[int, ...] = (8, 8),
    ) -> Turns:
        return [(table(*to), i, table(*given, seed=1)) for i in ids(shape, columns, 3)]

    for shape in ((1,), (4,)):
        rank = len(shape)
        rows, columns = numbers((rank,), (0,), (0,)), numbers((rank,), (1,), (1,))
        yield partial(put, dimension_numbers=rows), some((*shape, 8), shape)
        yield partial(put, dimension_numbers=columns), some((*shape, 8), shape)
        yield partial(put, dimension_numbers=numbers((), (0, 1), (0, 1))), some(shape, shape, 2)
        kept = numbers((rank, rank + 1), (), (0, 1))
        for sizes in ((8, 3), (1, 8)):
            yield partial(put, dimension_numbers=kept), some((*shape, *sizes), shape, 2)
    batched = numbers((1,), (1,), (1,), (0,), (0,))
    yield partial(put, dimension_numbers=batched), some((8, 2), (8,), to=(8, 8, 2))


CHANGES = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter-mul": lax.scatter_mul,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
}


def sliced() -> Iterator[Case]:
    pairs = [tuple(jnp.int32(i) for i in some[0]) for some in ids((1,), 2, 3)]
    for sizes in ((8, 1), (8, 3), (1, 8), (3, 8), (1, 1), (8, 8)):
        yield bind("dynamic_slice", slice_sizes=sizes), [(table(8, 8), *pair) for pair in pairs]
        part = table(*sizes, seed=1)
        yield bind("dynamic_update_slice"), [(table(8, 8), part, *pair) for pair in pairs]


USUAL = {
    ("gather", "fill"),
    ("scatter", "clip"),
    ("scatter-add", "fill"),
    ("scatter-max", "promise_in_bounds"),
}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(*one, marks=() if one in USUAL else pytest.mark.slow)
        for one in product(("gather", *CHANGES), MODES)
    ],
)
def test_ids_find_their_places_however_an_op_is_cut(kind: str, mode: str):
    check(list(looked_up(mode) if kind == "gather" else changed(kind, mode)))


def test_slices_lie_where_they_should_however_an_op_is_cut():
    check(list(sliced()))


@pytest.mark.parametrize("change", ["set", "add", "multiply", "max"])
def test_a_feature_changed_before_a_product_that_is_cut_by_rows(change: str):
    """The input lies whole on each device, which takes its features of it: under the planner's own plan."""

    def step(w: Any, x: Any) -> Any:
        def loss(w: Any) -> Any:
            h = jnp.tanh(getattr(x.at[:, 0], change)(1.5) @ w["up"])
            return jnp.mean((h @ w["down"]) ** 2)

        return jax.tree.map(lambda p, g: p - g, w, jax.grad(loss)(w))

    draw = np.random.default_rng(0)
    w = {"up": draw.normal(size=(4096, 9)), "down": draw.normal(size=(9, 8))}
    w = {name: (some / 8).astype(np.float32) for name, some in w.items()}
    x = draw.normal(size=(3, 4096)).astype(np.float32)
    run = mw.parallelize(step, cluster="8xcpu", mesh=(8,))
    assert run.plan(w, x).slots["w['up']"].dims == (("x",), ())
    for got, wanted in zip(
        jax.tree.leaves(run(w, x)), jax.tree.leaves(jax.jit(step)(w, x)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
