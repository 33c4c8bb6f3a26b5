"""Gradients of weights may be settled where the backward pass makes them, as FSDP does, or owed until the update."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.audit import audit
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import reference, verify_outputs
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.mesh import Axis, Mesh
from meshwright.ir.passes.copies import SETTLING, settles
from meshwright.ir.pipeline.stage_places import Classes, Places
from meshwright.ir.plan import Plan
from meshwright.ir.program import prepare
from meshwright.ir.rules.rule import NONE, Strategy, owing
from meshwright.models import build
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import build as build_space
from meshwright.planner.request import Request

LAYERS, WIDTH, BATCH = 6, 256, 512
WEIGHTS = 4 * LAYERS * WIDTH * WIDTH  # bytes


def loss(params, x, y):
    for weight, bias in params:
        x = jnp.tanh(x @ weight + bias)
    return jnp.mean((x - y) ** 2)


def with_momentum(params, momentum, x, y):
    """Parameters and momentum are gradients, scaled: an optimizer that reads each gradient once."""
    found, gradients = jax.value_and_grad(loss)(params, x, y)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum, found


def by_signs(params, x, y):
    return jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, jax.grad(loss)(params, x, y))


def arguments():
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    params = [(jax.random.normal(key, (WIDTH, WIDTH)) / 16, jnp.zeros(WIDTH)) for key in keys[2:]]
    x, y = (jax.random.normal(key, (BATCH, WIDTH)) for key in keys[:2])
    return params, jax.tree.map(jnp.zeros_like, params), x, y


@cache
def case():
    args = arguments()
    leaves, tree = jax.tree.flatten(args)
    captured = capture(with_momentum, *args, donate_argnums=(0, 1))
    flat = jax.jit(lambda *leaves: with_momentum(*jax.tree.unflatten(tree, leaves)))
    return captured, [np.asarray(leaf) for leaf in leaves], reference(flat, captured, leaves)


@cache
def sharded() -> Plan:
    """State in shards, in memory that does not hold all gradients whole."""
    request = Request(mesh=(8,), microbatches=1, recompute="none", memory=1.3 * 2**20, gap=0.01)
    return plan_captured(case()[0], "8xcpu", request, "mlp")


def owing_all(plan: Plan) -> Plan:
    """The same plan, but gradients owe their sums until the update."""
    later = {
        tag: (owing(0),) * len(codes)
        for tag, codes in plan.strategies.items()
        if tag.endswith(SETTLING)
    }
    return plan.model_copy(update={"strategies": {**plan.strategies, **later}})


def test_a_sharded_step_scatters_each_gradient_as_it_is_made():
    plan = sharded()
    scattered = [c for c in plan.collectives if c.kind == "reduce_scatter"]
    assert {c.phase for c in scattered} == {"backward"}
    assert sum(c.nbytes * c.count for c in scattered) == WEIGHTS
    assert plan.estimate.memory["gradients"] < WEIGHTS / 4


def test_as_many_bytes_are_scattered_as_planned():
    [line] = [
        line for line in audit(lower(sharded(), case()[0])).lines if line.kind == "reduce_scatter"
    ]
    assert (line.compiled_bytes, line.compiled_count) == (
        line.predicted_bytes,
        line.predicted_count,
    )


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_settled_at_once_or_later_a_step_equals_one_device(microbatches, later):
    captured, leaves, truth = case()
    plan = (owing_all(sharded()) if later else sharded()).model_copy(
        update={"microbatches": microbatches}
    )
    lowered = lower(plan, captured)
    scattered = [line for line in audit(lowered).lines if line.kind == "reduce_scatter"]
    assert sum(line.compiled_count for line in scattered) == (1 if later else microbatches) * LAYERS
    verify_outputs(truth, lowered.jitted(*leaves), captured.graph.output_names)


@pytest.mark.parametrize("step", [with_momentum, by_signs])
def test_weights_may_owe_whatever_the_optimizer_does_with_them(step):
    """A sign cannot be taken of a sum that is owed; that does not take the choice from the gradient."""
    args = arguments() if step is with_momentum else (arguments()[0], *arguments()[2:])
    program = prepare(fold(capture(step, *args).graph).small, "none")
    copies = [op for op in program.graph.ops if settles(op)]
    ranks = [program.graph.types[op.inputs[0]].rank for op in copies for _ in range(op.count)]
    assert sorted(ranks) == [1] * LAYERS + [2] * LAYERS  # biases, weights
    layouts = Layouts(Roofline(Cluster.parse("8xcpu")).collectives(Mesh((Axis("x", 8),))))
    space = build_space(program, 4, Roofline(Cluster.parse("8xcpu")), layouts)
    for op in copies:
        cuts = {Strategy((dim,)) for dim in range(program.graph.types[op.inputs[0]].rank)}
        choices = space.nodes[space.op_node[op.tag]].choices
        assert {Strategy((owing(0),)), Strategy((NONE,))} | cuts == set(choices)


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny", "dlrm-tiny"])
def test_a_gradient_and_its_copy_lie_on_one_stage(name):
    example = build(name)
    graph = fold(capture(example.step, example.state, example.batch).graph).whole
    program = prepare(graph, "none")
    cuts = [0, len(graph.ops) // 12, len(graph.ops) // 6]
    placed = Places(Classes(program), graph, cuts).backward
    stage_of = {v: each.stage for each in placed for v in each.op.outputs}
    copies = [op for op in program.graph.ops if settles(op)]
    assert len(copies) > 3
    assert all(stage_of[op.inputs[0]] == stage_of[op.outputs[0]] for op in copies)
