"""Seconds of one op on one device: a roofline.

    seconds = launch + max(FLOP / achieved FLOP/s, bytes moved / memory bandwidth)

Elementwise chains are taken as fused: they move only what enters and leaves the
chain. Source of the model: Williams, Waterman & Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...ir.analysis.attention import Attention
from ...ir.cluster.cluster import Device
from ...ir.execution_model import ExecutionModel
from ...ir.graph import Op, TensorType
from ...ir.ops import COMPOSITES, CONTRACTIONS, DECOMPOSITIONS, INDEXED, LOSSES, VIEWS
from ...ir.rules.rule import Rule
from ...ir.rules.user_kernel import KIND as USERS
from .attention import ROWS, attention_seconds, attention_tail
from .flop import flop, told_cost
from .kernels import FREE, Kernels, is_kernel, work
from .loss import least_loss_seconds, loss_seconds
from .products import ENDLESS, multiplied_as, peak_of, product_share
from .ways import Ways


def op_seconds(
    op: Op,
    rule: Rule,
    types: Mapping[int, TensorType],
    device: Device,
    ways: Ways,
    kernels: Kernels,
    model: ExecutionModel,
    products: str | None = None,
) -> np.ndarray | float:
    """Seconds on one device for every choice; `kernels` says what the op reads and writes.

    `products` is an element type to which the operands of products outside attention are
    cast first ("f8e4m3fn").

    A fused op pays for what its chain first reads at it and for what it writes. Of its
    arithmetic it pays the part by which the chain's arithmetic exceeds the chain's memory
    traffic, so that a chain takes the larger of the two.
    """
    terms = fused_terms(op, types, device, kernels, model)
    if terms is not None:
        return terms.fixed + _cut(terms.sides, ways)
    if op.kind in CONTRACTIONS:
        narrow = None if kernels.attention(op) else products
        seconds = start_seconds(device, model) + np.maximum(
            device.stream_seconds(_cut(_moved(op, types, kernels), ways)),
            _product_seconds(op, rule, types, device, ways, kernels, model, narrow),
        )
        return seconds + (_cast_seconds(op, types, device, ways) if narrow else 0.0)
    if op.kind in LOSSES:
        return loss_seconds(op, device, ways, model, products)
    if op.kind in COMPOSITES:
        moved = device.stream_seconds(_cut(_moved(op, types, kernels), ways))
        seconds = _composite_seconds(op, rule, types, device, model) / ways.work
        launch = start_seconds(device, model) * ways.launches
        return launch + np.maximum(moved, seconds * attention_tail(op, device, ways.work))
    arithmetic = _beside_products(op, rule, types, device, model) / ways.work
    return start_seconds(device, model) + np.maximum(
        device.stream_seconds(_cut(_touched(op, types, kernels), ways)), arithmetic
    )


def _beside_products(
    op: Op, rule: Rule, types: Mapping[int, TensorType], device: Device, model: ExecutionModel
) -> float:
    """Seconds of arithmetic of a kernel that is no product and does more than move: a decomposition, one whose author
    says so. A user's kernel is taken to multiply as fused attention does."""
    if op.kind == USERS:
        rate = (
            peak_of(device, multiplied_as(op, types, device, model)) * device.attention_efficiency
        )
        return flop(op, rule, types) / rate
    counted = op.kind in DECOMPOSITIONS or told_cost(op)
    return flop(op, rule, types) / device.vector_flops if counted else 0.0


def _composite_seconds(
    op: Op, rule: Rule, types: Mapping[int, TensorType], device: Device, model: ExecutionModel
) -> float:
    peak = peak_of(device, multiplied_as(op, types, device, model))
    return attention_seconds(op, flop(op, rule, types), peak, device, model)


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds of an op: `fixed`, of each side (operands, then results) so many divided by the ways that it is cut,
    and `work` divided by those of the op's work."""

    fixed: float
    sides: Mapping[int, float]
    work: float = 0.0


def start_seconds(device: Device, model: ExecutionModel) -> float:
    """Until an op's kernel runs: the device's launch, or the host's dispatch where the host runs op by op."""
    alone = model.runs_ops_alone and not model.dispatches_beside
    return model.dispatch_seconds if alone else device.launch


def fused_terms(
    op: Op, types: Mapping[int, TensorType], device: Device, kernels: Kernels, model: ExecutionModel
) -> Terms | None:
    """Of an op that runs within a fused chain or costs nothing; None for kernels of their own."""
    start = start_seconds(device, model)
    if op.kind in FREE or (kernels.inside.keys() >= {*op.outputs} and op.kind not in CONTRACTIONS):
        return Terms(start if model.runs_ops_alone and op.kind in VIEWS else 0.0, {})
    if is_kernel(op):
        return None
    first, many, sides = op.outputs[0], len(op.inputs), (*op.inputs, *op.outputs)
    chain, found = kernels.chains[first], defaultdict[int, float](float)
    for k, v in enumerate(op.outputs):
        found[many + k] += device.stream_seconds(types[v].nbytes) * (v in kernels.stores)
    for k, v in kernels.reads.get(first, ()):
        found[k] += device.stream_seconds(types[v].nbytes)
    arithmetic, memory = chain.work / device.vector_flops, device.stream_seconds(chain.nbytes)
    excess = max(0.0, 1 - memory / arithmetic) if arithmetic else 0.0
    largest = max(range(len(sides)), key=lambda k: types[sides[k]].size)
    found[largest] += excess * work(op, types) / device.vector_flops
    fixed = start * (model.runs_ops_alone or not kernels.ends.isdisjoint(op.outputs))
    return Terms(fixed, {k: seconds for k, seconds in found.items() if seconds})


def least_terms(
    op: Op,
    rule: Rule,
    types: Mapping[int, TensorType],
    device: Device,
    kernels: Kernels,
    model: ExecutionModel,
    products: str | None = None,
) -> Terms:
    """No layout that cuts everything into at most so many parts runs the op in less.

    A product whose operands are cut smaller never reaches a larger share of the peak than
    the whole one does, all multiprocessors busy.
    """
    fused = fused_terms(op, types, device, kernels, model)
    if fused is not None:
        return fused
    if op.kind in LOSSES:
        return Terms(
            start_seconds(device, model), {}, least_loss_seconds(op, device, model, products)
        )
    if op.kind in COMPOSITES:
        return Terms(
            start_seconds(device, model), {}, _composite_seconds(op, rule, types, device, model)
        )
    if op.kind not in CONTRACTIONS:
        touched, arithmetic = (
            _touched(op, types, kernels),
            _beside_products(op, rule, types, device, model),
        )
        if arithmetic > device.stream_seconds(sum(touched.values())):
            return Terms(start_seconds(device, model), {}, arithmetic)
        return Terms(
            start_seconds(device, model),
            {k: device.stream_seconds(nbytes) for k, nbytes in touched.items()},
        )
    if (within := kernels.attention(op)) is not None:
        rate = (
            peak_of(device, multiplied_as(op, types, device, model)) * device.attention_efficiency
        )
        return Terms(start_seconds(device, model), {}, flop(op, rule, types) * within.share / rate)
    share, total = device.efficiency, flop(op, rule, types)
    if op.kind != "conv_general_dilated":
        left, right, result = (types[v].size for v in (*op.inputs[:2], *op.outputs))
        terms = total / 2
        share = float(product_share(terms / right, terms / left, terms / result, ENDLESS, device))
    return Terms(
        start_seconds(device, model),
        {},
        total / (peak_of(device, products or multiplied_as(op, types, device, model)) * share),
    )


def _moved(op: Op, types: Mapping[int, TensorType], kernels: Kernels) -> dict[int, float]:
    """Bytes of each side, but for those inside fused attention."""
    sides = enumerate((*op.inputs, *op.outputs))
    return {k: float(types[v].nbytes) for k, v in sides if v not in kernels.inside}


def _touched(op: Op, types: Mapping[int, TensorType], kernels: Kernels) -> dict[int, float]:
    """Bytes of each side that a look-up or an update touches: not the whole table it reads or changes."""
    many = len(op.inputs)
    results = {many + k: float(types[v].nbytes) for k, v in enumerate(op.outputs)}
    if told := told_cost(op):
        return {many: told[1]}
    if op.kind == "gather":
        return {
            **{k: 2 * nbytes for k, nbytes in results.items()},
            1: float(types[op.inputs[1]].nbytes),
        }
    if op.kind == "dynamic_update_slice":
        return {1: 2.0 * types[op.inputs[1]].nbytes}
    if op.kind in INDEXED:
        return {**results, 2: 2.0 * types[op.inputs[2]].nbytes}
    return _moved(op, types, kernels)


def _cut(sides: Mapping[int, float], ways: Ways) -> np.ndarray | float:
    """What is left of something on each side where it is cut, added up."""
    cuts = (*ways.operands, *ways.results)
    return sum((much / cuts[k] for k, much in sides.items()), 0.0)


def _product_seconds(
    op: Op, rule: Rule, types: Mapping[int, TensorType], device: Device, ways: Ways, kernels: Kernels,
    model: ExecutionModel, narrow: str | None,
) -> np.ndarray | float:  # fmt: skip
    """Seconds of a contraction's arithmetic at the rate that its shape achieves."""
    peak, total = (
        peak_of(device, narrow or multiplied_as(op, types, device, model)),
        flop(op, rule, types) / ways.work,
    )
    if (within := kernels.attention(op)) is not None:
        rate = peak * device.attention_efficiency
        return total * within.share / rate * _tail(op, types, device, ways, kernels, within)
    if op.kind == "conv_general_dilated":
        return total / (peak * device.efficiency)
    left, right, result = (
        types[v].size / w
        for v, w in zip(
            (*op.inputs[:2], *op.outputs), (*ways.operands[:2], *ways.results), strict=True
        )
    )
    terms = total / 2  # batch * m * n * k; groups of equal size are a batch
    batch = left * right * result / terms**2
    return total / (
        peak * product_share(terms / right, terms / left, terms / result, batch, device)
    )


def _tail(
    op: Op,
    types: Mapping[int, TensorType],
    device: Device,
    ways: Ways,
    kernels: Kernels,
    within: Attention,
) -> np.ndarray | float:
    """By what factor fused attention outlasts its work spread evenly over all multiprocessors:

        1 + units / blocks * longest / share / 2        blocks = batch * heads * queries / ROWS

    Under a causal mask the last block has all keys (`longest`), twice the average (`share`); a multiprocessor
    starts it half done on average. Halves the error on fused attention measured at 4 to 128 heads: on an
    A100 PCIe 24 measurements, 16 to 9 %; on a B200 38, 33 to 20 % (SimuMax @4dcaae513b, configs/system).
    """
    if device.units is None:
        return 1.0
    sides = zip((*op.inputs, *op.outputs), (*ways.operands, *ways.results), strict=True)
    scores, cut = next((types[v], w) for v, w in sides if v in kernels.inside)
    return (
        1
        + device.units
        * within.many_keys
        * ROWS
        * cut
        / scores.size
        * within.longest
        / within.share
        / 2
    )


def _cast_seconds(
    op: Op, types: Mapping[int, TensorType], device: Device, ways: Ways
) -> np.ndarray | float:
    """Two passes over each operand: one for the largest value, one to read and write it narrower."""
    sizes = sum(
        (types[v].size / w for v, w in zip(op.inputs[:2], ways.operands, strict=False)), 0.0
    )
    wide = types[op.inputs[0]].nbytes / types[op.inputs[0]].size
    return device.stream_seconds(sizes * (2 * wide + 1))
