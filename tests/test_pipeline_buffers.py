"""What a pipelined step keeps alive on each rank, and that a pass reads its own microbatch."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.pipeline import LoweredPipeline
from meshwright.ir.pipeline.schedule import in_flight
from meshwright.planner.pipeline.schedules import gpipe, interleaved, one_f_one_b
from meshwright.planner.request import Request

from .pipelines import case, lowered, pipelined, some, zero_bubble


@dataclass
class Ledger:
    """The arrays that forward passes leave for later ones, as long as anything refers to them."""

    running: LoweredPipeline
    saved: list[tuple[int, int, weakref.ref]] = field(
        default_factory=list
    )  # stage, forward call, array
    peaks: dict[int, int] = field(default_factory=dict)  # rank -> most forward results alive
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rank_of = {
            s: rank for rank, held in enumerate(self.running.schedule.held) for s in held
        }
        for name, program in self.running.passes.items():
            kind, stage = program.fragment.kind, program.fragment.stage
            if kind != "update":
                call = self._watched(kind, stage, program.call)
                self.running.passes[name] = replace(program, call=call)

    def _watched(self, kind, stage, call):
        numbers = iter(range(10**6))

        def run(*args):
            self._look(self.rank_of[stage])
            results = call(*args)
            if kind == "forward":
                number = next(numbers)
                self.saved += [(stage, number, weakref.ref(array)) for array in results[2]]
            return results

        return run

    def _look(self, rank: int) -> None:
        """Before a pass of a rank: what earlier passes of it left and no one has let go of."""
        alive = [
            (s, n, array)
            for s, n, ref in self.saved
            if self.rank_of[s] == rank and (array := ref()) is not None
        ]
        self.peaks[rank] = max(self.peaks.get(rank, 0), len({(s, n) for s, n, _ in alive}))
        nbytes = sum(array.nbytes for _, _, array in alive)
        self.peak_bytes[rank] = max(self.peak_bytes.get(rank, 0), nbytes)


SCHEDULES = {
    "gpipe": gpipe(4, 4), "1f1b": one_f_one_b(4, 8), "interleaved": interleaved(2, 4, 2),
    "zero bubble": zero_bubble(4, 4),
}  # fmt: skip


@pytest.mark.parametrize("schedule", some(SCHEDULES, "interleaved", "zero bubble"))
def test_arrays_of_forward_passes_alive_at_once_are_those_in_flight(schedule):
    running = lowered("gpt-tiny", schedule)
    ledger = Ledger(running)
    jax.block_until_ready(running.jitted(*case("gpt-tiny")[1]))
    freed_by = "weight" if schedule.splits else "backward"
    assert [ledger.peaks[r] for r in range(schedule.ranks)] == [
        in_flight(schedule, r, freed_by) for r in range(schedule.ranks)
    ]
    assert not [ref for _, _, ref in ledger.saved if ref() is not None]


def test_the_bytes_of_a_rank_are_those_of_its_microbatches_in_flight():
    schedule = one_f_one_b(4, 8)
    running = lowered("gpt-tiny", schedule)
    ledger = Ledger(running)
    running.jitted(*case("gpt-tiny")[1])
    types = running.stages[0].local.graph.types
    for rank in range(4):
        one = sum(_nbytes(types[v], 8 if v in running.stages[rank].local.time.split else 1)
                  for v in running.passes[f"forward {rank}"].fragment.gives)  # fmt: skip
        assert ledger.peak_bytes[rank] == pytest.approx(in_flight(schedule, rank) * one)


def _nbytes(kind, parts: int) -> float:
    return np.prod(kind.shape) * {"f32": 4, "s32": 4, "bool": 1, "u32": 4}[kind.dtype] / parts


@jax.custom_vjp
def weighted(hidden, scale):
    """The identity; its gradient is scaled, element by element."""
    return hidden


weighted.defvjp(
    lambda hidden, scale: (hidden, scale), lambda scale, gradient: (gradient * scale, None)
)


def squares(state, batch):
    """Three layers; only the backward pass reads `scale`."""

    def loss(weights):
        hidden = weighted(jnp.tanh(batch["x"] @ weights[0]), batch["scale"])
        return jnp.mean((jnp.tanh(hidden @ weights[1]) @ weights[2] - batch["y"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(state)
    return [w - 0.5 * g for w, g in zip(state, gradients, strict=True)], value


def test_a_backward_pass_that_reads_the_batch_reads_its_own_microbatch():
    rng = np.random.default_rng(0)
    state = [rng.normal(size=(8, 8)).astype(np.float32) for _ in range(3)]
    batch = {k: rng.normal(size=(16, 8)).astype(np.float32) for k in ("scale", "x", "y")}
    captured = capture(squares, state, batch)
    plan = plan_captured(
        captured, "2xcpu", Request(microbatches=4, recompute="none", gap=0.05), "squares"
    )
    running = lower(pipelined(plan, captured, one_f_one_b(2, 4), [0, 2]), captured)
    scale = captured.graph.inputs[3]
    assert any(scale in running.passes[f"backward {stage}"].keeps for stage in range(2))
    assert not any(scale in running.passes[f"forward {stage}"].keeps for stage in range(2))
    found, _ = jax.tree.unflatten(
        captured.binding.out_tree, running.jitted(*state, *batch.values())
    )
    wanted, _ = squares(state, batch)
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-6)
