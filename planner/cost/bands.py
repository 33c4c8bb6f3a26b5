"""How far predictions have been off, by device and fabric, and which figure they hang on.

A band is what the published runs of `benchmarks/fidelity.py` showed on devices of one kind joined by one fabric:
predicted over measured, minus one, where the middle nine in ten of the runs lie, with the frameworks that ran them.
Elsewhere there is none: what was seen on one fabric says little of another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...ir.cluster.cluster import Cluster
from ...ir.mesh import Mesh
from ...ir.plan import Collective
from .groups import levels_of


@dataclass(frozen=True, slots=True)
class Band:
    """Errors of predicted seconds: -0.1 is 10 % too fast."""

    low: float
    high: float
    runs: int
    regime: str

    def __str__(self) -> str:
        return f"{self.low:+.0%} to {self.high:+.0%} on nine in ten of {self.runs} published runs ({self.regime})"

    def around(self, predicted: float) -> tuple[float, float]:
        """Where the measured seconds lie if the error is one that was seen."""
        return predicted / (1 + self.high), predicted / (1 + self.low)


FEWEST = 3  # runs that make a band
# From benchmarks/results/fidelity.json, by device and the tier that joins all of them; tests hold the two together.
BANDS = {
    ("a100", "hdr200"): Band(-0.12, 0.01, 24, "Megatron-LM"),
    ("a100", "nvlink3"): Band(-0.34, 0.01, 73, "Megatron-LM, llm-foundry"),
    ("a100", "roce200"): Band(-0.12, -0.05, 15, "Megatron-LM, llm-foundry"),
    ("a100-40", "nvlink3"): Band(-0.31, -0.07, 46, "llm-foundry"),
    ("a100-40", "roce200"): Band(-0.23, -0.07, 32, "llm-foundry"),
    ("b200", "nvlink5"): Band(-0.16, -0.01, 43, "Megatron-Core"),
    ("h100", "ib400"): Band(-0.19, 0.15, 65, "Megatron-Core, llm-foundry, torchtitan"),
    ("h100", "nvlink4"): Band(-0.29, 0.04, 51, "llm-foundry, torchtitan"),
    ("v4", "dcn"): Band(-0.04, -0.02, 4, "MaxText"),
    ("v5e", "dcn"): Band(-0.17, 0.04, 20, "MaxText"),
    ("v5e", "ici"): Band(-0.06, 0.07, 4, "MaxText"),
    ("v5p", "dcn"): Band(-0.18, -0.01, 8, "MaxText"),
    ("v5p", "ici"): Band(-0.11, 0.05, 17, "MaxText"),
    ("v6e", "ici"): Band(-0.16, 0.05, 3, "MaxText"),
}
NONE = "not seen"

RATES = ("peak_flops", "efficiency", "memory_bandwidth", "memory_efficiency", "launch")


def band_of(cluster: Cluster) -> Band | None:
    """The band of the cluster's device on its fabric; None where no run was compared, or their rates are not ours."""
    device, fabric = cluster.device.name, joined_by(cluster)
    ours = (*(f"devices.{device}.{rate}" for rate in RATES), f"fabric.{fabric}.")
    if any(
        path.startswith(ours) and origin != "preset" for path, origin in cluster.provenance.items()
    ):
        return None
    return BANDS.get((device, fabric))


def joined_by(cluster: Cluster) -> str:
    """The tier of the fabric that joins all devices; none of one device."""
    return cluster.tier_for(cluster.size).name if cluster.size > 1 else ""


def told(cluster: Cluster) -> str:
    """The band in words, or that there is none, and where there are."""
    band, device, fabric = band_of(cluster), cluster.device.name, joined_by(cluster)
    if band:
        return str(band)
    where = f"{device} joined by {fabric}" if fabric else f"one {device}"
    if (device, fabric) in BANDS:
        return f"{NONE}: published runs on {where} had other rates"
    known = {tier: one for (name, tier), one in BANDS.items() if name == device}
    others = ", ".join(f"{tier} {one.low:+.0%} to {one.high:+.0%}" for tier, one in known.items())
    return f"{NONE}: no published runs on {where} to compare with" + (
        f" (on {others})" if others else ""
    )


def weakest(cluster: Cluster, mesh: Mesh, compute: float, collectives: Iterable[Collective]) -> str:
    """The figure not measured that most predicted seconds hang on, with its origin."""
    seconds = {f"devices.{cluster.device.name}.efficiency": compute}
    for entry in collectives:
        levels = levels_of(entry.axes, mesh, cluster)
        if levels:
            slowest = min(levels, key=lambda level: level.bandwidth)
            field = f"fabric.{slowest.tier.name}.bandwidth"
            seconds[field] = seconds.get(field, 0.0) + entry.seconds
    open_ = {f: s for f, s in seconds.items() if cluster.provenance.get(f, "preset") != "measured"}
    if not open_:
        return "every figure that matters was measured"
    field = max(open_, key=lambda f: open_[f])
    share = open_[field] / max(sum(seconds.values()), 1e-30)
    return f"{share:.0%} of it hangs on {field} ({cluster.provenance.get(field, 'preset')})"
