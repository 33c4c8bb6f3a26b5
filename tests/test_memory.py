"""Memory by liveness: the folded graph tells the same peak as the whole one."""

from functools import cache

import pytest

from meshwright.backends.xla.capture import capture
from meshwright.ir.blocks import fold
from meshwright.ir.microbatch import TimeAxis
from meshwright.ir.program import prepare
from meshwright.ir.recompute import POLICIES
from meshwright.ir.roles import roles
from meshwright.models import build
from meshwright.planner.memory.ledger import least_peak
from meshwright.planner.memory.lifetimes import lifetimes
from meshwright.planner.memory.storage import as_xla
from meshwright.planner.meshes import mesh_of


@cache
def folded(name: str, layers: int):
    example = build(name, layers=layers)
    return fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph)


def peak(graph, policy: str, count: int) -> float | None:
    program = prepare(graph, policy)
    if count > 1 and not isinstance(program.time, TimeAxis):
        return None
    lives = lifetimes(program, count, roles(program.graph), as_xla(program, "cuda"))
    return least_peak(lives, mesh_of((1,)))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny"])
def test_a_folded_graph_has_the_peak_of_the_whole_one(name, policy, count):
    """Recomputed values and copies of a middle layer are not alive in all layers at once."""
    found = folded(name, 8)
    assert len(found.small.ops) < len(found.whole.ops)
    small, whole = peak(found.small, policy, count), peak(found.whole, policy, count)
    assert small == whole is None or whole * 0.995 <= small <= whole * 1.1


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_recompute_needs_less_the_more_it_recomputes(name):
    found = folded(name, 8)
    peaks = [peak(found.small, policy, 1) for policy in ("none", "selective", "full")]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.7 * peaks[0]


def test_a_70b_model_fits_on_128_gpus():
    example = build("llama3-70b", batch=1024)
    found = fold(capture(example.step, example.state, example.batch, donate_argnums=0).graph)
    program = prepare(found.small, "full")
    lives = lifetimes(program, 64, roles(program.graph), as_xla(program, "cuda"))
    assert least_peak(lives, mesh_of((128,))) < 16 * 2.0**30
