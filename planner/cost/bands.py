"""How far predictions have been off, by device and regime, and which figure they hang on.

A band is what the published runs of `benchmarks/fidelity.py` showed: predicted over measured,
minus one, where the middle nine in ten of the runs lie. Outside these regimes there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...ir.cluster import Cluster
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


# From benchmarks/results/fidelity.json; tests hold the two together.
BANDS = {
    "a100": Band(-0.32, 0.01, 112, "Megatron-LM on 8 to 3072 devices, llm-foundry"),
    "a100-40": Band(-0.30, -0.06, 78, "llm-foundry"),
    "h100": Band(-0.29, 0.09, 116, "Megatron-Core on 48 to 6144 devices, torchtitan, llm-foundry"),
    "b200": Band(-0.15, 0.01, 43, "Megatron-Core on one host"),
    "v4": Band(-0.07, -0.02, 6, "MaxText"),
    "v5e": Band(-0.16, 0.05, 24, "MaxText on one and several slices"),
    "v5p": Band(-0.17, 0.04, 25, "MaxText on one and several slices"),
    "v6e": Band(-0.32, 0.04, 4, "MaxText"),
}
NONE = "not validated on this device against published runs"


RATES = ("peak_flops", "efficiency", "memory_bandwidth", "memory_efficiency", "launch")


def band_of(cluster: Cluster) -> Band | None:
    """The band of the cluster's device; None where no run was compared, or its rates are not ours."""
    name = cluster.device.name
    rates = tuple(f"devices.{name}.{rate}" for rate in RATES)
    if any(
        field.startswith(rates) and origin != "preset"
        for field, origin in cluster.provenance.items()
    ):
        return None
    return BANDS.get(name)


def told(cluster: Cluster) -> str:
    """The band in words."""
    band = band_of(cluster)
    return str(band) if band else NONE


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
