"""Passes on local programs: their contract, and coalescing. Text in, text out; the same numbers; fewer collectives."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from meshwright.api import plan_captured
from meshwright.backends.xla import spmd
from meshwright.backends.xla.audit import audit
from meshwright.backends.xla.capture import Captured
from meshwright.backends.xla.collectives import run_on_shards
from meshwright.backends.xla.hlo import collectives
from meshwright.backends.xla.lower import lower
from meshwright.ir.errors import GraphError, UsageError
from meshwright.ir.local.checks import verify_local
from meshwright.ir.local.program import LocalOp, LocalProgram
from meshwright.ir.local.text import parse_local
from meshwright.ir.mesh import Mesh
from meshwright.ir.passes.coalesce import SMALL, Coalesce
from meshwright.ir.passes.contract import DUMP, Pass, run_passes
from meshwright.ir.passes.localize import localize
from meshwright.ir.plan import Plan
from meshwright.planner.request import Request

from .local_interpreter import interpret
from .pipelines import captured_of
from .random_graphs import random_graph, random_layouts

MESHES = (Mesh.of(x=2), Mesh.of(x=2, y=2), Mesh.of(x=4, y=2))


def coalesced(text: str) -> str:
    """The program after the pass; good before and after, and read back as it is printed."""
    program = parse_local(text)
    assert str(program) == text
    after = run_passes(program, [Coalesce()])
    assert parse_local(str(after)) == after
    return str(after)


# ---------------------------------------------------------------- what becomes one

PAIR = """\
local 'pair' on x=2 × y=2 {
  in %0: f32[8] @ [-] partial x
  in %1: f32[4] @ [-] partial x
  %2: f32[8] @ [-] = all_reduce %0 (axes=('x',), reduction='sum') in update for 'a' x1
  %3: f32[8] @ [-] = neg %2 in update tag 'a' x1
  %4: f32[4] @ [-] = all_reduce %1 (axes=('x',), reduction='sum') in update for 'b' x1
  %5: f32[4] @ [-] = neg %4 in update tag 'b' x1
  out %3
  out %5
}
"""


def test_a_collective_comes_early_to_join_one_that_is_read_before_it():
    assert (
        coalesced(PAIR)
        == """\
local 'pair' on x=2 × y=2 {
  in %0: f32[8] @ [-] partial x
  in %1: f32[4] @ [-] partial x
  %2: f32[8] @ [-], %4: f32[4] @ [-] = all_reduce %0 %1 (axes=('x',), reduction='sum') in update for 'a and 1 more' x1
  %3: f32[8] @ [-] = neg %2 in update tag 'a' x1
  %5: f32[4] @ [-] = neg %4 in update tag 'b' x1
  out %3
  out %5
}
"""
    )


def test_a_collective_waits_for_one_whose_operand_is_made_before_its_first_reader():
    """Maxima that ops settle themselves, inside the body of microbatches; each is read at the end."""
    text = """\
local 'late' on x=2, 2 microbatches {
  in %7: f32[4, 2] @ [-, x]
  in %8: f32[4, 2] @ [-, x]
  %9: f32[4] @ [-], %10: f32[4] @ [-] = microbatches (groups=1, joins=('max', 'max')) {
    %1: f32[4] @ [-] partial max x = reduce_max %7 (axes=(1,)) cut 1=x in body tag 'a' x1
    %2: f32[4] @ [-] = all_reduce %1 (axes=('x',), reduction='max') in body at 'm.py:3' tag 'a' x1
    %3: f32[4] @ [-] partial max x = reduce_max %8 (axes=(1,)) cut 1=x in body tag 'b' x1
    %4: f32[4] @ [-] = all_reduce %3 (axes=('x',), reduction='max') in body at 'm.py:4' tag 'b' x1
    %5: f32[4] @ [-] = add %2 %4 in body tag 'c' x1
    out %5 %4
  }
  out %9
}
"""
    both = """\
    %3: f32[4] @ [-] partial max x = reduce_max %8 (axes=(1,)) cut 1=x in body tag 'b' x1
    %2: f32[4] @ [-], %4: f32[4] @ [-] = all_reduce %1 %3 (axes=('x',), reduction='max') in body for 'a and 1 more' x1
    %5: f32[4] @ [-] = add %2 %4 in body tag 'c' x1
"""
    found = coalesced(text)
    assert both in found and found.count("all_reduce") == 1


def test_values_of_the_largest_size_join():
    at_most = PAIR.replace("f32[8]", f"f32[{SMALL // 4}]")
    assert coalesced(at_most).count("all_reduce") == 1


# ---------------------------------------------------------------- what does not

BRANCHES = """\
local 'branches' on x=2 {
  in %0: f32[8] @ [-] partial x
  in %1: s32[] @ []
  %2: f32[8] @ [-] = all_reduce %0 (axes=('x',), reduction='sum') in update for 'a' x1
  %3: f32[8] @ [-] = cond %1 %0 in update tag 'c' x1 {
    in %4: s32[] @ []
    in %5: f32[8] @ [-] partial x
    %6: f32[8] @ [-] = all_reduce %5 (axes=('x',), reduction='sum') in update for 'b' x1
    out %6
  }
  out %2
  out %3
}
"""
READ_INSIDE = """\
local 'read inside' on x=2, 2 microbatches {
  in %0: f32[8] @ [-] partial x
  in %1: f32[8] @ [-] partial x
  %2: f32[8] @ [-] = all_reduce %0 (axes=('x',), reduction='sum') for 'a' x1
  %3: f32[8] @ [-] = microbatches (groups=1, joins=('sum',)) {
    %4: f32[8] @ [-] = neg %2 in forward tag 'a' x1
    out %4
  }
  %5: f32[8] @ [-] partial x = neg %1 in update tag 'b' x1
  %6: f32[8] @ [-] = all_reduce %5 (axes=('x',), reduction='sum') for 'b' x1
  out %3
  out %6
}
"""
GATHERS = """\
local 'gathers' on x=2 {
  in %0: f32[8] @ [x]
  in %1: f32[8] @ [x]
  %2: f32[16] @ [-] = all_gather %0 (axes=('x',), dim=0) in update for 'a' x1
  %3: f32[16] @ [-] = all_gather %1 (axes=('x',), dim=0) in update for 'b' x1
  out %2
  out %3
}
"""
DEPENDS = """\
  %6: f32[4] @ [-] = all_reduce %0 (axes=('x',), reduction='sum') in update for 'a' x1
  %2: f32[4] @ [-] partial x = mul %1 %6 in update tag 'a' x1
  %4: f32[4] @ [-] = all_reduce %2 (axes=('x',), reduction='sum') in update for 'b' x1
"""
SECOND = "%1 (axes=('x',), reduction='sum') in update for 'b' x1"
APART = {
    "one needs the other": PAIR[: PAIR.index("  %2")].replace("f32[8]", "f32[4]")
    + DEPENDS
    + "  out %4\n}\n",
    "a region reads it before": READ_INSIDE,
    "another region": BRANCHES,
    "other axes": PAIR.replace("%1: f32[4] @ [-] partial x", "%1: f32[4] @ [-] partial y").replace(
        SECOND, SECOND.replace("'x'", "'y'")
    ),
    "another reduction": PAIR.replace("%1: f32[4] @ [-] partial", "%1: f32[4] @ [-] partial max").replace(
        SECOND, SECOND.replace("sum", "max")
    ),
    "another phase": PAIR.replace(SECOND, SECOND.replace("update", "backward")),
    "another count": PAIR.replace(SECOND, SECOND.replace("x1", "x2")),
    "another element type": PAIR.replace("f32[4]", "bf16[4]"),
    "too large": PAIR.replace("f32[8]", f"f32[{SMALL // 4 + 1}]"),
    "another kind of collective": GATHERS,
}  # fmt: skip


@pytest.mark.parametrize("text", APART.values(), ids=APART)
def test_what_is_not_ready_together_or_not_alike_stays_apart(text):
    assert text != PAIR and coalesced(text) == text


@pytest.mark.parametrize(
    "old, new, said",
    [
        (
            "reduction='sum')",
            "reduction='max')",
            "%2 does not lie as all_reduce of %0 leaves it",
        ),
        ("f32[4]", "s32[4]", "one all_reduce of f32 and s32"),
        ("all_reduce %0 %1", "all_reduce %0", "all_reduce of 1 values gives 2"),
        (
            "all_reduce %0 %1 (axes=('x',), reduction='sum')",
            "local_slice %0 %1 (axes=('x',), dim=0)",
            "local_slice of 2 values gives 2",
        ),
        (
            "%1: f32[4] @ [-] partial x",
            "%1: f32[4] @ [-] partial y",
            "%4 does not lie as all_reduce of %1 leaves it",
        ),
    ],
)
def test_every_operand_of_one_collective_is_checked(old, new, said):
    joined = coalesced(PAIR)
    assert old in joined
    with pytest.raises(GraphError, match="breaks `moves`") as error:
        verify_local(parse_local(joined.replace(old, new)))
    assert said in str(error.value)


# ---------------------------------------------------------------- the same numbers, fewer collectives


def check(seed: int, microbatches: int) -> int:
    """Of a random graph under random layouts, how many all-reduces there are fewer."""
    graph = random_graph(seed, microbatches > 1)
    local = localize(*random_layouts(graph, MESHES[seed % len(MESHES)], seed, microbatches))
    after = run_passes(local, [Coalesce()])
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(graph.types[v].shape) for v in graph.inputs]
    for found, wanted in zip(interpret(after, values), interpret(local, values), strict=True):
        np.testing.assert_array_equal(found, wanted)
    kinds, before = Counter(op.kind for op in after.walk()), Counter(op.kind for op in local.walk())
    fewer = before["all_reduce"] - kinds["all_reduce"]
    assert fewer >= 0 and kinds + Counter(all_reduce=fewer) == before
    assert fewer or after == local
    return fewer


@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
def test_results_are_equal_to_the_last_bit_and_collectives_never_more(seed, microbatches):
    check(seed, microbatches)


def test_random_programs_have_what_joins():
    assert sum(check(seed, 1) > 0 for seed in range(60)) >= 5
    assert sum(check(seed, 2) > 0 for seed in range(60)) >= 5


@pytest.mark.parametrize(
    "reduction, dtype",
    [("sum", "float32"), ("sum", "bfloat16"), ("max", "float32"), ("min", "int32"), ("or", "bool")],
)
def test_operands_that_travel_together_arrive_as_they_would_alone(reduction, dtype):
    """A matrix, a scalar, one without elements, a vector; NaN among them."""
    mesh = Mesh.of(x=4, y=2)
    rng = np.random.default_rng(0)
    shapes = ((3, 5), (), (0, 2), (7,))
    drawn = [9 * rng.standard_normal((8, *shape)) for shape in shapes]
    values = [jnp.asarray(each > 0 if dtype == "bool" else each, dtype) for each in drawn]
    if dtype == "float32":
        values[0] = values[0].at[2, 1, 1].set(jnp.nan)
    attrs = (("axes", ("x",)), ("reduction", reduction))
    devices = DeviceMesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))

    def both(*parts):
        local = [part[0] for part in parts]
        op = LocalOp("all_reduce", (0, 1, 2, 3), (4, 5, 6, 7), attrs)
        alone = [run_on_shards(op, [each], mesh, 1, None)[0] for each in local]
        together = run_on_shards(op, local, mesh, 1, None)
        return [each[None] for each in (*alone, *together)]

    spec = P(("x", "y"))
    step = jax.shard_map(both, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    found = jax.jit(step)(*values)
    for alone, together, shape in zip(found[:4], found[4:], shapes, strict=True):
        assert together.shape == (8, *shape) and together.dtype == alone.dtype
        assert np.asarray(together).tobytes() == np.asarray(alone).tobytes()


# ---------------------------------------------------------------- in XLA


@cache
def two_layers() -> tuple[Captured, Plan]:
    """gpt-tiny over eight devices."""
    captured = captured_of("gpt-tiny", layers=2)
    return captured, plan_captured(captured, "8xcpu", Request(mesh=(8,)), "gpt-tiny")


def test_a_data_parallel_step_has_fewer_collectives_and_equal_results(monkeypatch):
    """gpt-tiny over eight devices: gradients of biases and norms, and the loss, in one all-reduce. The program handed
    to XLA has it; what its own combiner leaves, one op for all, has fewer operands. Bytes and results stay."""
    captured, plan = two_layers()
    rng = np.random.default_rng(0)
    leaves = [
        np.asarray(0.02 * rng.standard_normal(a.shape) if jnp.issubdtype(a.dtype, jnp.floating)
                   else rng.integers(0, 100, a.shape), a.dtype)
        for a in captured.binding.in_avals
    ]  # fmt: skip
    handed, operands, results, audits = {}, {}, {}, {}
    for passes in ((), (Coalesce(),)):
        monkeypatch.setattr(spmd, "PASSES", passes)
        lowered = lower(plan, captured)
        avals = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
            for aval, sharding in zip(
                captured.binding.in_avals, lowered.input_shardings, strict=True
            )
        ]
        key = len(passes)
        handed[key] = lowered.jitted.lower(*avals).as_text().count('"stablehlo.all_reduce"')
        [line] = [line for line in lowered.hlo().splitlines() if re.search(r" all-reduce\(", line)]
        operands[key] = line.count("f32[") - line.split(" all-reduce(")[1].count("f32[")
        audits[key] = audit(lowered)
        results[key] = [np.asarray(each).tobytes() for each in lowered.run(leaves)]
    gradients = sum(c.count for c in plan.collectives)
    assert handed == {0: gradients, 1: operands[1]} and operands[0] == gradients
    assert operands[1] <= operands[0] - 20
    assert audits[0].lines == audits[1].lines
    assert abs(audits[1].compiled_peak / audits[0].compiled_peak - 1) < 0.02
    assert results[0] == results[1]


def test_where_xla_joins_nothing_the_step_has_fewer(monkeypatch):
    captured, plan = two_layers()
    counts, nbytes = [], []
    for passes in ((), (Coalesce(),)):
        monkeypatch.setattr(spmd, "PASSES", passes)
        options = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}
        found = collectives(lower(plan, captured).compile(options).as_text(), plan.mesh)
        counts.append(sum(each.count for each in found))
        nbytes.append(sum(each.nbytes for each in found))
    assert counts[0] == sum(c.count for c in plan.collectives) and counts[1] <= counts[0] - 20
    assert nbytes[0] == nbytes[1]


# ---------------------------------------------------------------- the contract


class Rename(Pass):
    name = "rename"

    def run(self, program: LocalProgram) -> LocalProgram:
        return replace(program, name=f"{program.name}'")


class Spoil(Pass):
    name = "spoil"

    def run(self, program: LocalProgram) -> LocalProgram:
        return replace(program, ops=program.ops[1:])


def test_passes_run_in_order():
    assert run_passes(parse_local(PAIR), [Rename(), Coalesce(), Rename()]).name == "pair''"


def test_a_program_is_verified_before_the_first_pass_and_after_each():
    broken = parse_local(PAIR.replace("  out %5", "  out %1"))
    with pytest.raises(GraphError, match="breaks `settled`") as error:
        run_passes(broken, [Rename()])
    assert "from" not in str(error.value)
    with pytest.raises(GraphError, match="breaks `defined-before-use`") as error:
        run_passes(parse_local(PAIR), [Rename(), Spoil(), Coalesce()])
    assert "from   pass `spoil`" in str(error.value)


def test_programs_of_stages_may_hand_on_partial_sums():
    program = parse_local(PAIR.replace("  out %5", "  out %1"))
    assert run_passes(program, [Rename()], whole=False).outputs == (3, 1)


@pytest.mark.parametrize("asked", ["coalesce", " rename ,coalesce", "all"])
def test_the_environment_names_passes_to_print(asked, monkeypatch, capsys):
    monkeypatch.setenv(DUMP, asked)
    program = parse_local(PAIR)
    after = run_passes(program, [Coalesce(), Rename()])
    out, err = capsys.readouterr()
    first = f"before pass coalesce\n{program}after pass coalesce\n{Coalesce().run(program)}"
    second = f"before pass rename\n{Coalesce().run(program)}after pass rename\n{after}"
    assert out == "" and err == (first if asked == "coalesce" else first + second)


def test_nothing_is_printed_unasked(monkeypatch, capsys):
    monkeypatch.setenv(DUMP, "")
    run_passes(parse_local(PAIR), [Coalesce()])
    assert capsys.readouterr() == ("", "")


def test_a_pass_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(DUMP, "coalesce,colaesce")
    with pytest.raises(UsageError, match="`colaesce` is no pass") as error:
        run_passes(parse_local(PAIR), [Coalesce(), Rename()])
    assert "where  MESHWRIGHT_DUMP" in str(error.value)
    assert "one of coalesce, rename, or all" in str(error.value)
