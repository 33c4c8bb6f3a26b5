"""Seconds of a cross-entropy that is one op: its products and the fused kernels between them, block by block.

    blocks * (launches + sum of max(FLOP / achieved FLOP/s, bytes moved / memory bandwidth))

Products and kernels are those that the plain step has, on blocks of tokens; gradients in an op of their own have the
product that makes the logits again besides. A product that sums over tokens also reads and writes its sum, in fp32,
once a block. Bodies are priced as XLA runs them; frameworks that keep logits block by block (Hsu et al., arXiv
2410.10989, section 3.2) do the same with kernels of their own between products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np

from ...ir.analysis.refusals import Refusal
from ...ir.cluster.cluster import Device
from ...ir.composites.bodies import body_of
from ...ir.composites.loss_blocks import hidden_in, hidden_of, logits_in, most_logits
from ...ir.composites.online import body_parts
from ...ir.execution_model import ExecutionModel
from ...ir.graph import ITEM_BYTES, Op, TensorType
from ...ir.ops import CONTRACTIONS
from ...ir.program import Program
from ...ir.rules import rule_of
from .flop import flop
from .kernels import kernels_of
from .products import ENDLESS, multiplied_as, peak_of, product_share
from .ways import Ways

SUM = ITEM_BYTES["f32"]  # bytes of a number that is added up from block to block


@dataclass(frozen=True)
class _Product:
    """One product on all tokens and classes: elements and bytes of both operands and the result, whether each has
    tokens and classes, and whether the result is one of the op's."""

    op: Op
    flop: float
    elements: tuple[float, ...]
    nbytes: tuple[float, ...]
    tokens: tuple[bool, ...]
    classes: tuple[bool, ...]
    leaves: bool


@dataclass(frozen=True)
class _Body:
    """`nbytes` and `work` of what is fused between products; in all so many `kernels`."""

    types: Mapping[int, TensorType]
    products: tuple[_Product, ...]
    nbytes: float
    work: float
    kernels: int


def loss_seconds(
    op: Op, device: Device, ways: Ways, model: ExecutionModel, products: str | None
) -> np.ndarray:
    """Of the whole op on one device, for every choice.

    Args:
        products: the element type that operands are cast to, if they are.
    """
    body, tokens = _body_of(op), ways.operands[hidden_of(op)]
    classes = ways.work / tokens  # ways that the vocabulary is cut
    at_once = most_logits(hidden_in(op) / tokens)
    blocks = np.maximum(1.0, np.ceil(logits_in(op) / ways.work / at_once))
    seconds = np.maximum(
        device.stream_seconds(body.nbytes / ways.work), body.work / ways.work / device.vector_flops
    )
    for product in body.products:
        local = [
            elements / np.where(t, tokens * blocks, 1.0) / np.where(c, classes, 1.0)
            for elements, t, c in zip(
                product.elements, product.tokens, product.classes, strict=True
            )
        ]
        widths = [n / e for n, e in zip(product.nbytes, product.elements, strict=True)]
        terms = product.flop / 2 / ways.work / blocks
        left, right, result = local
        share = product_share(terms / right, terms / left, terms / result, 1.0, device)
        summed = product.leaves and not product.tokens[2]
        moved = left * widths[0] + right * widths[1]
        moved = moved + result * np.where(summed & (blocks > 1), 2.0 * SUM, widths[2])
        rate = _peak(product, body, device, model, products) * share
        seconds = seconds + blocks * np.maximum(2 * terms / rate, device.stream_seconds(moved))
    return seconds + device.launch * body.kernels * blocks


def least_loss_seconds(
    op: Op, device: Device, model: ExecutionModel, products: str | None
) -> float:
    """No layout that cuts everything into at most so many parts takes less, divided by these."""
    body = _body_of(op)
    seconds = max(device.stream_seconds(body.nbytes), body.work / device.vector_flops)
    for product in body.products:
        terms = product.flop / 2
        left, right, result = product.elements
        share = product_share(terms / right, terms / left, terms / result, ENDLESS, device)
        seconds += product.flop / (_peak(product, body, device, model, products) * float(share))
    return seconds


def _peak(
    product: _Product, body: _Body, device: Device, model: ExecutionModel, products: str | None
) -> float:
    return peak_of(device, products or multiplied_as(product.op, body.types, device, model))


def _body_of(op: Op) -> _Body:
    attrs = dict(op.attrs)
    return _made(*(cast("str", attrs.get(name)) for name in ("body", "sizes", "operands", "vocabulary")))  # fmt: skip


@lru_cache(maxsize=64)
def _made(
    text: str,
    sizes: tuple[int, ...],
    operands: tuple[tuple[tuple[int, ...], ...], ...],
    vocabulary: int | None,
) -> _Body:
    graph = body_of(text)
    parts = body_parts(graph, sizes, operands)
    tokens = {d for d, size in enumerate(sizes) if size > 1 and d != vocabulary}

    def named(value: int) -> set[int]:
        return {part[0] for dim in parts.get(value, ()) for part in dim}

    def product(op: Op) -> _Product:
        first, second, result = (*op.inputs[:2], *op.outputs)
        kinds = [graph.types[v] for v in (first, second, result)]
        return _Product(
            op,
            flop(op, rule_of(op, graph.types), graph.types),
            tuple(float(kind.size) for kind in kinds),
            tuple(float(kind.nbytes) for kind in kinds),
            tuple(bool(named(v) & tokens) for v in (first, second, result)),
            tuple(vocabulary in named(v) for v in (first, second, result)),
            result in graph.outputs,
        )

    products = tuple(product(op) for op in graph.ops if op.kind in CONTRACTIONS)
    alone = Program(graph, ("forward",) * len(graph.ops), Refusal("", "", ""))
    kernels = kernels_of(alone)
    chains = {id(chain): chain for chain in kernels.chains.values()}.values()
    return _Body(
        graph.types, products, sum(c.nbytes for c in chains), sum(c.work for c in chains),
        len(products) + len(kernels.ends - {*graph.inputs} - {p.op.outputs[0] for p in products}),
    )  # fmt: skip
