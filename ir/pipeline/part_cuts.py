"""Where a step is cut into what is before its layers, the layers of each stage, and what is after them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..analysis.blocks import Folded
from ..errors import LoweringError
from .layered import STAGES


def part_cuts(folded: Folded, cuts: Sequence[int]) -> list[int]:
    """Where the front, each stage's layers and the back begin, as positions of ops.

    Args:
        cuts: where the stages begin; the first also holds the front, the last the back.

    Raises:
        LoweringError: stages of other numbers or kinds of layers than each other.
    """
    block = next((b for b in folded.blocks if all(b.place(cut) for cut in cuts[1:])), None)
    if block is None:
        raise LoweringError(
            "the stages hold layers of several kinds.", where="pipeline", fix=STAGES
        )
    if not block.start:
        raise LoweringError(
            "nothing comes before the layers of the first stage.", where="pipeline", fix=STAGES
        )
    ends = [block.start, *cuts[1:], block.start + block.period * block.repeats]
    layers = [(end - first) / block.period for first, end in pairwise(ends)]
    if len(set(layers)) > 1:
        counts = ", ".join(f"{count:g}" for count in layers)
        raise LoweringError(
            f"the stages hold {counts} layers, not equally many.", where="pipeline", fix=STAGES
        )
    return [0, *ends]
