"""How many logits of a cross-entropy exist at a time: `WIDE` for each number of the hidden states.

    16384 tokens of width 4096, a vocabulary of 128256: blocks of 2048 tokens

So logits take memory as hidden states do. Hsu et al. (arXiv 2410.10989, section 3.2) cut tokens the same way,
into as many blocks as a vocabulary is wider than hidden states. So many are slow: the weight's gradient is read and
written once a block, and products of 512 tokens fill a device badly.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any, cast

import numpy as np

from ..graph import Graph, Op
from ..ops import EXPONENTIAL, LOSSES
from .bodies import body_of

WIDE = 4
LEAST = 1 << 18  # logits: fewer than these are not cut


def logits_in(op: Op) -> int:
    """Of all tokens and classes."""
    graph = _body(op)
    exps = [v for each in graph.ops if each.kind in EXPONENTIAL for v in each.outputs]
    return max(graph.types[v].size for v in exps)


def hidden_of(op: Op) -> int:
    """Which operand the hidden states are: the largest that has all tokens and no classes."""
    graph, logits = _body(op), logits_in(op)
    return max(
        (k for k, v in enumerate(graph.inputs) if _has_tokens(op, "operands", k) and graph.types[v].size < logits),
        key=lambda k: graph.types[graph.inputs[k]].size,
        default=0,
    )  # fmt: skip


def block_of(op: Op, ways: Mapping[int, int]) -> int:
    """Logits that exist at a time on one device, at most where tokens can be cut so far.

    Args:
        ways: by free dim, into how many parts it is cut.
    """
    shared = prod(n for d, n in ways.items() if d != dict(op.attrs).get("vocabulary"))
    return int(most_logits(hidden_in(op) / shared))


def most_logits(hidden: Any) -> Any:
    """That exist at a time beside so many numbers of hidden states; each a number, or an array of them."""
    return np.maximum(LEAST, WIDE * hidden)


def blocks_of(op: Op, tokens: int, classes: int) -> int:
    """How many blocks a device has of tokens and of classes that are cut so many ways, if tokens divide."""
    here = logits_in(op) / tokens / classes
    return max(1, ceil(here / float(most_logits(hidden_in(op) / tokens))))


def tokens_in(op: Op) -> int:
    """How many tokens there are, of a loss whose vocabulary may be cut."""
    return logits_in(op) // op.integers("sizes")[op.integer("vocabulary")]


def hidden_in(op: Op) -> int:
    """Numbers of all hidden states."""
    graph = _body(op)
    return graph.types[graph.inputs[hidden_of(op)]].size


def is_of_tokens(op: Op, result: int) -> bool:
    """Whether a result has all tokens and no classes."""
    return _has_tokens(op, "results", result)


def _has_tokens(op: Op, sides: str, k: int) -> bool:
    vocabulary, sizes = dict(op.attrs).get("vocabulary"), op.integers("sizes")
    told = cast(tuple[tuple[int, ...], ...], op.items(sides)[k])
    named = {d for dim in told for d in dim}
    wanted = {d for d, size in enumerate(sizes) if size > 1 and d != vocabulary}
    return named >= wanted and vocabulary not in named


def _body(op: Op) -> Graph:
    assert op.kind in LOSSES
    return body_of(op.text("body"))
