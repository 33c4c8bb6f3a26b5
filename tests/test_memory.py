"""Memory by liveness: the folded graph tells the same peak as the whole one."""

from functools import cache

import jax
import jax.numpy as jnp
import optax
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.analysis.roles import roles
from meshwright.ir.execution_model import execution_model
from meshwright.ir.passes.microbatch import TimeAxis
from meshwright.ir.passes.recompute import POLICIES
from meshwright.ir.program import prepare
from meshwright.models import build
from meshwright.planner.memory.ledger import least_peak
from meshwright.planner.memory.lifetimes import lifetimes
from meshwright.planner.memory.storage import storage_of
from meshwright.planner.search.meshes import mesh_of

S = jax.ShapeDtypeStruct


@cache
def folded(name: str, layers: int):
    example = build(name, layers=layers)
    return fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph)


def peak(graph, policy: str, count: int, kind: str = "tpu") -> float | None:
    program = prepare(graph, policy)
    if count > 1 and not isinstance(program.time, TimeAxis):
        return None
    lives = lifetimes(
        program, count, roles(program.graph), storage_of(program, execution_model(kind))
    )
    return least_peak(lives, mesh_of((1,)))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny"])
@pytest.mark.parametrize("kind", ["cpu", "tpu", "cuda"])
def test_a_folded_graph_has_the_peak_of_the_whole_one(kind, name, policy, count):
    """Recomputed values and copies of a middle layer are not alive in all layers at once."""
    found = folded(name, 8)
    assert len(found.small.ops) < len(found.whole.ops)
    small, whole = (peak(graph, policy, count, kind) for graph in (found.small, found.whole))
    assert small == whole is None or whole * 0.995 <= small <= whole * 1.1


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_recompute_needs_less_the_more_it_recomputes(name):
    found = folded(name, 8)
    peaks = [peak(found.small, policy, 1) for policy in ("none", "selective", "full")]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.7 * peaks[0]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
@pytest.mark.parametrize("name", ["gpt-tiny", "gpt-tiny-scan", "wrn-tiny"])
def test_the_backward_pass_goes_on_from_what_holds_a_copy_back(name, policy):
    """XLA drops what a barrier holds and nobody reads; the copies would then be free to start early."""
    example = build(name)
    program = prepare(
        fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph).whole,
        policy,
    )
    visits = program.graph.visits
    read = {v for visit in visits for v in visit.op.inputs}
    read |= {v for visit in visits for region in visit.op.regions for v in region.outputs}
    holds = [
        visit.op
        for visit in visits
        if visit.op.kind == "optimization_barrier" and "hold" in visit.op.tag
    ]
    phase_of = {
        v: phase
        for op, phase in zip(program.graph.ops, program.phases, strict=True)
        for v in op.outputs
    }
    assert holds and all(read.issuperset(op.outputs) for op in holds)
    gated = [
        op for op in holds if any(phase_of.get(v, "backward") == "backward" for v in op.inputs)
    ]
    assert len(gated) >= len(holds) - 1  # the first may wait for nothing


def test_a_70b_model_fits_on_128_tpus_of_16_gib():
    example = build("llama3-70b-scan", batch=1024)
    found = fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph)
    program = prepare(found.small, "full")
    lives = lifetimes(
        program, 64, roles(program.graph), storage_of(program, execution_model("tpu"))
    )
    assert least_peak(lives, mesh_of((128,))) < 16 * 2.0**30


@pytest.mark.parametrize("accumulate", [False, True])
def test_new_state_beside_old_has_its_own_memory_as_in_the_compiled_program(accumulate):
    """Widths for which the forward pass, the update and the compiler's packing of temporaries each count."""
    inner = optax.adamw(1e-3)
    optimizer = optax.MultiSteps(inner, 4) if accumulate else inner

    def step(p, state, x):
        gradient = jax.grad(lambda p: jnp.mean((jax.nn.relu(x @ p["a"]) @ p["b"] - x) ** 2))(p)
        updates, state = optimizer.update(gradient, state, p)
        return optax.apply_updates(p, updates), state

    p = {"a": S((1024, 4096), jnp.float32), "b": S((4096, 1024), jnp.float32)}
    args = p, jax.eval_shape(optimizer.init, p), S((1024, 1024), jnp.float32)
    plan = mw.plan(step, *args, cluster="h100x8", request=mw.Request(overlap="none"))
    stats = lower(plan, capture(step, *args)).compiled.memory_analysis()
    compiled = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    assert plan.estimate.peak_bytes == pytest.approx(compiled, rel=0.06)


@pytest.mark.parametrize("keys", ["folded in", "split"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_layers_with_keys_of_their_own_are_one_block_and_all_counted(keys, policy):
    """Their keys alone told layers apart: backward passes were folded, forward ones were not."""

    def step(layers, key, x):
        of = jax.random.split(key, len(layers)) if keys == "split" else None

        def loss(layers):
            h = x
            for i, p in enumerate(layers):
                y = jnp.tanh(h @ p["a"]) @ p["b"]
                own = jax.random.fold_in(key, 77 * i) if of is None else of[i]
                h = h + jnp.where(jax.random.bernoulli(own, 0.9, y.shape), y / 0.9, 0.0)
            return jnp.mean(h**2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, jax.grad(loss)(layers))

    layers = [{"a": S((64, 256), jnp.float32), "b": S((256, 64), jnp.float32)} for _ in range(8)]
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = fold(capture(step, layers, key, S((256, 64), jnp.float32), donate_argnums=0).graph)
    assert len(found.small.ops) < 0.55 * len(found.whole.ops)
    small, whole = (peak(graph, policy, 1) for graph in (found.small, found.whole))
    assert whole * 0.995 <= small <= whole * 1.1


def test_a_block_whose_layers_read_unlike_activations_is_not_folded():
    """Layers that differ in a number have no block; their backward passes are alike, but read what each layer left."""

    def step(layers, x):
        def loss(layers):
            h = x
            for i, w in enumerate(layers):
                h = h + jnp.where(h > 0.1 * i, jnp.tanh(h @ w), 0.0)
            return jnp.mean(h**2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, jax.grad(loss)(layers))

    layers = [S((64, 64), jnp.float32)] * 8
    found = fold(capture(step, layers, S((4096, 64), jnp.float32), donate_argnums=0).graph)
    for policy in ("none", "full"):
        small, whole = (peak(graph, policy, 1) for graph in (found.small, found.whole))
        assert whole * 0.995 <= small <= whole * 1.1
