"""How the ops of a step are shared out: deep steps in seconds, updates where they hold least."""

import time

import pytest

from meshwright.backends.xla.capture import capture
from meshwright.ir.blocks import fold
from meshwright.ir.program import prepare
from meshwright.ir.stages import cut_stages
from meshwright.models import build

from .pipelines import even_cuts


@pytest.mark.slow
def test_ninety_six_layers_are_cut_into_eight_stages_within_seconds():
    """60 000 ops; a norm over all gradients is a chain of a thousand additions."""
    example = build("gpt-tiny", optimizer="adamw", dtype="f32", layers=96)
    captured = capture(example.step, example.state, example.batch)
    whole = fold(captured.graph).whole
    program = prepare(whole, "none")
    begin = time.perf_counter()
    cut = cut_stages(program, whole, even_cuts(captured, 8), 4)
    assert time.perf_counter() - begin < 15
    assert len(program.graph.ops) > 50_000 and cut.count == 8


def test_updates_wait_for_the_round_that_needs_them():
    """Where gradients are clipped by their norm, Adam's moments wait for it as they are: what the first round makes of
    them (m * b1, v * b2, w * decay), in as many bytes as they have, would be held until then."""
    example = build("gpt-tiny", optimizer="adamw", dtype="f32", layers=4)
    captured = capture(example.step, example.state, example.batch)
    program = prepare(fold(captured.graph).whole, "none")
    cut = cut_stages(program, program.graph, even_cuts(captured, 2), 4)
    first, *rest = cut.updates
    assert rest and any(op.kind == "mul" for each in rest[-1] for op in each.ops)
    writer = {v: op.kind for op in program.graph.ops for v in op.outputs}
    for fragment in first:
        given = {writer[v] for v in fragment.gives if program.graph.types[v].rank}
        assert fragment.sends and given == {"copy"}  # gradients as the update takes them
