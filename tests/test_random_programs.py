"""Random training steps equal plain jax, or are refused by name: `random_programs` as a test.

The seeds are ranges: a new failure is met by mending its kind, not by another range.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.graph import Graph
from meshwright.ir.passes.microbatch import TimeAxis
from meshwright.ir.program import prepare

from .outcomes import Outcome, summary
from .random_programs import children, run_seed
from .random_steps import random_step


def check(outcome: Outcome) -> None:
    assert outcome.kind in ("ok", "refused"), str(outcome)


@pytest.mark.parametrize("seed", range(6))
def test_steps_equal_plain_jax(seed):
    check(run_seed(seed, pipelines=False))


@pytest.mark.parametrize("seed", range(3))
def test_pipelines_equal_plain_jax(seed):
    check(run_seed(seed, pipelines=True))


@pytest.mark.slow
@pytest.mark.parametrize("pipelines", [False, True])
def test_five_hundred_equal_plain_jax(pipelines):
    lines = list(children(list(range(500)), pipelines))
    assert not [line for line in lines if line.split()[1] in ("WRONG", "CRASH")], summary(lines)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("seed", range(3))
def test_the_small_graph_decides_all_that_the_whole_one_asks(seed, policy):
    made = random_step(seed, pipelines=True)
    graphs = fold(capture(made.step, *made.args).graph)
    decided, asked = (forms(prepare(graph, policy).graph) for graph in (graphs.small, graphs.whole))
    assert asked.items() <= decided.items()


def test_loops_of_layers_stay_as_they_were_where_totals_are_taken_early():
    """Who reads a gradient may be folded away: in the small graph nobody does, and it is made all the same."""

    def step(state, batch):
        def loss(weights):
            x = batch["x"]
            for w in weights:
                x = lax.fori_loop(0, 2, lambda _, x, w=w: jnp.tanh(x @ w["a"] + x @ w["b"]), x)
            return jnp.sum(jnp.mean(x**2, -1) * batch["mask"]) / jnp.sum(batch["mask"])

        slopes = jax.grad(loss)(state["w"])
        moved = jax.tree.map(lambda m, g: 0.9 * m + g, state["m"], slopes)
        return {"w": jax.tree.map(lambda w, m: w - m, state["w"], moved), "m": moved}

    weights = [{"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))} for _ in range(4)]
    batch = {"x": jnp.ones((8, 4)), "mask": jnp.ones(8)}
    graphs = fold(capture(step, {"w": weights, "m": weights}, batch).graph)
    decided, asked = (forms(prepare(graph, "none").graph) for graph in (graphs.small, graphs.whole))
    assert isinstance(prepare(graphs.small, "none").time, TimeAxis)
    assert asked.items() <= decided.items()


def forms(graph: Graph) -> dict[str, tuple]:
    """By tag, what decisions on an op depend on. Copies and barriers show what others made."""
    types = lambda values: tuple(graph.types[v] for v in values)  # noqa: E731
    ops = [
        visit.op for visit in graph.visits if visit.op.kind not in ("copy", "optimization_barrier")
    ]
    return {op.tag: (op.kind, types(op.inputs), types(op.outputs)) for op in ops}


def test_a_seed_is_one_program():
    first, again = random_step(11, True), random_step(11, True)
    assert first.words == again.words and first.request == again.request
    assert first.words != random_step(11, False).words


def test_a_wrong_number_is_told(monkeypatch):
    """What moves a parameter by a hundredth of its step too little is wrong."""

    def nearly(step, **asked):
        def run(state, batch):
            new, told = jax.jit(step)(state, batch)
            less = jax.tree.map(
                lambda old, to: old + 0.99 * (to - old), state["params"], new["params"]
            )
            return {**new, "params": less}, told

        return run

    monkeypatch.setattr(mw, "parallelize", nearly)
    assert run_seed(3, pipelines=False).kind == "WRONG"


def test_refusals_are_counted_by_reason():
    lines = [f"{n} refused | batch of {n} ; where x | words" for n in (7, 9)] + ["1 ok | words"]
    counted = "3 programs: 1 ok, 2 refused, 0 WRONG, 0 CRASH"
    assert summary(lines).splitlines() == [counted, "    2  refused batch of #"]


def test_stages_begin_where_they_were_planned_though_keys_are_made_first():
    """Noise on gradients: keys are made after the layers, and moved before them."""
    optimizer = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), optax.sgd(0.1))

    def step(weights, state, x):
        def loss(weights):
            h = x
            for w in weights:
                h = h + jnp.tanh(h @ w)
            return jnp.mean(h**2)

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    weights = [jnp.eye(16)] * 4
    args = weights, optimizer.init(weights), jnp.ones((16, 16))
    request = {"pp": 4, "microbatches": 4, "program": "stages", "time_limit": 15}
    found = mw.parallelize(step, cluster="8xcpu", **request)(*args)
    for ours, wanted in zip(found[0], jax.jit(step)(*args)[0], strict=True):
        assert jnp.allclose(jax.device_get(ours), wanted, rtol=1e-5, atol=1e-6)  # noise is 1e-2
