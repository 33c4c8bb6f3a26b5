"""What stages save: as little as trying everything finds, the same results, and no other price."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import composed
from meshwright.ir.graph import Graph
from meshwright.ir.mesh import Mesh
from meshwright.ir.ops import VIEWS
from meshwright.ir.passes.saved import CHEAP, STORED, WITHIN, save_less
from meshwright.ir.program import Program, prepare
from meshwright.planner.cost.kernels import kernels_of
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build
from meshwright.recipe import make

from .local_interpreter import evaluate
from .random_graphs import random_graph


def passes(graph: Graph) -> list[str]:
    """The first half of the ops is the forward pass, the rest the backward pass."""
    half = len(graph.ops) // 2
    return ["forward" if at < half else "backward" for at in range(len(graph.ops))]


def saved(graph: Graph, phases) -> set[int]:
    """What ops of the forward pass make and those of the backward pass read."""
    made = {
        v
        for op, phase in zip(graph.ops, phases, strict=True)
        if phase == "forward"
        for v in op.outputs
    }
    read = {
        v
        for op, phase in zip(graph.ops, phases, strict=True)
        if phase == "backward"
        for v in op.inputs
    }
    return made & read


def size(graph: Graph, values) -> int:
    return sum(graph.types[v].nbytes for v in values)


def least(graph: Graph, phases) -> int:
    """By trying all sets of ops that may be run again."""
    forward = [op for op, phase in zip(graph.ops, phases, strict=True) if phase == "forward"]
    wanted, stored = saved(graph, phases), set(graph.outputs)
    for op, phase in zip(reversed(graph.ops), reversed(phases), strict=True):
        if phase == "backward" and (
            op.kind in STORED or (op.kind in VIEWS and not stored.isdisjoint(op.outputs))
        ):
            stored.update(op.inputs)
    free = [op for op in forward if op.kind in CHEAP and stored.isdisjoint(op.outputs)]
    made = {v for op in forward for v in op.outputs}
    sizes = []
    for many in range(len(free) + 1):
        for again in combinations(free, many):
            values = {v for op in again for v in op.outputs}
            read = wanted | {v for op in again for v in op.inputs if v in made}
            sizes.append(size(graph, read - values))
    return min(sizes)


def pairs(seed: int) -> tuple[Graph, list[str], Graph, list[str]]:
    graph = random_graph(seed)
    phases = passes(graph)
    less = save_less(graph, phases)
    phase_of = {op.outputs: phase for op, phase in zip(graph.ops, phases, strict=True)}
    return graph, phases, less, [phase_of.get(op.outputs, "backward") for op in less.ops]


def test_no_set_of_ops_to_run_again_saves_less():
    changed = 0
    for seed in range(300):
        graph, phases, less, after = pairs(seed)
        assert size(less, saved(less, after)) == least(graph, phases), seed
        changed += less is not graph
    assert changed > 30


@pytest.mark.parametrize("seed", range(60))
def test_results_are_the_same(seed):
    graph, _, less, _ = pairs(seed)
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=graph.types[v].shape) for v in graph.inputs]
    for one, other in zip(evaluate(graph, inputs), evaluate(less, inputs), strict=True):
        np.testing.assert_array_equal(one, other)


def prepared(model: str, in_stages: bool, **more: int) -> Program:
    graph = make({"model": model, **more}).capture(True).graph
    return prepare(fold(composed(graph, "fused")).small, "none", in_stages)


def of_layers(program: Program) -> int:
    """Bytes that the passes of the layers hand on, which are `block1`."""
    made = {
        v
        for op, phase in zip(program.graph.ops, program.phases, strict=True)
        if phase == "forward" and op.tag.startswith("block1.")
        for v in op.outputs
    }
    return size(program.graph, made & saved(program.graph, program.phases))


def test_a_layer_of_experts_saves_less_than_half():
    """Of the experts' layer two products and what the third reads, not all that gradients are made of."""
    shape = {"batch": 8, "seq": 2048, "layers": 4}
    whole, stages = (prepared("mixtral-8x7b", each, **shape) for each in (False, True))
    assert 0 < of_layers(stages) < 0.5 * of_layers(whole)


def test_a_pass_by_itself_has_clones_without_their_first_ops():
    """They are ops as any others there."""
    whole = prepared("gpt-tiny", True)
    pairs = zip(whole.graph.ops, whole.phases, strict=True)
    ops = tuple(op for op, phase in pairs if phase == "backward")
    made = {v for op in ops for v in op.outputs}
    read = dict.fromkeys(v for op in ops for v in op.inputs if v not in made)
    graph = replace(
        whole.graph, ops=ops, inputs=tuple(v for v in read if v not in whole.graph.constant_ids),
        outputs=ops[-1].outputs, state=(), input_tags=(), input_counts=(), input_names=(), output_names=(),
    )  # fmt: skip
    kernels = kernels_of(Program(graph, ("backward",) * len(ops), whole.time))
    clones = [op for op in ops if op.tag.endswith(WITHIN) and op.outputs[0] in kernels.chains]
    assert any(kernels.chains[op.outputs[0]].work > 0 for op in clones)


@pytest.mark.parametrize("model", ["gpt-tiny", "llama-tiny", "mixtral-tiny", "vit-tiny"])
def test_it_costs_what_one_program_costs(model):
    """There XLA makes the same values again, and they are priced as if written once and read."""
    cost = Roofline(Cluster.parse("h100x8"))

    def seconds(program: Program) -> float:
        space = build(program, 1, cost, Layouts(cost.collectives(Mesh.of(x=1))))
        return sum(float(own[0]) * space.runs[tag] for tag, own in space.own.items())

    whole, stages = (prepared(model, each) for each in (False, True))
    assert any(op.tag.endswith(WITHIN) for op in stages.graph.ops)
    assert seconds(stages) == pytest.approx(seconds(whole), rel=1e-3)
