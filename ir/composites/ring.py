"""Keys and values that go round a ring of devices: who has which when, what is worked on in each step, what is sent.

    step 0    each device its own keys          step s    those of the device s places before it

Where masks leave more keys to some queries than to others, rows and keys are dealt out in halves first (`evenly.py`):
under a causal mask each device then has as much to do as any other in every step. A ring ends where no device has
keys left that it looks at (sliding windows). Gradients of keys and values travel with them, and one hop home.

Source: Liu, Zaharia & Abbeel, arXiv 2310.01889 (ring attention); Brandon et al., arXiv 2311.09431 (equal work).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np

from ..graph import Op
from .bodies import body_of
from .evenly import Spans, halves_go_round, partners
from .online import body_parts, online_body


@dataclass(frozen=True)
class Ring:
    """A ring of so many devices.

    Attributes:
        partners: by device, whose second half of rows and keys it has; None where each has neighbours alone.
        meets: of pieces of rows and of keys, numbered as they lie in the whole, which have anything in common.
        steps: after which all have met; at least 1.
        work: by step, what the busiest device works on, as a share of all pairs of queries and keys.
    """

    ways: int
    partners: tuple[int, ...] | None
    meets: tuple[tuple[bool, ...], ...]
    steps: int
    work: tuple[float, ...]

    @property
    def pieces(self) -> int:
        """Of rows, and of keys, that a device has."""
        return 1 if self.partners is None else 2

    @property
    def always(self) -> bool:
        """Whether all pieces meet."""
        return all(map(all, self.meets))


def ring_of(op: Op, ways: int) -> Ring:
    """The ring of a composite whose rows and keys are cut so many ways."""
    attrs, rows = dict(op.attrs), op.integers("sizes")[op.integer("ring")]
    spans, blocks = cast(Spans, attrs.get("spans", ((0, 1),))), cast(int, attrs.get("blocks", 1))
    return _ring(spans, blocks, ways, halves_go_round(attrs, rows))


@dataclass(frozen=True)
class Travel:
    """How often a side (operands, then results) is sent in one run: as it `hops` from device to device, and its halves
    before and after; in 32 bits if `wide`."""

    side: int
    hops: int
    halves: int
    wide: bool


def travels(op: Op, ways: int) -> tuple[Travel, ...]:
    """All that a ring sends."""
    return _travels(op, ring_of(op, ways))


def passes(op: Op) -> int:
    """How often keys go round; once where sums are given."""
    return 1 if given(op) else _body(*_text(op))[0]


def given(op: Op) -> int:
    """How many maxima and sums gradients are given, their last operands but one, which is the result."""
    return op.integer("given") if op.has("given") else 0


def first_ops(op: Op) -> tuple[Op, ...]:
    """The ops of its body that the first pass over the keys runs."""
    return _body(*_text(op))[1]


def first_reads(op: Op) -> frozenset[int]:
    """The operands that it reads."""
    return _body(*_text(op))[2]


def _text(op: Op) -> tuple[Any, ...]:
    attrs = dict(op.attrs)
    return attrs["body"], attrs["sizes"], attrs["keys"], attrs["operands"], attrs.get("kept", 0)


@lru_cache(maxsize=256)
def _body(
    text: str, sizes: Any, keys: int, operands: Any, kept: int
) -> tuple[int, tuple[Op, ...], frozenset[int]]:
    """Passes over the keys; what the first runs and reads."""
    graph = body_of(text)
    found = online_body(graph, (*sizes, keys), body_parts(graph, (*sizes, keys), operands), kept)
    assert found is not None
    wanted = {*found.sums, *(graph.outputs if found.passes == 1 else ())}
    wanted |= set() if found.maximum is None else {found.maximum}
    ops = list[Op]()
    for op in reversed(graph.ops):
        if not wanted.isdisjoint(op.outputs):
            ops.append(op)
            wanted.update(op.inputs)
    reads = frozenset(k for k, v in enumerate(graph.inputs) if v in wanted)
    return found.passes, tuple(reversed(ops)), reads


def _travels(op: Op, ring: Ring) -> tuple[Travel, ...]:
    found, keys, rows = list[Travel](), len(op.integers("sizes")), op.integer("ring")
    sides: tuple[Any, ...] = (*op.items("operands"), *op.items("results"))
    result = len(op.inputs) - 1 if given(op) else None  # what it and do come to is sent instead
    for side, dims in enumerate(sides):
        if side == result:
            continue
        by_rows, by_keys = ((d,) in dims for d in (rows, keys))
        made, hops = side >= len(op.inputs), 0
        if by_keys and not by_rows and ring.steps > 1:
            twice = passes(op) == 2 and side in first_reads(op)
            hops = ring.steps if made else (ring.steps - 1) * (2 if twice else 1)
        halves = int(ring.partners is not None and (by_rows or by_keys))
        if given(op) and op.integers("delta") and result is not None and side == result - 1:
            halves *= 2  # as large as the last sum
        if hops or halves:
            found.append(Travel(side, hops, halves, made and by_keys and not by_rows))
    return tuple(found)


@lru_cache(maxsize=1024)
def _ring(spans: Spans, blocks: int, ways: int, dealt: bool) -> Ring:
    pairs = partners(spans, blocks, ways) if dealt else None
    kept = _kept(spans, blocks, ways * (2 if dealt else 1))
    numbers = np.arange(ways)[:, None]
    if pairs is not None:
        numbers = np.stack([2 * np.arange(ways), 2 * np.array(pairs) + 1], axis=1)
    shared = kept[numbers[:, None, :, None], numbers[None, :, None, :]].sum(axis=(2, 3))
    device, step = np.arange(ways)[:, None], np.arange(ways)
    work = shared[device, (device - step) % ways].max(axis=0)
    steps = int(np.flatnonzero(work).max(initial=0)) + 1
    meets = tuple(tuple(bool(share > 0) for share in row) for row in kept.tolist())
    return Ring(ways, pairs, meets, steps, tuple(work[:steps].tolist()))


def _kept(spans: Spans, blocks: int, pieces: int) -> np.ndarray:
    """Of all pairs, what each of so many equal pieces of rows keeps with each of as many of keys."""
    first, end = np.array(spans).T
    at = np.arange(blocks)
    mask = (first[:, None] <= at) & (at < end[:, None])
    sums = np.zeros((len(spans) + 1, blocks + 1))
    sums[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1) / mask.size
    by_rows = _resampled(sums, pieces)
    both = _resampled(by_rows.T, pieces).T
    return np.diff(np.diff(both, axis=0), axis=1).round(12)


def _resampled(sums: np.ndarray, pieces: int) -> np.ndarray:
    """Running sums at the borders of so many equal pieces of the first dim."""
    have, wanted = np.linspace(0, 1, len(sums)), np.linspace(0, 1, pieces + 1)
    columns: list[np.ndarray] = [np.interp(wanted, have, column) for column in sums.T]
    return np.stack(columns, axis=1)
