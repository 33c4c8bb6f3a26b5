"""Scans over layers unrolled on the graph, text in and text out; `test_unstack.py` runs the results."""

from __future__ import annotations

from meshwright.ir.analysis.layer_axes import layer_axes
from meshwright.ir.passes.dead import drop_dead_ops
from meshwright.ir.passes.unroll import unroll_layers
from meshwright.ir.text import parse, show
from meshwright.ir.verify import verify

STEP = """\
in %0: f32[2, 4, 4]
in %1: f32[8, 4]
%5: f32[8, 4] = scan %1 %0 (length=2, num_carry=1, num_consts=0, reverse=False) {
  in %2: f32[8, 4]
  in %3: f32[4, 4]
  %4: f32[8, 4] = dot_general %2 %3 (lhs_batch=(), lhs_contracting=(1,), rhs_batch=(), rhs_contracting=(0,))
  out %4
}
%6: f32[2, 4, 4] = transpose %0 (permutation=(0, 2, 1))
%7: f32[2, 4, 4] = mul %6 %0
out %7 updates %0
out %5
"""
UNROLLED = """\
in %8: f32[4, 4]
in %9: f32[4, 4]
in %1: f32[8, 4]
%10: f32[8, 4] = dot_general %1 %8 (lhs_batch=(), lhs_contracting=(1,), rhs_batch=(), rhs_contracting=(0,))
%11: f32[8, 4] = dot_general %10 %9 (lhs_batch=(), lhs_contracting=(1,), rhs_batch=(), rhs_contracting=(0,))
%12: f32[4, 4] = transpose %8 (permutation=(1, 0))
%14: f32[4, 4] = mul %12 %8
%13: f32[4, 4] = transpose %9 (permutation=(1, 0))
%15: f32[4, 4] = mul %13 %9
out %14 updates %8
out %15 updates %9
out %11
"""


def test_each_layer_has_its_own_ops_and_its_own_state():
    graph = parse(STEP)
    found = unroll_layers(graph, layer_axes(graph))
    made = drop_dead_ops(found.graph)
    verify(made)
    assert show(made) == UNROLLED
    assert found.inputs == found.outputs == ((0, 0, 0), (0, 0, 1), (1, None, 0))
    assert found.notes == ()
    [transpose] = [op for op in graph.ops if op.kind == "transpose"]
    narrow = (("permutation", (1, 0)),)
    assert found.narrowed["transpose", narrow] == transpose.attrs
