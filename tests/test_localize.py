"""Local programs: whatever the layouts, all ranks together give what one device gives; text both ways; every law."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.composites.attention_op import composed
from meshwright.ir.errors import GraphError, InfeasibleError
from meshwright.ir.graph import TensorType
from meshwright.ir.local.checks import verify_local
from meshwright.ir.local.program import COLLECTIVES, FactorCut, LocalProgram, Shard
from meshwright.ir.local.text import parse_local
from meshwright.ir.mesh import Mesh
from meshwright.ir.passes.localize import localize
from meshwright.ir.passes.microbatch import TimeAxis
from meshwright.ir.program import prepare
from meshwright.ir.sharding import Sharding
from meshwright.models import build
from meshwright.planner.request import Request

from .local_interpreter import evaluate, interpret
from .pipelines import captured_of
from .random_graphs import random_graph, random_layouts

MESHES = (Mesh.of(x=2), Mesh.of(x=2, y=2), Mesh.of(x=4, y=2), Mesh.of(x=2, y=2, z=2))


def numbers(graph, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(graph.types[v].shape) for v in graph.inputs]


def check(seed: int, batch: bool, microbatches: int) -> LocalProgram:
    graph = random_graph(seed, batch)
    program, plan = random_layouts(graph, MESHES[seed % len(MESHES)], seed, microbatches)
    if microbatches > 1:
        assert isinstance(program.time, TimeAxis)
    local = localize(program, plan)
    verify_local(local)
    given = numbers(graph, seed)
    for found, wanted in zip(interpret(local, given), evaluate(graph, given), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert parse_local(str(local)) == local
    return local


def test_all_ranks_together_give_what_one_device_gives():
    """Two hundred graphs under layouts drawn at random; among their programs are all kinds of collectives."""
    met = {op.kind for seed in range(200) for op in check(seed, False, 1).walk()}
    assert met >= COLLECTIVES | {"local_slice", "keep_first"}


def test_microbatches_together_give_what_the_whole_batch_gives():
    met = {op.kind for seed in range(100) for op in check(seed, True, 2).walk()}
    assert met >= {"microbatches", "take_microbatch", "join_microbatches"}


# ---------------------------------------------------------------- plans of the zoo


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize(
    "name, mesh, microbatches",
    [
        ("gpt-tiny", (2, 4), 1),
        ("gpt-tiny-scan", (8,), 4),
        ("llama-tiny", (2, 2, 2), 2),
        ("mixtral-tiny", (8,), 1),
        ("wrn-tiny", (4, 2), 1),
    ],
)
def test_programs_of_plans_keep_every_law(name, mesh, microbatches, attention):
    """Folded and whole, squeezed so that layouts are mixed; the text of each is read back."""
    captured = captured_of(name)
    request = Request(mesh=mesh, microbatches=microbatches, attention=attention)
    plan = plan_captured(captured, "8xcpu", request, name)
    tight = replace(request, memory=0.6 * plan.estimate.peak_bytes)
    with suppress(InfeasibleError):
        plan = plan_captured(captured, "8xcpu", tight, name)
    folded = fold(composed(captured.graph, attention, plan.cluster))
    for graph in (folded.small, folded.whole):
        program = prepare(graph, plan.recompute)
        for holds in (False, True):
            local = localize(program, plan, holds)
            verify_local(local)
            assert parse_local(str(local)) == local


# ---------------------------------------------------------------- laws and text

TEXT = """\
local 'two' on x=2 × y=2, 2 microbatches {
  in %0: f32[8, 4] @ [x, y] 'w'
  in %1: f32[8, 8] @ [x·y, -] 'batch'
  const %2: f32[] @ [] = 0.5
  %3: f32[16, 4] @ [-, y] = all_gather %0 (axes=('x',), dim=0) in prepare for 'dot' x1
  %8: f32[4] @ [y] partial x, %9: f32[2, 4, 4] @ [-, x/m, y] = microbatches (groups=4, joins=('sum',)) {
    %4: f32[4, 8] @ [x·y/m, -] = take_microbatch %1 (dim=0, groups=1) in forward
    %5: f32[8, 8] @ [x/m, -] = all_gather %4 (axes=('y',), dim=0) in forward for 'dot' x1
    %6: f32[8, 4] @ [x/m, y] = neg %5 (n=(((1,), (0,)), ((), ()))) cut 0=x/m 1=y in forward at 'm.py:3' tag 'dot' x2
    %7: f32[4] @ [y] partial x = reduce_sum %6 (axes=(0,)) cut 0=x/m 1=y joint ring=x in forward tag 'sum' x1
    out %7 %6
  }
  %10: f32[4] @ [y] = all_reduce %8 (axes=('x',), reduction='sum') in update for 'loss' x1
  %11: s32[], %12: f32[4] @ [y] = cond %10 {
    in %13: f32[4] @ [y] partial max x
    out %13
  } and {
    in %14: f32[4] @ [y]
    out %14
  }
  out %10 'loss'
}
"""


def test_programs_are_read_as_they_are_printed():
    text = TEXT.replace("%11: s32[], ", "%11: s32[] @ [], ")
    program = parse_local(text)
    assert str(program) == text
    assert program.shards[9].whole == TensorType("f32", (2, 16, 8))
    assert program.local(9) == TensorType("f32", (2, 4, 4))
    assert program.shards[13].reduction == "max"
    take = program.ops[1].regions[0].ops[2]
    assert take.cuts == (FactorCut(0, ("x",), True), FactorCut(1, ("y",)))
    assert take.where == "m.py:3" and take.count == 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("nothing", "line 1"),
        (TEXT, "%11: s32[],"),  # without a layout
        (TEXT.replace("f32[8, 4] @ [x, y]", "f33[8, 4] @ [x, y]"), "`f33` is not an element type"),
        (TEXT.replace("@ [x, y] 'w'", "@ [x, z] 'w'"), "no axis `z`"),
        (TEXT.replace("in %1:", "in %0:"), "%0 is defined twice"),
        (TEXT[: TEXT.index("    out %7")], "a region is never closed"),
        (TEXT.replace("dim=0) in prepare", "dim=) in prepare"), "line 5"),
    ],
)
def test_texts_that_are_none_are_refused_by_line(text, said):
    with pytest.raises(GraphError) as error:
        parse_local(text)
    assert said in str(error.value)


GOOD = """\
local 'good' on x=2 × y=2, 2 microbatches {
  in %0: f32[8, 4] @ [x, -]
  in %1: s32[] @ []
  %2: f32[16, 4] @ [-, -] = all_gather %0 (axes=('x',), dim=0)
  %3: f32[4] @ [-] partial x = reduce_sum %0 (axes=(0,)) cut 0=x
  %4: f32[4] @ [-] = all_reduce %3 (axes=('x',), reduction='sum')
  %5: f32[8] @ [x] = reduce_max %0 (axes=(1,)) cut 0=x
  %6: f32[4] @ [-] = cond %1 %4 (dearest=0) {
    in %7: s32[] @ []
    in %8: f32[4] @ [-]
    out %8
  }
  %12: f32[4] @ [-] partial x = microbatches (groups=2, joins=('sum',)) {
    %9: f32[4, 4] @ [x/m, -] = take_microbatch %0 (dim=0, groups=1)
    %10: f32[4] @ [-] partial x = reduce_sum %9 (axes=(0,)) cut 0=x/m
    out %10
  }
  %11: f32[2] @ [x] = reduce_scatter %3 (axes=('x',), dim=0)
  out %6
}
"""


def test_the_good_program_is_good():
    verify_local(parse_local(GOOD))


@pytest.mark.parametrize(
    "law, old, new",
    [
        ("defined-before-use", "all_reduce %3", "all_reduce %12"),
        ("defined-before-use", "out %6", "out %8"),
        ("defined-before-use", "    out %8", "    out %4"),
        ("moves", "%2: f32[16, 4] @ [-, -] = all_gather", "%2: f32[8, 4] @ [x, -] = all_gather"),
        ("moves", "axes=('x',), dim=0)\n  %3", "axes=('y',), dim=0)\n  %3"),
        ("moves", "reduction='sum'", "reduction='max'"),
        ("moves", "all_reduce %3 (axes=('x',)", "all_reduce %3 (axes=('y',)"),
        ("moves", "reduce_scatter %3", "reduce_scatter %4"),
        ("follows-rule", "@ [-] partial x = reduce_sum %0", "@ [-] = reduce_sum %0"),
        ("follows-rule", "reduce_sum %0 (axes=(0,)) cut 0=x", "reduce_sum %0 (axes=(0,)) cut 1=x"),
        ("follows-rule", "f32[8] @ [x] = reduce_max", "f32[8] @ [x] partial y = reduce_max"),
        ("in-time", "  out %6", "  %13: f32[4, 4] @ [x/m, -] = take_microbatch %0 (dim=0, groups=1)\n  out %6"),
        ("in-time", "%3: f32[4] @ [-] partial x = reduce_sum %0 (axes=(0,)) cut 0=x",
         "%3: f32[4] @ [-] partial x = reduce_sum %0 (axes=(0,)) cut 0=x/m"),
        ("same-branch", "in %1: s32[] @ []", "in %1: s32[] @ [] partial x"),
        ("settled", "out %6", "out %3"),
    ],
)  # fmt: skip
def test_every_law_is_checked(law, old, new):
    assert GOOD.count(old) == 1
    with pytest.raises(GraphError, match=f"breaks `{law}`"):
        verify_local(parse_local(GOOD.replace(old, new)))


def test_values_that_do_not_divide_and_values_defined_twice_are_met():
    program = parse_local(GOOD)
    odd = Shard(TensorType("f32", (7, 4)), Sharding((("x",), ())))
    with pytest.raises(GraphError, match="breaks `fits`"):
        verify_local(replace(program, shards={**program.shards, 0: odd}))
    late = Shard(TensorType("f32", (6, 4)), Sharding((("x",), ())), time=0)
    with pytest.raises(GraphError, match="breaks `fits`"):
        verify_local(replace(program, shards={**program.shards, 9: late}))
    with pytest.raises(GraphError, match="breaks `defined-once`"):
        verify_local(replace(program, ops=(*program.ops, program.ops[0])))


def test_gradients_of_weights_are_held_before_they_are_transposed_where_xla_would_be_slow():
    """A product of gpt-tiny's backward pass that is summed over the batch and transposed: on CPUs a barrier between."""
    example = build("gpt-tiny")
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    plan = plan_captured(captured, "8xcpu", Request(mesh=(8,)), "gpt-tiny")
    program = prepare(fold(captured.graph).small, plan.recompute)

    def turned(holds):
        local = localize(program, plan, holds)
        writer = {v: op for op in local.walk() for v in op.outputs}
        transposed = [writer[op.inputs[0]] for op in local.walk() if op.kind == "transpose"]
        products = [op for op in transposed if op.kind == "dot_general"]
        partial = [op for op in products if local.shards[op.outputs[0]].sharding.partial]
        barriers = [op for op in transposed if op.kind == "optimization_barrier"]
        return len(partial), len(
            [op for op in barriers if writer[op.inputs[0]].kind == "dot_general"]
        )

    assert turned(holds=False)[0] >= 3 and turned(holds=False)[1] == 0
    assert turned(holds=True)[0] == 0 and turned(holds=True)[1] >= 3
