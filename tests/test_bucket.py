"""Collectives of the update in buckets: fewer of the same bytes, each as soon as it is full, and the same results."""

from __future__ import annotations

import pytest

from meshwright.ir.local.program import LocalProgram
from meshwright.ir.local.text import parse_local
from meshwright.ir.passes import bucket
from meshwright.ir.passes.bucket import Bucket
from meshwright.ir.passes.contract import run_passes

GRADIENTS = """\
local 'gradients' on x=2 {
  in %0: f32[8, 4] @ [-, -] partial x
  in %1: f32[4] @ [-] partial x
  in %2: f32[2, 4] @ [x, -]
  %3: f32[8, 4] @ [-, -] = all_reduce %0 (axes=('x',), reduction='sum') in update for 'a' x1
  %4: f32[8, 4] @ [-, -] = neg %3 in update tag 'a' x1
  %5: f32[4] @ [-] partial x = neg %1 in backward tag 'b' x1
  %6: f32[4] @ [-] = all_reduce %5 (axes=('x',), reduction='sum') in update for 'c' x1
  %7: f32[4] @ [-] = neg %6 in update tag 'c' x1
  %8: f32[4] @ [-] = all_reduce %1 (axes=('x',), reduction='sum') in update for 'd' x1
  %9: f32[4, 4] @ [-, -] = all_gather %2 (axes=('x',), dim=0) in update for 'e' x1
  %10: f32[4, 4] @ [-, -] = all_gather %2 (axes=('x',), dim=0) in forward for 'f' x1
  out %4
  out %7
  out %8
  out %9
  out %10
}
"""


def told(program: LocalProgram) -> list[str]:
    return [f"{op.kind} {len(op.inputs)}" for op in program.ops]


def after(text: str = GRADIENTS) -> list[str]:
    program = run_passes(parse_local(text), [Bucket()])
    assert parse_local(str(program)) == program
    return told(program)


def test_what_is_made_before_any_result_is_read_goes_together_as_soon_as_it_is_made():
    assert after() == [
        "all_reduce 2", "all_gather 1", "neg 1", "neg 1", "all_reduce 1", "neg 1", "all_gather 1",
    ]  # fmt: skip


def test_a_full_bucket_is_closed_and_the_next_is_larger(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket, "FIRST", 128)
    assert after() == [
        "all_reduce 1", "all_gather 1", "neg 1", "neg 1", "all_reduce 2", "neg 1", "all_gather 1",
    ]  # fmt: skip


def test_what_is_large_stays_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket, "LARGEST", 64)
    assert after()[0] == "all_reduce 1" and after().count("all_reduce 2") == 1
    monkeypatch.setattr(bucket, "LARGEST", 8)
    assert after().count("all_reduce 1") == 3
