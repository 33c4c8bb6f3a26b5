"""How the ops of a step are shared out: deep steps in seconds, updates where they hold least."""

import time
from collections import Counter

import pytest

from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.execution_model import execution_model
from meshwright.ir.pipeline.stages import cut_stages
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.pipeline.passes import Passes
from meshwright.planner.pipeline.units import Cut, find_units

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


@pytest.mark.parametrize("name, optimizer", [("gpt-tiny", "adamw"), ("llama-tiny", "sgd")])
def test_layers_that_stand_for_others_update_in_the_rounds_of_real_stages(name, optimizer):
    """Memory is priced on a folded step, in which nothing reads the squares of most layers' gradients, as the sum that
    reads them is of layers folded away. They are made in the first round nevertheless, and gradients kept for the next.
    """
    example = build(name, optimizer=optimizer, layers=8)
    folded = fold(capture(example.step, example.state, example.batch).graph)
    program, small = prepare(folded.whole, "none"), prepare(folded.small, "none")
    units = find_units(folded, small, 2)
    cuts = [units.cuts[first] for first in units.evenly(2)]
    real = cut_stages(program, folded.whole, cuts, 4)
    passes = Passes(Cut.of(units, small, folded.small, 4), 4, execution_model("cuda"), splits=False)
    assert len(passes.parts) == 3 + len(passes.cut.stages.updates)

    def kinds(graph, ops):
        return Counter(
            (op.kind, shape) for op in ops if (shape := graph.types[op.outputs[0]].shape)
        )

    for_one = {op.outputs for op in passes.cut.stages.updates[0][units.middle].ops}
    in_first = [op for op in passes.parts[3].program.graph.ops if op.outputs in for_one]
    expected = kinds(program.graph, (op for stage in real.updates[0] for op in stage.ops))
    found = kinds(small.graph, in_first)
    assert found[("square", (64,))] and not found - expected
    assert all(expected[each] >= 8 * many for each, many in found.items())
