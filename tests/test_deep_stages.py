"""Stages of a deep step are cut in seconds."""

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
