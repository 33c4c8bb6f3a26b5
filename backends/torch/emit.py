"""Ops of the graph as torch functions on one shard's part of their operands.

    run = emitter(op, view)      # once
    results = run(operands)      # each step

What an op needs to know is in its attributes and its rule, so that a step captured by any front end runs. Results that
depend on where the shard lies (iota, look-ups into a cut dim) read that off the view. No operand is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ...ir.errors import LoweringError
from ...ir.graph import Op
from .emit_elementwise import ELEMENTWISE
from .emit_indexing import INDEXING
from .emit_products import PRODUCTS
from .emit_reductions import REDUCTIONS
from .emit_shape import SHAPE
from .shard import View

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
Emitter = Callable[[Op, View], Run]

EMITTERS: Mapping[str, Emitter] = {
    **ELEMENTWISE, **SHAPE, **PRODUCTS, **REDUCTIONS, **INDEXING,
}  # fmt: skip


def emitter(op: Op, view: View) -> Run:
    """What computes this shard's results of an op, or its contribution to them where a reduced factor is cut.

    Raises:
        LoweringError: there is no such op on torch yet.
    """
    if op.kind not in EMITTERS:
        raise LoweringError(
            f"`{op.kind}` cannot run on torch yet.",
            where=op.where or None,
            fix="run the step with --backend xla",
        )
    return EMITTERS[op.kind](op, view)
