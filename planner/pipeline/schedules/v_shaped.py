"""Two chunks per rank, folded: rank r has stages r and 2p - 1 - r, so the last stage lies where the first does.

A microbatch's loss is then known on the rank it started from, and ranks hold equal amounts. How much
they may hold decides the bubble: p microbatches (ZBV), about a half (V-Half) or a third (V-Min).

V-Half and V-Min each repeat a block, a microbatch every 6 slots of equal length. On the way up each pass
follows the one it needs in the next slot; on the way down too in V-Min, two slots later in V-Half. Steps
then move forward into the bubbles as far as the limit allows (`tighten`, with F = B = W). Sources: Qi et
al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 6 (ZBV); Qi et al., Pipeline Parallelism with
Controllable Memory, NeurIPS 2024 (blocks, V-Half, V-Min and their limits).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ....ir.pipeline.schedule import MARKS, Schedule, Step
from ..simulate import StageSeconds
from ..tighten import ActivationMemory, Policy, tighten
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
    taken = tuple(
        tuple(step for step in order if step.microbatch < microbatches) for order in orders
    )
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
    order: list[Step] = []
    for word in words:
        order.append(Step(MARKS[word[1]], stage[word[0]], taken[word]))
        taken[word] += 1
    return order


def v_half(ranks: int, microbatches: int) -> Schedule:
    """At most floor((p + 2) / 2) microbatches held."""
    turn = 3 * ranks - 1 if ranks % 2 else 3 * ranks + 2
    return _within("v-half", _block(ranks, microbatches, 2, turn), (ranks + 2) // 2, Policy())


def v_min(ranks: int, microbatches: int) -> Schedule:
    """At most floor((p + 4) / 3) microbatches held."""
    turn = 2 * ranks if ranks % 3 else 2 * ranks + 2
    return _within(
        "v-min", _block(ranks, microbatches, 1, turn), (ranks + 4) // 3, Policy(reserve=True)
    )


def _within(name: str, block: Schedule, limit: int, policy: Policy) -> Schedule:
    """The block's order, tightened: every rank holds up to `limit` microbatches, that is twice as many results."""
    one = [1.0] * block.stages
    held = ActivationMemory(one, one, [float(CHUNKS * limit)] * block.ranks)
    return replace(tighten(block, [StageSeconds(1, 1, 1)] * block.stages, held, policy), name=name)


def _block(ranks: int, microbatches: int, hop: int, turn: int) -> Schedule:
    """A pass goes down a rank in `hop` slots and up in one; in slot `turn` the first rank turns back.

    The turn is such that no two passes of a rank ever meet in one slot.
    """
    positive(ranks=ranks, microbatches=microbatches)
    orders: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        slots = (
            (hop * rank, Step("forward", down, 0)),
            ((hop + 1) * ranks - hop - rank, Step("forward", up, 0)),
            (turn + hop * rank, Step("backward", up, 0)),
            (turn + (hop + 1) * ranks - 1 - rank, Step("backward", down, 0)),
        )
        timed = sorted(
            (PERIOD * m + slot, step._replace(microbatch=m))
            for slot, step in slots
            for m in range(microbatches)
        )
        orders.append(tuple(each for _, step in timed for each in _with_weights(step)))
    return Schedule("block", CHUNKS * ranks, microbatches, tuple(orders))


def _with_weights(step: Step) -> list[Step]:
    return [step, step._replace(kind="weight")] if step.kind == "backward" else [step]
