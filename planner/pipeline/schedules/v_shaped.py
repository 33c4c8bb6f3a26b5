"""Two chunks per rank, folded: rank r has stages r and 2p - 1 - r, so the last stage lies where the first does.

A microbatch's loss is then known on the rank it started from, and ranks hold equal amounts. How much
they may hold decides the bubble: p microbatches (ZBV), about a half (V-Half) or a third (V-Min).

V-Half and V-Min come from one block, that of V-Min, which holds least: microbatch after microbatch every
6 slots of equal length, each pass one slot after the one it needs. Steps then move forward into the
bubbles as far as the limit allows (`tighten`, with F = B = W). Sources: Qi et al., Zero Bubble Pipeline
Parallelism, ICLR 2024, section 6 (ZBV); Qi et al., Pipeline Parallelism with Controllable Memory,
NeurIPS 2024 (blocks, V-Half, V-Min and their limits).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ....ir.schedule import MARKS, Schedule, Step
from ..simulate import StageSeconds
from ..tighten import Held, Policy, tighten
from .classic import positive

PERIOD = 6  # slots of a block: two forward, two backward, two weight passes
CHUNKS = 2


def zbv(ranks: int, microbatches: int) -> Schedule:
    """As many microbatches held as in 1F1B, on every rank; no bubble where F = B = W.

    Fewer than 2p - 1 microbatches are the first of so many, the others left out.
    """
    positive(ranks=ranks, microbatches=microbatches)
    least = 2 * ranks - 1
    orders = (_zbv_order(rank, ranks, max(least, microbatches)) for rank in range(ranks))
    taken = tuple(tuple(step for step in order if step.microbatch < microbatches) for order in orders)
    return Schedule("zbv", CHUNKS * ranks, microbatches, taken)


def _zbv_order(rank: int, ranks: int, microbatches: int) -> list[Step]:
    """Fill with forward passes, down and up; then one of each pass by turns; drain, weight passes last.

    Written as words first: `d` the stage on the way down, `u` on the way up, and the kind of pass.
    """
    behind = ranks - rank
    words = ["dF"] * (2 * behind - 1) + ["uF", "dF"] * rank + ["uF", "uB", "uW"] * behind
    filled = 2 * ranks - 1 - rank
    for i in range(microbatches - ranks):
        words += (["dF"] if filled + i < microbatches else []) + ["dB", "dW", "uF", "uB", "uW"]
    words += ["dB", "uB"] * rank + ["dB", "dW"] * behind + ["uW"] * rank + ["dW"] * rank
    stage = {"d": rank, "u": 2 * ranks - 1 - rank}
    taken: Counter[str] = Counter()
    order = []
    for word in words:
        order.append(Step(MARKS[word[1]], stage[word[0]], taken[word]))
        taken[word] += 1
    return order


def v_half(ranks: int, microbatches: int) -> Schedule:
    """At most floor((p + 2) / 2) microbatches held."""
    return replace(_within(ranks, microbatches, (ranks + 2) // 2), name="v-half")


def v_min(ranks: int, microbatches: int) -> Schedule:
    """At most floor((p + 4) / 3) microbatches held."""
    return replace(_within(ranks, microbatches, (ranks + 4) // 3), name="v-min")


def _within(ranks: int, microbatches: int, limit: int) -> Schedule:
    """The block's order, tightened: every rank holds up to `limit` microbatches, that is twice as many results."""
    positive(ranks=ranks, microbatches=microbatches)
    stages = CHUNKS * ranks
    one = [1.0] * stages
    held = Held(one, one, [float(CHUNKS * limit)] * ranks)
    return tighten(_block(ranks, microbatches), [StageSeconds(1, 1, 1)] * stages, held, Policy())


def _block(ranks: int, microbatches: int) -> Schedule:
    """V-Min's order. Slots on one rank never meet: the two down the ranks have another parity than the two
    up, and those of equal direction lie `turn` and more apart, which is no multiple of the period.
    """
    turn = 2 * ranks if ranks % 3 else 2 * ranks + 2
    orders = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        timed: list[tuple[int, Step]] = []
        for m in range(microbatches):
            start = PERIOD * m
            timed.append((start + rank, Step("forward", down, m)))
            timed.append((start + 2 * ranks - 1 - rank, Step("forward", up, m)))
            timed.append((start + turn + rank, Step("backward", up, m)))
            timed.append((start + turn + 2 * ranks - 1 - rank, Step("backward", down, m)))
        order = [step for _, step in sorted(timed)]
        orders.append(
            tuple(
                each
                for step in order
                for each in ([step, step._replace(kind="weight")] if step.kind == "backward" else [step])
            )
        )
    return Schedule("v-min block", CHUNKS * ranks, microbatches, tuple(orders))
