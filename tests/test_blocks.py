"""Repeated layers are found by structure, whatever their number."""

import jax
import pytest

from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.passes.recompute import POLICIES
from meshwright.ir.program import prepare
from meshwright.models import build


def folded(name: str, **options):
    example = build(name, **options)
    return fold(capture(example.step, example.state, example.batch).graph)


def test_the_small_graph_does_not_grow_with_depth():
    sizes = {layers: folded("gpt-tiny", layers=layers) for layers in (6, 12)}
    kept = {layers: [op for op in f.small.ops if "." in op.tag] for layers, f in sizes.items()}
    assert len(sizes[12].whole.ops) > 1.7 * len(sizes[6].whole.ops)
    assert len(kept[12]) == len(kept[6])


def test_counts_of_the_small_graph_add_up_to_the_whole():
    found = folded("gpt-tiny", layers=8)
    assert sum(op.count for op in found.small.ops) == len(found.whole.ops)
    assert sum(found.small.input_counts) == len(found.whole.inputs)


def test_every_tag_of_the_whole_graph_is_in_the_small_one():
    found = folded("llama-tiny", layers=6)
    assert {op.tag for op in found.whole.ops} == {op.tag for op in found.small.ops}
    assert set(found.whole.input_tags) == set(found.small.input_tags)


@pytest.mark.parametrize("policy", POLICIES)
def test_passes_give_both_graphs_the_same_tags(policy):
    found = folded("gpt-tiny", layers=6)
    small, whole = prepare(found.small, policy), prepare(found.whole, policy)
    assert {op.tag for op in whole.graph.ops} == {op.tag for op in small.graph.ops}


def test_equal_layers_become_one_block_with_their_number():
    found = folded("gpt-tiny", layers=7)
    forward = max(found.blocks, key=lambda block: block.period)
    assert forward.repeats == 7


def test_layers_of_a_scan_stay_in_their_loop():
    found = folded("gpt-tiny-scan", layers=6)
    assert found.blocks == ()
    assert {op.trips for op in found.small.ops if op.kind == "scan"} == {6}


def test_different_layers_are_not_tied():
    def step(w, x):
        for i in range(4):
            x = jax.numpy.tanh(x @ w[i])
        return w, x.sum()

    shapes = [(8, 16), (16, 4), (4, 32), (32, 8)]
    w = [jax.ShapeDtypeStruct(s, "float32") for s in shapes]
    graph = capture(step, w, jax.ShapeDtypeStruct((8, 8), "float32")).graph
    assert fold(graph).blocks == ()
