"""The sharded step equals the single-device step: outputs, updated state and gradients.

SGD with momentum and float32 throughout, so that the updated parameters and the
momentum *are* the gradients: Adam would hide an error of scale.
"""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import reference, verify_outputs
from meshwright.ir.errors import InfeasibleError, PlanError, StoppedError
from meshwright.ir.passes.recompute import POLICIES
from meshwright.models import build
from meshwright.planner.request import Request

ZOO = (
    "gpt-tiny", "gpt-tiny-scan", "llama-tiny", "llama-tiny-scan", "mixtral-tiny", "vit-tiny", "wrn-tiny", "dlrm-tiny",
)  # fmt: skip
MESHES = ((8,), (4, 2), (2, 2, 2))
QUICK = {("gpt-tiny-scan", (4, 2))}
RECOMPUTED = {("gpt-tiny", "full"), ("gpt-tiny-scan", "selective")}


@functools.cache
def case(name: str):
    """The captured step, its inputs and what one device makes of them."""
    example = build(name, optimizer="sgd", dtype="f32")
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    leaves, tree = jax.tree.flatten((state, batch))
    flat = jax.jit(lambda *leaves: example.step(*jax.tree.unflatten(tree, leaves)))
    truth = reference(flat, captured, leaves)
    return captured, (state, batch), replace(truth, tolerance=0.0)  # f32 throughout: strict


def check(name: str, **request) -> float:
    """Plan, run, compare; returns the plan's peak bytes."""
    captured, inputs, expected = case(name)
    found = plan_captured(captured, "8xcpu", Request(time_limit=20, gap=0.05, **request), name)
    results = lower(found, captured).jitted(*jax.tree.map(np.asarray, jax.tree.leaves(inputs)))
    verify_outputs(expected, results, captured.graph.output_names)
    return found.estimate.peak_bytes


def cases():
    for name in ZOO:
        for mesh in MESHES:
            marks = () if (name, mesh) in QUICK else pytest.mark.slow
            yield pytest.param(name, mesh, id=f"{name}-{'x'.join(map(str, mesh))}", marks=marks)


@pytest.mark.parametrize(("name", "mesh"), cases())
def test_free_and_squeezed_plans_equal_one_device(name, mesh):
    peak = check(name, mesh=mesh)
    least = least_needed(name, mesh)
    for share in (0.2, 0.4, 0.6, 0.8):
        try:
            check(name, mesh=mesh, memory=least + share * (peak - least))
        except (InfeasibleError, StoppedError):  # a slow machine may find nothing in time
            continue
        return
    raise AssertionError(f"{name} fits in {peak} bytes and in nothing less")


def least_needed(name: str, mesh: tuple[int, ...]) -> float:
    """Bytes that a refusal names as the least any layout could need."""
    try:
        plan_captured(case(name)[0], "8xcpu", Request(mesh=mesh, memory=1.0, time_limit=120), name)
    except InfeasibleError as error:
        return error.needed_bytes
    raise AssertionError("a plan in one byte")


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=() if (name, policy) in RECOMPUTED else pytest.mark.slow)
        for name in ("gpt-tiny", "gpt-tiny-scan")
        for policy in ("elementwise", "selective", "full")
    ],
)
def test_recompute_and_microbatches_change_no_result(name, policy):
    check(name, mesh=(4, 2), recompute=policy, microbatches=2)


@pytest.mark.parametrize("mesh", [(8,), (2, 4)], ids=str)
def test_a_microbatch_has_the_same_rows_in_every_layout(mesh):
    """Tokens replicated, targets cut: each device takes its own part of the same examples."""
    check("gpt-tiny-scan", mesh=mesh, recompute="none", microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_whatever_is_pinned_changes_no_result(name):
    rng = np.random.default_rng(7)
    peak, ran = check(name, mesh=(8,)), 0
    for _ in range(12):
        pins = {
            "mesh": MESHES[rng.integers(len(MESHES))],
            "recompute": [None, *POLICIES][rng.integers(len(POLICIES) + 1)],
            "microbatches": [None, 1, 2, 4][rng.integers(4)],
            "memory": float(rng.uniform(0.2, 1.2)) * peak,
            "seed": int(rng.integers(100)),
        }
        try:
            check(name, **pins)
        except PlanError:  # infeasible, or no microbatches in this model
            continue
        ran += 1
    assert ran
