"""What is read out of a compiled program, and how it is held against a plan."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

import meshwright as mw
from meshwright.backends.xla.hlo import CompiledCollective, collectives
from meshwright.ir.audit import Audit, AuditedRank, compare
from meshwright.ir.mesh import Mesh
from meshwright.models import build
from meshwright.view import audit_text

MESH = Mesh.of(x=4, y=2)


def compiled(body, *shapes, spec=None) -> str:
    mesh = DeviceMesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spec = spec or P(("x", "y"))
    step = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(step).lower(*arguments).compile().as_text()


def found_in(body, *shapes, spec=None) -> dict:
    return {
        (f.kind, f.axes): (f.nbytes, f.count)
        for f in collectives(compiled(body, *shapes, spec=spec), MESH)
    }


@pytest.mark.parametrize(
    ("body", "kind", "axes", "nbytes"),
    [
        (lambda a: lax.psum(a, "x"), "all_reduce", ("x",), 4 * 16 * 4),
        (lambda a: lax.psum(a, ("x", "y")), "all_reduce", ("x", "y"), 4 * 16 * 4),
        (lambda a: lax.all_gather(a, "y", axis=0, tiled=True)[:4], "all_gather", ("y",), 2 * 4 * 16 * 4),
        (lambda a: jnp.tile(lax.psum_scatter(a, "x", tiled=True), (4, 1)), "reduce_scatter", ("x",), 4 * 16 * 4),
        (lambda a: lax.all_to_all(a, "y", 1, 0, tiled=True).reshape(4, 16), "all_to_all", ("y",), 4 * 16 * 4),
    ],
)  # fmt: skip
def test_kind_axes_and_bytes_of_each_collective(body, kind, axes, nbytes):
    found = found_in(body, (32, 16))
    assert found[kind, axes] == (nbytes, 1)


@pytest.mark.parametrize(
    "groups",
    ["{{0,2,4,6},{1,3,5,7}}", "[2,4]<=[4,2]T(1,0)", "mesh['x'=4,'y'=2] {'x'}"],
    ids=["lists", "iota", "named"],
)
def test_every_notation_of_groups_is_read(groups):
    line = (
        f"%psum = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    )
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}"
    assert collectives(text, MESH) == [CompiledCollective("all_reduce", ("x",), 16.0, 1)]


def test_collectives_in_a_loop_count_once_per_turn():
    def body(a):
        return lax.scan(lambda c, _: (lax.psum(c, "x") * 0.5, None), a, None, length=3)[0]

    assert found_in(body, (32, 16))["all_reduce", ("x",)] == (4 * 16 * 4, 3)


def test_a_program_without_communication_has_none():
    assert found_in(lambda a: a * 2, (32, 16)) == {}


def test_a_difference_is_reported_with_its_kind_and_axes(small_plan):
    honest = [CompiledCollective(c.kind, c.axes, c.nbytes, c.count) for c in small_plan.collectives]
    assert all(line.difference == 0 for line in compare(small_plan, honest))
    surprise = [*honest, CompiledCollective("all_to_all", ("x",), 1024.0, 2)]
    lines = {(line.kind, line.axes): line for line in compare(small_plan, surprise)}
    assert lines["all_to_all", ("x",)].compiled_bytes == 2048
    assert lines["all_to_all", ("x",)].difference == float("inf")
    missing = [f for f in honest if f.kind != honest[0].kind]
    assert any(line.difference == -1 for line in compare(small_plan, missing))


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "wrn-tiny", "dlrm-tiny"])
def test_predicted_bytes_and_memory_are_near_the_compiled_ones(name):
    """Memory never more than 5 % above the prediction, nor more than 15 % below it."""
    example = build(name)
    arguments = (example.step, example.state, example.batch)
    request = mw.Request(mesh=(4, 2), time_limit=20, gap=0.05)
    plan = mw.plan(*arguments, cluster="8xcpu", donate_argnums=0, request=request)
    audit = mw.lower(plan, *arguments, donate_argnums=0).audit()
    assert abs(audit.difference) < 0.25
    assert -0.15 < audit.memory_difference < 0.05
    assert audit.compiled_peak > 0 and audit.compiled_bytes > 0


def test_a_pipeline_moves_what_was_planned_and_holds_about_as_much():
    """Its programs run as often as the schedule says. A pass keeps what it takes to its end, as plans say."""
    example = build("gpt-tiny", optimizer="sgd", dtype="f32")
    request = mw.Request(pp=2, microbatches=4, recompute="none", schedule="1f1b", time_limit=20)
    arguments = (example.state, example.batch)
    found = mw.plan(example.step, *arguments, cluster="8xcpu", request=request, donate_argnums=0)
    report = mw.lower(found, example.step, *arguments, donate_argnums=0).audit()
    assert abs(report.difference) < 0.02
    assert [part.stages for part in report.ranks] == [(0,), (1,)]
    assert sum(part.compiled_bytes for part in report.ranks) == report.compiled_bytes
    for part in report.ranks:
        # 16 % more in the update: XLA combines all all-reduces of a program that are small (on CPUs, of any size), so
        # all gradients are there at once, transposed, before and after it
        assert 0.75 < sum(part.parts.values()) / part.predicted_peak < 1.2
    assert report.compiled_peak == max(sum(part.parts.values()) for part in report.ranks)
    assert "ranks: collectives above are of all of them" in audit_text(report)


def test_an_audit_names_the_fullest_rank_and_the_one_that_was_to_be():
    ranks = (
        AuditedRank(0, (0,), 0.0, 4096.0, {"held": 1024.0}),
        AuditedRank(1, (1,), 0.0, 3072.0, {"held": 5120.0}),
    )
    report = Audit((), 3072.0, ranks[1].parts, 8192.0, ranks)
    told = "memory of the fullest rank, 1 (planned: rank 0, 4 KiB): 3 KiB predicted, 5 KiB compiled (+66.7%)"
    assert told in audit_text(report)
    alike = replace(report, ranks=(replace(ranks[0], predicted_peak=2048.0), ranks[1]))
    assert "memory of the fullest rank, 1: 3 KiB predicted" in audit_text(alike)
    assert "memory: 3 KiB predicted" in audit_text(replace(report, ranks=())), "no pipeline"
