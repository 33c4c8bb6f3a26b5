"""Calibrate: measure this machine, fit, judge, write a profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .ir.profile import Profile
from .ir.version import VERSION


def calibrate(
    devices: list[Any] | None = None, tell: Callable[[str], None] = lambda line: None
) -> Profile:
    """Measure the JAX devices of this process; some tens of seconds, with nothing else running."""
    import jax
    import numpy as np

    from .backends.xla import microbench
    from .backends.xla.measure import elementwise_rate, launch_seconds
    from .ir.cluster.cluster import Cluster
    from .planner.cost.calibrate import fit_collectives, fit_copies, fit_products
    from .planner.cost.products import shape_share

    found = devices or jax.devices()
    mesh = jax.sharding.Mesh(np.array(found), ("d",))
    device = Cluster.local().device
    products = microbench.products(mesh, tell, "tf32" if "tf32" in device.peak_flops else "f32")
    copies = microbench.copies(mesh, tell)
    sent = microbench.collectives(found, tell) if len(found) > 1 else []
    launch = launch_seconds(mesh)
    peaks, fits = fit_products(
        products, lambda p: float(shape_share(p.m, p.n, p.k, 1, device.units)), launch
    )
    bandwidth, copied = fit_copies(copies)
    lines, moved = fit_collectives(sent)
    return Profile(
        device=device.name, described=str(found[0].device_kind), count=len(found),
        made_with=f"meshwright {VERSION}, jax {jax.__version__}", peak_flops=peaks, memory_bandwidth=bandwidth,
        elementwise_flops=elementwise_rate(mesh), launch=launch, lines=tuple(lines),
        fits=(*fits, copied, *moved), products=tuple(products), copies=tuple(copies), collectives=tuple(sent),
    )  # fmt: skip


def profile_text(profile: Profile) -> str:
    """The fitted figures and how well they fit, for people."""
    from .ir.units import format_bandwidth, format_flops, format_seconds

    peaks = ", ".join(f"{dtype} {format_flops(rate)}" for dtype, rate in profile.peak_flops.items())
    rows = [
        f"{profile.count} × {profile.described} ({profile.device})",
        f"  peak {peaks}; memory {format_bandwidth(profile.memory_bandwidth)};"
        f" launch {format_seconds(profile.launch)}",
        "",
        f"  {'family':18} {'points':>6} {'held out':>8} {'median error':>12} {'worst':>8}",
    ]
    rows += [
        f"  {f.family:18} {f.points:6d} {f.held_out:8d} {f.median:12.1%} {f.worst:8.1%}"
        for f in profile.fits
    ]
    return "\n".join(rows)
