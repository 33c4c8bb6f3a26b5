"""Seconds of attention that is one op: by a kernel of the device, or block by block where none runs it.

    kernel      products made / (peak * attention efficiency)
    blocks      products made / (peak * efficiency) + scores written and read between the products / memory bandwidth

Which of both is `ir/composites/attention_kernels.py`'s word. Keys that may go round a ring are priced as by a kernel,
though XLA runs their blocks.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np

from ...ir.cluster.cluster import Device
from ...ir.composites.attention_kernels import products_made, reason_against
from ...ir.composites.bodies import body_of
from ...ir.composites.evenly import keys_at_most, pairs_kept
from ...ir.execution_model import ExecutionModel
from ...ir.graph import Op
from ...ir.ops import CONTRACTIONS, REDUCTIONS

ROWS = 128  # queries that one thread block of fused attention works on (Dao, arXiv 2307.08691, section 3.3)


def attention_seconds(
    op: Op, flop: float, peak: float, device: Device, model: ExecutionModel
) -> float:
    """Of the whole op on one device; keys that masks leave out are not multiplied.

    Args:
        flop: of the products that its body writes, `peak` FLOP/s.
        model: has the kernel, if one.
    """
    pairs = pairs_kept(op) * flop
    kernel = None if op.has("round") else model.attention_kernel
    if model.runs_ops_alone or (kernel and reason_against(op, kernel)):
        moved = device.stream_seconds(pairs_kept(op) * _scores_moved(op.text("body")))
        return pairs / (peak * device.efficiency) + moved
    return products_made(op, kernel) * pairs / (peak * device.attention_efficiency)


def attention_tail(op: Op, device: Device, work: np.ndarray) -> np.ndarray | float:
    """By what factor it outlasts its work spread evenly over all multiprocessors: all but its keys are free."""
    if device.units is None:
        return 1.0
    rows = prod(op.integers("sizes"))
    return 1 + device.units * ROWS * work / rows * keys_at_most(op) / pairs_kept(op) / 2


@lru_cache(maxsize=256)
def _scores_moved(body: str) -> float:
    """Bytes of what is as large as the scores that products write and read, and sums and maxima read."""
    graph = body_of(body)
    types = graph.types
    large = max(
        (types[v].size for op in graph.ops if op.kind in CONTRACTIONS for v in op.outputs),
        default=0,
    )
    return float(
        sum(
            types[v].nbytes
            for op in graph.ops
            if op.kind in CONTRACTIONS | REDUCTIONS
            for v in (*op.inputs, *op.outputs)
            if types[v].size == large
        )
    )
