"""How queries that look at more or fewer keys are dealt out to devices, so that all have equal work.

    causal, 4 devices        rows 0 1 | 2 3 | 4 5 | 6 7        work 1 2 | 3 4 | 5 6 | 7 8, a half each
    the second half moves    rows 0 7 | 2 5 | 4 3 | 6 1        work 1+8 | 3+6 | 5+4 | 7+2

Each device keeps the first half of its rows and takes the second half of a partner's, as the spans of keys say
(`ir/analysis/key_spans.py`): those with the widest first halves take the narrowest second ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd
from typing import Any, cast

import numpy as np

from ..graph import Op

WORTH = 0.9  # of the busiest device's work: where even dealing leaves more than that, rows stay where they are
Spans = tuple[tuple[int, int], ...]


def pairs_kept(op: Op, ways: int = 1, even: bool = False) -> float:
    """Of all pairs of queries and keys of a composite, which share it computes, where its rows are cut so many
    ways: as if all parts were like the busiest, of rows dealt out evenly or of neighbours."""
    told = _told(dict(op.attrs))
    return 1.0 if told is None else _busiest(*told, ways, even)


def keys_at_most(op: Op) -> float:
    """Of all keys of a composite, which share some query looks at, at most."""
    told = _told(dict(op.attrs))
    return 1.0 if told is None else max(end - first for first, end in told[0]) / told[1]


def is_uneven(attrs: Mapping[str, Any]) -> bool:
    """Whether devices that share the rows of a composite with these attrs should exchange some for equal work."""
    told = _told(attrs)
    return told is not None and any(
        _busiest(*told, ways, True) <= WORTH * _busiest(*told, ways, False) for ways in (2, 8)
    )


def halves_go_round(attrs: Mapping[str, Any], rows: int) -> bool:
    """Whether devices that pass keys round have halves of rows and of keys, for equal work."""
    return is_uneven(attrs) and rows % 2 == 0 and cast(int, attrs["keys"]) % 2 == 0


def divides(attrs: Mapping[str, Any], rows: int) -> int:
    """What the devices that pass keys round must divide."""
    keys = cast(int, attrs["keys"])
    return gcd(rows // 2, keys // 2) if halves_go_round(attrs, rows) else gcd(rows, keys)


def partners(spans: Spans, blocks: int, ways: int) -> tuple[int, ...]:
    """By device, the one whose second half of rows it works on."""
    firsts, seconds = _shares(spans, blocks, 2 * ways).reshape(ways, 2).T
    found = np.zeros(ways, int)
    found[np.argsort(firsts, kind="stable")] = np.argsort(-seconds, kind="stable")
    return tuple(found.tolist())


def _told(attrs: Mapping[str, Any]) -> tuple[Spans, int] | None:
    return (attrs["spans"], cast(int, attrs["blocks"])) if "spans" in attrs else None


@lru_cache(maxsize=1024)
def _busiest(spans: Spans, blocks: int, ways: int, even: bool) -> float:
    """The share of all pairs if every device had as many as the busiest."""
    if not even or ways == 1:
        return float(_shares(spans, blocks, ways).max()) * ways
    halves = _shares(spans, blocks, 2 * ways)
    return float((halves[::2] + halves[1::2][list(partners(spans, blocks, ways))]).max()) * ways


def _shares(spans: Spans, blocks: int, many: int) -> np.ndarray:
    """Of all pairs, what each of so many equal runs of rows keeps."""
    first, end = np.array(spans).T
    sums = np.concatenate(([0.0], np.cumsum((end - first) / blocks))) / len(first)
    at = np.interp(np.linspace(0, len(first), many + 1), np.arange(len(first) + 1), sums)
    return np.diff(at).round(12)
