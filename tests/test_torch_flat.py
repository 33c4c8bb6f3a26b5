"""What the update does to many small arrays is done once, to all of them end to end, with the same bits."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from meshwright.backends.torch import flat, local_step  # noqa: E402
from meshwright.backends.torch.flat import Together  # noqa: E402
from meshwright.backends.torch.local_step import LocalStep  # noqa: E402
from meshwright.ir.local.program import LocalProgram  # noqa: E402
from meshwright.ir.local.text import parse_local  # noqa: E402

# Two parameters whose gradients are scaled by the largest element of both: what is one, is so on either side of it.
CLIPPED = """\
local 'clipped' on x=1 {
  in %0: f32[4, 6] @ [-, -]
  in %1: f32[6] @ [-]
  in %2: f32[4, 6] @ [-, -]
  in %3: f32[6] @ [-]
  in %4: f32[] @ []
  %5: f32[4, 6] @ [-, -] = abs %2 in update tag 'a' x1
  %6: f32[] @ [] = reduce_max %5 (axes=(0, 1)) in update tag 'b' x1
  %7: f32[6] @ [-] = abs %3 in update tag 'c' x1
  %8: f32[] @ [] = reduce_max %7 (axes=(0,)) in update tag 'd' x1
  %9: f32[] @ [] = max %6 %8 in update tag 'e' x1
  %10: f32[4, 6] @ [-, -] = abs %0 in update tag 'f' x1
  %11: f32[4, 6] @ [-, -] = broadcast_in_dim %9 (broadcast_dimensions=(), shape=(4, 6)) in update tag 'g' x1
  %12: f32[4, 6] @ [-, -] = div %2 %11 in update tag 'h' x1
  %13: f32[4, 6] @ [-, -] = mul %12 %4 in update tag 'i' x1
  %14: f32[4, 6] @ [-, -] = sub %0 %13 in update tag 'j' x1
  %15: f32[6] @ [-] = broadcast_in_dim %9 (broadcast_dimensions=(), shape=(6,)) in update tag 'k' x1
  %16: f32[6] @ [-] = div %3 %15 in update tag 'l' x1
  %17: f32[6] @ [-] = mul %16 %4 in update tag 'm' x1
  %18: f32[6] @ [-] = sub %1 %17 in update tag 'n' x1
  out %14
  out %18
  out %10
}
"""
TOGETHER = ["abs", "broadcast_in_dim", "div", "mul", "sub"]


def entries(program: LocalProgram) -> list[Any]:
    kept = set(program.outputs)
    return flat.flattened(program, program.ops, local_step._read, kept)


def together(program: LocalProgram) -> list[str]:
    return [each.ops[0].kind for each in entries(program) if isinstance(each, Together)]


def given() -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = ((4, 6), (6,), (4, 6), (6,), ())
    return [torch.randn(shape, generator=source) for shape in shapes]


def test_ops_that_do_the_same_become_one_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    program = parse_local(CLIPPED)
    assert together(program) == TOGETHER
    found = LocalStep(program, {})(*given())
    freed = [c for each in entries(program) if isinstance(each, Together) for c in each.last]
    assert len(freed) == len({*freed}) == 8  # three that are given, five that are made
    monkeypatch.setattr(local_step, "flattened", lambda program, ops, read, kept: list(ops))
    for one, other in zip(found, LocalStep(program, {})(*given()), strict=True):
        assert torch.equal(one, other)


def test_what_is_between_them_lies_end_to_end_alone():
    each = {e.ops[0].kind: e for e in entries(parse_local(CLIPPED)) if isinstance(e, Together)}
    assert [each[kind].split for kind in TOGETHER] == [True, False, False, False, True]
    assert each["div"].inputs == (2, 3) and each["mul"].inputs == (4,)


def test_large_arrays_and_other_phases_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    assert not together(parse_local(CLIPPED.replace("in update", "in backward")))
    monkeypatch.setattr(flat, "SMALL", 8)
    assert not together(parse_local(CLIPPED))
