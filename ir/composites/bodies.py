"""What a composite stands for: a graph of its own, kept as text."""

from __future__ import annotations

from functools import lru_cache

from ..graph import Graph
from ..text import parse

FORWARD, BACKWARD = "attention", "attention_grad"
LOSS, LOSS_GRAD, BOTH = "cross_entropy", "cross_entropy_grad", "cross_entropy_and_grad"


@lru_cache(maxsize=256)
def body_of(text: str) -> Graph:
    """The graph that a composite stands for."""
    return parse(text)
