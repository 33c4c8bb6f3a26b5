"""Fit the figures of a profile to measured points, and say how well they describe the rest.

    product      seconds = launch + FLOP / (peak * share)      share: of the shape (products.py)
    copy         seconds = launch + bytes / bandwidth
    collective   seconds = fixed + bytes * slope          per kind and group layout

Every third point by size is left out of the fit and predicted afterwards. Errors are
relative, so that small sizes count as much as large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from ...ir.profile import CollectivePoint, CopyPoint, Fit, MeasuredLine, ProductPoint


def fit_line(
    sizes: Sequence[float], seconds: Sequence[float], fixed: float | None = None
) -> tuple[float, float]:
    """(fixed, slope) of least relative error, neither below 0; robust: fitted again without outliers.

    One size alone gives a slope and nothing fixed. What is fixed may be known.
    """
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    if fixed is None and len(set(sizes)) < 2:
        return 0.0, float(np.median(y / x))
    start, slope = _weighted(x, y, fixed)
    errors = np.abs((start + slope * x) / y - 1)
    good = errors <= 3 * max(float(np.median(errors)), 1e-3)
    if good.sum() >= 2 and len(set(x[good])) > 1:
        start, slope = _weighted(x[good], y[good], fixed)
    return start, slope


def _weighted(x: np.ndarray, y: np.ndarray, known: float | None) -> tuple[float, float]:
    if known is not None:
        return known, max(0.0, float(np.sum(x / y * (1 - known / y)) / np.sum((x / y) ** 2)))
    columns = np.stack([1 / y, x / y], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(columns, np.ones(len(y)), rcond=None)
    if fixed < 0:
        return 0.0, float(np.sum(x / y) / np.sum((x / y) ** 2))
    if slope < 0:
        return float(np.sum(1 / y) / np.sum(1 / y**2)), 0.0
    return float(fixed), float(slope)


def held_out(count: int) -> np.ndarray:
    """Which of so many points, in order of size, are left out of a fit: every third, never the ends."""
    index = np.arange(count)
    return (index % 3 == 1) & (index > 0) & (index < count - 1)


def judge(
    family: str, sizes: Sequence[float], seconds: Sequence[float], fixed: float | None = None
) -> tuple[tuple[float, float], Fit]:
    """A line fitted to two thirds of the points, and its errors on the others."""
    order = np.argsort(sizes, kind="stable")
    x, y = np.asarray(sizes, float)[order], np.asarray(seconds, float)[order]
    out = held_out(len(x))
    line = fit_line(x[~out].tolist(), y[~out].tolist(), fixed)
    errors = np.abs((line[0] + line[1] * x[out]) / y[out] - 1) if out.any() else np.zeros(1)
    median, worst = float(np.median(errors)), float(errors.max())
    return line, Fit(
        family=family, points=len(x), held_out=int(out.sum()), median=median, worst=worst
    )


def fit_products(
    points: Sequence[ProductPoint], share: Callable[[ProductPoint], float], launch: float
) -> tuple[dict[str, float], list[Fit]]:
    """Peak FLOP/s by dtype, and fits; `share` of the peak is that of a point's shape.

    The launch is the one measured by itself, as prices have it, and the peak is fitted to all points,
    also to those that judge the fit. With a free launch and two thirds of the points the peaks of two
    calibrations of an H100 were 870 and 947 TFLOP/s, so they are 883 and 884.
    """
    peaks, fits = dict[str, float](), list[Fit]()
    for dtype in sorted({p.dtype for p in points}):
        mine = [p for p in points if p.dtype == dtype]
        work = [2.0 * p.m * p.n * p.k / share(p) for p in mine]
        seconds = [p.seconds for p in mine]
        peaks[dtype] = 1 / max(fit_line(work, seconds, launch)[1], 1e-30)
        fits.append(judge(f"products {dtype}", work, seconds, launch)[1])
    return peaks, fits


def fit_copies(points: Sequence[CopyPoint]) -> tuple[float, Fit]:
    """Bytes/s of streaming kernels."""
    (_, slope), fit = judge("memory", [p.nbytes for p in points], [p.seconds for p in points])
    return 1 / max(slope, 1e-30), fit


def fit_collectives(points: Sequence[CollectivePoint]) -> tuple[list[MeasuredLine], list[Fit]]:
    """A line per kind and layout; fits of all layouts of a kind together."""

    def layout(p: CollectivePoint) -> tuple[str, int, int]:
        return p.kind, p.size, p.stride

    lines, by_kind = list[MeasuredLine](), dict[str, list[Fit]]()
    for (kind, size, stride), group in groupby(sorted(points, key=layout), key=layout):
        mine = list(group)
        (fixed, slope), fit = judge(kind, [p.nbytes for p in mine], [p.seconds for p in mine])
        lines.append(MeasuredLine(kind=kind, size=size, stride=stride, fixed=fixed, slope=slope))
        by_kind.setdefault(kind, []).append(fit)
    fits = [
        Fit(
            family=kind, points=sum(f.points for f in found), held_out=sum(f.held_out for f in found),
            median=float(np.median([f.median for f in found])), worst=max(f.worst for f in found),
        )
        for kind, found in by_kind.items()
    ]  # fmt: skip
    return lines, fits
