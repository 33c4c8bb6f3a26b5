"""Every move between layouts keeps the tensor: run on 8 devices and compare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh as DeviceMesh

from meshwright.backends.xla.collectives import move
from meshwright.backends.xla.devices import partition_spec
from meshwright.ir.mesh import Mesh
from meshwright.ir.sharding import ReshardStep, Sharding, reshard
from meshwright.planner.intra.strategies import layouts_of

MESH = Mesh.of(x=2, y=2, z=2)
LAYOUTS = layouts_of((8, 8), MESH)
OWING = layouts_of((8, 8), MESH, owed=True)


def carry_out(source: Sharding, target: Sharding) -> tuple[np.ndarray, np.ndarray]:
    """The tensor before and after a resharding, owed sums given as (whole, zeros...)."""
    devices = DeviceMesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), MESH.names)
    whole = jnp.arange(64.0).reshape(8, 8)

    def body(x):
        for axis in source.partial:
            x = jnp.where(jax.lax.axis_index(axis) == 0, x, 0)
        return move(x, reshard(source, target) or (), MESH)

    specs = partition_spec(source), partition_spec(target)
    step = jax.shard_map(body, mesh=devices, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    return np.asarray(whole), np.asarray(jax.jit(step)(whole))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(OWING), st.sampled_from(LAYOUTS))
def test_a_move_keeps_the_tensor(source, target):
    before, after = carry_out(source, target)
    np.testing.assert_array_equal(before, after)


@given(st.sampled_from(OWING))
def test_staying_costs_nothing(layout):
    assert reshard(layout, layout) == ()


def test_an_axis_of_one_device_cuts_nothing():
    """Whatever the sizes of the tensor, layouts are those of the mesh without it."""
    alone, joined = layouts_of((8, 1, 6), Mesh.of(x=2)), layouts_of((8, 1, 6), Mesh.of(x=2, y=1))
    assert joined == alone and len(alone) == 3


def test_no_move_makes_a_sum_owed():
    assert reshard(Sharding(((), ())), Sharding(((), ()), frozenset("x"))) is None


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        (
            Sharding((("x",), ())),
            Sharding(((), ("x",))),
            (ReshardStep("all_to_all", ("x",), 0, 1),),
        ),
        (
            Sharding(((), ()), frozenset("x")),
            Sharding((("x",), ())),
            (ReshardStep("reduce_scatter", ("x",), 0),),
        ),
        (
            Sharding(((), ()), frozenset("xy")),
            Sharding(((), ())),
            (ReshardStep("all_reduce", ("x", "y")),),
        ),
        (
            Sharding((("x", "y"), ())),
            Sharding(((), ("x", "y"))),
            (ReshardStep("all_to_all", ("x", "y"), 0, 1),),
        ),
        (
            Sharding((("x", "y"), ())),
            Sharding(((), ())),
            (ReshardStep("all_gather", ("x", "y"), 0),),
        ),
        (Sharding(((), ())), Sharding((("x", "y"), ())), (ReshardStep("slice", ("x", "y"), 0),)),
    ],
)
def test_a_change_takes_the_obvious_collective(source, target, steps):
    assert reshard(source, target) == steps


def test_an_axis_that_is_not_last_in_its_dim_is_reached_by_gathering_what_follows():
    steps = reshard(Sharding((("x", "y"),)), Sharding((("y",),)))
    assert steps == (ReshardStep("all_gather", ("x", "y"), 0), ReshardStep("slice", ("y",), 0))
